//! Snapshots of machines that go on while they are written.
//!
//! The guest writes all over a piece of its memory, without a rest, and knows at each moment what
//! each byte of it must be; a page of another moment than the rest of the machine is found out at
//! the next round. Meanwhile it reads its disk, which other threads of the monitor write into its
//! memory.

use api::spec::{
    CreateSnapshot, Drive, JobState, LoadSnapshot, MemoryHotplug, SnapshotJob, SnapshotType, Transport,
};
use serde_json::json;

use crate::{
    api_devices::until,
    kernel::Kernel,
    snapshot::{directory, done, pair},
    vm::{Setup, Vm, random_file, sha256},
};

/// Two processes that write, one that reads the disk; then a word whenever one is said.
const RESTLESS: &str = r#"
    export booted=$(dmesg | wc -l)
    for name in one two; do
        (TASK="rounds 4 /tmp/$name" side --nocapture --ignored --exact side::in_the_guest || echo torn memory) &
    done
    sha256sum < /dev/vda > /tmp/before
    (while [ ! -e /tmp/stop ]; do
        echo 3 > /proc/sys/vm/drop_caches
        sha256sum < /dev/vda | cmp - /tmp/before || echo torn disk
        echo read >> /tmp/reads
    done) &
    for name in one two reads; do while [ ! -s /tmp/$name ]; do sleep 0.1; done; done
    echo begun
    while read -r word; do
        [ "$word" = end ] && break
        for name in one two reads; do
            before=$(wc -c < /tmp/$name)
            while [ $(wc -c < /tmp/$name) -lt $((before + 4)) ]; do sleep 0.05; done
        done
        echo "$word goes on"
    done
    touch /tmp/stop
    wait
    fact sum $(cut -d' ' -f1 /tmp/before)
    part complaints sh -c 'dmesg | tail -n +$((booted + 1)) | grep -A 12 -E "WARNING|BUG|lockup" || true'
"#;

fn restless(transport: Transport, memory: u64) -> (Setup, String) {
    restless_after("", transport, memory)
}

fn restless_after(first: &str, transport: Transport, memory: u64) -> (Setup, String) {
    let script = format!("{first}\n{RESTLESS}");
    let mut setup = Setup::new(Kernel::quick(), transport).size(2, memory).script(script).with_side();
    let path = setup.folder().join("disk");
    let sum = sha256(&random_file(&path, 4, 3));
    // Several machines read it at once.
    let disk = Drive {
        drive_id: "disk".to_owned(),
        path_on_host: path,
        is_read_only: true,
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    };
    setup.spec.drives.push(disk);
    (setup, sum)
}

/// Takes a live snapshot; the guest has been heard of before it was whole, and after.
fn taken(vm: &mut Vm, mut create: CreateSnapshot) -> SnapshotJob {
    let mut client = vm.client();
    create.live = true;
    done(client.put("/snapshot/create", Some(&create)));
    let jobs: Vec<SnapshotJob> = client.get("/snapshot/jobs").unwrap();
    let job = jobs.last().unwrap().clone();
    assert_eq!((job.state, &job.error), (JobState::Done, &None));
    assert!(job.pause_us > 0, "{job:?}");
    println!("stood still for {} us, {} bytes looked at", job.pause_us, job.total_bytes);
    goes_on(vm, &format!("after{}", job.id));
    job
}

fn goes_on(vm: &mut Vm, word: &str) {
    vm.say(word);
    vm.wait_for(&format!("{word} goes on"));
    assert!(!vm.console().contains("torn"), "{}", vm.console());
}

/// A machine of the snapshot, that lives beside the one it was taken of.
fn clone(vm: &Vm, name: &str, load: &LoadSnapshot) -> Vm {
    let (mut clone, mut client) = vm.beside(name);
    done(client.put("/snapshot/load", Some(load)));
    goes_on(&mut clone, &format!("clone-{name}"));
    clone
}

fn ended(mut vm: Vm, sum: &str) {
    vm.say("end");
    let ended = vm.succeed();
    assert!(!ended.console.contains("torn"), "{}", ended.console);
    assert_eq!(ended.part("complaints"), "");
    // A clone's console does not begin at the beginning.
    ended.is("sum", sum);
}

