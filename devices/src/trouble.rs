//! What goes wrong with a device while the machine goes on.
//!
//! A device that meets trouble answers its driver as the specification says (an error status, a
//! link that is down, `DEVICE_NEEDS_RESET`), and counts it. Somebody else may want to know, too: the
//! operator whose disk is full hears of it here, through the [`Witness`] that the machine's owner
//! gives each transport. It is called on whatever thread meets the trouble, as often as a guest
//! manages to cause it, so a witness is quick and limits what it passes on.

use std::io;

/// One thing that went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The device cannot go on from what its driver did; it asked for a reset (VIRTIO 1.2 section
    /// 2.1.2).
    NeedsReset,
    /// The host refused to do what a request asked for.
    Io {
        /// What was to be done: `read`, `write`, `flush`, `discard`, `write-zeroes`.
        operation: &'static str,
        /// What the host said, as an error number of its system calls.
        code: Option<i32>,
        /// What kind of error that is.
        kind: io::ErrorKind,
    },
    /// The host's side of a network device is gone.
    LinkDown,
}

impl Trouble {
    /// Trouble with input or output.
    pub fn io(operation: &'static str, error: &io::Error) -> Trouble {
        Trouble::Io { operation, code: error.raw_os_error(), kind: error.kind() }
    }

    /// Its name in events.
    pub fn name(&self) -> &'static str {
        match self {
            Trouble::NeedsReset => "NeedsReset",
            Trouble::Io { .. } => "IoError",
            Trouble::LinkDown => "LinkDown",
        }
    }

    /// What the host said, in words, where it said something.
    pub fn error(&self) -> Option<String> {
        match self {
            Trouble::Io { code: Some(code), .. } => Some(io::Error::from_raw_os_error(*code).to_string()),
            Trouble::Io { kind, .. } => Some(kind.to_string()),
            _ => None,
        }
    }
}

/// Who is told. Must not block.
pub type Witness = Box<dyn Fn(Trouble) + Send + Sync>;
