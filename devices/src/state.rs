//! Saved state: opaque, named, versioned, and hostile when it comes back.
//!
//! A [`Section`] belongs to the one type that wrote it. Everybody else carries it as bytes.
//! The owner keeps the types it saves apart from the types it works with, gives each layout
//! a version, and checks every value on the way in: a section may come from a file or a peer
//! that lies.
//!
//! A machine outlives the program that saved it. Whoever changes a layout gives it the next number
//! and goes on reading the two before, by their own types:
//!
//! ```text
//!   match section.version {
//!       1 => { let (a, b) = section.open(KIND, 1)?; Saved { a, b, c: what it was then } }
//!       _ => section.open(KIND, VERSION)?,          any other version is refused here
//!   }
//! ```

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// One part of a saved machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// What wrote it, for example `virtio-block`.
    pub kind: String,
    /// Version of its layout, from 1.
    pub version: u16,
    /// The owner's encoding of it.
    pub bytes: Vec<u8>,
}

/// Why a section was refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The section was written by something else.
    #[error("Saved state of kind {found:?} was given to a device of kind {expected:?}")]
    Kind {
        /// What the reader is.
        expected: &'static str,
        /// What the section says.
        found: String,
    },
    /// The layout is one this build does not read.
    #[error(
        "Saved state of {kind} has version {found}; this build writes version {newest} and reads at most two \
         older ones"
    )]
    Version {
        /// Section kind.
        kind: &'static str,
        /// Version found.
        found: u16,
        /// Version that is written here.
        newest: u16,
    },
    /// The bytes do not decode.
    #[error("Saved state of {kind} does not decode")]
    Decode {
        /// Section kind.
        kind: &'static str,
        /// The decoder's reason.
        #[source]
        source: postcard::Error,
    },
    /// The values decode but cannot be true.
    #[error("Saved state of {kind} is not possible: {reason}")]
    Impossible {
        /// Section kind.
        kind: &'static str,
        /// Which value and why.
        reason: String,
    },
}

impl Section {
    /// Encodes `value` as version `version` of `kind`.
    ///
    /// # Panics
    /// Never for the plain structs of numbers, strings and vectors that devices save: the
    /// encoder only fails on types of unknown length.
    pub fn new<T: Serialize>(kind: &'static str, version: u16, value: &T) -> Section {
        let bytes = postcard::to_stdvec(value).expect("plain data always encodes");
        Section { kind: kind.to_owned(), version, bytes }
    }

    /// Decodes a section that must be `kind` in the layout of `version`, which `T` is. Trailing
    /// bytes are an error. The decoded values are still the caller's to check.
    pub fn open<T: DeserializeOwned>(&self, kind: &'static str, version: u16) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::Kind { expected: kind, found: self.kind.clone() });
        }
        if self.version != version {
            return Err(StateError::Version { kind, found: self.version, newest: version });
        }
        let (value, rest) =
            postcard::take_from_bytes(&self.bytes).map_err(|source| StateError::Decode { kind, source })?;
        if !rest.is_empty() {
            let reason = format!("{} bytes follow the last field", rest.len());
            return Err(StateError::Impossible { kind, reason });
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_returns_what_was_put_in() {
        let section = Section::new("demo", 1, &(7u32, vec![1u8, 2]));
        assert_eq!(section.open::<(u32, Vec<u8>)>("demo", 1).unwrap(), (7, vec![1, 2]));
    }

    #[test]
    fn other_kinds_versions_and_lengths_are_refused() {
        let mut section = Section::new("demo", 2, &7u32);
        assert!(matches!(section.open::<u32>("other", 2), Err(StateError::Kind { .. })));
        // Another version is another layout, be it newer or older.
        for other in [1, 3] {
            let error = section.open::<u32>("demo", other).unwrap_err();
            assert!(matches!(error, StateError::Version { found: 2, .. }), "{error}");
            assert!(error.to_string().contains(&format!("version 2; this build writes version {other}")));
        }
        section.bytes.push(0);
        assert!(matches!(section.open::<u32>("demo", 2), Err(StateError::Impossible { .. })));
        section.bytes.clear();
        assert!(matches!(section.open::<u32>("demo", 2), Err(StateError::Decode { .. })));
    }
}
