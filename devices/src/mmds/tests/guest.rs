//! A guest: another stack at the other end of the cable, with a clock of its own.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp::{Socket, SocketBuffer},
    time,
    wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Address},
};

use crate::mmds::{Detour, HEAD_LEN, MTU, Mmds, MmdsConfig, MmdsVersion};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub(super) const SERVICE: Ipv4Address = Ipv4Address::new(169, 254, 169, 254);

/// A service with some data.
pub(super) fn service(version: MmdsVersion) -> Arc<Mmds> {
    let mmds = Mmds::new(100_000).unwrap();
    mmds.configure(MmdsConfig { version, ..MmdsConfig::for_interface("eth0") }, &["eth0"]).unwrap();
    let big = "0123456789".repeat(5_000);
    let data = json!({"latest": {"meta-data": {"ami-id": "ami-1", "net": {"mac": "x"}}}, "big": big});
    mmds.put(data).unwrap();
    Arc::new(mmds)
}

#[derive(Default)]
struct Cable {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: VecDeque<Vec<u8>>,
}

struct In(Vec<u8>);
struct Out<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = In;
    type TxToken<'a> = Out<'a>;

    fn receive(&mut self, _: time::Instant) -> Option<(In, Out<'_>)> {
        Some((In(self.to_guest.pop_front()?), Out(&mut self.from_guest)))
    }
    fn transmit(&mut self, _: time::Instant) -> Option<Out<'_>> {
        Some(Out(&mut self.from_guest))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        // Every checksum of a reply is verified.
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU + 14;
        capabilities
    }
}

/// Says of each frame whether it is lost.
pub(super) type Loss = Box<dyn FnMut(&[u8]) -> bool>;

pub(super) struct Guest {
    pub(super) mmds: Arc<Mmds>,
    pub(super) detour: Detour,
    interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    cable: Cable,
    start: Instant,
    pub(super) now: Instant,
    port: u16,
    /// Frames towards the guest.
    pub(super) lose: Loss,
    /// Everything the guest ever sent.
    pub(super) log: Vec<Vec<u8>>,
}

impl Guest {
    pub(super) fn new(version: MmdsVersion) -> Guest {
        Guest::with(service(version), IpCidr::new(IpAddress::v4(169, 254, 1, 9), 16))
    }

    /// A guest with this address; without a link-local one it sends to a gateway.
    pub(super) fn with(mmds: Arc<Mmds>, address: IpCidr) -> Guest {
        let start = Instant::now();
        let mut cable = Cable::default();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let mut interface = Interface::new(config, &mut cable, time::Instant::ZERO);
        interface.update_ip_addrs(|all| all.push(address).unwrap());
        let detour = Detour::new(Arc::clone(&mmds)).unwrap();
        let sockets = SocketSet::new(Vec::new());
        let lose = Box::new(|_: &[u8]| false);
        Guest {
            mmds,
            detour,
            interface,
            sockets,
            cable,
            start,
            now: start,
            port: 40_000,
            lose,
            log: Vec::new(),
        }
    }

    pub(super) fn gateway(&mut self, gateway: Ipv4Address) {
        self.interface.routes_mut().add_default_ipv4_route(gateway).unwrap();
    }

    /// A frame from somebody else on the guest's cable.
    pub(super) fn hears(&mut self, frame: Vec<u8>) {
        self.cable.to_guest.push_back(frame);
    }

    /// Frames towards others, which a tap would get.
    pub(super) fn run(&mut self) -> Vec<Vec<u8>> {
        let mut others = Vec::new();
        loop {
            let elapsed = time::Instant::from_micros(self.now.duration_since(self.start).as_micros() as i64);
            self.interface.poll(elapsed, &mut self.cable, &mut self.sockets);
            let mut quiet = true;
            while let Some(frame) = self.cable.from_guest.pop_front() {
                quiet = false;
                self.log.push(frame.clone());
                if self.detour.is_for_mmds(&frame[..frame.len().min(HEAD_LEN)]) {
                    self.detour.take(&frame, self.now);
                } else {
                    others.push(frame);
                }
            }
            let mut buf = [0; MTU + 14];
            while let Some(len) = self.detour.next_reply(&mut buf, self.now) {
                quiet = false;
                if !(self.lose)(&buf[..len]) {
                    self.cable.to_guest.push_back(buf[..len].to_vec());
                }
            }
            if quiet {
                return others;
            }
        }
    }

    /// Lets time pass, as the service's timer sees it.
    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(10).min(end - self.now);
            self.detour.tick(self.now);
            self.run();
        }
    }

    pub(super) fn connect(&mut self) -> SocketHandle {
        self.connect_with(32 * 1024)
    }

    /// A connection whose guest takes `window` bytes before it reads.
    pub(super) fn connect_with(&mut self, window: usize) -> SocketHandle {
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(window), buffer(16 * 1024));
        // Its acknowledgements wait for no clock.
        socket.set_ack_delay(None);
        self.port += 1;
        socket.connect(self.interface.context(), (SERVICE, 80), self.port).unwrap();
        let handle = self.sockets.add(socket);
        self.run();
        handle
    }

    pub(super) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn say(&mut self, handle: SocketHandle, text: &str) {
        assert_eq!(self.socket(handle).send_slice(text.as_bytes()), Ok(text.len()));
        self.run();
    }

    /// All that was said to the guest and not heard yet, until nothing comes for a while.
    pub(super) fn hear(&mut self, handle: SocketHandle) -> String {
        let mut heard = Vec::new();
        let mut quiet = 0;
        loop {
            let read = self.socket(handle).recv(|bytes| {
                heard.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            });
            self.run();
            quiet = if matches!(read, Ok(1..)) { 0 } else { quiet + 1 };
            if quiet > 1 {
                self.pass(Duration::from_millis(10));
            }
            if quiet > 5 {
                return String::from_utf8(heard).unwrap();
            }
        }
    }

    /// One request on a connection of its own: status and body of the answer.
    pub(super) fn ask(&mut self, request: &str) -> (u16, String) {
        let handle = self.connect();
        self.say(handle, &format!("{}\r\n\r\n", request.replace('\n', "\r\n")));
        let answer = self.hear(handle);
        self.socket(handle).close();
        self.run();
        self.sockets.remove(handle);
        parts(&answer)
    }

    pub(super) fn count(&self, name: &str) -> u64 {
        self.mmds.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// Status and body of an answer, whose length must be as it says.
pub(super) fn parts(answer: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let length = head.split("Content-Length: ").nth(1).unwrap().split("\r\n").next().unwrap();
    assert_eq!(length.parse::<usize>().unwrap(), body.len(), "{head}");
    (head[9..12].parse().unwrap(), body.to_owned())
}
