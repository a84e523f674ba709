//! Machines that are saved and come back: what their guests notice, and what is lost.
//!
//! A guest here counts, checks a disk and talks on its console while it is saved again and again,
//! each time by one monitor and taken up by another.

use std::{
    env, fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use api::{
    client::Client,
    spec::{
        CreateSnapshot, Drive, Entropy, LoadSnapshot, MemBackend, MemBackendType, MemoryHotplug, Pmem,
        SnapshotType, Transport, Vsock,
    },
};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    net::Tap,
    vm::{Setup, Vm, random_bytes, random_file, sha256},
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
    export booted=$(dmesg | wc -l)
    (n=0; while :; do n=$((n + 1)); echo $n > /tmp/count.new; mv /tmp/count.new /tmp/count; done) &
    sha256sum < /dev/vda > /tmp/before
    dmesg -c > /dev/null
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
    part complaints sh -c 'dmesg | tail -n +$((booted + 1)) | grep -A 12 -E "WARNING|BUG|lockup" || true'
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
        fs::remove_file(vm.folder().join("vsock")).unwrap();
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
        fs::remove_file(vm.folder().join("vsock")).unwrap();
        vm = handed_over(vm, &create, &load);
        vm.say(&format!("again{generation}"));
        vm.wait_for(&format!("again{generation} 2 "));
    }
    vm.say("end");
    let ended = vm.succeed();
    ended.is("sum", &sum);
}

/// The workload of a machine that is saved again and again: a timer, a disk that is written with
/// what is read back and summed, and a server.
const BUSY: &str = r#"
    ip link set lo up; ip link set eth0 up; ip addr add GUEST/24 dev eth0
    nc -ll -p 7 -e cat &
    (n=0; while :; do n=$((n + 1)); echo $n > /tmp/ticks.new; mv /tmp/ticks.new /tmp/ticks; sleep 0.02; done) &
    (
        n=0
        while [ $n -lt ROUNDS ]; do
            n=$((n + 1))
            yes "round $n" | head -c 65536 > /tmp/block
            dd if=/tmp/block of=/dev/vda bs=65536 seek=$((n % 64)) conv=notrunc,fsync 2>/dev/null
            echo 1 > /proc/sys/vm/drop_caches
            dd if=/dev/vda bs=65536 skip=$((n % 64)) count=1 2>/dev/null | cmp - /tmp/block || echo "round $n is lost"
            sleep 0.1
        done
        echo finished > /tmp/finished
    ) &
    last=0
    dmesg -c > /dev/null
    echo begun
    while read -r word; do
        [ "$word" = end ] && break
        now=$(cat /tmp/ticks); [ "$now" -gt "$last" ] || echo "the timer stands at $now"
        up=$(cut -d' ' -f1 /proc/uptime | tr -d .); [ "$up" -ge "${before:-0}" ] || echo "time ran back from $before to $up"
        before=$up; last=$now
        sleep 0.1
        echo "$word goes on"
    done
    until [ -e /tmp/finished ]; do sleep 0.1; done
    fact sum $(sha256sum < /dev/vda | cut -d' ' -f1)
    part complaints sh -c 'dmesg | grep -A 12 -E "WARNING|BUG|lockup" || true'
"#;

/// Has the guest's server send back what differs each time.
fn talks(guest: Ipv4Addr, round: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    // At the beginning it may not listen yet.
    let mut stream = loop {
        match TcpStream::connect((guest, 7)) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
            connected => break connected.unwrap(),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let sent = random_bytes(20_000, round);
    stream.write_all(&sent).unwrap();
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == sent, "round {round} brought back something else");
}

/// How often a machine is saved and taken up again; the release check asks for 100.
fn generations() -> u64 {
    env::var("NACELLE_TEST_GENERATIONS").map_or(12, |number| number.parse().unwrap())
}

