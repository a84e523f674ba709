//! The package firecracker-python, by two small programs that lie beside this file.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use api::spec::Transport;
use serde_json::json;

use super::{PATIENCE, PRELUDE, echo_once, firecracker};
use crate::{
    kernel::Kernel,
    net::Tap,
    process::{Process, Stream, within},
    side::CALL_BYTES,
    vm::Setup,
};

/// One of the programs, to be started.
fn python<I: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = I>) -> Command {
    let interpreter = env::var_os("NACELLE_TEST_PYTHON").expect(
        "NACELLE_TEST_PYTHON does not name a Python with the packages of tests/machine/clients/requirements.txt; \
         `cargo xtask test` makes one and sets it",
    );
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/clients").join(program);
    let mut command = Command::new(interpreter);
    // Nothing is to be written beside the sources.
    command.env("PYTHONDONTWRITEBYTECODE", "1").arg(program).args(arguments);
    command
}

/// What a program said that has ended well.
fn said(output: Output) -> String {
    let [said, why] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).replace('\r', ""));
    assert!(output.status.success(), "{}\n{said}\n{why}", output.status);
    said
}

/// A folder by a name without capital letters: the package makes a host name of a socket's path,
/// and its library for HTTP makes host names small.
struct Small(PathBuf);

impl Small {
    fn new(folder: &Path, name: &str) -> Small {
        let link = env::temp_dir().join(format!("nacelle-{name}-{}", std::process::id()));
        symlink(folder, &link).unwrap();
        Small(link)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_python_client_drives_a_machine_through_its_socket() {
    let script = r#"
        ask() { wget -q -O - http://169.254.169.254/$1; }
        fact cpus $(nproc)
        fact size $(cat /sys/block/vda/size)
        fact read $(head -c 6 /dev/vda)
        fact mac $(cat /sys/class/net/eth0/address)
        ip link set eth0 up
        ip addr add 172.31.85.2/24 dev eth0
        ip route add 169.254.169.254 dev eth0
        ping -c 1 -W 20 172.31.85.1 && fact ping answered
        fact before $(ask name)
        echo ready; read -r word
        fact after $(ask name)
        echo last
        while :; do sleep 1; done"#;
    let setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    let (disk, log) = (setup.folder().join("disk"), setup.folder().join("log"));
    fs::write(&disk, [&b"inside"[..], &[0; 4090]].concat()).unwrap();
    let (tap, mac) = (Tap::new("nacelle-t85", 85, 1500, 1), "06:00:00:00:00:55");
    let (mut vm, spec) = setup.start_empty();
    drop(vm.client());
    let told = json!({
        "version": api::FIRECRACKER_VERSION,
        "kernel": spec.boot_source.kernel_image_path,
        "initrd": spec.boot_source.initrd_path,
        "boot_args": spec.boot_source.boot_args,
        "disk": disk,
        "log": log,
        "tap": tap.name,
        "mac": mac,
    });
    let small = Small::new(vm.socket().parent().unwrap(), "api");
    let socket = small.0.join("api");
    let mut command = python("api.py", [OsStr::new(&socket), OsStr::new(&told.to_string())]);
    let mut child = Process::new(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let answers = Stream::of(child.child().stdout.take().unwrap());
    let mut steps = child.child().stdin.take().unwrap();
    let mut step = |name: &str| {
        writeln!(steps, "{name}").unwrap();
        assert!(answers.heard(name, within(PATIENCE.as_secs())), "the client failed in {name:?}");
    };
    step("configure");
    vm.wait_for("ready\n");
    step("change");
    vm.say("go");
    vm.wait_for("last\n");
    step("end");
    let ended = vm.wait();
    assert_eq!(ended.code, 0);
    ended.is("cpus", &2);
    ended.is("size", &8);
    for (fact, value) in [("read", "inside"), ("mac", mac), ("ping", "answered")] {
        ended.is(fact, value);
    }
    ended.is("before", "first");
    ended.is("after", "second");
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("The guest asked for a reset"), "{log}");
}

#[test]
fn a_python_package_keeps_a_machine_as_its_own() {
    // The kernel's words must not get between those of the script, and the package gives
    // kernels an address for the network that not every one takes.
    let script = r#"
        echo 1 > /proc/sys/kernel/printk
        header="X-metadata-token"
        ask() { printf "$1 HTTP/1.1\r\nHost: x\r\n$2\r\nConnection: close\r\n\r\n" |
            nc -w 5 169.254.169.254 80 | tr -d '\r' | sed '1,/^$/d'; }
        fact cpus $(nproc)
        fact memory $(total)
        fact read $(head -c 6 /dev/vda)
        ip link set eth0 up
        ip addr show dev eth0 | grep -q 172.31.84.2 || ip addr add 172.31.84.2/24 dev eth0
        ip route add 169.254.169.254 dev eth0
        ping -c 1 -W 20 172.31.84.1 && fact ping answered
        token=$(ask 'PUT /latest/api/token' "$header-ttl-seconds: 60")
        fact name $(ask 'GET /latest/meta-data/local-hostname' "$header: $token")
        fact id $(ask 'GET /latest/meta-data/instance-id' "$header: $token")
        fact data $(ask 'GET /latest/user-data' "$header: $token")
        until call; do sleep 1; done
        fact call answered
        printf outside | dd of=/dev/vda conv=notrunc,fsync
        fact step ready
        sleep 3
        fact step last
        while :; do sleep 1; done"#;
    let mut setup =
        Setup::new(Kernel::quick(), Transport::Mmio).with_side().script([PRELUDE, script].concat());
    setup.write();
    let folder = setup.folder().to_owned();
    let small = Small::new(&folder, "microvm");
    let disk = folder.join("disk");
    fs::write(&disk, [&b"inside"[..], &[0; 4090]].concat()).unwrap();
    let calls = folder.join("calls");
    let served = echo_once(&calls);
    let source = &setup.spec.boot_source;
    let (kernel, initrd) = (source.kernel_image_path.clone(), source.initrd_path.clone().unwrap());
    let (data, program) = (small.0.join("machines"), firecracker(&folder));
    let address = "172.31.84.2".into();
    let mut command = python("microvm.py", [data, program, kernel, initrd, disk.clone(), address, calls]);
    let console = said(command.output().unwrap());
    let ended = setup.ended(0, console, String::new());
    ended.is("cpus", &2);
    for (fact, value) in [("read", "inside"), ("ping", "answered"), ("name", "machine"), ("call", "answered")]
    {
        ended.is(fact, value);
    }
    ended.is("data", "told by a file");
    let own = ended.fact("own");
    ended.is("id", &own);
    assert!((300 << 10..384 << 10).contains(&ended.number("memory")));
    assert_eq!(served.join().unwrap(), CALL_BYTES);
    // The package copies the disk, and took the copy away with the machine.
    assert!(fs::read(&disk).unwrap().starts_with(b"inside"));
    // SIGTERM ended it.
    ended.is("status", &143);
}
