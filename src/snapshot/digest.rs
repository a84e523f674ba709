//! The hash of the format, BLAKE3, and its spelling.
//!
//! The hash has to keep up with writing pages. On one core with AVX2, BLAKE3 does about 3 GB/s
//! (AVX-512: 6), SHA-256 about 2 with the processor's SHA instructions and 0.4 without; a CRC
//! is faster still, but cannot name a chunk in a store that several tenants' snapshots share.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// Bytes of a digest.
pub const LEN: usize = 32;

/// A BLAKE3 digest, 64 hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; LEN]);

impl Digest {
    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// Reads 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Digest> {
        parse(text).map(Digest)
    }
}

/// Identity of a snapshot: 128 random bits, 32 hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// A new one, from the kernel's random numbers.
    pub fn random() -> std::io::Result<Id> {
        let mut id = [0; 16];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut id)?;
        Ok(Id(id))
    }

    /// Reads 32 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Id> {
        parse(text).map(Id)
    }
}

fn parse<const N: usize>(text: &str) -> Option<[u8; N]> {
    let figure = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let &[high, low] = pair else { return None };
        *byte = figure(high)? << 4 | figure(low)?;
    }
    Some(bytes)
}

macro_rules! spelled {
    ($name:ident, $what:literal) => {
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $name::parse(&text).ok_or_else(|| D::Error::custom(concat!("no ", $what, " in hexadecimal")))
            }
        }
    };
}

spelled!(Digest, "digest of 64 digits");
spelled!(Id, "id of 32 digits");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_as_they_are_spelled() {
        let digest = Digest::of(b"nacelle");
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        let id = Id::random().unwrap();
        assert_eq!(Id::parse(&id.to_string()), Some(id));
        for bad in ["", "0", "zz", &"A".repeat(32), &"é".repeat(16)] {
            assert_eq!(Id::parse(bad), None, "{bad}");
        }
    }
}
