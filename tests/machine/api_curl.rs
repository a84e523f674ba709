//! The README's quick start, by curl, word for word as a user of Firecracker types it.

use std::process::Command;

use api::spec::Transport;

use crate::{kernel::Kernel, vm::Setup};

#[test]
fn curl_starts_a_machine_and_ctrl_alt_del_ends_it() {
    let script = r#"
        fact disk $(cat /sys/block/vda/size)
        fact read $(head -c 6 /dev/vda)
        echo ready
        while :; do sleep 1; done"#;
    let setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    let disk = setup.folder().join("disk");
    let mut content = vec![0; 1 << 20];
    content[..6].copy_from_slice(b"inside");
    std::fs::write(&disk, content).unwrap();
    let (vm, spec) = setup.start_empty();
    drop(vm.client());
    let (kernel, initrd) = (spec.boot_source.kernel_image_path, spec.boot_source.initrd_path.unwrap());
    let arguments = spec.boot_source.boot_args.unwrap();
    let bodies = [
        (
            "boot-source",
            format!(
                r#"{{"kernel_image_path": "{}", "initrd_path": "{}", "boot_args": "{arguments}"}}"#,
                kernel.display(),
                initrd.display()
            ),
        ),
        (
            "drives/data",
            format!(
                r#"{{"drive_id": "data", "path_on_host": "{}", "is_root_device": false, "is_read_only": true}}"#,
                disk.display()
            ),
        ),
        ("entropy", "{}".to_owned()),
        ("actions", r#"{"action_type": "InstanceStart"}"#.to_owned()),
    ];
    for (path, body) in bodies {
        curl(&vm.socket(), path, &body);
    }
    vm.wait_for("ready\n");
    curl(&vm.socket(), "actions", r#"{"action_type": "SendCtrlAltDel"}"#);
    let ended = vm.wait();
    ended.is("disk", &2048);
    ended.is("read", "inside");
    assert_eq!(ended.code, 0);
    ended.says("The guest asked for a reset");
}

fn curl(socket: &std::path::Path, path: &str, body: &str) {
    let out = Command::new("curl")
        .args(["-sS", "-i", "-X", "PUT", "--max-time", "60", "--unix-socket"])
        .arg(socket)
        .args(["--data", body, &format!("http://localhost/{path}")])
        .output()
        .expect("curl is not installed");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.starts_with("HTTP/1.1 204"), "{path}: {text}{}", String::from_utf8_lossy(&out.stderr));
}