#[test]
fn a_machine_goes_on_while_it_is_saved_and_its_clones_are_of_one_moment() {
    let (setup, sum) = restless(Transport::Pci, 256);
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (mut create, load) = directory(&vm, "first");
    create.hash = true;
    taken(&mut vm, create);
    let mut first = clone(&vm, "first", &load);
    // The clone has the memory file below its own pages.
    let (create, load) = pair(&first, "second");
    taken(&mut first, create);
    let second = clone(&first, "second", &load);
    ended(second, &sum);
    ended(first, &sum);
    goes_on(&mut vm, "still");
    ended(vm, &sum);
}

#[test]
fn memory_that_comes_when_it_is_touched_is_brought_before_it_is_held() {
    let (setup, sum) = restless(Transport::Mmio, 256);
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (mut create, load) = directory(&vm, "stored");
    create.store = Some(vm.folder().join("store"));
    taken(&mut vm, create);
    let mut paged = clone(&vm, "paged", &load);
    let (create, load) = directory(&paged, "again");
    let job = taken(&mut paged, create);
    assert_eq!(job.total_bytes, 256 << 20);
    ended(clone(&paged, "again", &load), &sum);
    ended(paged, &sum);
    ended(vm, &sum);
}

#[test]
fn live_diffs_with_three_pieces_of_memory_are_of_one_moment() {
    // Beyond 3 GiB there is a hole for devices, and memory behind it.
    let (mut setup, sum) = restless(Transport::Mmio, 3328);
    setup.spec.machine_config.track_dirty_pages = true;
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let mut last = None;
    for generation in 0..3 {
        let (mut create, load) = directory(&vm, &format!("generation{generation}"));
        create.snapshot_type = if generation == 0 { SnapshotType::Full } else { SnapshotType::Diff };
        let job = taken(&mut vm, create);
        assert!(generation == 0 || job.total_bytes < 1 << 30, "{job:?}");
        last = Some(load);
    }
    let chain = clone(&vm, "chain", &last.unwrap());
    ended(chain, &sum);
    ended(vm, &sum);
}

#[test]
fn live_snapshots_have_memory_that_was_plugged_in() {
    let (mut setup, sum) = restless_after("echo ready; read -r word", Transport::Pci, 192);
    setup.spec.machine_config.track_dirty_pages = true;
    setup.spec.memory_hotplug =
        Some(MemoryHotplug { total_size_mib: 512, block_size_mib: 2, slot_size_mib: 128 });
    // What processes write is there first.
    let setup = setup.parameters("reboot=k memhp_default_state=online_movable");
    let mut vm = setup.start_with_api();
    vm.wait_for("ready\n");
    let mut client = vm.client();
    done(client.patch("/hotplug/memory", Some(&json!({ "requested_size_mib": 256 }))));
    until(&mut client, "/hotplug/memory", |m| m["plugged_size_mib"] == 256);
    vm.say("go");
    vm.wait_for("begun\n");
    let (create, load) = directory(&vm, "full");
    taken(&mut vm, create);
    ended(clone(&vm, "full", &load), &sum);
    let (mut create, load) = directory(&vm, "diff");
    create.snapshot_type = SnapshotType::Diff;
    taken(&mut vm, create);
    ended(clone(&vm, "diff", &load), &sum);
    ended(vm, &sum);
}

#[test]
fn a_live_snapshot_that_fails_or_is_cancelled_leaves_the_machine_running() {
    let (mut setup, sum) = restless(Transport::Mmio, 256);
    setup.spec.machine_config.track_dirty_pages = true;
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (create, _) = directory(&vm, "full");
    taken(&mut vm, create);
    let mut client = vm.client();
    let (mut create, _) = directory(&vm, "missing");
    (create.live, create.snapshot_path) = (true, vm.folder().join("no").join("where"));
    let refused = client.put::<serde_json::Value>("/snapshot/create", Some(&create));
    assert!(refused.is_err());
    goes_on(&mut vm, "failed");
    let (mut create, _) = directory(&vm, "cancelled");
    (create.live, create.background) = (true, true);
    let job: SnapshotJob = client.put("/snapshot/create", Some(&create)).unwrap();
    let _: serde_json::Value = client.delete(&format!("/snapshot/jobs/{}", job.id)).unwrap();
    goes_on(&mut vm, "cancelled");
    // What both had taken from the record of what was written is in the next diff.
    let (mut create, load) = directory(&vm, "diff");
    create.snapshot_type = SnapshotType::Diff;
    taken(&mut vm, create);
    ended(clone(&vm, "diff", &load), &sum);
    ended(vm, &sum);
}
