//! Snapshots for which there is no room, or no right to write: said by name, nothing left, and a
//! machine that goes on as if nobody had asked.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use api::{
    client::Client,
    spec::{Compression, CreateSnapshot, LoadSnapshot, Transport},
};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    snapshot::{done, pause},
    vm::{Setup, Vm},
};

/// A small file system, gone when dropped.
struct Small(PathBuf);

impl Small {
    fn new(at: PathBuf, kib: u32) -> Small {
        fs::create_dir(&at).unwrap();
        let small = Small(at);
        mount(&["-t", "tmpfs", "-o", &format!("size={kib}k"), "small"], &small.0);
        small
    }

    fn change(&self, option: &str) {
        mount(&["-o", &format!("remount,{option}")], &self.0);
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(flags: &[&str], at: &Path) {
    assert!(Command::new("mount").args(flags).arg(at).status().unwrap().success(), "mount {flags:?}");
}

/// A machine that answers words, with some 20 MB of memory that is not zero.
fn answering() -> Vm {
    let script = r#"
        head -c 8000000 /dev/urandom > /tmp/noise
        echo begun
        while read -r word; do [ "$word" = end ] && break; echo "$word heard"; done
        fact sum ok
    "#;
    let vm = Setup::new(Kernel::quick(), Transport::Mmio).size(1, 96).script(script).start_with_api();
    vm.wait_for("begun\n");
    vm
}

fn answers(vm: &mut Vm, word: &str) {
    vm.say(word);
    vm.wait_for(&format!("{word} heard\n"));
}

fn is_in(client: &mut Client, state: &str) {
    let found: Value = client.get("/").unwrap();
    assert_eq!(found["state"], state);
}

fn resume(client: &mut Client) {
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
}

/// Each form of a snapshot, in `folder`.
fn forms(folder: &Path) -> Vec<(&'static str, CreateSnapshot)> {
    let to = |name: &str| CreateSnapshot { snapshot_path: folder.join(name), ..CreateSnapshot::default() };
    vec![
        ("directory", CreateSnapshot { hash: true, ..to("directory") }),
        ("pair", CreateSnapshot { mem_file_path: Some(folder.join("memory")), ..to("state") }),
        (
            "store",
            CreateSnapshot {
                store: Some(folder.join("store")),
                compression: Compression::Lz4,
                ..to("stored")
            },
        ),
        ("live", CreateSnapshot { live: true, ..to("live") }),
    ]
}

/// What went wrong; it did.
fn refused(client: &mut Client, create: &CreateSnapshot) -> String {
    client.put::<Value>("/snapshot/create", Some(create)).expect_err("there is no room for it").to_string()
}

#[test]
fn a_disk_that_is_full_is_named_and_the_machine_goes_on_and_is_saved_elsewhere() {
    let mut vm = answering();
    let small = Small::new(vm.folder().join("small"), 64);
    let mut client = vm.client();
    for (form, create) in forms(&small.0) {
        for (round, kib) in [64, 256, 1024, 4096].into_iter().enumerate() {
            small.change(&format!("size={kib}k"));
            if !create.live {
                pause(&mut client);
            }
            let said = refused(&mut client, &create);
            assert!(said.contains("No space left") && said.contains("small"), "{form} in {kib} KiB: {said}");
            if !create.live {
                is_in(&mut client, "Paused");
                resume(&mut client);
            }
            is_in(&mut client, "Running");
            answers(&mut vm, &format!("{form}{round}"));
            // Chunks that are in a store already wait there for the next one, or its collection.
            let mut left = small.names();
            left.retain(|name| name != "store");
            assert_eq!(left, [""; 0], "{form} in {kib} KiB");
        }
        let _ = fs::remove_dir_all(small.0.join("store"));
    }
    drop(small);
    let create = forms(vm.folder()).swap_remove(0).1;
    pause(&mut client);
    done(client.put("/snapshot/create", Some(&create)));
    let mut vm = vm.successor();
    let load =
        LoadSnapshot { snapshot_path: create.snapshot_path, resume_vm: true, ..LoadSnapshot::default() };
    done(vm.client().put("/snapshot/load", Some(&load)));
    answers(&mut vm, "elsewhere");
    vm.say("end");
    vm.succeed().is("sum", "ok");
}

fn limit_files(vm: &Vm, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    let process = libc::pid_t::try_from(vm.process_id()).unwrap();
    // SAFETY: the limit is read from a variable of this function; the process is this test's.
    let set = unsafe { libc::prlimit(process, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_limit_of_file_sizes_and_a_disk_without_writes_are_named_and_the_machine_goes_on() {
    let mut vm = answering();
    let mut client = vm.client();
    let folder = vm.folder().join("limited");
    fs::create_dir(&folder).unwrap();
    for (form, create) in forms(&folder).into_iter().filter(|(form, _)| *form != "store") {
        limit_files(&vm, 2 << 20);
        if !create.live {
            pause(&mut client);
        }
        let said = refused(&mut client, &create);
        limit_files(&vm, libc::RLIM_INFINITY);
        assert!(said.contains("File too large") && said.contains("limited"), "{form}: {said}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "{form}");
        if !create.live {
            resume(&mut client);
        }
        answers(&mut vm, form);
    }
    let small = Small::new(vm.folder().join("small"), 64);
    small.change("ro");
    for (form, create) in forms(&small.0) {
        if !create.live {
            pause(&mut client);
        }
        let said = refused(&mut client, &create);
        assert!(said.contains("Read-only file system") && said.contains("small"), "{form}: {said}");
        if !create.live {
            resume(&mut client);
        }
        answers(&mut vm, &format!("{form}again"));
    }
    drop(small);
    vm.say("end");
    vm.succeed().is("sum", "ok");
}
