//! What a client of the API sends: bytes of HTTP, in pieces, and bodies of requests.

use api::{
    Request,
    http::{MAX_HEAD, Parser},
    routes,
};
use serde_json::{Value, json};

use crate::{edits::edited, pieces::Pieces};

/// Largest body of a request, as the monitor has it.
const BODY_MAX: usize = 51_200;

/// A request of each kind that has a body.
fn bodies() -> Vec<(&'static str, &'static str, Value)> {
    let limiter = json!({ "bandwidth": { "size": 1000, "one_time_burst": 5, "refill_time": 100 } });
    vec![
        (
            "PUT",
            "/snapshot/create",
            json!({
                "snapshot_type": "Diff", "snapshot_path": "a", "store": "s", "compression": "lz4",
                "drives": "copy", "hash": true, "live": true, "background": true, "replace": true,
                "note": { "any": [1] }
            }),
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({
                "snapshot_path": "a", "mem_backend": { "backend_type": "Uffd", "backend_path": "b" },
                "track_dirty_pages": true, "resume_vm": true, "clock_realtime": true, "huge_pages": "2M",
                "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": "06:00:00:00:00:01" }],
                "drive_overrides": [{ "drive_id": "root", "path_on_host": "c" }],
                "pmem_overrides": [{ "id": "p", "path_on_host": "d" }],
                "vsock_override": { "uds_path": "v", "guest_cid": 5 }, "serial_override": { "mode": "off" },
                "prefetch": "all", "record_working_set": false, "search": ["e", "f"]
            }),
        ),
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PUT", "/actions", json!({ "action_type": "InstanceStart" })),
        ("PUT", "/boot-source", json!({ "kernel_image_path": "k", "boot_args": "a", "initrd_path": "i" })),
        ("PUT", "/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 128, "huge_pages": "2M" })),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 128, "smt": false })),
        ("PUT", "/drives/a", json!({ "drive_id": "a", "path_on_host": "p", "rate_limiter": limiter })),
        ("PATCH", "/drives/a", json!({ "drive_id": "a", "path_on_host": "p", "rate_limiter": limiter })),
        (
            "PUT",
            "/network-interfaces/e",
            json!({ "iface_id": "e", "host_dev_name": "t", "tx_rate_limiter": limiter }),
        ),
        ("PUT", "/vsock", json!({ "guest_cid": 3, "uds_path": "v" })),
        ("PUT", "/balloon", json!({ "amount_mib": 1, "deflate_on_oom": true })),
        ("PATCH", "/balloon", json!({ "amount_mib": 1 })),
        (
            "PUT",
            "/hotplug/memory",
            json!({ "total_size_mib": 1024, "block_size_mib": 2, "slot_size_mib": 128 }),
        ),
        ("PATCH", "/hotplug/memory", json!({ "requested_size_mib": 512 })),
        ("PUT", "/mmds", json!({ "a": { "b": [1, 2, null] } })),
        ("PATCH", "/mmds", json!({ "a": { "b": null } })),
        ("PUT", "/mmds/config", json!({ "network_interfaces": ["e"], "version": "V2" })),
        ("PUT", "/logger", json!({ "log_path": "l", "level": "Info" })),
        (
            "PUT",
            "/cpu-config",
            json!({ "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{ "register": "eax", "bitmap": "0b0000000000000000xxxxxxxxxxxxxxxx" }] }] }),
        ),
        ("PUT", "/serial", json!({ "mode": "file", "serial_out_path": "s" })),
        ("PUT", "/entropy", json!({ "rate_limiter": limiter })),
    ]
}

fn understood(method: &str, path: &str, body: &[u8]) {
    match routes::parse(method, path, body) {
        Ok(parsed) => match parsed.request {
            Request::CreateSnapshot(create) => {
                let _ = create.check();
            }
            Request::LoadSnapshot(load) => {
                let _ = (load.check(), load.backend());
            }
            other => drop(format!("{other:?}")),
        },
        Err(fault) => {
            let shown = routes::render(&Err(fault));
            assert!((400..600).contains(&shown.status), "{}", shown.status);
        }
    }
}

/// 0: HTTP in pieces of some length. 1: a body with edits. 2: a body of these bytes.
pub fn run(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let (mode, which) = (pieces.byte() % 3, pieces.byte());
    if mode == 0 {
        return requests(pieces.rest(), usize::from(which) + 1);
    }
    let bodies = bodies();
    let Some((method, path, body)) = bodies.into_iter().nth(usize::from(which)) else { return };
    match mode {
        1 => understood(method, path, edited(body, pieces.rest()).to_string().as_bytes()),
        _ => understood(method, path, pieces.rest()),
    }
}

fn requests(bytes: &[u8], length: usize) {
    let mut parser = Parser::new(BODY_MAX);
    for mut piece in bytes.chunks(length) {
        while !piece.is_empty() {
            let before = piece.len();
            match parser.advance(&mut piece) {
                Ok(Some(request)) => understood(request.method.name(), &request.path, &request.body),
                Ok(None) => assert!(piece.is_empty(), "what is not a request yet is taken whole"),
                Err(error) => return assert!((400..500).contains(&error.status())),
            }
            assert!(piece.len() < before, "each step takes something");
            assert!(parser.held() <= 2 * (MAX_HEAD + BODY_MAX), "{} bytes are held", parser.held());
            let _ = (parser.wants_continue(), parser.pending());
        }
    }
}

/// Requests as HTTP, two of them at once, and each body.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (number, (method, path, body)) in (0u8..).zip(bodies()) {
        let body = body.to_string();
        assert!(routes::parse(method, path, body.as_bytes()).is_ok(), "{method} {path} {body}");
        let length = body.len();
        let http = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
        seeds.push([&[0, 255][..], http.as_bytes()].concat());
        seeds.push(vec![1, number]);
        seeds.push([&[2, number], body.as_bytes()].concat());
    }
    let two =
        "GET / HTTP/1.1\r\n\r\nPOST /vm/wait HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n";
    seeds.push([&[0, 9][..], two.as_bytes()].concat());
    seeds
}
