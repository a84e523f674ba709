//! Devices that come and go while the machine runs, as an unmodified guest sees them: nobody in
//! it rescans a bus by hand.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
};

use api::{
    client::{Client, ClientError},
    http::Method,
    spec::{Drive, LoadSnapshot, Transport},
};
use devices::disk::{Disk, DiskOptions};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    net::Tap,
    snapshot::directory,
    vm::{Setup, random_file, sha256},
};

const MIB: u64 = 1 << 20;

/// What scripts wait with.
const AWAIT: &str = r#"
    until_there() { until [ -e $1 ]; do sleep 0.1; done; }
    until_gone() { while [ -e $1 ]; do sleep 0.1; done; }
    "#;

fn setup(kernel: Kernel, script: &str) -> Setup {
    Setup::new(kernel, Transport::Pci).script(format!("{AWAIT}{script}"))
}

#[track_caller]
fn done(outcome: Result<Value, ClientError>) {
    assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Value::Null);
}

#[track_caller]
fn refused(outcome: Result<Value, ClientError>, words: &str) {
    let why = outcome.expect_err("this was to be refused").to_string();
    assert!(why.contains(words), "{why}");
}

fn drive(id: &str, path: &Path) -> Value {
    json!({ "drive_id": id, "path_on_host": path, "is_root_device": false })
}

fn is_free(path: &Path) -> bool {
    Disk::open(path, DiskOptions { read_only: false, direct: false }).is_ok()
}

fn config(client: &mut Client, part: &str) -> Value {
    let mut config: Value = client.get("/vm/config").unwrap();
    config[part].take()
}

fn a_disk_comes_goes_and_comes_again(kernel: Kernel) {
    let script = r#"
        fact before $(ls /sys/block | grep vd | wc -l)
        functions() { ls /sys/bus/pci/devices | wc -l; }
        fact functions $(functions)
        echo ready
        until_there /dev/vda
        fact size $(cat /sys/block/vda/size)
        fact serial $(cat /sys/block/vda/serial)
        fact sum $(dd if=/dev/vda bs=1M 2> /dev/null | sha256sum | cut -d' ' -f1)
        printf inside | dd of=/dev/vda bs=4096 seek=1 conv=fsync,notrunc
        echo written
        until_gone /dev/vda
        until [ $(functions) = 0 ]; do sleep 0.1; done
        echo gone
        until_there /dev/vda
        fact again $(dd if=/dev/vda bs=4096 skip=1 count=1 2> /dev/null | head -c 6)
        echo again
        until_there /dev/vdb
        fact second $(cat /sys/block/vdb/serial)"#;
    let setup = setup(kernel, script);
    let (disk, other) = (setup.folder().join("disk"), setup.folder().join("other"));
    let content = random_file(&disk, 2, 1);
    random_file(&other, 1, 2);
    let vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    done(client.put("/drives/data", Some(&drive("data", &disk))));
    vm.wait_for("written\n");
    assert!(!is_free(&disk), "a disk that is in use is not locked");
    refused(client.put("/drives/data", Some(&drive("data", &other))), "Device ID in use");
    refused(client.put("/drives/more", Some(&drive("more", &disk))), "in use");
    refused(client.put("/drives/more", Some(&drive("more", Path::new("/nowhere/disk")))), "/nowhere/disk");
    let root = json!({ "drive_id": "more", "path_on_host": other, "is_root_device": true });
    refused(client.put("/drives/more", Some(&root)), "root device");
    refused(client.delete("/drives/more"), "Device not found");
    assert_eq!(config(&mut client, "drives").as_array().map(Vec::len), Some(1));

    done(client.delete("/drives/data"));
    assert!(is_free(&disk), "a disk that was removed is still locked");
    assert_eq!(config(&mut client, "drives"), json!([]));
    let counters: Value = client.get("/vm/counters").unwrap();
    assert!(counters["devices"]["data"].is_null(), "{counters}");
    vm.wait_for("gone\n");
    let mut found = [0; 6];
    File::open(&disk).unwrap().read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"inside");

    // While it stands still the guest cannot be asked, but it can be given.
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    done(client.put("/drives/data", Some(&drive("data", &disk))));
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    vm.wait_for("again\n");
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    refused(client.delete("/drives/data"), "resume it first");
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    done(client.put("/drives/second", Some(&drive("second", &other))));
    let ended = vm.succeed();
    ended.is("before", &0);
    ended.is("size", &(2 * MIB / 512));
    ended.is("serial", "data");
    ended.is("sum", &sha256(&content));
    ended.is("functions", &0);
    ended.is("again", "inside");
    ended.is("second", "second");
}

