//! What is saved of a disk. Its content is the owner's affair, and nothing is in flight.
//!
//! ```text
//!   1  sectors  queues  read_only  flush_failed
//!   2  .. and the tokens of its limits
//!   3  .. and whether the driver is still to be told of its capacity
//! ```

use serde::{Deserialize, Serialize};

use super::KIND;
use crate::{
    limiter::LimiterState,
    state::{Section, StateError},
};

const VERSION: u16 = 3;

/// Version 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub sectors: u64,
    pub queues: u16,
    pub read_only: bool,
    pub flush_failed: bool,
    pub limiter: LimiterState,
    /// The driver has not been told of its capacity yet.
    pub announce: bool,
}

impl Saved {
    pub(super) fn section(&self) -> Section {
        Section::new(KIND, VERSION, self)
    }

    /// Decodes any version that is read. The values are still to be checked.
    pub(super) fn read(section: &Section) -> Result<Saved, StateError> {
        // Who saved the older ones knew of no limits, and told the driver of a change at once.
        let (shape, limiter) = match section.version {
            1 => (section.open(KIND, 1)?, LimiterState::default()),
            2 => section.open(KIND, 2)?,
            _ => return section.open(KIND, VERSION),
        };
        let (sectors, queues, read_only, flush_failed) = shape;
        Ok(Saved { sectors, queues, read_only, flush_failed, limiter, announce: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(version: u16, bytes: &[u8]) -> Result<Saved, StateError> {
        Saved::read(&Section { kind: KIND.to_owned(), version, bytes: bytes.to_vec() })
    }

    #[test]
    fn what_older_builds_wrote_is_read_as_they_meant_it() {
        // 300 sectors, two queues, read-only, no failed flush.
        let plain = Saved {
            sectors: 300,
            queues: 2,
            read_only: true,
            flush_failed: false,
            limiter: LimiterState::default(),
            announce: false,
        };
        assert_eq!(read(1, &[0xac, 2, 2, 1, 0]).unwrap(), plain);
        assert_eq!(read(2, &[0xac, 2, 2, 1, 0, 0, 0]).unwrap(), plain);
        assert_eq!(read(3, &[0xac, 2, 2, 1, 0, 0, 0, 1]).unwrap(), Saved { announce: true, ..plain });
        // Limited to 100 operations in a second, 7 of which are left.
        let limited = read(2, &[0xac, 2, 2, 1, 0, 0, 1, 100, 0, 0xe8, 7, 0, 7, 0, 0]).unwrap();
        let ops = limited.limiter.ops.unwrap();
        assert_eq!((ops.size, ops.refill_time_ms, ops.budget), (100, 1000, 7));
        assert_eq!(Saved::read(&limited.section()).unwrap(), limited);
    }

    #[test]
    fn a_layout_under_another_number_and_numbers_that_are_not_known_are_refused() {
        for (version, bytes) in
            [(1, &[0xac, 2, 2, 1, 0, 0, 0][..]), (2, &[0xac, 2, 2, 1, 0]), (3, &[1, 1, 0])]
        {
            assert!(read(version, bytes).is_err(), "{version}");
        }
        for version in [0, 4, u16::MAX] {
            let error = read(version, &[0xac, 2, 2, 1, 0, 0, 0, 1]).unwrap_err().to_string();
            let said = format!("virtio-block has version {version}; this build writes version 3");
            assert!(error.contains(&said), "{error}");
        }
    }
}
