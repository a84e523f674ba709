//! Devices that are changed through the API while the machine runs, and what the guest sees.
//!
//! Scripts wait for a line on the console (`read -r word`) between their steps, so that host
//! and guest take turns.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use api::{
    client::Client,
    spec::{Balloon, Drive, IoEngine, MemoryHotplug, Pmem, RateLimiter, TokenBucket, Transport},
};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    vm::{Setup, random_file, sha256},
};

const MIB: u64 = 1 << 20;

#[track_caller]
fn done(outcome: Result<Value, api::client::ClientError>) {
    assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Value::Null);
}

/// Asks until `wanted` holds of the answer.
#[track_caller]
pub fn until(client: &mut Client, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer: Value = client.get(path).unwrap();
        if wanted(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{path} stays at {answer}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back() {
    let script = r#"
        total() { awk '/MemTotal/{print $2}' /proc/meminfo; }
        fact before $(total)
        echo ready; read -r word
        fact during $(total)
        echo next; read -r word
        fact after $(total)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    setup.spec.balloon = Some(Balloon {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    });
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    done(client.patch("/balloon", Some(&json!({ "amount_mib": 64 }))));
    until(&mut client, "/balloon/statistics", |s| s["actual_mib"] == 64);
    vm.say("go");
    vm.wait_for("next\n");
    let told = until(&mut client, "/balloon/statistics", |s| s["total_memory"].as_u64() < Some(200 * MIB));
    assert!(told["available_memory"].as_u64() < told["total_memory"].as_u64(), "{told}");
    let config: Value = client.get("/balloon").unwrap();
    assert_eq!((&config["amount_mib"], &config["stats_polling_interval_s"]), (&json!(64), &json!(1)));
    let refused = client.patch::<Value>("/balloon", Some(&json!({ "amount_mib": 257 })));
    assert!(refused.unwrap_err().to_string().contains("257"));

    done(client.patch("/balloon/hinting/start", None::<&()>));
    // The guest's own number follows the host's, and then says that the run is over.
    let hinting = until(&mut client, "/balloon/hinting/status", |s| !s["guest_cmd"].is_null());
    assert!(hinting["host_cmd"].is_u64(), "{hinting}");
    done(client.patch("/balloon/hinting/stop", None::<&()>));

    done(client.patch("/balloon", Some(&json!({ "amount_mib": 0 }))));
    until(&mut client, "/balloon/statistics", |s| s["actual_mib"] == 0);
    vm.say("go");
    let ended = vm.succeed();
    let (before, during, after) = (ended.number("before"), ended.number("during"), ended.number("after"));
    assert_eq!(before, after);
    assert_eq!(before - during, 64 << 10, "KiB that the balloon took");
    assert!(ended.counter("balloon", "inflate_count") > 0);
}

/// Ten seconds of reading at 10 MiB a second, then twice as fast after a change, both within
/// five hundredths of what was said.
#[test]
fn a_disk_keeps_to_its_limits_and_to_new_ones() {
    let script = r#"
        now() { cut -d' ' -f1 /proc/uptime; }
        fact start $(now)
        dd if=/dev/vda of=/dev/null bs=256k iflag=direct
        fact middle $(now)
        echo ready; read -r word
        fact again $(now)
        dd if=/dev/vda of=/dev/null bs=256k iflag=direct
        fact end $(now)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).script(script);
    let disk = setup.folder().join("disk");
    random_file(&disk, 100, 3);
    let bucket = |mib: u64| TokenBucket { size: mib * MIB / 10, one_time_burst: None, refill_time: 100 };
    let limits = |mib| RateLimiter { bandwidth: Some(bucket(mib)), ops: None };
    setup.spec.drives = vec![Drive {
        drive_id: "data".to_owned(),
        path_on_host: disk,
        is_read_only: true,
        io_engine: IoEngine::Async,
        rate_limiter: Some(limits(10)),
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    }];
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    let patch = json!({ "drive_id": "data", "rate_limiter": limits(20) });
    done(client.patch("/drives/data", Some(&patch)));
    vm.say("go");
    let ended = vm.succeed();
    let at = |name: &str| ended.fact(name).parse::<f64>().unwrap();
    let (first, second) = (at("middle") - at("start"), at("end") - at("again"));
    // Never faster than said; slower only where an emulated processor may have to wait for its own.
    let slack = if std::env::var_os("NACELLE_LAB").is_some() { 3.0 } else { 1.05 };
    assert!((9.5..=10.0 * slack).contains(&first), "100 MiB at 10 MiB/s took {first} s");
    assert!((4.75..=5.0 * slack).contains(&second), "100 MiB at 20 MiB/s took {second} s");
    assert!(ended.counter("data", "rate_limiter_throttled_events") > 0);
}

#[test]
fn a_disk_is_exchanged_under_a_running_guest() {
    let script = r#"
        sum() { dd if=/dev/vda bs=1M 2> /dev/null | sha256sum | cut -d' ' -f1; }
        fact first $(sum)
        echo ready; read -r word
        fact size $(cat /sys/block/vda/size)
        echo 3 > /proc/sys/vm/drop_caches
        fact second $(sum)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    let (one, two) = (setup.folder().join("one"), setup.folder().join("two"));
    let contents = [random_file(&one, 1, 1), random_file(&two, 3, 2)];
    setup.spec.drives = vec![Drive {
        drive_id: "data".to_owned(),
        path_on_host: one,
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    }];
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    let wrong = json!({ "drive_id": "data", "path_on_host": "/nowhere/disk" });
    let refused = client.patch::<Value>("/drives/data", Some(&wrong));
    assert!(refused.unwrap_err().to_string().contains("/nowhere/disk"));
    done(client.patch("/drives/data", Some(&json!({ "drive_id": "data", "path_on_host": two }))));
    let config: Value = client.get("/vm/config").unwrap();
    assert_eq!(config["drives"][0]["path_on_host"], json!(two));
    vm.say("go");
    let ended = vm.succeed();
    ended.is("first", &sha256(&contents[0]));
    ended.is("size", &(3 * MIB / 512));
    ended.is("second", &sha256(&contents[1]));
}

#[test]
fn persistent_memory_keeps_what_is_written() {
    let script = r#"
        fact size $(cat /sys/block/pmem0/size)
        fact read $(head -c 6 /dev/pmem0)
        printf 'inside' | dd of=/dev/pmem0 bs=4096 seek=1 conv=fsync,notrunc
        fact second $(cat /sys/block/pmem1/size)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).script(script);
    let (file, fixed) = (setup.folder().join("pmem"), setup.folder().join("fixed"));
    for path in [&file, &fixed] {
        let mut made = File::create(path).unwrap();
        made.write_all(b"before").unwrap();
        made.set_len(4 * MIB).unwrap();
    }
    let pmem = |id: &str, path: &std::path::Path, read_only| Pmem {
        id: id.to_owned(),
        path_on_host: path.to_owned(),
        read_only,
        ..Pmem::default()
    };
    setup.spec.pmem = vec![pmem("one", &file, false), pmem("two", &fixed, true)];
    let ended = setup.start_with_api().succeed();
    ended.is("size", &(4 * MIB / 512));
    ended.is("read", "before");
    ended.is("second", &(4 * MIB / 512));
    let mut found = [0; 6];
    File::open(ended.folder().join("pmem")).unwrap().read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"inside");
}

