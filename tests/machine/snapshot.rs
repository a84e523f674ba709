//! Machines that are saved and come back: what their guests notice, and what is lost.
//!
//! A guest here counts, checks a disk and talks on its console while it is saved again and again,
//! each time by one monitor and taken up by another.

use api::{
    client::Client,
    spec::{
        CreateSnapshot, Drive, Entropy, LoadSnapshot, MemBackend, MemBackendType, SnapshotType, Transport,
        Vsock,
    },
};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    vm::{Setup, Vm, random_file, sha256},
};

#[track_caller]
pub fn done(outcome: Result<Value, api::client::ClientError>) {
    assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Value::Null);
}

pub fn pause(client: &mut Client) {
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
}

/// Saves a machine, kills its monitor, and has another one take it up.
pub fn handed_over(vm: Vm, create: &CreateSnapshot, load: &LoadSnapshot) -> Vm {
    let mut client = vm.client();
    pause(&mut client);
    done(client.put("/snapshot/create", Some(create)));
    let vm = vm.successor();
    let mut client = vm.client();
    done(client.put("/snapshot/load", Some(load)));
    vm
}

pub fn directory(vm: &Vm, name: &str) -> (CreateSnapshot, LoadSnapshot) {
    let snapshot_path = vm.folder().join(name);
    let load =
        LoadSnapshot { snapshot_path: snapshot_path.clone(), resume_vm: true, ..LoadSnapshot::default() };
    (CreateSnapshot { snapshot_path, ..CreateSnapshot::default() }, load)
}

pub fn pair(vm: &Vm, name: &str) -> (CreateSnapshot, LoadSnapshot) {
    let (mut create, mut load) = directory(vm, &format!("{name}.state"));
    let backend_path = vm.folder().join(format!("{name}.memory"));
    create.mem_file_path = Some(backend_path.clone());
    load.mem_backend = Some(MemBackend { backend_type: MemBackendType::File, backend_path });
    (create, load)
}

/// Counts in the background, and after each word on its console tells how far it is; then checks
/// its disk.
const COUNTING: &str = r#"
    (n=0; while :; do n=$((n + 1)); echo $n > /tmp/count.new; mv /tmp/count.new /tmp/count; done) &
    sha256sum < /dev/vda > /tmp/before
    echo begun
    while read -r word; do
        [ "$word" = end ] && break
        before=$(cat /tmp/count); sleep 0.2; after=$(cat /tmp/count)
        [ "$after" -gt "$before" ] || echo stopped
        echo "$word $(nproc) $(cut -d' ' -f1 /proc/uptime)"
    done
    echo 3 > /proc/sys/vm/drop_caches
    sha256sum < /dev/vda > /tmp/after
    cmp /tmp/before /tmp/after
    dd if=/dev/hwrng of=/dev/null bs=64 count=4 2>/dev/null
    fact sum $(cut -d' ' -f1 /tmp/after)
    part complaints sh -c 'dmesg | grep -A 12 -E "WARNING|BUG|lockup" || true'
"#;

pub fn counting(transport: Transport) -> (Setup, String) {
    let mut setup = Setup::new(Kernel::quick(), transport).size(2, 256).script(COUNTING);
    let path = setup.folder().join("disk");
    let sum = sha256(&random_file(&path, 8, 3));
    let disk = Drive {
        drive_id: "disk".to_owned(),
        path_on_host: path,
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    };
    setup.spec.drives.push(disk);
    setup.spec.entropy = Some(Entropy::default());
    setup.spec.vsock = Some(Vsock { guest_cid: 3, uds_path: setup.folder().join("vsock"), vsock_id: None });
    (setup, sum)
}

fn goes_on(transport: Transport, form: fn(&Vm, &str) -> (CreateSnapshot, LoadSnapshot)) {
    let (setup, sum) = counting(transport);
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    vm.say("first");
    vm.wait_for("first 2 ");
    for generation in 0..3 {
        let (create, load) = form(&vm, &format!("generation{generation}"));
        std::fs::remove_file(vm.folder().join("vsock")).unwrap();
        vm = handed_over(vm, &create, &load);
        vm.say(&format!("again{generation}"));
        vm.wait_for(&format!("again{generation} 2 "));
        assert!(!vm.console().contains("stopped"), "{}", vm.console());
    }
    vm.say("end");
    let ended = vm.succeed();
    ended.is("sum", &sum);
    assert_eq!(ended.part("complaints"), "");
}

#[test]
fn a_machine_with_mmio_devices_goes_on_from_a_directory() {
    goes_on(Transport::Mmio, directory);
}

#[test]
fn a_machine_with_pci_devices_goes_on_from_a_directory() {
    goes_on(Transport::Pci, directory);
}

#[test]
fn a_machine_goes_on_from_firecrackers_two_files() {
    goes_on(Transport::Mmio, pair);
}

#[test]
fn a_chain_of_diffs_comes_back_as_one_machine() {
    let (mut setup, sum) = counting(Transport::Pci);
    setup.spec.machine_config.track_dirty_pages = true;
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    for generation in 0..4 {
        let (mut create, mut load) = directory(&vm, &format!("generation{generation}"));
        create.snapshot_type = if generation == 0 { SnapshotType::Full } else { SnapshotType::Diff };
        load.track_dirty_pages = generation != 2;
        std::fs::remove_file(vm.folder().join("vsock")).unwrap();
        vm = handed_over(vm, &create, &load);
        vm.say(&format!("again{generation}"));
        vm.wait_for(&format!("again{generation} 2 "));
    }
    vm.say("end");
    let ended = vm.succeed();
    ended.is("sum", &sum);
}
