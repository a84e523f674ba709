//! The life of a machine through its API: what is allowed when, and what the guest notices.

use api::{
    MachineInfo, MachineState, Spec,
    client::{Client, ClientError},
    http::Method,
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

/// Method, path, body (`null` for none), and the status before the start, while the machine
/// runs, and while it is paused; 0 where the call would end that state.
type Call = (&'static str, &'static str, Value, [u16; 3]);

fn calls(source: &Value, disk: &Value, metrics: &Value) -> Vec<Call> {
    let none = || Value::Null;
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
                          "free_page_hinting": true });
    vec![
        ("GET", "/", none(), [200; 3]),
        ("GET", "/version", none(), [200; 3]),
        ("GET", "/vm/config", none(), [200; 3]),
        ("GET", "/machine-config", none(), [200; 3]),
        ("GET", "/metrics/openmetrics", none(), [200; 3]),
        ("GET", "/healthz", none(), [200; 3]),
        ("GET", "/nonsense", none(), [400; 3]),
        ("POST", "/machine-config", json!({}), [400; 3]),
        ("PUT", "/mmds", json!({ "a": 1 }), [204; 3]),
        ("PATCH", "/mmds", json!({ "b": 2 }), [204; 3]),
        ("GET", "/mmds", none(), [200; 3]),
        ("PUT", "/logger", json!({ "level": "Info" }), [204; 3]),
        ("PUT", "/boot-source", source.clone(), [204, 400, 400]),
        ("PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 256 }), [204, 400, 400]),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 2 }), [204, 400, 400]),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 0 }), [400; 3]),
        ("PUT", "/cpu-config", json!({}), [204, 400, 400]),
        ("PUT", "/drives/data", disk.clone(), [204, 400, 400]),
        ("PATCH", "/drives/data", json!({ "drive_id": "data" }), [400, 204, 204]),
        ("PATCH", "/drives/other", json!({ "drive_id": "other" }), [400; 3]),
        ("DELETE", "/drives/other", none(), [400; 3]),
        ("PUT", "/network-interfaces/x", json!({ "iface_id": "x" }), [400; 3]),
        ("PATCH", "/network-interfaces/x", json!({ "iface_id": "x" }), [400; 3]),
        ("DELETE", "/network-interfaces/x", none(), [400; 3]),
        ("PUT", "/pmem/x", json!({ "id": "x", "path_on_host": "/nowhere" }), [400; 3]),
        ("PATCH", "/pmem/x", json!({ "id": "x" }), [400; 3]),
        ("DELETE", "/pmem/x", none(), [400; 3]),
        ("PUT", "/vsock", json!({ "guest_cid": 2, "uds_path": "v" }), [400; 3]),
        ("PUT", "/entropy", json!({}), [204, 400, 400]),
        ("DELETE", "/entropy", none(), [400; 3]),
        ("PUT", "/serial", json!({}), [204, 400, 400]),
        ("PUT", "/balloon", balloon, [204, 400, 400]),
        ("GET", "/balloon", none(), [200; 3]),
        ("PATCH", "/balloon", json!({ "amount_mib": 1 }), [400, 204, 204]),
        ("GET", "/balloon/statistics", none(), [400, 200, 200]),
        ("PATCH", "/balloon/statistics", json!({ "stats_polling_interval_s": 2 }), [400, 204, 204]),
        ("PATCH", "/balloon/statistics", json!({ "stats_polling_interval_s": 0 }), [400; 3]),
        ("PATCH", "/balloon/hinting/start", none(), [400, 204, 204]),
        ("GET", "/balloon/hinting/status", none(), [400, 200, 200]),
        ("PATCH", "/balloon/hinting/stop", none(), [400, 204, 204]),
        ("PUT", "/hotplug/memory", json!({ "total_size_mib": 100 }), [400; 3]),
        ("GET", "/hotplug/memory", none(), [400; 3]),
        ("PATCH", "/hotplug/memory", json!({ "requested_size_mib": 2 }), [400; 3]),
        ("PUT", "/mmds/config", json!({ "network_interfaces": ["x"] }), [400; 3]),
        ("PUT", "/metrics", metrics.clone(), [204, 400, 400]),
        ("PUT", "/actions", json!({ "action_type": "FlushMetrics" }), [400, 204, 204]),
        ("PUT", "/actions", json!({ "action_type": "SendCtrlAltDel" }), [400, 0, 400]),
        ("PUT", "/actions", json!({ "action_type": "InstanceStart" }), [0, 400, 400]),
        ("PATCH", "/vm", json!({ "state": "Paused" }), [400, 0, 204]),
        ("PATCH", "/vm", json!({ "state": "Resumed" }), [400, 204, 0]),
        ("PUT", "/snapshot/create", json!({}), [400; 3]),
        ("PUT", "/snapshot/load", json!({}), [400; 3]),
        ("GET", "/vm/counters", none(), [400, 200, 200]),
        ("PUT", "/vm/nmi", none(), [400, 204, 204]),
        ("PUT", "/vm/power-button", none(), [400, 0, 400]),
        ("PUT", "/vm/coredump", json!({ "path": "/" }), [400; 3]),
    ]
}

/// Every call answers in every state as documented, and one that is refused changes nothing.
#[test]
fn every_call_answers_in_every_state() {
    let script = "echo ready; read -r word";
    let setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    let file = setup.folder().join("disk");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    let metrics = json!({ "metrics_path": setup.folder().join("metrics") });
    let (mut vm, spec) = setup.start_empty();
    let source = json!(spec.boot_source);
    let disk = json!({ "drive_id": "data", "path_on_host": file, "is_root_device": false });
    let calls = calls(&source, &disk, &metrics);
    let mut client = vm.client();
    let walk = |client: &mut Client, state: usize| {
        for (method, path, body, expected) in calls.iter().filter(|call| call.3[state] != 0) {
            let before: Value = client.get("/vm/config").unwrap();
            let text = if body.is_null() { String::new() } else { body.to_string() };
            let (status, said) = match client.send(Method::named(method), path, text.as_bytes(), &[]) {
                Ok(answer) => (answer.status, String::new()),
                Err(ClientError::Fault { status, message }) => (status, message),
                Err(error) => panic!("{method} {path}: {error}"),
            };
            assert_eq!(status, expected[state], "{method} {path} {text} in state {state}: {said}");
            if status >= 400 {
                assert!(said.len() > 10, "{method} {path}: {said}");
                assert_eq!(client.get::<Value>("/vm/config").unwrap(), before, "{method} {path} {text}");
            }
        }
    };
    walk(&mut client, 0);
    done(client.put("/actions", Some(&json!({ "action_type": "InstanceStart" }))));
    vm.wait_for("ready\n");
    walk(&mut client, 1);
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    walk(&mut client, 2);
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    vm.say("go");
    vm.succeed();
}
