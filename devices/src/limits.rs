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
