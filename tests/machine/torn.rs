//! Files that a machine's memory is mapped from, and that somebody cuts short under it.

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use api::spec::{CreateSnapshot, LoadSnapshot, Transport};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    kills::names,
    snapshot::{directory, done, handed_over, pair, pause},
    vm::{Setup, Vm},
};

type Form = fn(&Vm, &str) -> (CreateSnapshot, LoadSnapshot);

/// A machine that was taken up from a memory file and answers.
fn taken_up(form: Form) -> Vm {
    let script = r#"
        echo begun
        while read -r word; do head -c 8000000 /dev/zero > /tmp/zeroes; cat /bin/busybox > /tmp/program; echo "$word done"; done
    "#;
    let vm = Setup::new(Kernel::quick(), Transport::Mmio).size(2, 128).script(script).start_with_api();
    vm.wait_for("begun\n");
    let (create, load) = form(&vm, "it");
    let mut vm = handed_over(vm, &create, &load);
    vm.say("first");
    vm.wait_for("first done\n");
    vm
}

fn cut(file: &Path, length: u64) {
    File::options().write(true).open(file).unwrap().set_len(length).unwrap();
}

/// Cuts the file, in which the guest's every step is, and waits for the end.
fn ends_in_a_second(vm: Vm, file: &str, length: u64) {
    let path = vm.folder().join(file);
    let full = path.metadata().unwrap().len();
    cut(&path, length);
    let before = Instant::now();
    let ended = vm.wait();
    let took = before.elapsed();
    assert_eq!(ended.code, 1);
    ended.says("The machine cannot go on: ");
    ended.says(&format!(
        "{file}, which its memory is mapped from, was cut short: it has {length} of {full} bytes"
    ));
    // A second, and what the lab is slower than a host.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_machine_ends_in_a_second_when_its_memory_file_is_cut_short() {
    ends_in_a_second(taken_up(pair), "it.memory", 4096);
}

#[test]
fn a_machine_ends_in_a_second_when_half_of_its_memory_is_cut_off_from_a_directory() {
    let mut vm = taken_up(directory);
    // A device's thread touches what is gone, or a processor does.
    vm.say("again");
    ends_in_a_second(vm, "it/memory", 64 << 20);
}

#[test]
fn of_a_machine_whose_memory_is_not_whole_no_snapshot_is_left() {
    let vm = taken_up(pair);
    let mut client = vm.client();
    pause(&mut client);
    cut(&vm.folder().join("it.memory"), 4096);
    for (name, form) in [("one", directory as Form), ("two", pair)] {
        let create = form(&vm, name).0;
        let said = client.put::<Value>("/snapshot/create", Some(&create)).unwrap_err().to_string();
        assert!(said.contains("Not all of the machine is there any more"), "{said}");
        assert!(said.contains("it.memory") && said.contains("was cut short"), "{said}");
        assert!(!create.snapshot_path.exists());
    }
    assert_eq!(names(vm.folder()), [""; 0]);
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    let ended = vm.wait();
    assert_eq!(ended.code, 1);
    ended.says("it.memory, which its memory is mapped from, was cut short");
}

#[test]
fn a_file_that_was_cut_short_before_is_refused_by_name() {
    let vm = Setup::new(Kernel::quick(), Transport::Mmio).size(1, 96).script("echo begun; read -r word");
    let vm = vm.start_with_api();
    vm.wait_for("begun\n");
    let mut client = vm.client();
    pause(&mut client);
    for (form, file) in [(pair as Form, "it.memory"), (directory, "it/memory")] {
        let (create, load) = form(&vm, "it");
        done(client.put("/snapshot/create", Some(&create)));
        cut(&vm.folder().join(file), 32 << 20);
        let (_other, mut client) = vm.beside("other");
        let said = client.put::<Value>("/snapshot/load", Some(&load)).unwrap_err().to_string();
        assert!(said.contains("memory: it has 33554432 bytes; 100663296 belong"), "{said}");
        let state: Value = client.get("/").unwrap();
        assert_eq!(state["state"], "Not started");
    }
}
