//! What is told of a guest that crashes and of devices that meet trouble.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use api::{
    client::{Client, Lines},
    spec::{Drive, NetworkInterface, Transport},
};
use serde_json::Value;

use crate::{
    kernel::Kernel,
    net::Tap,
    vm::{Setup, Vm},
};

/// The machine's events, from its start on.
fn events(vm: &Vm) -> Lines {
    // The machine starts before its API answers.
    let _ = vm.client();
    Client::unix(vm.socket()).lines("/events?since=0").unwrap()
}

/// The next event, which has to be of this kind.
#[track_caller]
fn next(events: &mut Lines, kind: &str) -> Value {
    let line = events.next().expect("the stream of events has ended").unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["event"], kind, "{event}");
    event
}

#[test]
fn a_guest_that_crashes_is_told_of_before_its_end() {
    let script = "echo ready; read -r word; echo c > /proc/sysrq-trigger";
    let mut setup = Setup::new(Kernel::debian(), Transport::Mmio).script(script);
    setup.spec.machine_config.pvpanic = true;
    let mut vm = setup.start_with_api();
    let mut events = events(&vm);
    next(&mut events, "Running");
    vm.wait_for("ready\n");
    vm.say("go");
    let panicked = next(&mut events, "GuestPanicked");
    assert_eq!(panicked["action"], "panicked");
    let last = next(&mut events, "Ended");
    assert!(last["sequence"].as_u64() > panicked["sequence"].as_u64(), "{last}");
    let ended = vm.wait();
    assert!(ended.console.contains("Kernel panic"), "{}", ended.console);
    assert_eq!(ended.counter("pvpanic", "panicked"), 1);
}

/// A file system in memory with little room.
struct Small<'a>(&'a Path);

impl Small<'_> {
    fn mounted(at: &Path) -> Small<'_> {
        fs::create_dir(at).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=1m", "none"];
        let mounted = Command::new("mount").args(options).arg(at).status().unwrap();
        assert!(mounted.success());
        Small(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_disk_without_room_is_told_of_once() {
    let script = r#"
        fill() { dd if=/dev/zero of=/dev/vda bs=64k count=32 oflag=direct && echo filled || echo failed; }
        fact first $(fill)
        fact second $(fill)
        echo ready; read -r word"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).script(script);
    let folder = setup.folder().join("small");
    let small = Small::mounted(&folder);
    let file = folder.join("disk");
    File::create(&file).unwrap().set_len(4 << 20).unwrap();
    let drive = r#"{"drive_id": "data", "is_root_device": false, "path_on_host": ""}"#;
    let drive: Drive = serde_json::from_str(drive).unwrap();
    setup.spec.drives = vec![Drive { path_on_host: file, ..drive }];
    let mut vm = setup.start_with_api();
    let mut events = events(&vm);
    next(&mut events, "Running");
    let fault = next(&mut events, "DeviceFault");
    assert_eq!((&fault["device"], &fault["kind"]), (&"data".into(), &"virtio-block".into()), "{fault}");
    assert_eq!((&fault["fault"], &fault["operation"]), (&"IoError".into(), &"write".into()), "{fault}");
    assert!(fault["error"].as_str().unwrap().contains("No space left"), "{fault}");
    vm.wait_for("ready\n");
    vm.say("go");
    // Further failures were too soon after the first.
    next(&mut events, "Ended");
    let ended = vm.succeed();
    ended.is("first", "failed");
    ended.is("second", "failed");
    assert!(ended.counter("data", "errors") >= 2);
    drop(small);
}

#[test]
fn a_tap_that_goes_away_is_told_of() {
    let script = r#"
        ip link set eth0 up
        fact before $(cat /sys/class/net/eth0/carrier)
        echo ready; read -r word
        fact after $(cat /sys/class/net/eth0/carrier)"#;
    let tap = Tap::new("ncltest5", 74, 1500, 1);
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    let card = format!(r#"{{"iface_id": "eth0", "host_dev_name": "{}"}}"#, tap.name);
    let card: NetworkInterface = serde_json::from_str(&card).unwrap();
    setup.spec.network_interfaces = vec![card];
    let mut vm = setup.start_with_api();
    let mut events = events(&vm);
    next(&mut events, "Running");
    vm.wait_for("ready\n");
    drop(tap);
    let fault = next(&mut events, "DeviceFault");
    assert_eq!((&fault["device"], &fault["fault"]), (&"eth0".into(), &"LinkDown".into()), "{fault}");
    vm.say("go");
    next(&mut events, "Ended");
    let ended = vm.succeed();
    ended.is("before", &1);
    ended.is("after", &0);
}
