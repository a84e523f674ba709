//! What is saved of a network device.
//!
//! ```text
//!   1  mac  mtu  pairs  pairs_in_use
//!   2  .. and the tokens of its limits, received and sent
//! ```

use serde::{Deserialize, Serialize};

use super::{KIND, Mac};
use crate::{
    limiter::LimiterState,
    state::{Section, StateError},
};

const VERSION: u16 = 2;

/// Version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub mac: Mac,
    pub mtu: Option<u16>,
    pub pairs: u16,
    pub pairs_in_use: u16,
    pub rx: LimiterState,
    pub tx: LimiterState,
}

impl Saved {
    pub(super) fn section(&self) -> Section {
        Section::new(KIND, VERSION, self)
    }

    /// Decodes any version that is read. The values are still to be checked.
    pub(super) fn read(section: &Section) -> Result<Saved, StateError> {
        if section.version != 1 {
            return section.open(KIND, VERSION);
        }
        // Who saved this knew of no limits.
        let (mac, mtu, pairs, pairs_in_use) = section.open(KIND, 1)?;
        let (rx, tx) = (LimiterState::default(), LimiterState::default());
        Ok(Saved { mac, mtu, pairs, pairs_in_use, rx, tx })
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
        // MTU 1500, one of two pairs in use.
        let first = [6, 0, 0xac, 0x10, 0, 2, 1, 0xdc, 0xb, 2, 1];
        let saved = read(1, &first).unwrap();
        assert_eq!((saved.mac, saved.mtu), (Mac([6, 0, 0xac, 0x10, 0, 2]), Some(1500)));
        assert_eq!((saved.pairs, saved.pairs_in_use), (2, 1));
        assert_eq!((saved.rx, saved.tx), (LimiterState::default(), LimiterState::default()));
        assert_eq!(read(2, &[&first[..], &[0; 4]].concat()).unwrap(), saved);
        assert_eq!(Saved::read(&saved.section()).unwrap(), saved);
        // Neither in the other's layout.
        assert!(read(2, &first).is_err() && read(1, &[&first[..], &[0; 4]].concat()).is_err());
        let error = read(3, &first).unwrap_err().to_string();
        assert!(error.contains("virtio-net has version 3; this build writes version 2"), "{error}");
    }
}
