//! Every cap in this crate, in one place.
//!
//! A guest, a host file or a peer decides how much it sends; these constants decide how much
//! of it is ever held. Each one names what it bounds and what happens beyond it.

use std::time::Duration;

/// Largest virtqueue offered to a driver, in descriptors (VIRTIO 1.2 section 2.7 allows
/// 32768; a larger ring only costs memory here).
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// How long a worker may take to drain one handler before the device counts as stuck. A disk
/// that answers nothing for this long makes `stop` fail instead of hanging the machine.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Bytes one entropy request is filled with at most; the guest asks again for more.
pub const RNG_REQUEST_MAX: u32 = 64 * 1024;

/// Connections one vsock device keeps at most; further ones are refused with a reset.
pub const VSOCK_CONNECTIONS_MAX: usize = 1023;

/// Bytes buffered for one vsock connection towards the host before its credit runs out.
pub const VSOCK_BUFFER: u32 = 256 * 1024;

/// Emptied buffers of that kind one vsock device keeps for the next connection in need.
pub const VSOCK_SPARE_BUFFERS: usize = 2;

/// Resets waiting for guest buffers; beyond it the device takes no more packets from the
/// guest until the guest makes room (VIRTIO 1.2 section 5.10.6.1.2).
pub const VSOCK_RESETS_MAX: usize = 256;

/// How long the other side of a vsock connection may take: a host client for its `CONNECT`
/// line, a guest for accepting, a host listener with a full queue, a guest for confirming a
/// full shutdown. Beyond it the connection is dropped.
pub const VSOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest path of a unix socket, in bytes (`sockaddr_un` less its zero byte).
pub const VSOCK_PATH_MAX: usize = 107;

/// Longest `CONNECT <port>` line read from a host client; a longer one closes it.
pub const VSOCK_CONNECT_LINE_MAX: usize = 32;

/// Largest frame accepted from or given to a network device, virtio-net header included:
/// 64 KiB of payload after segmentation offload plus headers (VIRTIO 1.2 section 5.1.6.3).
pub const NET_FRAME_MAX: usize = 65_562;

/// Bytes of serial or console output held for a reader that does not read; the oldest are
/// dropped and counted beyond it, and the vCPU is never blocked.
pub const CONSOLE_BUFFER: usize = 64 * 1024;

/// Segments of one block request (`seg_max`); with header and status a chain is two longer.
pub const BLOCK_SEGMENTS_MAX: u32 = 254;

/// Requests one turn of a queue handler serves before it lets its neighbours on the same
/// worker run.
pub const TURN_BUDGET: usize = 256;

/// Bytes one block request moves at most; a longer one fails with `VIRTIO_BLK_S_IOERR`. A
/// driver that keeps to `seg_max` and its own sane segment sizes never comes near.
pub const BLOCK_REQUEST_MAX: u64 = 64 << 20;

/// Ranges of one discard request (`max_discard_seg`); more fail with `VIRTIO_BLK_S_IOERR`.
pub const BLOCK_RANGES_MAX: u32 = 16;

/// Sectors of one discard range (`max_discard_sectors`): 2 GiB.
pub const BLOCK_DISCARD_SECTORS_MAX: u32 = 1 << 22;

/// Sectors of one write-zeroes range (`max_write_zeroes_sectors`): 256 MiB, what a host
/// without any help for it writes by hand well inside [`DRAIN_DEADLINE`].
pub const BLOCK_ZEROES_SECTORS_MAX: u32 = 1 << 19;

/// Bytes of the buffer through which one block queue passes what `O_DIRECT` refuses; longer
/// requests go through it piece by piece.
pub const BLOCK_BOUNCE: usize = 256 * 1024;

/// Bytes one turn of a block queue moves on the worker's own time before its neighbours run.
pub const BLOCK_TURN_BYTES: u64 = 8 << 20;

/// How often one block request is given to the host again after `EAGAIN` or a partial
/// transfer before it fails with `VIRTIO_BLK_S_IOERR`.
pub const BLOCK_RETRIES_MAX: u16 = 1024;

/// Queues of one block device.
pub const BLOCK_QUEUES_MAX: u16 = 64;

/// Bytes the keyboard controller holds for a guest that does not read them; further ones are
/// lost, as on the real part.
pub const KEYBOARD_BUFFER: usize = 32;

/// Queue pairs of one network device at most; each has a worker thread of its own.
pub const NET_PAIRS_MAX: u16 = 16;

/// Descriptors in each queue of a network device. At 256 mergeable buffers of 1.5 KiB hold
/// six of the largest frames.
pub const NET_QUEUE_SIZE: u16 = 256;

/// How long a disk that is locked is asked for before it counts as in use.
pub const DISK_LOCK_PATIENCE: Duration = Duration::from_millis(300);

/// Bytes of one output request of a virtio console that are passed on; a driver that puts
/// more into one buffer than this loses the rest.
pub const CONSOLE_REQUEST_MAX: u64 = 1 << 20;

/// How long a block queue looks for its driver's next request before it sleeps, where the
/// driver was seen to be that quick.
pub const BLOCK_LINGER: Duration = Duration::from_micros(10);

/// Steps one turn of a balloon queue makes before its neighbours run: one for each page of a
/// list, one for each 64 KiB of a range. About ten milliseconds at the worst.
pub const BALLOON_TURN_STEPS: u64 = 4096;

/// Bytes of one range that a balloon gives back at a time; the rest follows by itself.
pub const BALLOON_PIECE: u64 = 64 << 20;

/// Statistics in one buffer of a balloon's driver; a longer buffer is kept but not looked at.
pub const BALLOON_STATISTICS_MAX: usize = 256;

/// Pieces of a snapshot file's mapping that one balloon replaces by empty memory, each of
/// which may split a mapping; further ones are given back without replacing them.
pub const BALLOON_OVERLAYS_MAX: u32 = 8192;

/// Queue entries of a persistent memory device: flushes that wait at the same time.
pub const PMEM_QUEUE_SIZE: u16 = 64;

/// Slots of pluggable memory at most: 1 TiB of the smallest. Each takes a memory slot of the
/// hypervisor, which has some 32 thousand, and a mapping of this process, which may have 65
/// thousand.
pub const MEM_SLOTS_MAX: u64 = 8192;

/// Blocks of pluggable memory at most; each takes a bit.
pub const MEM_BLOCKS_MAX: u64 = 1 << 22;

/// Bytes of unplugged memory given back in one turn before the device looks whether it is to
/// stop: well inside [`DRAIN_DEADLINE`], however small the pages.
pub const MEM_TURN_BYTES: u64 = 1 << 30;

/// Slots that one request may open or close; a longer one is told to try again. The longest a
/// driver can write at the usual sizes (65535 blocks of 2 MiB) comes to 1025.
pub const MEM_REQUEST_SLOTS_MAX: usize = 1100;
