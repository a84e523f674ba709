//! Disks and taps that come over the API socket as open descriptors.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    net::{Shutdown, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    thread,
};

use api::{client::Client, spec::Transport};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    net::Tap,
    vm::{Setup, Vm, random_bytes, sha256},
};

const MIB: usize = 1 << 20;

#[track_caller]
fn put(client: &mut Client, path: &str, body: &Value, descriptors: &[BorrowedFd<'_>]) {
    let said: Value = client.put_with(path, body, descriptors).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert_eq!(said, Value::Null);
}

#[track_caller]
fn refused(client: &mut Client, path: &str, body: &Value, descriptors: &[BorrowedFd<'_>], why: &str) {
    let said = client.put_with::<Value>(path, body, descriptors).expect_err("this was to be refused");
    assert!(said.to_string().contains(why), "{path} {body}: {said}");
}

/// A monitor that knows what to boot.
fn prepared(transport: Transport, script: &str) -> (Vm, Client) {
    let mut setup = Setup::new(Kernel::quick(), transport).script(script);
    if transport == Transport::Pci {
        setup = setup.flag("--enable-pci");
    }
    let (vm, spec) = setup.start_empty();
    let mut client = vm.client();
    let config = json!({ "vcpu_count": 2, "mem_size_mib": 256 });
    put(&mut client, "/machine-config", &config, &[]);
    put(&mut client, "/boot-source", &json!(spec.boot_source), &[]);
    (vm, client)
}

/// Starts the machine, and holds it once while its kernel is still on its way into memory.
fn start(client: &mut Client) {
    put(client, "/actions", &json!({ "action_type": "InstanceStart" }), &[]);
    for state in ["Paused", "Resumed"] {
        let said: Value = client.patch("/vm", Some(&json!({ "state": state }))).unwrap();
        assert_eq!(said, Value::Null);
    }
}

#[test]
fn a_disk_without_a_name_is_read_and_written() {
    let script = r#"
        fact sum $(dd if=/dev/vda bs=1M 2> /dev/null | sha256sum | cut -d' ' -f1)
        fact locked $(cat /sys/block/vdb/ro)
        printf 'from the guest' | dd of=/dev/vda bs=512 seek=8 conv=fsync,notrunc
        echo ready; read -r word
        fact size $(cat /sys/block/vda/size)"#;
    let (mut vm, mut client) = prepared(Transport::Mmio, script);
    let data = random_bytes(MIB, 5);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&data).unwrap();
    let image = vm.socket().with_file_name("image");
    std::fs::write(&image, &data).unwrap();
    let reader = File::open(&image).unwrap();
    let folder = File::open(vm.socket().parent().unwrap()).unwrap();

    let disk = json!({ "drive_id": "a", "by_descriptor": true, "is_root_device": false });
    let other = json!({ "drive_id": "b", "by_descriptor": true, "is_root_device": false,
                        "is_read_only": true });
    let before = vm.descriptors();
    let (fd, fds) = (file.as_fd(), [file.as_fd(); 2]);
    refused(&mut client, "/drives/a", &disk, &[], "needs 1 descriptor");
    refused(&mut client, "/drives/a", &disk, &fds, "2 descriptors came");
    refused(&mut client, "/drives/a", &disk, &[folder.as_fd()], "is a directory");
    refused(&mut client, "/drives/a", &disk, &[reader.as_fd()], "not open for reading and writing");
    refused(&mut client, "/entropy", &json!({}), &[fd], "1 descriptor came with a request that takes none");
    refused(&mut client, "/vm/shutdown", &json!({}), &[fd], "takes none");
    refused(&mut client, "/drives/a", &json!({ "drive_id": "a" }), &[fd], "is not by_descriptor");
    refused(&mut client, "/drives/a", &json!({ "nonsense": 1 }), &[fd], "nonsense");
    assert_eq!(vm.descriptors(), before, "descriptors of refused requests stay open");

    put(&mut client, "/drives/a", &disk, &[fd]);
    put(&mut client, "/drives/a", &disk, &[fd]);
    put(&mut client, "/drives/b", &other, &[reader.as_fd()]);
    assert_eq!(vm.descriptors(), before + 2);
    let config: Value = client.get("/vm/config").unwrap();
    assert_eq!(config["drives"][0]["by_descriptor"], true);
    assert!(config["drives"][0].get("path_on_host").is_none(), "{config}");
    start(&mut client);
    vm.wait_for("ready\n");
    let mut written = [0; 14];
    file.read_exact_at(&mut written, 4096).unwrap();
    assert_eq!(&written, b"from the guest");
    // It is measured again by its descriptor, for want of a path.
    file.set_len(2 * MIB as u64).unwrap();
    let said: Value = client.patch("/drives/a", Some(&json!({ "drive_id": "a" }))).unwrap();
    assert_eq!(said, Value::Null);
    vm.say("go");
    let ended = vm.succeed();
    ended.is("sum", &sha256(&data));
    ended.is("locked", &1);
    ended.is("size", &(2 * MIB / 512));
}

/// One descriptor of the tap `name`, with room for several.
fn queue_of(name: &str, flags: i32) -> OwnedFd {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an ifreq is plain bytes, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes an ifreq at the pointer, which lives across the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert!(done >= 0, "{name}: {}", std::io::Error::last_os_error());
    file.into()
}

#[test]
fn a_tap_of_two_queues_passes_packets() {
    const WHOLE: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let tap = Tap::new("ncltest2", 73, 1500, 2);
    let (host, guest) = (tap.host, tap.guest);
    let listener = TcpListener::bind((host, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        r#"
        fact queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)
        ip link set eth0 up
        ip addr add {guest}/24 dev eth0
        ping -c 3 -W 20 {host} && fact ping answered || fact ping lost
        fact sum $(nc {host} {port} < /dev/null | sha256sum | cut -d' ' -f1)"#
    );
    let (vm, mut client) = prepared(Transport::Pci, &script);
    let before = vm.descriptors();
    let card = json!({ "iface_id": "eth0", "by_descriptor": true, "num_queue_pairs": 2 });
    let path = "/network-interfaces/eth0";
    {
        let queues = [(); 2].map(|()| queue_of(tap.name, WHOLE));
        let bare = queue_of("ncltest3", libc::IFF_TAP | libc::IFF_NO_PI);
        let other = queue_of("ncltest4", WHOLE);
        let (first, second) = (queues[0].as_fd(), queues[1].as_fd());
        refused(&mut client, path, &card, &[first], "needs 2 descriptors");
        refused(&mut client, path, &card, &[first, bare.as_fd()], "IFF_VNET_HDR");
        refused(&mut client, path, &card, &[first, other.as_fd()], "two taps, ncltest2 and ncltest4");
        let null = File::open("/dev/null").unwrap();
        refused(&mut client, path, &card, &[first, null.as_fd()], "is not a tap");
        assert_eq!(vm.descriptors(), before, "descriptors of refused requests stay open");
        put(&mut client, path, &card, &[first, second]);
    }
    assert_eq!(vm.descriptors(), before + 2);
    let data = random_bytes(2 * MIB, 6);
    let sent = data.clone();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read(&mut [0]);
    });
    start(&mut client);
    let ended = vm.succeed();
    server.join().unwrap();
    ended.is("queues", &2);
    ended.is("ping", "answered");
    ended.is("sum", &sha256(&data));
    assert_eq!(ended.counter("eth0", "port_write_errors"), 0);
}
