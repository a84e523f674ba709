//! Machines whose memory comes when it is touched: from a store, from diffs over diffs, from
//! another process; what becomes of them when that process dies, and what a recorded working set
//! spares.

use std::{
    fs::File,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::unix::{fs::FileExt, net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use api::spec::{
    Compression, CreateSnapshot, LoadSnapshot, MachineConfig, MemBackend, MemBackendType, Prefetch,
    SnapshotType, Transport,
};
use nacelle::pager::uffd::{Event, Userfault};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use crate::{
    process::Process,
    snapshot::{counting, directory, done, handed_over, pair, pause},
    vm::Vm,
};

const SOCKET: &str = "NACELLE_TEST_HANDLER_SOCKET";
const MEMORY: &str = "NACELLE_TEST_HANDLER_MEMORY";

/// Another word of the guest, from a machine that was taken up again.
fn goes_on(vm: &mut Vm, word: &str) {
    vm.say(word);
    vm.wait_for(&format!("{word} 2 "));
    assert!(!vm.console().contains("stopped"), "{}", vm.console());
}

fn finish(mut vm: Vm, sum: &str) {
    vm.say("end");
    let ended = vm.succeed();
    ended.is("sum", sum);
}

fn without_vsock_socket(vm: &Vm) {
    std::fs::remove_file(vm.folder().join("vsock")).unwrap();
}

#[test]
fn a_machine_goes_on_from_a_store_and_from_diffs_in_it() {
    let (setup, sum) = counting(Transport::Pci);
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    for generation in 0..3 {
        let (mut create, load) = directory(&vm, &format!("generation{generation}"));
        create.store = Some(vm.folder().join("store"));
        create.compression = Compression::Lz4;
        create.snapshot_type = if generation == 0 { SnapshotType::Full } else { SnapshotType::Diff };
        let load = LoadSnapshot { track_dirty_pages: true, ..load };
        without_vsock_socket(&vm);
        vm = handed_over(vm, &create, &load);
        goes_on(&mut vm, &format!("again{generation}"));
    }
    finish(vm, &sum);
}

#[test]
fn diffs_over_diffs_are_mapped_and_know_their_own_pages_without_tracking() {
    let (setup, sum) = counting(Transport::Mmio);
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let mut sizes = Vec::new();
    for generation in 0..6 {
        let (mut create, load) = directory(&vm, &format!("generation{generation}"));
        // The last one is full again: what the layers show is copied into it.
        let full = generation == 0 || generation == 5;
        create.snapshot_type = if full { SnapshotType::Full } else { SnapshotType::Diff };
        without_vsock_socket(&vm);
        vm = handed_over(vm, &create, &load);
        sizes.push(disk_usage(&create.snapshot_path.join("memory")));
        goes_on(&mut vm, &format!("again{generation}"));
    }
    assert!(sizes[1..5].iter().all(|size| size * 2 < sizes[0]), "{sizes:?}");
    assert!(sizes[5] * 2 > sizes[0], "{sizes:?}");
    finish(vm, &sum);
}

fn disk_usage(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512
}

/// A page-fault handler: this program again, with this test alone.
#[test]
fn the_page_fault_handler() {
    let (Some(socket), Some(memory)) = (std::env::var_os(SOCKET), std::env::var_os(MEMORY)) else { return };
    let memory = File::open(memory).unwrap();
    let listener = UnixListener::bind(PathBuf::from(socket)).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut text = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(&stream, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::empty());
    let regions: Vec<Value> = serde_json::from_slice(&text[..got.unwrap().bytes]).unwrap();
    let mut descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let uffd = Userfault::of(descriptors.next().unwrap().next().unwrap());
    let field = |region: &Value, name: &str| region[name].as_u64().unwrap();
    let mut page = vec![0; 4096];
    loop {
        let mut faults = Vec::new();
        uffd.drain(|event| faults.extend(matches!(event, Event::Fault(_)).then_some(event))).unwrap();
        for fault in &faults {
            let Event::Fault(address) = fault else { continue };
            let within =
                |r: &&Value| address.wrapping_sub(field(r, "base_host_virt_addr")) < field(r, "size");
            let region = regions.iter().find(within).unwrap();
            let offset = address - field(region, "base_host_virt_addr") + field(region, "offset");
            memory.read_exact_at(&mut page, offset).unwrap();
            // Another processor may have asked for the same page.
            let _ = uffd.copy(*address, &page);
        }
        if faults.is_empty() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// A handler, its socket, and the load that uses it.
fn handler(vm: &Vm, create: &CreateSnapshot, load: LoadSnapshot) -> (Process, LoadSnapshot) {
    let socket = vm.folder().join("handler");
    let _ = std::fs::remove_file(&socket);
    let module = module_path!().split_once("::").unwrap().1;
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("{module}::the_page_fault_handler")]);
    child.env(SOCKET, &socket).env(MEMORY, create.mem_file_path.as_ref().unwrap());
    let handler = Process::new(child.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    let until = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < until, "The handler does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    let mem_backend = Some(MemBackend { backend_type: MemBackendType::Uffd, backend_path: socket });
    (handler, LoadSnapshot { mem_backend, ..load })
}

/// A machine that another process brings the memory of.
fn served() -> (Vm, Process, String) {
    let (setup, sum) = counting(Transport::Pci);
    let vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (create, load) = pair(&vm, "it");
    let mut client = vm.client();
    pause(&mut client);
    done(client.put("/snapshot/create", Some(&create)));
    without_vsock_socket(&vm);
    let vm = vm.successor();
    let (handler, load) = handler(&vm, &create, load);
    done(vm.client().put("/snapshot/load", Some(&load)));
    (vm, handler, sum)
}

#[test]
fn a_machine_goes_on_from_a_page_fault_handler_and_can_be_saved() {
    let (mut vm, handler, sum) = served();
    goes_on(&mut vm, "served");
    // All of its memory is touched for this, and comes from the handler.
    let (create, load) = directory(&vm, "whole");
    without_vsock_socket(&vm);
    let mut vm = handed_over(vm, &create, &load);
    drop(handler);
    goes_on(&mut vm, "alone");
    finish(vm, &sum);
}

#[test]
fn a_machine_ends_in_a_second_when_its_page_fault_handler_is_killed() {
    let (mut vm, handler, _) = served();
    goes_on(&mut vm, "served");
    handler.signal(libc::SIGKILL);
    let before = Instant::now();
    let ended = vm.wait();
    let took = before.elapsed();
    ended.says("handler died");
    assert_eq!(ended.code, 1);
    // A second, and what the lab is slower than a host.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_machine_ends_when_its_page_fault_handler_is_stuck() {
    let (mut vm, handler, _) = served();
    goes_on(&mut vm, "served");
    handler.signal(libc::SIGSTOP);
    // The guest reads its disk and runs programs that it has not touched since.
    vm.say("end");
    let ended = vm.wait();
    ended.says("is stuck: for 20 s it brought no page");
    assert_eq!(ended.code, 1);
    drop(handler);
}

#[test]
fn a_handler_that_nobody_started_is_named_and_the_monitor_can_be_asked_again() {
    let (setup, sum) = counting(Transport::Mmio);
    let vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (create, load) = pair(&vm, "it");
    let mut client = vm.client();
    pause(&mut client);
    done(client.put("/snapshot/create", Some(&create)));
    without_vsock_socket(&vm);
    let mut vm = vm.successor();
    let backend_path = vm.folder().join("nobody");
    let mem_backend = Some(MemBackend { backend_type: MemBackendType::Uffd, backend_path });
    let wrong = LoadSnapshot { mem_backend, ..load.clone() };
    let refused: Result<Value, _> = vm.client().put("/snapshot/load", Some(&wrong));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("nobody cannot be connected to"), "{refused}");
    done(vm.client().put("/snapshot/load", Some(&load)));
    goes_on(&mut vm, "mapped");
    finish(vm, &sum);
}

/// Loads, and counts the faults from the moment the guest goes on until its first answer.
fn answered(vm: Vm, load: &LoadSnapshot, word: &str) -> (Vm, u64) {
    let mut vm = vm.successor();
    let _ = std::fs::remove_file(vm.folder().join("vsock"));
    let mut client = vm.client();
    done(client.put("/snapshot/load", Some(load)));
    let before = settled(&vm);
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    goes_on(&mut vm, word);
    let faults = vm.page_faults() - before;
    (vm, faults)
}

/// Faults up to now, once none are added: a working set comes beside the answer.
fn settled(vm: &Vm) -> u64 {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let before = vm.page_faults();
        std::thread::sleep(Duration::from_millis(200));
        if vm.page_faults() == before {
            return before;
        }
        assert!(Instant::now() < until, "The monitor goes on taking pages");
    }
}

/// Faults without a working set and with one.
fn recorded(configure: impl Fn(&Path, &mut CreateSnapshot)) -> (u64, u64) {
    let (mut setup, sum) = counting(Transport::Pci);
    setup.spec.machine_config = MachineConfig { mem_size_mib: 256, ..setup.spec.machine_config };
    let vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (mut create, load) = directory(&vm, "it");
    configure(vm.folder(), &mut create);
    let load = LoadSnapshot { resume_vm: false, ..load };
    let mut client = vm.client();
    pause(&mut client);
    done(client.put("/snapshot/create", Some(&create)));
    let set = create.snapshot_path.join("memory.working-set");
    let none = LoadSnapshot { prefetch: Prefetch::None, ..load.clone() };
    let (vm, without) = answered(vm, &none, "without");
    assert!(!set.exists());
    let (vm, _) = answered(vm, &load, "first");
    let until = Instant::now() + Duration::from_secs(30);
    while !set.exists() {
        assert!(Instant::now() < until, "Nothing was recorded");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (vm, with) = answered(vm, &load, "second");
    finish(vm, &sum);
    (without, with)
}

#[test]
fn a_recorded_working_set_spares_faults_of_a_mapped_file() {
    let (without, with) = recorded(|_, _| {});
    eprintln!("faults to the first answer: {without} without a working set, {with} with one");
    // Five to thirty times fewer; the guest goes on making processes all the while.
    assert!(without >= 3 * with, "{without} without, {with} with");
}

#[test]
fn a_recorded_working_set_spares_faults_of_a_store() {
    let (without, with) = recorded(|folder, create| {
        create.store = Some(folder.join("store"));
        create.compression = Compression::Lz4;
    });
    eprintln!("faults to the first answer: {without} without a working set, {with} with one");
    assert!(without >= 2 * with, "{without} without, {with} with");
}
