//! What users get wrong: each mistake ends in one clear sentence and leaves nothing behind.
//!
//! No guest runs here. The monitor's part of every answer is checked for its form too: the
//! sentence first, each cause on a line of its own, nothing else, a code that is not zero.

use std::{
    fs::{self, File},
    os::unix::{fs::symlink, net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    kernel::Kernel,
    process::{Process, Stream, code, within},
};

/// Exit code for a machine that cannot be built.
const CONFIGURATION: i32 = 152;
/// Exit code for arguments that cannot be understood.
const ARGUMENTS: i32 = 153;

/// A folder with a configuration of a machine that could start, to be spoiled.
struct Bench {
    folder: TempDir,
    spec: Value,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let spec = json!({
            "boot-source": {"kernel_image_path": Kernel::debian().image, "boot_args": "console=ttyS0"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        });
        Bench { folder, spec }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into the folder; its path.
    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Changes one section.
    fn with(mut self, section: &str, value: Value) -> Bench {
        self.spec[section] = value;
        self
    }

    /// The machine with another kernel.
    fn kernel(self, path: &Path) -> Bench {
        self.with("boot-source", json!({"kernel_image_path": path}))
    }

    /// Runs the monitor, which must refuse with all of `words` in what it says, and leave the
    /// folder as it was.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let config = self.file("machine.json", self.spec.to_string().as_bytes());
        let before = names(self.folder.path());
        is_refused(&config, words);
        assert_eq!(names(self.folder.path()), before, "something was left behind");
    }
}

/// Runs the monitor with a configuration file; it must refuse with all of `words` in what it
/// says. Warnings are left out: they may come before the failure.
#[track_caller]
fn is_refused(config: &Path, words: &[&str]) {
    let config = config.to_str().unwrap();
    let (code, said) = run(&["vmm", "--no-api", "--level", "Error", "--config-file", config]);
    assert_eq!(code, CONFIGURATION, "{said}");
    is_well_formed(&said);
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

fn names(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

/// Runs nacelle to its end; its code and standard error.
#[track_caller]
fn run(arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacelle"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::new(command.spawn().unwrap());
    let output = Stream::of(process.child().stdout.take().unwrap());
    let errors = Stream::of(process.child().stderr.take().unwrap());
    let deadline = within(60);
    let Some(status) = process.wait(deadline) else { panic!("It does not end; it says: {}", errors.text()) };
    // The streams end with the last process that holds them: nobody was left running.
    assert!(output.ended(deadline) && errors.ended(deadline), "a process was left behind");
    assert_eq!(output.text(), "", "standard output is not for failures");
    (code(status), errors.text())
}

#[track_caller]
fn is_well_formed(said: &str) {
    let mut lines = said.lines();
    let sentence = lines.next().unwrap_or_default();
    let start =
        sentence.strip_prefix("nacelle: ").and_then(|text| text.split(' ').next()).unwrap_or_default();
    // A capital letter, or the name of a field or file.
    let starts = start.starts_with(|c: char| c.is_uppercase()) || start.contains(['_', '"']);
    assert!(starts, "no sentence comes first: {said}");
    assert!(!sentence.ends_with('.') && sentence.len() < 400, "not one short sentence: {said}");
    for line in lines {
        assert!(line.starts_with("  caused by: "), "not a cause: {line:?} in {said}");
    }
    assert!(!said.contains("panicked") && !said.contains("Os {"), "meant for programmers: {said}");
}

/// The first kibibytes of a bzImage with another protocol version.
fn old_bzimage() -> Vec<u8> {
    let mut image = fs::read(Kernel::debian().image).unwrap();
    image.truncate(64 << 10);
    image[0x206..0x208].copy_from_slice(&[0x03, 0x02]);
    image
}

/// An ELF header: 64 bits, little endian, of `machine`, one program header that loads `size`
/// bytes at 16 MiB.
fn elf(machine: u16, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; 120];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &machine.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &(16u64 << 20).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(80, &(16u64 << 20).to_le_bytes());
    put(88, &(16u64 << 20).to_le_bytes());
    put(96, &size.to_le_bytes());
    put(104, &size.to_le_bytes());
    bytes
}

#[test]
fn a_kernel_that_cannot_be_read_is_named_with_the_reason() {
    let bench = Bench::new();
    let (missing, folder) = (bench.path("none"), bench.path("folder"));
    fs::create_dir(&folder).unwrap();
    let dangling = bench.path("link");
    symlink("nowhere", &dangling).unwrap();
    let bench = bench.kernel(&missing);
    bench.refused(&["kernel", "/none", "caused by: No such file"]);
    let bench = bench.kernel(&dangling);
    bench.refused(&["kernel", "/link", "caused by: No such file"]);
    let bench = bench.kernel(&folder);
    bench.refused(&["kernel", "/folder", "caused by: It is a directory"]);
    bench.kernel(Path::new("/dev/null")).refused(&["caused by: It is not a regular file"]);
}

#[test]
fn a_truncated_kernel_is_told_by_its_numbers() {
    let bench = Bench::new();
    let mut image = fs::read(Kernel::debian().image).unwrap();
    image.truncate(1 << 20);
    let half = bench.file("half", &image);
    let bench = bench.kernel(&half);
    bench.refused(&["/half", "is cut short", "the file has 1048576"]);
    let short = bench.file("elf", &elf(62, 4096));
    bench.kernel(&short).refused(&["/elf", "is cut short", "4096 bytes", "the file has 120"]);
}

#[test]
fn what_is_no_kernel_of_this_processor_is_told_by_what_it_is() {
    let cases: [(Vec<u8>, &[&str]); 8] = [
        (elf(183, 0), &["is for aarch64", "x86_64"]),
        (elf(243, 0), &["is for riscv64"]),
        (old_bzimage(), &["too old", "2.03", "2.12"]),
        (Vec::new(), &["an empty file"]),
        (b"\x1f\x8b\x08 and so on".to_vec(), &["gzip data (decompress it first)"]),
        (b"070701 and so on".to_vec(), &["a cpio archive (an initrd?)"]),
        (b"#!/bin/sh\n".to_vec(), &["a script"]),
        (vec![0xa5; 4096], &["data of an unknown kind", "ELF vmlinux or a bzImage"]),
    ];
    for (content, words) in cases {
        let bench = Bench::new();
        let kernel = bench.file("kernel", &content);
        bench.kernel(&kernel).refused(words);
    }
}

#[test]
fn what_does_not_fit_into_memory_is_refused_with_the_size_that_would_do() {
    let bench = Bench::new();
    let initrd = bench.path("initrd");
    File::create(&initrd).unwrap().set_len(200 << 20).unwrap();
    let source = json!({"kernel_image_path": Kernel::debian().image, "initrd_path": initrd});
    bench.with("boot-source", source).refused(&["/initrd", "200 MiB does not fit", "of memory would do"]);
    let bench = Bench::new().with("machine-config", json!({"vcpu_count": 1, "mem_size_mib": 16}));
    bench.refused(&["vmlinuz", "does not fit", "the machine has 16 MiB", "give it at least"]);
    let bench = Bench::new().with("machine-config", json!({"vcpu_count": 1, "mem_size_mib": 1 << 24}));
    bench.refused(&["asks for 16777216 MiB of memory", "this host has"]);
}

#[test]
fn a_disk_that_is_none_is_named() {
    let drive = |path: &Path| json!([{"drive_id": "data", "path_on_host": path}]);
    let bench = Bench::new();
    let folder = bench.path("folder");
    fs::create_dir(&folder).unwrap();
    let missing = bench.path("none");
    let bench = bench.with("drives", drive(&folder));
    bench.refused(&["Drive \"data\" cannot be set up", "/folder", "directory"]);
    let bench = bench.with("drives", drive(&missing));
    bench.refused(&["Drive \"data\" cannot be set up", "/none", "does not exist"]);
    bench
        .with("drives", drive(Path::new("/dev/null")))
        .refused(&["Drive \"data\" cannot be set up", "/dev/null"]);
}

#[test]
fn a_tap_that_is_not_there_or_not_a_tap_is_refused_with_what_to_do() {
    let interface = |name: &str| json!([{"iface_id": "eth0", "host_dev_name": name}]);
    let bench = Bench::new().with("network-interfaces", interface("nclnone0"));
    bench.refused(&[
        "Network interface \"eth0\" cannot be set up",
        "Tap nclnone0 does not exist",
        "ip tuntap add",
    ]);
    let bench = bench.with("network-interfaces", interface("lo"));
    bench.refused(&["Network interface \"eth0\" cannot be set up", "lo is not a tap"]);
    let mac = json!([{"iface_id": "eth0", "host_dev_name": "nclnone0", "guest_mac": "01:00:5e:00:00:01"}]);
    bench.with("network-interfaces", mac).refused(&["01:00:5e:00:00:01", "unicast"]);
}

#[test]
fn paths_that_are_taken_are_not_taken_over() {
    let bench = Bench::new();
    let used = bench.path("used.sock");
    let _other = UnixListener::bind(&used).unwrap();
    let bench = bench.with("vsock", json!({"guest_cid": 3, "uds_path": used}));
    bench.refused(&["/used.sock", "exists already"]);
    let file = bench.file("file", b"mine");
    let bench = bench.with("vsock", json!({"guest_cid": 3, "uds_path": file}));
    bench.refused(&["/file", "exists already"]);
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    let folder = json!({"guest_cid": 3, "uds_path": bench.path("no/folder.sock")});
    let bench = bench.with("vsock", folder);
    bench.refused(&["/no/folder.sock", "No such file"]);
    let bench = Bench { spec: Bench::new().spec, ..bench };
    bench
        .with("serial", json!({"mode": "socket", "serial_out_path": used}))
        .refused(&["/used.sock", "in use"]);
}

/// What was made for the first devices goes again when a later one fails.
#[test]
fn a_failure_late_in_the_build_takes_back_what_was_made() {
    let bench = Bench::new();
    let [serial, vsock] = ["serial.sock", "v.sock"].map(|name| bench.path(name));
    let drives: Vec<_> =
        (0..40).map(|i| json!({"drive_id": format!("d{i}"), "path_on_host": Kernel::debian().image, "is_read_only": true})).collect();
    let bench = bench
        .with("serial", json!({"mode": "socket", "serial_out_path": serial}))
        .with("vsock", json!({"guest_cid": 3, "uds_path": vsock}));
    let bench = bench.with("drives", json!(drives));
    bench.refused(&["There is no room for device"]);
    let late = json!({"iface_id": "late", "host_dev_name": "nclnone1"});
    bench.with("drives", json!([])).with("network-interfaces", json!([late])).refused(&["nclnone1"]);
}

#[test]
fn slips_in_the_configuration_are_answered_with_what_was_meant() {
    let machine = |value: Value| Bench::new().with("machine-config", value);
    machine(json!({"vcpus_count": 1, "mem_size_mib": 128}))
        .refused(&["machine.json", "did you mean `vcpu_count`"]);
    machine(json!({"vcpu_count": 0, "mem_size_mib": 128})).refused(&["vcpu_count is 0", "1 to 64"]);
    machine(json!({"vcpu_count": "two", "mem_size_mib": 128})).refused(&["machine.json", "two"]);
    let drives = |ids: [&str; 2]| json!(ids.map(|id| json!({"drive_id": id, "path_on_host": "/dev/null"})));
    Bench::new().with("drives", drives(["a", "a"])).refused(&["Two devices have the drive_id \"a\""]);
    Bench::new().with("drives", drives(["a", "../b"])).refused(&["\"../b\"", "letters, digits"]);
    let twice = json!(["x", "y"].map(|id| json!({"iface_id": id, "host_dev_name": "tap7"})));
    Bench::new().with("network-interfaces", twice).refused(&["Two interfaces use the tap \"tap7\""]);
    let long = "x".repeat(2100);
    let source = json!({"kernel_image_path": Kernel::debian().image, "boot_args": long});
    Bench::new().with("boot-source", source).refused(&["command line has", "at most"]);
    let source = json!({"kernel_image_path": Kernel::debian().image, "boot_args": "a\nb"});
    Bench::new().with("boot-source", source).refused(&["control character 0x0a", "position 1"]);
}

#[test]
fn a_configuration_file_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.json");
    let refused = |words: &[&str]| is_refused(&path, words);
    refused(&["machine.json cannot be read", "No such file"]);
    fs::create_dir(&path).unwrap();
    refused(&["machine.json cannot be read", "directory"]);
    fs::remove_dir(&path).unwrap();
    let deep = "[".repeat(100_000);
    let huge = format!("{{\"boot-source\": \"{}\"}}", "x".repeat(2 << 20));
    let cases: [(&[u8], &[&str]); 6] = [
        (b"", &["is not a machine specification"]),
        (b"{", &["is not a machine specification", "line 1"]),
        (b"kernel: vmlinux", &["is not a machine specification"]),
        (b"\xff\xfe\0\x01", &["machine.json"]),
        (deep.as_bytes(), &["is not a machine specification"]),
        (huge.as_bytes(), &["is larger than 1048576 bytes"]),
    ];
    for (content, words) in cases {
        fs::write(&path, content).unwrap();
        refused(words);
    }
}

#[test]
fn arguments_that_cannot_be_understood_have_their_own_code() {
    for (arguments, words) in [
        (&["vmm", "--config-fil", "x"][..], "did you mean --config-file?"),
        (&["vmm", "--no-api", "--config-file"], "--config-file needs a value"),
        (&["vmm", "--no-api", "--id", "../../etc"], "letters, digits and hyphens"),
        (&["vmm", "--level", "loud"], "Trace"),
    ] {
        let (code, said) = run(arguments);
        assert_eq!(code, ARGUMENTS, "{said}");
        assert!(said.starts_with("nacelle vmm: ") && said.contains(words), "{said}");
    }
    let (code, said) = run(&["vmm", "--no-api"]);
    assert_eq!(code, CONFIGURATION, "{said}");
    assert!(said.contains("--no-api needs --config-file"), "{said}");
}

#[test]
fn a_log_that_cannot_be_written_is_refused() {
    let bench = Bench::new().with("logger", json!({"log_path": "/no/such/folder/log"}));
    let config = bench.file("machine.json", bench.spec.to_string().as_bytes());
    for more in [&[][..], &["--log-path", "/no/such/folder/log"]] {
        let (code, said) =
            run(&[&["vmm", "--no-api", "--config-file", config.to_str().unwrap()], more].concat());
        assert_eq!(code, CONFIGURATION, "{said}");
        is_well_formed(&said);
        assert!(said.contains("log cannot be opened") && said.contains("No such file"), "{said}");
    }
}
