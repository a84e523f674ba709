//! The life of a machine through its API: what is allowed when, and what the guest notices.

use api::{
    MachineInfo, MachineState, Spec,
    client::{Client, ClientError},
    spec::{MachineConfig, Transport},
};
use serde_json::{Value, json};

use crate::{kernel::Kernel, vm::Setup};

fn state(client: &mut Client) -> MachineState {
    client.get::<MachineInfo>("/").unwrap().state
}

fn done(outcome: Result<Value, ClientError>) {
    assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Value::Null);
}

fn refused(outcome: Result<Value, ClientError>) -> String {
    outcome.expect_err("this was to be refused").to_string()
}

#[test]
fn the_power_button_arrives_also_after_pauses() {
    // A key event is 24 bytes: time, type, code (116, power), value.
    let script = r#"
        for input in /sys/class/input/event*; do
            if [ "$(cat $input/device/name)" = "Power Button" ]; then device=${input##*/}; fi
        done
        fact button $device
        exec 3< /dev/input/$device
        echo ready
        head -c 24 <&3 > /tmp/key
        fact key $(hexdump -s 18 -n 2 -e '1/2 "%u"' /tmp/key)"#;
    let vm = Setup::new(Kernel::debian(), Transport::Pci).script(script).start_with_api();
    let mut client = vm.client();
    vm.wait_for("@button=event");
    for _ in 0..5 {
        done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
        assert_eq!(state(&mut client), MachineState::Paused);
        let why = refused(client.put("/vm/power-button", None::<&()>));
        assert!(why.contains("resume it first"), "{why}");
        done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
        assert_eq!(state(&mut client), MachineState::Running);
    }
    vm.wait_for("ready\n");
    done(client.put("/vm/power-button", None::<&()>));
    let ended = vm.succeed();
    ended.is("key", &116);
}

#[test]
fn a_machine_is_described_started_and_shut_down_through_its_api() {
    let script = r#"
        fact cpus $(nproc)
        fact word $(grep -o 'word=[a-z]*' /proc/cmdline)
        echo ready
        while :; do sleep 1; done"#;
    let (vm, spec) = Setup::new(Kernel::quick(), Transport::Mmio).script(script).start_empty();
    let mut client = vm.client();
    assert_eq!(state(&mut client), MachineState::NotStarted);
    let version: Value = client.get("/version").unwrap();
    assert_eq!(version["firecracker_version"], api::FIRECRACKER_VERSION);

    let why = refused(client.put("/actions", Some(&json!({ "action_type": "InstanceStart" }))));
    assert!(why.contains("no kernel to boot"), "{why}");
    done(client.put("/machine-config", Some(&json!({ "vcpu_count": 1, "mem_size_mib": 256 }))));
    let why = refused(client.patch("/machine-config", Some(&json!({ "vcpu_count": 65 }))));
    assert!(why.contains("65"), "{why}");
    done(client.patch("/machine-config", Some(&json!({ "vcpu_count": 2 }))));
    let config: MachineConfig = client.get("/machine-config").unwrap();
    assert_eq!((config.vcpu_count, config.mem_size_mib), (2, 256));

    let arguments = format!("{} word=hello", spec.boot_source.boot_args.unwrap());
    let mut source = json!({
        "kernel_image_path": "/nowhere/vmlinux",
        "initrd_path": spec.boot_source.initrd_path,
        "boot_args": arguments,
    });
    let why = refused(client.put("/boot-source", Some(&source)));
    assert!(why.contains("/nowhere/vmlinux"), "{why}");
    source["kernel_image_path"] = json!(spec.boot_source.kernel_image_path);
    done(client.put("/boot-source", Some(&source)));
    let why = refused(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    assert!(why.contains("before starting"), "{why}");

    let mut events = Client::unix(vm.socket());
    let mut events = events.lines("/events?since=0").unwrap();
    done(client.put("/actions", Some(&json!({ "action_type": "InstanceStart" }))));
    vm.wait_for("ready\n");
    let why = refused(client.put("/boot-source", Some(&source)));
    assert!(why.contains("after starting"), "{why}");
    let whole: Spec = client.get("/vm/config").unwrap();
    assert_eq!(whole.boot_source.boot_args, Some(arguments));
    let first: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
    assert_eq!((&first["event"], &first["sequence"]), (&json!("Running"), &json!(1)));

    // The script does not listen to the button: the deadline ends the machine.
    let end: Value = client.put("/vm/shutdown", Some(&json!({ "timeout_s": 1 }))).unwrap();
    assert_eq!(end["exit_code"], 0);
    let last: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
    assert_eq!(last["event"], "Ended");
    let socket = vm.socket();
    let ended = vm.wait();
    ended.is("cpus", &2);
    ended.is("word", "word=hello");
    assert_eq!(ended.code, 0);
    assert!(!socket.exists(), "the socket was left behind");
}
