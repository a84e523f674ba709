use super::*;

fn read(text: &str) -> Result<Spec, Fault> {
    Spec::from_json(Path::new("machine.json"), text)
}

fn with(rest: &str) -> String {
    format!(r#"{{"boot-source": {{"kernel_image_path": "vmlinux"}}{rest}}}"#)
}

#[test]
fn a_firecracker_file_reads_with_its_defaults() {
    let text = with(
        r#", "drives": [{"drive_id": "rootfs", "path_on_host": "a.ext4", "is_root_device": true,
            "partuuid": null, "is_read_only": false, "cache_type": "Unsafe", "io_engine": "Sync"}],
           "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false},
           "network-interfaces": [{"iface_id": "net1", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02"}],
           "vsock": {"guest_cid": 3, "uds_path": "./v.sock"}"#,
    );
    let spec = read(&text).unwrap();
    assert_eq!(spec.machine_config.vcpu_count, 2);
    assert_eq!(spec.drives[0].queue_size, 256);
    assert_eq!(spec.machine_config.transport, Transport::Mmio);
    let again: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
    assert_eq!(again, spec);
}

#[test]
fn an_unknown_field_is_refused_with_the_nearest_name() {
    let fault = read(&with(r#", "drive": []"#)).unwrap_err();
    assert!(fault.to_string().contains("did you mean `drives`?"), "{fault}");
}

#[test]
fn every_broken_rule_is_named() {
    let cases = [
        (r#""machine-config": {"vcpu_count": 0, "mem_size_mib": 128}"#, "vcpu_count is 0"),
        (r#""machine-config": {"vcpu_count": 65, "mem_size_mib": 128}"#, "vcpu_count is 65"),
        (r#""machine-config": {"vcpu_count": 3, "mem_size_mib": 128, "smt": true}"#, "1 or even"),
        (
            r#""machine-config": {"vcpu_count": 4, "max_vcpu_count": 2, "mem_size_mib": 128}"#,
            "max_vcpu_count is 2; it must be vcpu_count, which is 4, to 64",
        ),
        (r#""machine-config": {"vcpu_count": 4, "max_vcpu_count": 65, "mem_size_mib": 128}"#, "is 65"),
        (
            r#""machine-config": {"vcpu_count": 2, "max_vcpu_count": 5, "mem_size_mib": 128, "smt": true}"#,
            "max_vcpu_count is 5; with smt",
        ),
        (r#""machine-config": {"vcpu_count": 1, "mem_size_mib": 15}"#, "at least 16"),
        (r#""machine-config": {"vcpu_count": 1, "mem_size_mib": 17592186044416}"#, "64 TiB"),
        (r#""machine-config": {"vcpu_count": 1, "mem_size_mib": 17, "huge_pages": "2M"}"#, "must be even"),
        (r#""drives": [{"drive_id": "a b", "path_on_host": "x"}]"#, "letters, digits"),
        (
            r#""drives": [{"drive_id": "a", "path_on_host": "x"}, {"drive_id": "a", "path_on_host": "y"}]"#,
            "Two devices have the drive_id \"a\"",
        ),
        (r#""drives": [{"drive_id": "a", "path_on_host": "x", "queue_size": 100}]"#, "power of two"),
        (r#""drives": [{"drive_id": "a"}]"#, "either path_on_host or by_descriptor"),
        (r#""drives": [{"drive_id": "a", "path_on_host": "x", "by_descriptor": true}]"#, "is either at"),
        (r#""drives": [{"drive_id": "a", "socket": "x"}]"#, "vhost-user-block is not supported"),
        (
            r#""network-interfaces": [{"iface_id": "a"}]"#,
            "one of host_dev_name, by_descriptor and host_dev_fd",
        ),
        (r#""network-interfaces": [{"iface_id": "a", "host_dev_fd": 1}]"#, "above 2"),
        (r#""vsock": {"guest_cid": 2, "uds_path": "v"}"#, "reserved"),
        (r#""vsock": {"guest_cid": 3, "uds_path": ""}"#, "0 bytes"),
        (r#""serial": {"mode": "file"}"#, "needs a path"),
        (r#""console": {"mode": "pty", "path": "x"}"#, "takes no path"),
        (r#""entropy": {"rate_limiter": {"ops": {"size": -1, "refill_time": 1}}}"#, "u64"),
        (r#""entropy": {"rate_limiter": {"ops": {"size": 1}}}"#, "refill_time"),
    ];
    for (part, expected) in cases {
        let fault = read(&with(&format!(", {part}"))).unwrap_err();
        assert!(fault.to_string().contains(expected), "{part}: {fault}");
    }
}

#[test]
fn two_roots_and_long_socket_paths_are_refused() {
    let drive = |id| format!(r#"{{"drive_id": "{id}", "path_on_host": "x", "is_root_device": true}}"#);
    let fault = read(&with(&format!(r#", "drives": [{}, {}]"#, drive("a"), drive("b")))).unwrap_err();
    assert!(fault.message.contains("both are root devices"));
    let path = "p".repeat(108);
    let fault = read(&with(&format!(r#", "vsock": {{"guest_cid": 3, "uds_path": "{path}"}}"#))).unwrap_err();
    assert!(fault.message.contains("108 bytes"));
}

#[test]
fn null_and_other_spellings_are_read_as_firecracker_reads_them() {
    let text = with(
        r#", "machine-config": null, "logger": {"level": "wArN", "show_level": null, "log_path": null},
           "drives": [{"drive_id": "a", "path_on_host": "x", "is_read_only": null, "io_engine": null,
            "socket": null, "partuuid": null, "rate_limiter": null}]"#,
    );
    let spec = read(&text).unwrap();
    assert_eq!(spec.machine_config, MachineConfig::default());
    assert_eq!(spec.logger.unwrap().level, LogLevel::Warning);
    assert_eq!(spec.drives[0].io_engine, IoEngine::Sync);
    let fault = read(&with(r#", "logger": {"level": "warm"}"#)).unwrap_err();
    assert!(fault.to_string().contains("did you mean `Warn`?"), "{fault}");
}
