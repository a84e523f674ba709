//! A tap between host and guest: address, ping, and TCP both ways with every byte compared.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use api::spec::{MmdsConfig, MmdsVersion, NetworkInterface, Transport};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    vm::{Setup, random_bytes, sha256},
};

const MIB: usize = 1 << 20;
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

/// A tap of a test with an address on it.
pub struct Tap {
    /// Its name.
    pub name: &'static str,
    /// The host's address on it.
    pub host: Ipv4Addr,
    /// The address for the guest.
    pub guest: Ipv4Addr,
}

impl Tap {
    /// Makes one with 172.31.`net`.1 on the host; .2 is for the guest.
    pub fn new(name: &'static str, net: u8, mtu: u16, queues: u16) -> Tap {
        let tap = Tap { name, host: Ipv4Addr::new(172, 31, net, 1), guest: Ipv4Addr::new(172, 31, net, 2) };
        let kind = if queues > 1 { " multi_queue" } else { "" };
        // One that an earlier, killed run has left behind.
        let _ = Command::new("ip").args(["link", "del", name]).output();
        ip(&format!("tuntap add {name} mode tap vnet_hdr{kind}"));
        ip(&format!("link set {name} mtu {mtu} up"));
        ip(&format!("addr add {}/24 dev {name}", tap.host));
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", self.name]).output();
    }
}

fn ip(arguments: &str) {
    let output =
        Command::new("ip").args(arguments.split(' ')).output().expect("Debian's package iproute2 is needed");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {arguments}: {said}");
}

/// A host's server for one connection: sends `data`, then takes all that comes.
fn serve(listener: TcpListener, data: Vec<u8>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(PATIENCE).unwrap();
        stream.set_write_timeout(PATIENCE).unwrap();
        stream.write_all(&data).unwrap();
        // Who has nothing to say keeps quiet: busybox's nc stops at the other side's end.
        if !data.is_empty() {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        let mut taken = Vec::new();
        stream.read_to_end(&mut taken).unwrap();
        taken
    })
}

/// What the guest's web server has under `path`.
fn get(host: Ipv4Addr, path: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect((host, 80)).unwrap();
    stream.set_read_timeout(PATIENCE).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("no answer of a web server");
    answer.split_off(end + 4)
}

fn packets_pass_both_ways(kernel: Kernel, transport: Transport, net: u8, mtu: u16, queues: u16) {
    let mac = format!("06:00:ac:1f:{net:02x}:02");
    let tap = Tap::new(if queues > 1 { "ncltest1" } else { "ncltest0" }, net, mtu, queues);
    let listeners = [(); 2].map(|()| TcpListener::bind((tap.host, 0)).unwrap());
    let [down, up] = [0, 1].map(|index: usize| listeners[index].local_addr().unwrap().port());
    let (host, guest) = (tap.host, tap.guest);
    let script = format!(
        r#"
        sum() {{ sha256sum | cut -d' ' -f1; }}
        fact mac $(cat /sys/class/net/eth0/address)
        fact mtu $(cat /sys/class/net/eth0/mtu)
        fact queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)
        ip link set lo up
        ip link set eth0 up
        ip addr add {guest}/24 dev eth0
        ping -c 3 -W 20 {host} && fact ping answered || fact ping lost
        dd if=/dev/urandom of=/tmp/up bs=1M count=4
        fact sum-up $(sum < /tmp/up)
        httpd -p 80 -h /tmp
        echo ready
        nc {host} {down} < /dev/null > /tmp/down
        fact sum-down $(sum < /tmp/down)
        nc {host} {up} < /tmp/up > /dev/null
        read line
        fact transmitted $(cat /sys/class/net/eth0/statistics/tx_bytes)
        fact errors $(cat /sys/class/net/eth0/statistics/[rt]x_errors | sort -u)
        "#
    );
    let mut setup = Setup::new(kernel, transport).size(2, 256).script(script);
    setup.spec.network_interfaces = vec![NetworkInterface {
        iface_id: "eth0".to_owned(),
        host_dev_name: Some(tap.name.to_owned()),
        host_dev_fd: None,
        by_descriptor: false,
        guest_mac: Some(mac.clone()),
        mtu: Some(mtu),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        num_queue_pairs: queues,
    }];
    let sent = random_bytes(4 * MIB, u64::from(net));
    let [down, up] = listeners;
    let (down, up) = (serve(down, sent.clone()), serve(up, Vec::new()));
    let mut vm = setup.start();
    vm.wait_for("ready\n");
    let ping =
        Command::new("busybox").args(["ping", "-c", "3", "-W", "20", &guest.to_string()]).output().unwrap();
    assert!(ping.status.success(), "{}", String::from_utf8_lossy(&ping.stdout));
    vm.wait_for("@sum-down=");
    let page = get(guest, "/up");
    let taken = up.join().unwrap();
    vm.say("done");
    let ended = vm.succeed();
    ended.is("mac", &mac);
    ended.is("mtu", &mtu);
    ended.is("queues", &queues);
    ended.is("ping", "answered");
    ended.is("errors", &0);
    ended.is("sum-down", &sha256(&sent));
    assert_eq!(down.join().unwrap(), b"");
    assert_eq!(sha256(&taken), ended.fact("sum-up"), "what the guest sent came otherwise");
    assert!(page == taken, "what was fetched from the guest came otherwise");
    for (counter, least) in [("tx_bytes", 8 * MIB as u64), ("rx_bytes", 4 * MIB as u64)] {
        assert!(ended.counter("eth0", counter) >= least, "{}", ended.log);
    }
    for counter in ["rx_dropped", "tx_dropped", "tx_malformed", "port_write_errors", "queue_errors"] {
        assert_eq!(ended.counter("eth0", counter), 0, "{counter}");
    }
}

