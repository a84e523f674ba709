//! Many connections at a time in both directions through the device's unix sockets.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use api::spec::{Transport, Vsock};

use crate::{
    kernel::Kernel,
    side::CALL_BYTES,
    vm::{Setup, random_bytes},
};

const CONNECTIONS: u64 = 200;
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

/// Connects to `port` in the guest as a host program does.
pub fn connect(uds: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(uds).unwrap();
    stream.set_read_timeout(PATIENCE).unwrap();
    stream.set_write_timeout(PATIENCE).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    // Byte by byte: what follows the line belongs to the connection.
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the connection was refused");
        answer.push(byte[0]);
    }
    let answer = String::from_utf8(answer).unwrap();
    let own = answer.strip_prefix("OK ").and_then(|port| port.trim().parse::<u32>().ok());
    assert!(own.is_some(), "{answer:?}");
    stream
}

/// Sends on all of `streams` at once, and expects it back.
fn exchange(streams: Vec<UnixStream>) {
    let talk = |(seed, mut stream): (u64, UnixStream)| {
        let sent = random_bytes(CALL_BYTES, seed);
        let mut writer = stream.try_clone().unwrap();
        thread::scope(|scope| {
            let bytes = &sent;
            scope.spawn(move || {
                writer.write_all(bytes).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            assert!(back == sent, "connection {seed} brought back {} bytes of {}", back.len(), sent.len());
        });
    };
    let threads: Vec<_> = (0..).zip(streams).map(|pair| thread::spawn(move || talk(pair))).collect();
    for thread in threads {
        thread.join().expect("a connection failed");
    }
}

/// Sends back what each of the guest's connections sends.
fn echo(listener: &UnixListener) {
    let echoes: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(PATIENCE).unwrap();
            thread::spawn(move || {
                let mut piece = vec![0; 16 << 10];
                loop {
                    match stream.read(&mut piece).unwrap() {
                        0 => return,
                        got => stream.write_all(&piece[..got]).unwrap(),
                    }
                }
            })
        })
        .collect();
    for echo in echoes {
        echo.join().expect("a connection failed");
    }
}

fn connections_carry_data_both_ways(kernel: Kernel, transport: Transport) {
    let mut setup = Setup::new(kernel, transport).size(2, 384).with_side().script(format!(
        r#"
        run() {{ TASK="$*" side --ignored --exact side::in_the_guest --nocapture; }}
        run serve 5000 {CONNECTIONS}
        run call 6000 {CONNECTIONS}
        "#
    ));
    let uds = setup.folder().join("v.sock");
    let listener = UnixListener::bind(setup.folder().join("v.sock_6000")).unwrap();
    setup.spec.vsock = Some(Vsock { guest_cid: 52, uds_path: uds.clone(), vsock_id: None });
    let vm = setup.start();
    vm.wait_for("@serving=5000\n");
    // A port nobody listens on is refused by closing, and harms nobody.
    let mut refused = BufReader::new(UnixStream::connect(&uds).unwrap());
    refused.get_mut().set_read_timeout(PATIENCE).unwrap();
    refused.get_mut().write_all(b"CONNECT 4999\n").unwrap();
    let mut answer = String::new();
    refused.read_line(&mut answer).unwrap_or(0);
    assert_eq!(answer, "");

    exchange((0..CONNECTIONS).map(|_| connect(&uds, 5000)).collect());
    let served = thread::spawn(move || echo(&listener));
    let ended = vm.succeed();
    served.join().unwrap();
    // As Firecracker does: whoever named it removes it.
    assert!(uds.exists(), "the socket is not where its owner looks for it");
    assert!(fs::exists(ended.folder().join("v.sock_6000")).unwrap(), "another's socket was removed");
}

#[test]
fn two_hundred_connections_each_way_over_mmio() {
    connections_carry_data_both_ways(Kernel::debian(), Transport::Mmio);
}

#[test]
fn two_hundred_connections_each_way_over_pci() {
    connections_carry_data_both_ways(Kernel::quick(), Transport::Pci);
}