#[test]
fn a_disk_comes_goes_and_comes_again_with_debians_kernel() {
    a_disk_comes_goes_and_comes_again(Kernel::debian());
}

#[test]
fn a_disk_comes_goes_and_comes_again_with_the_built_kernel() {
    a_disk_comes_goes_and_comes_again(Kernel::quick());
}

/// The guest reads as fast as it can, the host takes the disk that it started with.
#[test]
fn a_busy_disk_can_be_removed() {
    let script = r#"
        while dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2> /dev/null; do :; done &
        reader=$!
        sleep 1
        echo busy
        wait $reader
        until_gone /dev/vda
        fact gone yes"#;
    let mut setup = setup(Kernel::quick(), script).size(2, 256);
    let disk = setup.folder().join("disk");
    random_file(&disk, 16, 1);
    setup.spec.drives = vec![Drive {
        drive_id: "data".to_owned(),
        path_on_host: disk.clone(),
        num_queues: 2,
        queue_size: 256,
        ..Drive::default()
    }];
    let vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("busy\n");
    done(client.delete("/drives/data"));
    assert!(is_free(&disk));
    vm.succeed().is("gone", "yes");
}

#[test]
fn a_network_card_comes_with_its_address_and_goes() {
    let script = r#"
        fact before $(ls /sys/class/net | grep eth | wc -l)
        echo ready
        for round in 1 2; do
            until_there /sys/class/net/eth0
            fact mac$round $(cat /sys/class/net/eth0/address)
            ip link set eth0 up
            ip addr add 172.31.77.2/24 dev eth0
            ping -c 3 -W 20 172.31.77.1 && fact ping$round answered || fact ping$round lost
            echo pinged$round
            until_gone /sys/class/net/eth0
            echo gone$round
        done"#;
    let tap = Tap::new("ncltest7", 77, 1500, 1);
    let vm = setup(Kernel::debian(), script).start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    for round in 1..=2 {
        let mac = format!("06:00:ac:1f:77:0{round}");
        let card = json!({ "iface_id": "eth0", "host_dev_name": tap.name, "guest_mac": mac });
        done(client.put("/network-interfaces/eth0", Some(&card)));
        let other = json!({ "iface_id": "eth1", "host_dev_name": "ncltest8", "guest_mac": mac });
        refused(client.put("/network-interfaces/eth1", Some(&other)), "already in use");
        vm.wait_for(&format!("pinged{round}\n"));
        done(client.delete("/network-interfaces/eth0"));
        vm.wait_for(&format!("gone{round}\n"));
    }
    let ended = vm.succeed();
    for round in 1..=2 {
        ended.is(&format!("mac{round}"), &format!("06:00:ac:1f:77:0{round}"));
        ended.is(&format!("ping{round}"), "answered");
    }
}

#[test]
fn persistent_memory_and_entropy_come_and_go() {
    let script = r#"
        rng=/sys/devices/virtual/misc/hw_random/rng_available
        fact without $(cat $rng)
        echo ready
        for round in 1 2; do
            until_there /dev/pmem0
            fact size$round $(cat /sys/block/pmem0/size)
            fact read$round $(head -c 6 /dev/pmem0)
            printf inside | dd of=/dev/pmem0 bs=4096 seek=$round conv=fsync,notrunc
            until grep -q virtio $rng; do sleep 0.1; done
            fact random$round $(head -c 64 /dev/hwrng | wc -c)
            echo used$round
            until_gone /dev/pmem0
            while grep -q virtio $rng; do sleep 0.1; done
            echo gone$round
        done"#;
    let setup = setup(Kernel::quick(), script);
    let file = setup.folder().join("pmem");
    fs::write(&file, b"before").unwrap();
    File::options().write(true).open(&file).unwrap().set_len(4 * MIB).unwrap();
    let vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    for round in 1..=2 {
        done(client.put("/pmem/one", Some(&json!({ "id": "one", "path_on_host": file }))));
        done(client.put("/entropy", Some(&json!({}))));
        refused(client.put("/entropy", Some(&json!({}))), "Device ID in use");
        vm.wait_for(&format!("used{round}\n"));
        done(client.delete("/pmem/one"));
        done(client.delete("/entropy"));
        assert_eq!((config(&mut client, "pmem"), config(&mut client, "entropy")), (json!([]), Value::Null));
        vm.wait_for(&format!("gone{round}\n"));
    }
    refused(client.delete("/entropy"), "Device not found");
    let ended = vm.succeed();
    for round in 1..=2 {
        ended.is(&format!("size{round}"), &(4 * MIB / 512));
        ended.is(&format!("read{round}"), "before");
        ended.is(&format!("random{round}"), &64);
    }
    let mut found = vec![0; 3 * 4096];
    File::open(ended.folder().join("pmem")).unwrap().read_exact(&mut found).unwrap();
    assert_eq!((&found[4096..4102], &found[8192..8198]), (&b"inside"[..], &b"inside"[..]));
}

