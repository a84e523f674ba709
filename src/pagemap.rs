//! Which pages of a mapping are there, and which of them are copies of its own.
//!
//! Asked by whoever captures a machine (what is to be written) and by whoever records a working set
//! (what was touched). `/proc/self/pagemap` has eight bytes for each page: bit 63 that it is present, bit 62 that it
//! is swapped out, bit 61 that it is a page of a file. A private mapping of a file has pages of
//! the file until it is written to; a page that is there and not the file's was written.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::snapshot::{extents::Run, limits::PAGE};

// Bits of an entry (Linux Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// Pages that are looked at with one read: 64 KiB of entries, for 32 MiB of memory.
const AT_ONCE: u64 = 8192;

/// A mapping of this process, and where it lies in the memory file.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// First address.
    pub host: u64,
    /// Bytes; whole pages.
    pub len: u64,
    /// Where it begins in the memory file.
    pub offset: u64,
}

/// The kernel's list of this process's pages.
pub struct PageMap(File);

impl PageMap {
    /// Opens it; fails where `/proc` is not mounted.
    pub fn open() -> io::Result<PageMap> {
        File::open("/proc/self/pagemap").map(PageMap)
    }

    /// Tells `tell` of each run of pages of `span` that are there, as offsets in memory, and
    /// whether they are the mapping's own.
    pub fn scan(&self, span: Span, mut tell: impl FnMut(Run, bool)) -> io::Result<()> {
        let mut buffer = vec![0; (AT_ONCE * 8) as usize];
        let mut open: Option<(Run, bool)> = None;
        let mut at = 0;
        while at < span.len {
            let count = ((span.len - at) / PAGE).clamp(1, AT_ONCE);
            let piece = buffer.get_mut(..(count * 8) as usize).unwrap_or_default();
            self.0.read_exact_at(piece, (span.host + at) / PAGE * 8)?;
            for (number, entry) in piece.as_chunks().0.iter().enumerate() {
                let entry = u64::from_ne_bytes(*entry);
                let kind = (entry & (PRESENT | SWAPPED) != 0).then_some(entry & OF_A_FILE == 0);
                let start = span.offset + at + number as u64 * PAGE;
                match (&mut open, kind) {
                    (Some((run, own)), Some(kind)) if *own == kind => run.end = start + PAGE,
                    (open, kind) => {
                        if let Some((run, own)) = open.take() {
                            tell(run, own);
                        }
                        *open = kind.map(|own| (Run { start, end: start + PAGE }, own));
                    }
                }
            }
            at += count * PAGE;
        }
        if let Some((run, own)) = open {
            tell(run, own);
        }
        Ok(())
    }
}