#[test]
fn memory_is_plugged_and_unplugged() {
    let script = r#"
        total() { awk '/MemTotal/{print $2}' /proc/meminfo; }
        start=$(total)
        fact before $start
        # The device is done a moment before the kernel counts what it got.
        until_total() { for i in $(seq 200); do [ $(total) $1 $2 ] && break; sleep 0.1; done; }
        echo ready; read -r word
        until_total -ge $((start + 524288))
        fact during $(total)
        mount -o remount,size=400m /tmp
        dd if=/dev/zero of=/tmp/big bs=1M count=300
        fact sum $(sha256sum < /tmp/big | cut -d' ' -f1)
        rm /tmp/big
        echo next; read -r word
        until_total -le $start
        fact after $(total)"#;
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    setup.spec.memory_hotplug =
        Some(MemoryHotplug { total_size_mib: 1024, block_size_mib: 2, slot_size_mib: 128 });
    // So that nothing of it is used for what cannot be moved away again.
    let setup = setup.parameters("reboot=k memhp_default_state=online_movable");
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    let empty: Value = client.get("/hotplug/memory").unwrap();
    assert_eq!((&empty["plugged_size_mib"], &empty["total_size_mib"]), (&json!(0), &json!(1024)));
    done(client.patch("/hotplug/memory", Some(&json!({ "requested_size_mib": 512 }))));
    until(&mut client, "/hotplug/memory", |m| m["plugged_size_mib"] == 512);
    vm.say("go");
    vm.wait_for("next\n");
    done(client.patch("/hotplug/memory", Some(&json!({ "requested_size_mib": 0 }))));
    until(&mut client, "/hotplug/memory", |m| m["plugged_size_mib"] == 0);
    let refused = client.patch::<Value>("/hotplug/memory", Some(&json!({ "requested_size_mib": 1025 })));
    assert!(refused.is_err());
    vm.say("go");
    let ended = vm.succeed();
    let (before, during, after) = (ended.number("before"), ended.number("during"), ended.number("after"));
    assert_eq!(during - before, 512 << 10, "KiB that were plugged");
    assert_eq!(before, after);
    ended.is("sum", &sha256(&vec![0; 300 << 20]));
}

#[test]
fn an_nmi_arrives_and_a_core_file_holds_the_memory() {
    let script = r#"
        nmis() { awk '/NMI:/{print $2}' /proc/interrupts; }
        before=$(nmis)
        printf 'a needle in %s\n' memory > /tmp/needle
        echo ready; read -r word
        fact nmis $(($(nmis) - before))"#;
    let mut vm = Setup::new(Kernel::quick(), Transport::Mmio).script(script).start_with_api();
    let mut client = vm.client();
    vm.wait_for("ready\n");
    done(client.put("/vm/nmi", None::<&()>));
    let core = vm.socket().with_file_name("core");
    let body = json!({ "path": core });
    let refused = client.put::<Value>("/vm/coredump", Some(&body));
    assert!(refused.unwrap_err().to_string().contains("pause it first"));
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    done(client.put("/vm/coredump", Some(&body)));
    assert!(client.put::<Value>("/vm/coredump", Some(&body)).is_err(), "it was written over");
    let content = fs::read(&core).unwrap();
    assert_eq!(&content[..4], b"\x7fELF");
    let needle = b"a needle in memory\n";
    assert!(content.windows(needle.len()).any(|window| window == needle), "the guest's file is not there");
    done(client.patch("/vm", Some(&json!({ "state": "Resumed" }))));
    vm.say("go");
    vm.succeed().is("nmis", &1);
}