#[test]
fn without_pci_devices_stay_as_they_are() {
    let script = "fact disks $(ls /sys/block | grep vd | wc -l)\necho ready; read -r word";
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    let (disk, other) = (setup.folder().join("disk"), setup.folder().join("other"));
    random_file(&disk, 1, 1);
    random_file(&other, 1, 2);
    let fixed: Drive = serde_json::from_value(drive("data", &disk)).unwrap();
    setup.spec.drives = vec![fixed];
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    refused(client.put("/drives/other", Some(&drive("other", &other))), "PCI is not enabled");
    refused(client.delete("/drives/data"), "PCI is not enabled");
    refused(client.put("/entropy", Some(&json!({}))), "PCI is not enabled");
    assert!(is_free(&other) && !is_free(&disk));
    assert_eq!(config(&mut client, "drives").as_array().map(Vec::len), Some(1));
    vm.say("go");
    vm.succeed().is("disks", &1);
}

/// All slots are filled, and emptied again, and used again.
#[test]
fn a_bus_takes_31_devices_and_gives_all_back() {
    let script = r#"
        disks() { ls /sys/block | grep vd | wc -l; }
        echo ready
        until [ $(disks) = 31 ]; do sleep 0.1; done
        echo full
        until [ $(disks) = 0 ]; do sleep 0.1; done
        echo empty
        until_there /dev/vda
        fact sum $(sha256sum < /dev/vda | cut -d' ' -f1)"#;
    let setup = setup(Kernel::quick(), script);
    let folder = setup.folder().to_owned();
    let vm = setup.start_with_api();
    let mut client = vm.client();
    let mut events = Client::unix(vm.socket());
    let events = events.lines("/events?since=0").unwrap();
    vm.wait_for("ready\n");
    let name = |index: usize| format!("d{index}");
    for index in 0..32 {
        let path = folder.join(name(index));
        random_file(&path, 1, index as u64);
        let outcome = client.put(&format!("/drives/d{index}"), Some(&drive(&name(index), &path)));
        if index < 31 { done(outcome) } else { refused(outcome, "31 fit on PCI bus 0") }
    }
    assert!(is_free(&folder.join("d31")));
    vm.wait_for("full\n");
    for index in 0..31 {
        done(client.delete(&format!("/drives/d{index}")));
    }
    vm.wait_for("empty\n");
    done(client.put("/drives/d31", Some(&drive("d31", &folder.join("d31")))));
    let ended = vm.succeed();
    ended.is("sum", &sha256(&fs::read(folder.join("d31")).unwrap()));
    let mut seen = Vec::new();
    for line in events {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        seen.push((event["event"].as_str().unwrap().to_owned(), event["device"].clone()));
    }
    let count = |name: &str| seen.iter().filter(|(event, _)| event == name).count();
    assert_eq!((count("DeviceAdded"), count("DeviceRemoved")), (32, 31), "{seen:?}");
    assert!(seen.contains(&("DeviceRemoved".to_owned(), json!("d30"))));
}

