//! The devices there are.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use devices::{
    legacy::Output,
    limiter::{BucketConfig, LimiterConfig},
    virtio::{
        Change, VirtioDevice,
        balloon::{Balloon, BalloonConfig},
        block::{Block, BlockConfig},
        console::Console,
        mem::{Mem, MemConfig, Pages, Region, Slot, Slots},
        net::{Net, Port},
        pmem::{Backing, Pmem, PmemConfig},
        rng::Rng,
        vsock::{Vsock, VsockConfig},
    },
};

/// A part of a request: bytes for the device to read, or room for it to write.
pub enum Part {
    Read(Vec<u8>),
    Write(u32),
}

/// One kind of device.
pub struct Kind {
    pub name: &'static str,
    /// Makes one; whatever files it needs go into the directory, which is empty.
    pub make: fn(&Path) -> Box<dyn VirtioDevice>,
    /// A queue and a request on it that the device answers at once, whatever it is.
    pub request: fn() -> (u16, Vec<Part>),
}

/// All devices.
pub fn kinds() -> Vec<Kind> {
    vec![
        Kind { name: "rng", make: |_| Box::new(Rng::new()), request: || (0, vec![Part::Write(64)]) },
        Kind {
            name: "rng with limits",
            make: |_| limited(Box::new(Rng::new())),
            request: || (0, vec![Part::Write(64)]),
        },
        Kind { name: "block", make: block, request: read_sector },
        Kind { name: "block with two queues", make: wide_block, request: read_sector },
        Kind { name: "block with limits", make: |d| limited(wide_block(d)), request: read_sector },
        Kind { name: "net", make: |_| net(1), request: send_frame },
        Kind { name: "net with two pairs", make: |_| net(2), request: send_frame },
        Kind { name: "net with limits", make: |_| limited(net(2)), request: send_frame },
        Kind { name: "vsock", make: vsock, request: || (1, vec![Part::Read(vec![0; 44])]) },
        Kind { name: "balloon", make: |_| balloon(), request: || (0, vec![Part::Read(vec![0xe8, 3, 0, 0])]) },
        Kind {
            name: "mem",
            make: |_| mem(),
            request: || (0, vec![Part::Read(vec![0; 24]), Part::Write(10)]),
        },
        Kind { name: "pmem", make: pmem, request: || (0, vec![Part::Read(vec![0; 4]), Part::Write(4)]) },
        Kind { name: "console", make: console, request: || (1, vec![Part::Read(b"hello\n".to_vec())]) },
    ]
}

fn block_config(directory: &Path) -> BlockConfig {
    let path = directory.join("disk");
    File::create(&path).and_then(|file| file.set_len(1 << 20)).unwrap();
    BlockConfig::new("disk", &path)
}

fn block(directory: &Path) -> Box<dyn VirtioDevice> {
    Box::new(Block::new(block_config(directory)).unwrap())
}

fn wide_block(directory: &Path) -> Box<dyn VirtioDevice> {
    let config = BlockConfig { queues: 2, queue_size: 64, discard: true, ..block_config(directory) };
    Box::new(Block::new(config).unwrap())
}

/// The device with limits so tight that nearly every request waits for a moment.
fn limited(mut device: Box<dyn VirtioDevice>) -> Box<dyn VirtioDevice> {
    let bucket = |size| Some(BucketConfig { size, one_time_burst: 0, refill_time_ms: 1 });
    let limits = LimiterConfig { bandwidth: bucket(256), ops: bucket(1) };
    let changes = [Change::Limits(limits), Change::DirectionLimits { rx: limits, tx: limits }];
    assert!(changes.iter().any(|change| device.update(change).is_ok()));
    device
}

/// Reads sector 0 (VIRTIO 1.2 section 5.2.6): header, data, status.
fn read_sector() -> (u16, Vec<Part>) {
    (0, vec![Part::Read(vec![0; 16]), Part::Write(512), Part::Write(1)])
}

/// A cable with nobody at the other end who listens: frames are lost when it is full.
struct Cable {
    ours: Vec<OwnedFd>,
    _theirs: Vec<OwnedFd>,
}

impl Port for Cable {
    fn descriptors(&self) -> &[OwnedFd] {
        &self.ours
    }
    fn offloads(&self) -> u32 {
        0
    }
    fn set_offloads(&self, _flags: u32) -> io::Result<()> {
        Ok(())
    }
    fn set_attached(&self, _pair: usize, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}

fn net(pairs: usize) -> Box<dyn VirtioDevice> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let mut ends = [0; 2];
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: the kernel writes two descriptors into the array, which nobody else has.
        let (a, b) = unsafe {
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()), 0);
            (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
        };
        ours.push(a);
        theirs.push(b);
    }
    let mac = "06:00:00:00:00:01".parse().unwrap();
    Box::new(Net::with_port(Arc::new(Cable { ours, _theirs: theirs }), Some(mac), None).unwrap())
}

/// A virtio-net header without offloads and the smallest frame.
fn send_frame() -> (u16, Vec<Part>) {
    (1, vec![Part::Read(vec![0; 12]), Part::Read(vec![0x55; 60])])
}

fn vsock(directory: &Path) -> Box<dyn VirtioDevice> {
    let uds_path = directory.join("vsock");
    Box::new(Vsock::new(VsockConfig { guest_cid: 3, uds_path }).unwrap())
}

fn console(directory: &Path) -> Box<dyn VirtioDevice> {
    Box::new(Console::new(&Output::File(directory.join("output"))).unwrap())
}

/// With all it can have; its request gives back the page at 1000 times 4 KiB.
fn balloon() -> Box<dyn VirtioDevice> {
    let config = BalloonConfig {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    Box::new(Balloon::new(&config, 4).unwrap())
}

/// A hypervisor that takes every slot.
struct Willing;

impl Slots for Willing {
    fn plug(&self, _slot: &Slot) -> io::Result<()> {
        Ok(())
    }
    fn unplug(&self, _slot: &Slot) -> io::Result<()> {
        Ok(())
    }
}

/// Its request is a PLUG that is refused.
fn mem() -> Box<dyn VirtioDevice> {
    let config = MemConfig { start: 1 << 32, total: 256 << 20, block_size: 2 << 20, slot_size: 128 << 20 };
    let region = Region::reserve(config.total, config.slot_size, Pages::Small).unwrap();
    Box::new(Mem::new(config, Arc::new(region), Arc::new(Willing)).unwrap())
}

/// Its request is a flush.
fn pmem(directory: &Path) -> Box<dyn VirtioDevice> {
    let path = directory.join("pmem");
    File::create(&path).and_then(|file| file.set_len(1 << 20)).unwrap();
    let config =
        PmemConfig { id: "pmem".to_owned(), path, read_only: false, limiter: LimiterConfig::default() };
    let backing = Backing::open(&config.path, config.read_only).unwrap();
    Box::new(Pmem::new(&config, Arc::new(backing), 1 << 32).unwrap())
}