#[test]
fn packets_pass_both_ways_over_mmio() {
    packets_pass_both_ways(Kernel::debian(), Transport::Mmio, 71, 1400, 1);
}

#[test]
fn packets_pass_both_ways_over_pci_with_two_queue_pairs() {
    packets_pass_both_ways(Kernel::quick(), Transport::Pci, 72, 9000, 2);
}

/// Data is put through the API, asked for by the guest with a token, changed, and asked again;
/// nothing of it is seen on the tap.
#[test]
fn a_guest_reads_its_metadata_with_a_token() {
    let script = r#"
        ip link set eth0 up
        ip addr add 172.31.9.2/24 dev eth0
        ip route add 169.254.169.254 dev eth0
        ask() { printf "$1 HTTP/1.1\r\nHost: x\r\n$2\r\n" | nc -w 5 169.254.169.254 80 | tr -d '\r'; }
        body() { sed '1,/^$/d'; }
        fact without $(ask 'GET /latest/meta-data/name' '' | head -n 1 | cut -d' ' -f2)
        token=$(ask 'PUT /latest/api/token' 'X-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n' | body)
        with="X-metadata-token: $token\r\nConnection: close\r\n"
        fact name $(ask 'GET /latest/meta-data/name' "$with" | body)
        fact keys $(ask 'GET /latest/meta-data' "$with" | body | tr '\n' ' ')
        echo ready; read -r word
        fact changed $(ask 'GET /latest/meta-data/name' "$with" | body)
        fact missing $(ask 'GET /latest/nothing' "$with" | head -n 1 | cut -d' ' -f2)"#;
    let tap = Tap::new("nacelle-t9", 9, 1500, 1);
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    setup.spec.network_interfaces = vec![NetworkInterface {
        iface_id: "eth0".to_owned(),
        host_dev_name: Some(tap.name.to_owned()),
        host_dev_fd: None,
        by_descriptor: false,
        guest_mac: Some("06:00:00:00:00:09".to_owned()),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        num_queue_pairs: 1,
    }];
    setup.spec.mmds_config = Some(MmdsConfig {
        version: MmdsVersion::V2,
        network_interfaces: vec!["eth0".to_owned()],
        ..MmdsConfig::default()
    });
    let data = json!({ "latest": { "meta-data": { "name": "first", "tags": { "a": "1" } } } });
    let file = setup.folder().join("metadata.json");
    std::fs::write(&file, data.to_string()).unwrap();
    let setup = setup.flag("--metadata").flag(file.to_str().unwrap());
    let mut vm = setup.start_with_api();
    let mut client = vm.client();
    assert_eq!(client.get::<Value>("/mmds").unwrap(), data);
    vm.wait_for("ready\n");
    let patch = json!({ "latest": { "meta-data": { "name": "second" } } });
    assert_eq!(client.patch::<Value>("/mmds", Some(&patch)).unwrap(), Value::Null);
    let large = json!({ "x": "y".repeat(60_000) });
    assert!(client.put::<Value>("/mmds", Some(&large)).is_err());
    vm.say("go");
    let ended = vm.succeed();
    ended.is("without", "401");
    ended.is("name", "first");
    ended.is("keys", "name tags/");
    ended.is("changed", "second");
    ended.is("missing", "404");
}
