//! Processors that are added while Linux runs: it sees them come, brings them online, and
//! programs run on them.

use api::{
    client::{Client, ClientError},
    http::Method,
    spec::{MachineConfig, Transport},
};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    vm::{Setup, Vm},
};

/// A plain Linux does not bring processors online by itself: on others udev or an agent does.
const SCRIPT: &str = r#"
    cpus() { cat /sys/devices/system/cpu/$1; }
    fact possible $(cpus possible)
    fact before $(cpus present)
    fact clock_before $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
    echo ready; read -r word
    for i in $(seq 300); do [ "$(cpus present)" = 0-2 ] && break; sleep 0.1; done
    fact present $(cpus present)
    fact waiting $(cpus online)
    for cpu in 1 2; do echo 1 > /sys/devices/system/cpu/cpu$cpu/online; done
    fact online $(cpus online)
    for cpu in 0 1 2; do
        taskset -c $cpu sh -c '. /prelude; fact on'$cpu' $(sed "s/.*) //" /proc/self/stat | cut -d" " -f37)' || exit 3
    done
    fact ids $(awk '/^apicid/{printf "%s ", $3}' /proc/cpuinfo)
    fact models $(awk -F: '/^model name/{print $2}' /proc/cpuinfo | sort -u | wc -l)
    fact flags $(awk -F: '/^flags/{print $2}' /proc/cpuinfo | sort -u | wc -l)
    fact cores $(awk '/^cpu cores/{print $4}' /proc/cpuinfo | sort -u)
    fact clock_after $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
    part clocks sh -c "dmesg | grep -iE 'tsc|clocksource'"
    echo next; read -r word
    for i in $(seq 300); do [ "$(cpus present)" = 0-3 ] && break; sleep 0.1; done
    fact last $(cpus present)
    echo 1 > /sys/devices/system/cpu/cpu3/online
    fact all $(cpus online)"#;

fn done(outcome: Result<Value, ClientError>) {
    assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Value::Null);
}

fn vcpus(client: &mut Client, wanted: u8) -> Result<Value, ClientError> {
    client.patch("/machine-config", Some(&json!({ "vcpu_count": wanted })))
}

#[track_caller]
fn refused(client: &mut Client, body: &Value, words: &str) {
    let before: Value = client.get("/vm/config").unwrap();
    let said = client.patch::<Value>("/machine-config", Some(body)).unwrap_err().to_string();
    assert!(said.contains(words), "{said}");
    assert_eq!(client.get::<Value>("/vm/config").unwrap(), before);
}

fn start(kernel: Kernel, transport: Transport) -> Vm {
    let mut setup = Setup::new(kernel, transport).script(SCRIPT);
    setup.spec.machine_config.max_vcpu_count = Some(4);
    setup.start_with_api()
}

/// One processor of four at first, then two more, then the last while the machine is paused.
fn grows(kernel: Kernel, transport: Transport) {
    let mut vm = start(kernel, transport);
    let mut client = vm.client();
    vm.wait_for("ready\n");
    refused(&mut client, &json!({ "vcpu_count": 5 }), "room for 4");
    refused(&mut client, &json!({ "vcpu_count": 0 }), "vcpu_count is 0");
    refused(&mut client, &json!({ "vcpu_count": 2, "mem_size_mib": 512 }), "after starting");
    refused(&mut client, &json!({ "max_vcpu_count": 8 }), "after starting");
    done(vcpus(&mut client, 3));
    done(vcpus(&mut client, 3));
    refused(&mut client, &json!({ "vcpu_count": 2 }), "cannot be taken away");
    let config: MachineConfig = client.get("/machine-config").unwrap();
    assert_eq!((config.vcpu_count, config.max_vcpu_count), (3, Some(4)));
    vm.say("go");
    vm.wait_for("next\n");
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    done(vcpus(&mut client, 4));
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    let page = client.send(Method::Get, "/metrics/openmetrics", &[], &[]).unwrap().body;
    let page = String::from_utf8(page).unwrap();
    assert!(page.lines().any(|line| line.starts_with("nacelle_vcpus") && line.ends_with(" 4")), "{page}");
    vm.say("go");
    let ended = vm.succeed();
    for (name, value) in [
        ("possible", "0-3"),
        ("before", "0"),
        ("present", "0-2"),
        ("waiting", "0"),
        ("online", "0-2"),
        ("on0", "0"),
        ("on1", "1"),
        ("on2", "2"),
        ("ids", "0 1 2"),
        ("models", "1"),
        ("flags", "1"),
        ("cores", "3"),
        ("last", "0-3"),
        ("all", "0-3"),
    ] {
        ended.is(name, value);
    }
    ended.is("clock_after", &ended.fact("clock_before"));
    // What the kernel says when the counter of a processor that came is off.
    let clocks = ended.part("clocks");
    assert!(!clocks.contains("warp"), "{clocks}");
}

#[test]
fn a_linux_gets_processors_while_it_runs() {
    grows(Kernel::quick(), Transport::Mmio);
}

#[test]
fn debians_linux_gets_processors_while_it_runs() {
    grows(Kernel::debian(), Transport::Pci);
}