/// A guest that cannot hear (its event device is not looked at) keeps its disk, unless it is
/// taken by force; what is left answers, and goes when the guest lets go of it.
#[test]
fn a_device_is_taken_by_force_from_a_guest_that_stands_still() {
    let script = r#"
        fact first $(cat /sys/block/vda/serial)
        echo ready; read -r word
        until_gone /sys/bus/pci/devices/0000:00:01.0
        echo gone
        until_there /dev/vda
        fact second $(cat /sys/block/vda/serial)"#;
    let mut setup = setup(Kernel::quick(), script);
    let disk = setup.folder().join("disk");
    random_file(&disk, 1, 1);
    setup.spec.drives = vec![serde_json::from_value(drive("first", &disk)).unwrap()];
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    refused(client.delete("/drives/first"), "resume it first");
    refused(client.delete("/drives/first?force=1"), "force=true");
    assert!(!is_free(&disk));
    done(client.delete("/drives/first?force=true"));
    assert!(is_free(&disk));
    assert_eq!(config(&mut client, "drives"), json!([]));
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    vm.say("go");
    vm.wait_for("gone\n");
    done(client.put("/drives/second", Some(&drive("second", &disk))));
    let ended = vm.succeed();
    ended.is("first", "first");
    ended.is("second", "second");
}

/// What is left of a device that was taken by force is saved with the machine, and given back by the
/// guest of the restored one.
#[test]
fn a_machine_is_saved_with_what_is_left_of_a_device() {
    let script = r#"
        fact first $(cat /sys/block/vda/serial)
        echo ready; read -r word
        until_gone /sys/bus/pci/devices/0000:00:01.0
        echo gone
        until_there /dev/vda
        fact second $(cat /sys/block/vda/serial)"#;
    let mut setup = setup(Kernel::quick(), script);
    let disk = setup.folder().join("disk");
    random_file(&disk, 1, 1);
    setup.spec.drives = vec![serde_json::from_value(drive("first", &disk)).unwrap()];
    let vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    done(client.delete("/drives/first?force=true"));
    let (create, load) = directory(&vm, "severed");
    done(client.put("/snapshot/create", Some(&create)));
    fs::remove_file(&disk).unwrap();
    let told = vm.console();
    assert!(told.contains("@first=first\n"), "{told}");

    // Saved and restored twice: the second one's guest has not let go of it either.
    let vm = vm.successor();
    let mut client = vm.client();
    done(client.put("/snapshot/load", Some(&LoadSnapshot { resume_vm: false, ..load })));
    let (create, load) = directory(&vm, "again");
    done(client.put("/snapshot/create", Some(&create)));
    let mut vm = vm.successor();
    let mut client = vm.client();
    done(client.put("/snapshot/load", Some(&load)));
    assert_eq!(config(&mut client, "drives"), json!([]));
    vm.say("go");
    vm.wait_for("gone\n");
    random_file(&disk, 1, 2);
    done(client.put("/drives/second", Some(&drive("second", &disk))));
    vm.succeed().is("second", "second");
}

/// A guest whose kernel knows nothing of ACPI's slots: it keeps its disks, until its drivers let
/// go of them, as Firecracker's documents tell to do by hand, or until they are taken.
#[test]
fn a_guest_that_does_not_hear_keeps_its_disks() {
    let script = r#"
        echo ready; read -r word
        fact kept $(ls -d /dev/vda /dev/vdb | wc -l)
        echo 1 > /sys/bus/pci/devices/0000:00:01.0/remove
        echo removed; read -r word"#;
    let mut setup = setup(Kernel::quick(), script).parameters("reboot=k acpiphp.disable=1");
    let disks = ["first", "second"].map(|name| (name, setup.folder().join(name)));
    for (name, path) in &disks {
        random_file(path, 1, 1);
        setup.spec.drives.push(serde_json::from_value(drive(name, path)).unwrap());
    }
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    refused(client.delete("/drives/first"), "has not given drive \"first\" back within 15 s");
    assert!(!is_free(&disks[0].1));
    vm.say("go");
    vm.wait_for("removed\n");
    done(client.delete("/drives/first"));
    assert!(is_free(&disks[0].1));

    // Who waits is answered when somebody else loses patience.
    let mut patient = Client::unix(vm.socket());
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| patient.delete("/drives/second"));
        let asked = |client: &mut Client| client.send(Method::Delete, "/drives/second?force=true", b"", &[]);
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert_eq!(asked(&mut client).unwrap().status, 204);
        done(waits.join().unwrap());
    });
    assert!(is_free(&disks[1].1));
    assert_eq!(config(&mut client, "drives"), json!([]));
    vm.say("go");
    vm.succeed().is("kept", &2);
}
