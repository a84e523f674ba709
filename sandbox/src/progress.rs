//! # What is going on
//!
//! Opening an image may take minutes. The store tells what it does through [`Progress`]; how
//! that looks (a bar, plain lines, nothing) is the caller's business.

use crate::digest::Digest;

/// One thing worth telling while an image is opened.
#[derive(Debug)]
pub enum Event<'a> {
    /// The registry is asked what the reference stands for.
    Resolving {
        /// The full reference.
        name: &'a str,
    },
    /// Another process prepares the same image; this one waits for it.
    Waiting {
        /// The image's key in the store.
        key: &'a str,
    },
    /// Some of a layer has arrived. The first event of a layer has `done` = 0, the last one
    /// `done` = `total`; a layer that is in the store already has only the last.
    Download {
        /// The layer's position, from 0.
        index: usize,
        /// How many layers the image has.
        count: usize,
        /// The layer's digest, compressed as it is.
        digest: &'a Digest,
        /// Bytes on disk so far.
        done: u64,
        /// Bytes the manifest declares.
        total: u64,
    },
    /// A layer is being applied to the tree.
    Apply {
        /// The layer's position, from 0.
        index: usize,
        /// How many layers the image has.
        count: usize,
    },
    /// A root directory is being read.
    Walk {
        /// The directory.
        path: &'a std::path::Path,
    },
    /// The image is ready.
    Ready {
        /// Its key in the store.
        key: &'a str,
        /// The size of the image file in bytes.
        bytes: u64,
        /// Whether it had been prepared before.
        cached: bool,
    },
}

/// Takes the events. Any closure `FnMut(Event)` does.
pub trait Progress {
    /// Called from the thread that opens the image, in order.
    fn event(&mut self, event: Event<'_>);
}

impl<F: FnMut(Event<'_>)> Progress for F {
    fn event(&mut self, event: Event<'_>) {
        self(event);
    }
}

/// Takes the events and drops them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&mut self, _: Event<'_>) {}
}
