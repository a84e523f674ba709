//! What the guest says of its memory, and the clock that makes it say so (VIRTIO 1.2 section
//! 5.5.6.3).
//!
//! The driver gives the device one buffer with its statistics and waits. Returning the buffer
//! is the question; the driver's answer is the same buffer, filled anew. So the device keeps
//! the buffer until the clock strikes.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Bytes of one statistic: a 16-bit tag and a 64-bit value, packed, little-endian.
pub(super) const PAIR: usize = 10;

macro_rules! statistics {
    ($($name:ident: $what:literal,)*) => {
        /// The guest's statistics: the last value of each, absent where the guest never sent one.
        /// Amounts are in bytes unless said otherwise.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
        pub struct BalloonStats {
            $(#[doc = $what] pub $name: Option<u64>,)*
        }

        /// Tags that are known.
        const TAGS: usize = [$(stringify!($name)),*].len();

        impl Latest {
            /// The values by name.
            pub fn named(&self) -> BalloonStats {
                let [$($name),*] = self.0;
                BalloonStats { $($name),* }
            }
        }
    };
}

// In the order of their tags, from 0 on (VIRTIO 1.2 lists ten, Linux 6.12 has six more).
statistics! {
    swap_in: "Swapped in.",
    swap_out: "Swapped out.",
    major_faults: "Number of major page faults.",
    minor_faults: "Number of minor page faults.",
    free_memory: "Not used for anything.",
    total_memory: "All the guest has.",
    available_memory: "An estimate of what new programs could get without swapping.",
    disk_caches: "Caches of files that could be dropped at once.",
    hugetlb_allocations: "Number of huge page allocations that succeeded.",
    hugetlb_failures: "Number of huge page allocations that failed.",
    oom_kill: "Number of times the guest killed a process for want of memory.",
    alloc_stall: "Number of allocations that had to wait.",
    async_scan: "Scanned in the background for something to reclaim.",
    direct_scan: "Scanned by those who wanted memory.",
    async_reclaim: "Reclaimed in the background.",
    direct_reclaim: "Reclaimed by those who wanted memory.",
}

/// The last value of each tag, by tag; also what is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Latest([Option<u64>; TAGS]);

impl Latest {
    /// Takes over the pairs in `bytes`. Tags of later kernels are passed over, and so is an
    /// incomplete last pair; what is not there keeps its value.
    pub fn update(&mut self, bytes: &[u8]) {
        let (pairs, _) = bytes.as_chunks::<PAIR>();
        for [a, b, c, d, e, f, g, h, i, j] in pairs {
            let tag = usize::from(u16::from_le_bytes([*a, *b]));
            if let Some(value) = self.0.get_mut(tag) {
                *value = Some(u64::from_le_bytes([*c, *d, *e, *f, *g, *h, *i, *j]));
            }
        }
    }
}

/// A descriptor that is readable when it is time to ask.
///
/// Set by the register half while the queue half waits for it; the kernel keeps the two apart.
#[derive(Debug)]
pub(super) struct Clock {
    fd: OwnedFd,
}

impl Clock {
    /// A clock that stands still.
    pub fn new() -> io::Result<Clock> {
        // SAFETY: no memory is passed; the descriptor that comes back is nobody else's.
        let fd = unsafe {
            let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Clock { fd })
    }

    /// Strikes after `first`, which is not zero, and then every `interval`.
    pub fn set(&self, first: Duration, interval: Duration) -> io::Result<()> {
        let time = |d: Duration| libc::timespec {
            tv_sec: libc::time_t::try_from(d.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(d.subsec_nanos()),
        };
        let when = libc::itimerspec { it_value: time(first), it_interval: time(interval) };
        // SAFETY: the structure lives over the call, and the old setting is not asked for.
        let done =
            unsafe { libc::timerfd_settime(self.fd.as_raw_fd(), 0, &raw const when, std::ptr::null_mut()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Whether it struck since the last call, once or many times.
    pub fn struck(&self) -> bool {
        let mut times = [0u8; 8];
        // SAFETY: the buffer is as long as said and lives over the call.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), times.as_mut_ptr().cast(), times.len()) };
        got == 8
    }
}

impl AsRawFd for Clock {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat()
    }

    #[test]
    fn each_tag_lands_in_its_field() {
        let mut latest = Latest::default();
        let bytes: Vec<u8> = (0..16).flat_map(|tag| pair(tag, 100 + u64::from(tag))).collect();
        latest.update(&bytes);
        let stats = latest.named();
        // Numbers from Linux' include/uapi/linux/virtio_balloon.h.
        assert_eq!(stats.swap_in, Some(100));
        assert_eq!(stats.major_faults, Some(102));
        assert_eq!(stats.free_memory, Some(104));
        assert_eq!(stats.total_memory, Some(105));
        assert_eq!(stats.available_memory, Some(106));
        assert_eq!(stats.disk_caches, Some(107));
        assert_eq!(stats.hugetlb_failures, Some(109));
        assert_eq!(stats.oom_kill, Some(110));
        assert_eq!(stats.alloc_stall, Some(111));
        assert_eq!((stats.async_scan, stats.direct_scan), (Some(112), Some(113)));
        assert_eq!((stats.async_reclaim, stats.direct_reclaim), (Some(114), Some(115)));
    }

    #[test]
    fn unknown_tags_and_torn_pairs_change_nothing_and_absent_ones_keep_their_value() {
        let mut latest = Latest::default();
        latest.update(&pair(4, 1));
        let before = latest;
        latest.update(&[pair(16, 5), pair(u16::MAX, 6)].concat());
        latest.update(&pair(4, 9)[..9]);
        latest.update(&[]);
        assert_eq!(latest, before);
        latest.update(&pair(5, 2));
        assert_eq!((latest.named().free_memory, latest.named().total_memory), (Some(1), Some(2)));
    }

    #[test]
    fn a_clock_strikes_once_however_late_it_is_looked_at() {
        let clock = Clock::new().unwrap();
        assert!(!clock.struck());
        clock.set(Duration::from_nanos(1), Duration::from_millis(1)).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(clock.struck());
        clock.set(Duration::from_secs(1000), Duration::from_secs(1000)).unwrap();
        assert!(!clock.struck(), "setting it forgets what it struck before");
    }
}