fn nothing_is_lost(transport: Transport, net: u8) {
    let tap = Tap::new(if net == 91 { "nclsnap0" } else { "nclsnap1" }, net, 1500, 1);
    let rounds = 100;
    let script = BUSY.replace("GUEST", &tap.guest.to_string()).replace("ROUNDS", &rounds.to_string());
    let mut setup = Setup::new(Kernel::quick(), transport).size(2, 256).script(script);
    let path = setup.folder().join("disk");
    fs::write(&path, vec![0; 64 << 16]).unwrap();
    let disk = Drive {
        drive_id: "disk".to_owned(),
        path_on_host: path,
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    };
    setup.spec.drives.push(disk);
    let card = json!({ "iface_id": "eth0", "host_dev_name": tap.name, "guest_mac": "06:00:ac:1f:5b:02" });
    setup.spec.network_interfaces.push(serde_json::from_value(card).unwrap());
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    for generation in 0..generations() {
        let (mut create, load) = directory(&vm, "machine");
        create.replace = true;
        // What the machine runs from is not replaced: two take turns.
        let (mut create_b, load_b) = directory(&vm, "other");
        create_b.replace = true;
        vm = if generation % 2 == 0 {
            handed_over(vm, &create, &load)
        } else {
            handed_over(vm, &create_b, &load_b)
        };
        talks(tap.guest, generation);
        vm.say(&format!("generation{generation}"));
        vm.wait_for(&format!("generation{generation} goes on\n"));
    }
    vm.say("end");
    let ended = vm.succeed();
    assert!(!ended.console.contains("is lost") && !ended.console.contains("stands at"), "{}", ended.console);
    assert!(!ended.console.contains("ran back"), "{}", ended.console);
    // What an undisturbed run leaves on the disk.
    let mut expected = vec![0; 64 << 16];
    for round in 1..=rounds {
        let text = format!("round {round}\n");
        let block: Vec<u8> = text.bytes().cycle().take(65536).collect();
        let at = (round as usize % 64) << 16;
        expected[at..at + 65536].copy_from_slice(&block);
    }
    ended.is("sum", &sha256(&expected));
    assert_eq!(ended.part("complaints"), "");
}

#[test]
fn nothing_is_lost_over_generations_with_mmio_devices() {
    nothing_is_lost(Transport::Mmio, 91);
}

#[test]
fn nothing_is_lost_over_generations_with_pci_devices() {
    nothing_is_lost(Transport::Pci, 92);
}

#[test]
fn all_that_came_while_the_machine_ran_comes_back() {
    let script = r#"
        until_there() { until [ -e $1 ]; do sleep 0.1; done; }
        sum() { sha256sum | cut -d' ' -f1; }
        echo ready
        until_there /dev/vda; until_there /dev/pmem0; until_there /dev/pmem1
        until [ $(awk '/MemTotal/{print $2}' /proc/meminfo) -gt 600000 ]; do sleep 0.1; done
        mount -o remount,size=500m /tmp
        dd if=/dev/urandom of=/tmp/much bs=1M count=380 2>/dev/null
        sum < /tmp/much > /much.sum
        echo grown
        read -r word
        [ "$(sum < /tmp/much)" = "$(cat /much.sum)" ] && fact memory same || fact memory differs
        fact disk $(sum < /dev/vda)
        fact first $(sum < /dev/pmem0)
        fact second $(sum < /dev/pmem1)
        until_there /dev/vdb
        fact new $(sum < /dev/vdb)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).size(2, 256).script(script);
    setup.spec.memory_hotplug =
        Some(MemoryHotplug { total_size_mib: 1024, block_size_mib: 2, slot_size_mib: 128 });
    let file = |name: &str, seed| {
        let path = setup.folder().join(name);
        (path.clone(), sha256(&random_file(&path, 4, seed)))
    };
    let ((disk, disk_sum), (first, first_sum), (second, second_sum), (new, new_sum)) =
        (file("disk", 1), file("first", 2), file("second", 3), file("new", 4));
    setup.spec.pmem.push(Pmem { id: "first".to_owned(), path_on_host: first, ..Pmem::default() });
    let vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    done(client.put(
        "/drives/late",
        Some(&json!({ "drive_id": "late", "path_on_host": disk, "is_root_device": false })),
    ));
    done(client.put("/pmem/second", Some(&json!({ "id": "second", "path_on_host": second }))));
    done(client.put("/mmds", Some(&json!({ "answer": 42 }))));
    done(client.patch("/hotplug/memory", Some(&json!({ "requested_size_mib": 512 }))));
    vm.wait_for("grown\n");
    let (create, load) = directory(&vm, "grown");
    let mut vm = handed_over(vm, &create, &load);
    let mut client = vm.client();
    assert_eq!(client.get::<Value>("/mmds").unwrap()["answer"], 42);
    assert_eq!(client.get::<Value>("/hotplug/memory").unwrap()["plugged_size_mib"], 512);
    vm.say("go");
    done(client.put(
        "/drives/new",
        Some(&json!({ "drive_id": "new", "path_on_host": new, "is_root_device": false })),
    ));
    let ended = vm.succeed();
    ended.is("memory", "same");
    for (fact, sum) in [("disk", disk_sum), ("first", first_sum), ("second", second_sum), ("new", new_sum)] {
        ended.is(fact, &sum);
    }
}

