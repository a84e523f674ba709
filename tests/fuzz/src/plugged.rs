//! Every device on a bench: what it stands for on the host is made small here.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    os::unix::net::UnixDatagram,
    sync::Arc,
};

use devices::{
    Memory,
    bus::Bus,
    host::Host,
    legacy::wire::Wire,
    virtio::{
        VirtioDevice,
        balloon::{Balloon, BalloonConfig},
        block::{Block, BlockConfig},
        console::Console,
        core::Transport,
        driver::{Bench, Face, MmioFace, PciFace},
        mem::{Mem, MemConfig, Pages, Region, Slot, Slots},
        mmio::MmioTransport,
        net::{Net, Port},
        pci::PciTransport,
        pmem::{Backing, Pmem, PmemConfig},
        rng::Rng,
        vsock::{Vsock, VsockConfig},
    },
    worker::Worker,
};

use crate::directory::work;

/// Kinds of devices that are made here.
pub const KINDS: u8 = 8;
/// Guest memory of a bench, in bytes.
pub const RAM: usize = 1 << 20;

const BASE: u64 = 0xd000_0000;
const ECAM: u64 = 0xe000_0000;
const MIB: u64 = 1 << 20;

/// A device behind its registers.
pub struct Plugged {
    /// As its owner sees it.
    pub transport: Arc<dyn Transport>,
    /// As its driver does.
    pub face: Box<dyn Face>,
}

impl Plugged {
    /// A device of this kind in `memory`, on PCI or memory-mapped.
    pub fn new(kind: u8, pci: bool, memory: &Memory) -> Plugged {
        let (bench, worker, device) = (Bench::new(), Worker::new("fuzz"), device(kind));
        let host: Arc<dyn Host> = bench.clone();
        if !pci {
            let transport = MmioTransport::new(device, memory.clone(), worker, host, BASE, 5);
            let transport = transport.expect("a transport on an empty bench");
            let face = Box::new(MmioFace::new(transport.clone(), BASE, bench));
            return Plugged { transport, face };
        }
        let (bus, root) = (Arc::new(Bus::new()), Arc::new(devices::pci::root::Root::new()));
        let transport = PciTransport::new(device, memory.clone(), worker, host, &bus, 1, Some(BASE));
        let transport = transport.expect("a transport on an empty bus");
        root.add(1, transport.clone()).expect("an empty slot");
        bus.insert(ECAM, 1 << 20, root).expect("an empty bus");
        let face = Box::new(PciFace::new(bus, ECAM + (1 << 15), bench));
        Plugged { transport, face }
    }
}

fn device(kind: u8) -> Box<dyn VirtioDevice> {
    match kind {
        0 => Box::new(disk()),
        1 => Box::new(
            Net::with_port(Arc::new(Cable::new()), Some("06:00:00:00:00:01".parse().expect("a MAC")), None)
                .expect("a card"),
        ),
        2 => Box::new(socket()),
        3 => Box::new(balloon()),
        4 => Box::new(Rng::new()),
        5 => Box::new(Console::with_wire(Wire::from_descriptors(None, None).expect("a wire of nothing"))),
        6 => Box::new(pluggable()),
        _ => Box::new(persistent()),
    }
}

fn file(name: &str, length: u64) -> File {
    let path = work().join(name);
    let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
    let file = file.expect("a file");
    file.set_len(length).expect("a length");
    file
}

fn disk() -> Block {
    let settings = BlockConfig { discard: true, ..BlockConfig::new("root", &work().join("disk")) };
    Block::with_file(settings, file("disk", 64 << 10)).expect("a disk")
}

fn socket() -> Vsock {
    let uds_path = work().join("vsock");
    let _ = fs::remove_file(&uds_path);
    Vsock::new(VsockConfig { guest_cid: 3, uds_path }).expect("a socket")
}

fn balloon() -> Balloon {
    let config = BalloonConfig {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    Balloon::new(&config, 64).expect("a balloon")
}

fn pluggable() -> Mem {
    let config = MemConfig { start: 2 << 30, total: 256 * MIB, block_size: 2 * MIB, slot_size: 128 * MIB };
    let region = Region::reserve(config.total, config.slot_size, Pages::Small).expect("addresses");
    Mem::new(config, Arc::new(region), Arc::new(NoSlots)).expect("a memory device")
}

struct NoSlots;

impl Slots for NoSlots {
    fn plug(&self, _: &Slot) -> io::Result<()> {
        Ok(())
    }
    fn unplug(&self, _: &Slot) -> io::Result<()> {
        Ok(())
    }
}

fn persistent() -> Pmem {
    drop(file("pmem", 2 * MIB));
    let path = work().join("pmem");
    let backing = Backing::open(&path, false).expect("a file to map");
    let config = PmemConfig { id: "pmem".to_owned(), path, read_only: false, limiter: Default::default() };
    Pmem::new(&config, Arc::new(backing), 4 << 30).expect("persistent memory")
}

/// A cable that ends in nothing that listens.
struct Cable([OwnedFd; 1], #[expect(dead_code, reason = "held open")] UnixDatagram);

impl Cable {
    fn new() -> Cable {
        let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
        ours.set_nonblocking(true).expect("a socket");
        Cable([ours.into()], theirs)
    }
}

impl Port for Cable {
    fn descriptors(&self) -> &[OwnedFd] {
        &self.0
    }
    fn offloads(&self) -> u32 {
        0
    }
    fn set_offloads(&self, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn set_attached(&self, _: usize, _: bool) -> io::Result<()> {
        Ok(())
    }
}
