//! The command line: what to do, as `name=value` words.
//!
//! | word | means |
//! |---|---|
//! | `work=block|net|vsock|idle` | which device, or none; without it the end comes at once |
//! | `base=N` | address of its registers |
//! | `depth=N` | requests in flight |
//! | `cycles=N` | how long, by the time stamp counter |
//! | `sectors=N` | block: size of the disk |
//! | `bytes=N` | net: length of a frame; vsock: bytes of a stream |

/// Which device is driven.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// None; the machine ends at once.
    End,
    /// None; the machine stands there.
    Idle,
    /// Random reads.
    Block,
    /// Frames to the host.
    Net,
    /// Streams and round trips.
    Vsock,
}

/// The words of the command line.
pub struct Order {
    /// Which device.
    pub work: Work,
    /// Where its registers are.
    pub base: usize,
    /// Requests in flight.
    pub depth: u64,
    /// Duration in ticks of the time stamp counter.
    pub cycles: u64,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Bytes of a frame or a stream.
    pub bytes: u64,
}

/// Offset of the command line's address in the zero page.
const COMMAND_LINE: usize = 0x228;
/// Longest command line looked at.
const LONGEST: usize = 2048;

impl Order {
    /// Reads the command line that `zero_page` points to.
    pub fn read(zero_page: usize) -> Order {
        let mut order = Order { work: Work::End, base: 0, depth: 1, cycles: 0, sectors: 0, bytes: 0 };
        // SAFETY: the boot protocol puts a zero page there with the address of a text of at
        // most 64 KiB, both in mapped memory that nobody writes.
        let text = unsafe {
            let line = ((zero_page + COMMAND_LINE) as *const u32).read_unaligned() as *const u8;
            core::slice::from_raw_parts(line, LONGEST)
        };
        let text = text.split(|byte| *byte == 0).next().unwrap_or(text);
        for word in text.split(|byte| *byte == b' ') {
            let mut parts = word.splitn(2, |byte| *byte == b'=');
            let (name, value) = (parts.next().unwrap_or(&[]), parts.next().unwrap_or(&[]));
            match name {
                b"work" => order.work = work(value),
                b"base" => order.base = number(value) as usize,
                b"depth" => order.depth = number(value),
                b"cycles" => order.cycles = number(value),
                b"sectors" => order.sectors = number(value),
                b"bytes" => order.bytes = number(value),
                _ => {}
            }
        }
        order
    }
}

fn work(value: &[u8]) -> Work {
    match value {
        b"block" => Work::Block,
        b"net" => Work::Net,
        b"vsock" => Work::Vsock,
        b"idle" => Work::Idle,
        _ => Work::End,
    }
}

fn number(digits: &[u8]) -> u64 {
    let digits = digits.iter().filter(|byte| byte.is_ascii_digit());
    digits.fold(0, |sum: u64, byte| sum.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')))
}