#[test]
fn a_machine_that_came_back_takes_further_vcpus() {
    let script = r#"
        echo ready
        read -r word
        until [ -e /sys/devices/system/cpu/cpu2 ]; do sleep 0.1; done
        echo 1 > /sys/devices/system/cpu/cpu2/online || true
        part log sh -c 'dmesg | tail -n 20'
        fact cpus $(nproc)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).size(2, 128).script(script);
    setup.spec.machine_config.max_vcpu_count = Some(4);
    let vm = setup.start_with_api();
    vm.wait_for("ready\n");
    let (create, load) = directory(&vm, "machine");
    let mut vm = handed_over(vm, &create, &load);
    done(vm.client().patch("/machine-config", Some(&json!({ "vcpu_count": 3 }))));
    vm.say("go");
    let ended = vm.succeed();
    assert_eq!(ended.fact("cpus"), "3", "{}", ended.part("log"));
}

#[track_caller]
fn refused(outcome: Result<Value, api::client::ClientError>, words: &str) {
    let why = outcome.expect_err("this was to be refused").to_string();
    assert!(why.contains(words), "{why}");
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let (setup, sum) = counting(Transport::Mmio);
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("begun\n");
    let (create, load) = directory(&vm, "machine");
    refused(client.put("/snapshot/create", Some(&create)), "pause it first");
    refused(client.put("/snapshot/load", Some(&load)), "not supported after starting");
    pause(&mut client);
    let nowhere = CreateSnapshot { snapshot_path: "/nowhere/machine".into(), ..create.clone() };
    refused(client.put("/snapshot/create", Some(&nowhere)), "/nowhere");
    let full = CreateSnapshot { snapshot_path: "/dev/full/machine".into(), ..create.clone() };
    refused(client.put("/snapshot/create", Some(&full)), "/dev/full");
    done(client.put("/snapshot/create", Some(&create)));
    refused(client.put("/snapshot/create", Some(&create)), "exists already");
    let jobs: Value = client.get("/snapshot/jobs").unwrap();
    let states: Vec<&str> =
        jobs.as_array().unwrap().iter().map(|job| job["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["Failed", "Failed", "Done", "Failed"]);

    // The first machine is paused and has its disk.
    let (other, mut second) = vm.beside("second");
    let change = |json: Value| -> Value {
        let mut body = serde_json::to_value(&load).unwrap();
        body.as_object_mut().unwrap().extend(json.as_object().unwrap().clone());
        body
    };
    refused(second.put("/snapshot/load", Some(&load)), "in use by another machine");
    refused(second.put("/snapshot/load", Some(&change(json!({ "snapshot_path": "/nowhere" })))), "/nowhere");
    let unknown = change(json!({ "network_overrides": [{ "iface_id": "eth9", "host_dev_name": "t" }] }));
    refused(second.put("/snapshot/load", Some(&unknown)), "eth9");
    let backend = change(json!({ "mem_backend": { "backend_type": "File", "backend_path": "m" } }));
    refused(second.put("/snapshot/load", Some(&backend)), "holds its memory");
    // It can still be asked, with files of its own.
    let copy = vm.folder().join("copy");
    fs::copy(vm.folder().join("disk"), &copy).unwrap();
    let socket = other.folder().join("vsock");
    let own = change(json!({
        "drive_overrides": [{ "drive_id": "disk", "path_on_host": copy }],
        "vsock_override": { "uds_path": socket, "guest_cid": 77 },
    }));
    done(second.put("/snapshot/load", Some(&own)));
    let spec: Value = second.get("/vm/config").unwrap();
    assert_eq!(spec["vsock"]["guest_cid"], 77);
    assert_eq!(spec["drives"][0]["path_on_host"], json!(copy));
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    let mut other = other;
    for machine in [&mut vm, &mut other] {
        machine.say("both");
        machine.wait_for("both 2 ");
        machine.say("end");
    }
    for machine in [vm, other] {
        machine.succeed().is("sum", &sum);
    }
}
