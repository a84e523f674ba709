//! JSON of machines and of processors.

use std::path::Path;

use api::{Spec, spec::CpuConfig};
use arch::needs::{Host, Needs, baseline};
use serde_json::{Value, json};

use crate::{edits::edited, pieces::Pieces};

fn machine() -> Value {
    let limiter =
        json!({ "bandwidth": { "size": 1000, "one_time_burst": 5, "refill_time": 100 }, "ops": null });
    json!({
        "boot-source": { "kernel_image_path": "vmlinux", "boot_args": "console=ttyS0", "initrd_path": "initrd" },
        "machine-config": {
            "vcpu_count": 2, "mem_size_mib": 128, "smt": false, "track_dirty_pages": true,
            "huge_pages": "None", "max_vcpu_count": 4, "transport": "Pci", "prefault": false, "pvpanic": true
        },
        "drives": [
            {
                "drive_id": "root", "path_on_host": "root.img", "is_root_device": true, "is_read_only": true,
                "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": limiter, "num_queues": 2,
                "queue_size": 128
            },
            { "drive_id": "data", "path_on_host": "data.img" }
        ],
        "network-interfaces": [
            { "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1500,
              "rx_rate_limiter": limiter, "num_queue_pairs": 1 }
        ],
        "vsock": { "guest_cid": 3, "uds_path": "v.sock" },
        "balloon": { "amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1 },
        "entropy": { "rate_limiter": limiter },
        "pmem": [{ "id": "pmem0", "path_on_host": "pmem.img", "read_only": true }],
        "memory-hotplug": { "total_size_mib": 1024, "block_size_mib": 2, "slot_size_mib": 128 },
        "serial": { "mode": "off" },
        "console": { "mode": "off" },
        "logger": { "log_path": "log", "level": "Info", "show_level": true },
        "metrics": { "metrics_path": "metrics" },
        "mmds-config": { "network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.169.254" }
    })
}

/// A machine's specification, as it stands in a snapshot or a configuration file: edited, or the
/// bytes as they are.
pub fn spec(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let text = match pieces.byte() {
        0 => edited(machine(), pieces.rest()).to_string(),
        _ => String::from_utf8_lossy(pieces.rest()).into_owned(),
    };
    if let Ok(loaded) = serde_json::from_str::<Spec>(&text) {
        let _ = loaded.check_parts();
    }
    let Ok(spec) = Spec::from_json(Path::new("machine.json"), &text) else { return };
    let regions = arch::layout::ram_regions(spec.machine_config.mem_size_mib << 20);
    assert!(regions.iter().all(|(_, length)| *length > 0));
    let again: Spec =
        serde_json::from_value(serde_json::to_value(&spec).expect("plain data")).expect("what was written");
    assert_eq!(again, spec);
}

/// A machine with every device, edited and as text.
pub fn spec_seeds() -> Vec<Vec<u8>> {
    let text = machine().to_string();
    assert!(serde_json::from_str::<Spec>(&text).is_ok_and(|spec| spec.check().is_ok()), "{text}");
    let small =
        br#"{"boot-source":{"kernel_image_path":"k"},"machine-config":{"vcpu_count":1,"mem_size_mib":64}}"#;
    vec![vec![0], vec![0, 9, 4], [&[1], &small[..]].concat(), [&[1], text.as_bytes()].concat()]
}

fn row(leaf: &str, subleaf: &str, [eax, ebx, ecx, edx]: [&str; 4]) -> Value {
    json!({ "leaf": leaf, "subleaf": subleaf, "flags": 0, "eax": eax, "ebx": ebx, "ecx": ecx, "edx": edx })
}

fn needs() -> Value {
    let rows = [
        row("0x0", "0x0", ["0x1f", "0x756e6547", "0x6c65746e", "0x49656e69"]),
        row("0x1", "0x0", ["0xc06f2", "0x100800", "0xfffa3223", "0x178bfbff"]),
        row("0x7", "0x0", ["0x2", "0xf1bf27eb", "0x1b415f6e", "0xbc814410"]),
        row("0xd", "0x0", ["0x602e7", "0x2b00", "0x2b00", "0x0"]),
        row("0xd", "0x2", ["0x100", "0x240", "0x0", "0x0"]),
        row("0x40000000", "0x0", ["0x40000001", "0x4b4d564b", "0x564b4d56", "0x4d"]),
        row("0x80000008", "0x0", ["0x3934", "0x200", "0x0", "0x0"]),
    ];
    json!({
        "format": 1, "vendor": "GenuineIntel", "model": "Anything", "tsc_khz": 2_000_000,
        "cpuid": rows, "msrs": [{ "index": "0x10a", "value": "0x2c" }], "registers": ["0x10", "0xc0000080"]
    })
}

fn host() -> Value {
    let mut host = needs();
    host["tsc_scaling"] = json!(true);
    host
}

/// What a machine needs of a host, hosts, and a CPU template.
pub fn cpu(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let (mode, one, other) = (pieces.byte(), pieces.piece(), pieces.piece());
    if mode == 1 {
        let text = String::from_utf8_lossy(one);
        let _ = (serde_json::from_str::<Needs>(&text), serde_json::from_str::<Host>(&text));
        let _ = CpuConfig::from_json(Path::new("cpu.json"), &text);
        return;
    }
    let hosts = [one, other].map(|edits| serde_json::from_value::<Host>(edited(host(), edits)));
    let needs = serde_json::from_value::<Needs>(edited(needs(), pieces.rest()));
    for host in hosts.iter().flatten() {
        if let Ok(needs) = &needs {
            let missing = needs.missing(host).into_iter().flatten();
            missing.for_each(|missing| assert!(!missing.to_string().is_empty()));
        }
    }
    let hosts: Vec<Host> = hosts.into_iter().flatten().collect();
    if let Ok(found) = baseline(&hosts) {
        let _ = format!("{found:?}");
    }
}

/// Two equal hosts, and a template as text.
pub fn cpu_seeds() -> Vec<Vec<u8>> {
    assert!(serde_json::from_value::<Needs>(needs()).is_ok(), "the seed is what is read");
    assert!(serde_json::from_value::<Host>(host()).is_ok(), "the seed is what is read");
    let template = r#"{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"eax","bitmap":"0bxxxx000000000011xx00011011110010"}]}],"msr_modifiers":[{"addr":"0x10a","bitmap":"0b0000000000000000000000000000000000000000000000000000000000000000"}]}"#;
    let raw = |text: &str| [vec![1], crate::pieces::piece(text.as_bytes())].concat();
    vec![vec![0; 5], vec![0, 2, 0, 9, 4, 0, 0, 12, 4], raw(template), raw(&needs().to_string())]
}
