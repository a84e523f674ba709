//! The machine's clock and its source of random numbers: the two things a machine that was
//! copied or stopped for a while must not take from its own memory.

use super::syscall::{check, open};
use guest::protocol::{Failure, FailureKind};
use std::{io, os::fd::AsRawFd, path::Path, time::Duration};

/// Most random bytes taken at once.
const MAX_ENTROPY: usize = 512;

/// Sets the clock, in nanoseconds since 1970.
pub fn set(unix_ns: u64) -> Result<(), Failure> {
    let time = Duration::from_nanos(unix_ns);
    // Nanoseconds in 64 bits are at most 584 years: they fit every type here.
    let time = libc::timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() };
    // SAFETY: one readable timespec.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) })
        .map(drop)
        .map_err(|e| fail("set the clock", &e))
}

/// Mixes random bytes into the kernel's generator and counts them as fully random; the
/// kernel's own streams start anew from them at once.
pub fn feed(entropy: &[u8]) -> Result<(), Failure> {
    if entropy.is_empty() {
        return Ok(());
    }
    check_entropy(entropy)?;
    mix(entropy).map_err(|e| fail("feed the random generator", &e))
}

/// Refuses more than the kernel takes at once.
pub fn check_entropy(entropy: &[u8]) -> Result<(), Failure> {
    if entropy.len() > MAX_ENTROPY {
        let message = format!("{} random bytes were sent, at most {MAX_ENTROPY} fit", entropy.len());
        return Err(Failure::new(FailureKind::BadRequest, message));
    }
    Ok(())
}

fn mix(entropy: &[u8]) -> io::Result<()> {
    // _IOW('R', 0x03, int[2]) and _IO('R', 0x07) of Linux `random.h`.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let random = open(Path::new("/dev/random"), libc::O_WRONLY)?;
    let (bits, bytes) = (entropy.len() as i32 * 8, entropy.len() as i32);
    let mut request = [bits.to_ne_bytes(), bytes.to_ne_bytes()].concat();
    request.extend_from_slice(entropy);
    // SAFETY: a rand_pool_info: two integers and as many bytes as the second one says. The
    // kernel reads it as bytes, so alignment does not matter.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, request.as_ptr()) })?;
    // SAFETY: no argument. Older kernels do it by themselves.
    unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    Ok(())
}

fn fail(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::System, format!("Cannot {what}: {error}"))
}
