//! The lab itself, tried from outside through the program that developers call.
//!
//! Each test starts an emulated machine, so each tries several things at once.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("lab").args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    lab(arguments).output().unwrap()
}

/// Process ids of the children of `parent`.
fn children(parent: u32) -> Vec<String> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    fs::read_to_string(path).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn is_alive(process: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // An orphan that nobody has collected yet runs no more.
    !status.is_empty() && !status.contains(") Z ")
}

#[test]
fn streams_are_separate_and_byte_exact_and_the_code_comes_back() {
    let bytes: Vec<u8> =
        (0..300_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
    let mut child = lab(&["--", "sh", "-c", "cat; printf 'to\\0err' >&2; exit 9"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let fed = bytes.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&fed));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert_eq!(output.status.code(), Some(9));
    assert!(output.stdout == bytes, "{} bytes of {}", output.stdout.len(), bytes.len());
    assert_eq!(output.stderr, b"to\0err");
}

#[test]
fn the_inside_has_kvm_and_our_files_and_forgets_what_it_writes() {
    let script = "test -c /dev/kvm -a -c /dev/net/tun -a -c /dev/vhost-vsock || exit 1
        test \"$NACELLE_LAB$GIVEN\" = 1yes || exit 2
        test -d xtask -o -e Cargo.toml || exit 3
        echo x > /etc/forgotten || exit 4
        grep -q memory /sys/fs/cgroup/cgroup.subtree_control || exit 5
        kill -TERM $$";
    let output = output(&["-e", "GIVEN=yes", "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(128 + 15), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!fs::exists("/etc/forgotten").unwrap());
}

#[test]
fn two_run_at_once_and_a_shared_directory_takes_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let script = format!("echo kept > {path}/file");
    let mut first = lab(&["-w", path, "--", "sh", "-c", &script]).spawn().unwrap();
    let mut second = lab(&["-c", "1", "-m", "1024", "--", "nproc"]).stdout(Stdio::piped()).spawn().unwrap();
    assert!(first.wait().unwrap().success());
    assert!(second.wait().unwrap().success());
    let kept = folder.path().join("file");
    assert_eq!(fs::read_to_string(&kept).unwrap(), "kept\n");
    assert_eq!(fs::metadata(kept).unwrap().uid(), fs::metadata(folder.path()).unwrap().uid());
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_takes_too_long_124() {
    let output = output(&["--", "no-such-program-here"]);
    assert_eq!(output.status.code(), Some(127));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-program-here"));
    let start = Instant::now();
    let output = lab(&["-t", "6", "--", "sleep", "100"]).output().unwrap();
    assert_eq!(output.status.code(), Some(124));
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_machine_that_dies_says_why() {
    let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60";
    let output = output(&["--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(125));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("Kernel panic") && text.contains("sysrq triggered crash"), "{text}");
}

#[test]
fn an_interrupt_and_a_kill_leave_nothing_behind() {
    for (signal, code) in [("INT", Some(130)), ("KILL", None)] {
        let mut child =
            lab(&["--", "sh", "-c", "echo up; sleep 100"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        let emulators = children(child.id());
        assert!(!emulators.is_empty());
        signal_to(&child, signal);
        assert_eq!(child.wait().unwrap().code(), code);
        let start = Instant::now();
        while emulators.iter().any(|process| is_alive(process)) {
            assert!(start.elapsed() < Duration::from_secs(10), "{emulators:?} went on after {signal}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn signal_to(child: &Child, signal: &str) {
    let kill = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
    assert!(kill.success());
}
