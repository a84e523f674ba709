//! Taps of a test, each a network of two: this host and one machine.
//!
//! ```text
//!   PREFIX0  10.NET.0.1 ── 10.NET.0.2      the machine
//!   PREFIXn  10.NET.n.1 ── 10.NET.n.2      its fork number n
//! ```

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// How long a guest may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Taps with addresses on them, gone with this.
pub struct Taps {
    prefix: &'static str,
    net: u8,
    count: u8,
}

impl Taps {
    /// Makes number 0 to `count` - 1.
    pub fn new(prefix: &'static str, net: u8, count: u8) -> Taps {
        let taps = Taps { prefix, net, count };
        // Those that an earlier, killed run has left behind.
        taps.remove();
        let lines = (0..count).map(|number| {
            let name = taps.name(number);
            format!(
                "tuntap add {name} mode tap vnet_hdr\naddr add 10.{net}.{number}.1/24 dev {name}\nlink set \
                 {name} up\n"
            )
        });
        let said = batch(&lines.collect::<String>());
        assert_eq!(said, "", "taps cannot be made");
        taps
    }

    /// The name of one.
    pub fn name(&self, number: u8) -> String {
        format!("{}{number}", self.prefix)
    }

    /// The flag of `nacelle run` that puts a machine on number 0.
    pub fn flag(&self) -> String {
        format!("{},ip={}/24", self.name(0), self.guest(0))
    }

    /// The settings of `nacelle fork` that put each fork on its own.
    pub fn settings(&self) -> [String; 2] {
        let card = "network-interfaces.eth0";
        [
            format!("{card}.host_dev_name={}{{n}}", self.prefix),
            format!("{card}.ip=10.{}.{{n}}.2/24", self.net),
        ]
    }

    /// The machine's address on one.
    pub fn guest(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.net, number, 2)
    }

    /// A connection to the machine on one, once it listens.
    pub fn connect(&self, number: u8, port: u16) -> TcpStream {
        let until = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect_timeout(&(self.guest(number), port).into(), PATIENCE) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.set_write_timeout(Some(PATIENCE)).unwrap();
                    return stream;
                }
                Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(50)),
                Err(e) => panic!("{}:{port} does not answer: {e}", self.guest(number)),
            }
        }
    }

    fn remove(&self) {
        let lines = (0..self.count).map(|number| format!("link del {}\n", self.name(number)));
        batch(&lines.collect::<String>());
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Sends bytes that come back.
pub fn echo(stream: &mut TcpStream, sent: &[u8]) {
    stream.write_all(sent).unwrap();
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == sent, "something else came back");
}

/// Has `ip` do all of `lines`, and returns what it complained of.
fn batch(lines: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), lines).unwrap();
    let output = Command::new("ip").args(["-force", "-batch"]).arg(file.path()).output();
    String::from_utf8_lossy(&output.expect("Debian's package iproute2 is needed").stderr).into_owned()
}
