//! One device in one transport, with the guest that drives it.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use devices::{
    Memory,
    bus::Bus,
    pci::root::Root,
    virtio::{
        VirtioDevice,
        core::Transport,
        driver::{Bench, Buffer, Driver, Face, MmioFace, PATIENCE, PciFace},
        mmio::MmioTransport,
        pci::PciTransport,
        queue::QueueSetup,
    },
    worker::Worker,
};

use crate::kinds::{Kind, Part};

/// Where devices are plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    Mmio,
    Pci,
}

pub const TRANSPORTS: [Where; 2] = [Where::Mmio, Where::Pci];
pub const ECAM: u64 = 0xe000_0000;
pub const SLOT: u8 = 4;
pub const FUNCTION: u64 = ECAM + ((SLOT as u64) << 15);
/// MMIO registers, or the BAR.
pub const BASE: u64 = 0xc100_0000;
/// Where requests keep their bytes; rings lie below.
pub const BUFFERS: u64 = 0x20_0000;

pub struct Plugged {
    pub bench: Arc<Bench>,
    pub bus: Arc<Bus>,
    pub transport: Arc<dyn Transport>,
    pub face: Box<dyn Face>,
    pub driver: Driver,
    pub place: Where,
    make: fn(&std::path::Path) -> Box<dyn VirtioDevice>,
    request: fn() -> (u16, Vec<Part>),
    _directory: tempfile::TempDir,
}

impl Plugged {
    pub fn new(kind: &Kind, place: Where, memory: Memory) -> Plugged {
        Plugged::with(kind.make, kind.request, place, memory)
    }

    fn with(
        make: fn(&std::path::Path) -> Box<dyn VirtioDevice>,
        request: fn() -> (u16, Vec<Part>),
        place: Where,
        memory: Memory,
    ) -> Plugged {
        let directory = tempfile::tempdir().unwrap();
        let device = make(directory.path());
        let driver = Driver::new(memory, &device.about().queues);
        let (bench, bus) = (Bench::new(), Arc::new(Bus::new()));
        let (memory, worker) = (driver.memory.clone(), Worker::new("conformance"));
        let (transport, face): (Arc<dyn Transport>, Box<dyn Face>) = match place {
            Where::Mmio => {
                let plug = MmioTransport::new(device, memory, worker, bench.clone(), BASE, 5).unwrap();
                bus.insert(BASE, devices::virtio::mmio::LENGTH, plug.clone()).unwrap();
                (plug.clone(), Box::new(MmioFace::new(plug, BASE, bench.clone())))
            }
            Where::Pci => {
                let root = Arc::new(Root::new());
                bus.insert(ECAM, 1 << 20, root.clone()).unwrap();
                let plug =
                    PciTransport::new(device, memory, worker, bench.clone(), &bus, SLOT, Some(BASE)).unwrap();
                root.add(SLOT, plug.clone()).unwrap();
                (plug, Box::new(PciFace::new(bus.clone(), FUNCTION, bench.clone())))
            }
        };
        Plugged { bench, bus, transport, face, driver, place, make, request, _directory: directory }
    }

    /// The same device made anew in another machine with the same memory and the same driver
    /// in it; this one is gone.
    pub fn successor(self) -> Plugged {
        let Plugged { transport, face, driver, place, make, request, bus, .. } = self;
        drop((transport, face, bus));
        let mut next = Plugged::with(make, request, place, driver.memory.clone());
        next.driver = driver;
        next
    }

    pub fn setups(&self) -> Vec<QueueSetup> {
        self.driver.rings.iter().map(|ring| ring.setup()).collect()
    }

    /// Resets the device and sets it up with all it offers.
    pub fn up(&mut self) {
        self.up_with(u64::MAX);
    }

    pub fn up_with(&mut self, features: u64) {
        self.face.set_status(0);
        let features = features & self.face.features();
        for ring in &mut self.driver.rings {
            ring.clear();
            ring.accept(features);
        }
        assert_eq!(self.face.set_up(features, &self.setups()), 0xf, "with features {features:#x}");
    }

    /// As [`Plugged::up`], also from where a hostile guest has moved everything away.
    pub fn recover(&mut self) {
        if self.place == Where::Pci {
            self.bus.write(FUNCTION + 0x10, &BASE.to_le_bytes());
            self.bus.write(FUNCTION + 4, &[6, 0]);
            self.face = Box::new(PciFace::new(self.bus.clone(), FUNCTION, self.bench.clone()));
        }
        self.up();
    }

    /// Whether requests of this kind of device go to `queue`.
    pub fn asks_on(&self, queue: usize) -> bool {
        usize::from((self.request)().0) == queue
    }

    /// Makes the request of this kind of device available and rings.
    pub fn ask(&mut self) {
        let (queue, parts) = (self.request)();
        let mut at = BUFFERS;
        let mut buffers = Vec::new();
        for part in parts {
            buffers.push(match part {
                Part::Read(data) => {
                    self.driver.poke(at, &data);
                    Buffer::readable(at, data.len() as u32)
                }
                Part::Write(len) => Buffer::writable(at, len),
            });
            at += 0x1000;
        }
        self.driver.rings[usize::from(queue)].add(&buffers);
        self.face.notify(queue);
    }

    /// Waits for the answer.
    pub fn hear(&mut self) {
        let (queue, _) = (self.request)();
        let end = Instant::now() + PATIENCE;
        while self.driver.rings[usize::from(queue)].take_used().is_none() {
            assert!(Instant::now() < end, "no answer; status {:#x}", self.face.status());
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// One request and its answer.
    pub fn talk(&mut self) {
        self.ask();
        self.hear();
    }

    /// The device configuration.
    pub fn config(&self) -> Vec<u8> {
        let mut config = vec![0; self.transport.about().config_len as usize];
        for (byte, at) in config.iter_mut().zip(0..) {
            self.face.read_config(at, std::slice::from_mut(byte));
        }
        config
    }
}
