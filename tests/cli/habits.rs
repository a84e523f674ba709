//! What is asked wrong, and the commands around machines.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use super::host::{Host, LIMIT, Running, SMALL, test_image};

#[test]
fn what_is_asked_wrong_is_125_and_names_what_is_wrong() {
    let host = Host::new();
    let image = test_image();
    let run = |words: &[&str]| {
        let ended = host.nacelle(&[&["run"], words].concat()).expect(125);
        assert_eq!(ended.text(), "", "standard output is the command's alone");
        ended
    };
    run(&["--no-such-flag", &image, "true"]).says(&["--no-such-flag"]);
    run(&["-m", "512", &image, "true"]).says(&["512M or 2G"]);
    run(&["--cpus", "65", &image, "true"]).says(&["65"]);
    run(&["--tmpfs", "relative", &image, "true"]).says(&["absolute"]);
    run(&["--name", "a/..", &image, "true"]).says(&["name"]);
    run(&["-w", "relative", &image, "true"]).says(&["relative", "must start with '/'"]);
    run(&[]).says(&["IMAGE"]);
    run(&["-q"]).says(&["IMAGE"]);
    run(&["/no/such/image", "true"]).says(&["/no/such/image", "does not exist"]);
    run(&["/etc/hostname", "true"]).says(&["/etc/hostname"]);
    run(&["--env-file", "/no/such/file", &image, "true"]).says(&["/no/such/file", "caused by"]);
    run(&["-m", "9000G", &image, "true"]).says(&["9216000 MiB", "this host has"]);
    host.nacelle(&["no-such-command"]).expect(125).says(&["no-such-command"]);
    host.nacelle(&["logs", "nobody"]).says(&["No machine is called \"nobody\""]);
    host.assert_nothing_left();
}

#[test]
fn bad_kernels_and_disks_are_said_and_nothing_stays() {
    let host = Host::new();
    let image = test_image();
    let run = |words: &[&str]| host.nacelle(&[&["run", "-q"], &SMALL[..], words, &[&image, "true"]].concat());
    let file = |name: &str, bytes: &[u8]| {
        let path = host.dir().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    run(&["--kernel", "/no/such/kernel"]).expect(125).says(&["/no/such/kernel"]);
    run(&["--kernel", &file("text", &[b'x'; 5000])]).expect(125).says(&["text"]);
    run(&["--kernel", &file("empty", b"")]).expect(125).says(&["empty"]);
    let dir = host.dir().join("folder");
    fs::create_dir(&dir).unwrap();
    run(&["--kernel", dir.to_str().unwrap()]).expect(125).says(&["folder", "vmlinux"]);
    run(&["--disk", dir.to_str().unwrap()]).expect(125).says(&["folder", "directory"]);
    run(&["--disk", "/no/such/disk"]).expect(125).says(&["/no/such/disk"]);
    run(&["--tap", "nosuchtap"]).expect(125).says(&["nosuchtap"]);
    // A disk on which there is no file system to mount.
    let noise = file("noise", &super::host::noise(1 << 20));
    run(&["--disk", &format!("{noise}:/mnt")]).expect(125).says(&["/mnt"]);
    host.assert_nothing_left();
}

#[test]
fn a_start_that_failed_is_told_by_d_as_well() {
    let host = Host::new();
    let image = test_image();
    let ended = host.nacelle(&[&["run", "-q", "-d"], &SMALL[..], &[&image, "no-such-program"]].concat());
    assert_eq!(ended.expect(127).says(&["no-such-program"]).text(), "");
    host.assert_nothing_left();
}

#[test]
fn doctor_finds_what_is_there_and_names_what_is_missing() {
    let host = Host::new();
    let findings = |command: Command, code: i32| -> Value {
        let ended = Running::start(command, None).end(LIMIT).expect(code);
        serde_json::from_slice(&ended.out).expect("doctor prints JSON")
    };
    let level = |findings: &Value, check: &str| -> String {
        let mut found = findings.as_array().expect("an array").iter();
        let finding =
            found.find(|f| f["check"] == check).unwrap_or_else(|| panic!("no {check} in {findings}"));
        finding["level"].as_str().expect("a level").to_owned()
    };
    let line = ["doctor", "--format", "json"];
    let good = findings(host.command(&line), 0);
    for check in ["kernel", "processor", "kvm", "guest kernel", "agent"] {
        assert_eq!(level(&good, check), "ok", "{check}");
    }
    let mut command = host.command(&line);
    command.env("NACELLE_KERNEL", "/no/such/kernel").env("NACELLE_AGENT", "/no/such/agent");
    let bad = findings(command, 1);
    assert_eq!((level(&bad, "guest kernel"), level(&bad, "agent")), ("fail".to_owned(), "fail".to_owned()));
    for name in ["/no/such/kernel", "/no/such/agent"] {
        assert!(bad.to_string().contains(name), "{name} is not in {bad}");
    }
    let text = host.nacelle(&["doctor"]).expect(0).text();
    assert!(text.contains("This host can run machines"), "{text}");
}

#[test]
fn completion_is_a_script_that_bash_reads() {
    let host = Host::new();
    let script = host.nacelle(&["completion", "bash"]).expect(0).text();
    let file = host.dir().join("completion");
    fs::write(&file, script).unwrap();
    let test = "set -eu; source \"$1\"; complete -p nacelle >/dev/null; COMP_WORDS=(nacelle ins); COMP_CWORD=1; \
                _nacelle nacelle ins nacelle; echo \"${COMPREPLY[*]}\"";
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", test, "bash"]).arg(&file).stdin(Stdio::null());
    let ended = Running::start(bash, None).end(LIMIT).expect(0);
    assert_eq!((ended.text().trim(), &ended.err[..]), ("inspect", ""));
    for shell in ["zsh", "fish"] {
        assert!(host.nacelle(&["completion", shell]).expect(0).text().contains("inspect"));
    }
    assert!(!Path::new("completion").exists());
}
