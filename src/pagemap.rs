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

/// The same where a byte tells of a page, for 256 MiB.
const BYTES_AT_ONCE: u64 = 65536;

/// Eight pages in a row that are there, as `mincore` tells of them.
const EIGHT: u64 = 0x0101_0101_0101_0101;

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

    /// Tells `tell` of each run of pages of `span` that are there, as offsets in memory. Of pages of
    /// files it says no more than that; nobody may touch memory meanwhile.
    ///
    /// `mincore` tells it with an eighth of the bytes and of the work, but passes over what is
    /// swapped out: it is asked where there is no swap.
    pub fn scan_present(&self, span: Span, mut tell: impl FnMut(Run)) -> io::Result<()> {
        if has_swap() {
            return self.scan(span, |run, _| tell(run));
        }
        let mut buffer = vec![0; (span.len / PAGE).clamp(8, BYTES_AT_ONCE) as usize];
        let mut open: Option<Run> = None;
        let mut at = 0;
        while at < span.len {
            let count = ((span.len - at) / PAGE).clamp(1, BYTES_AT_ONCE);
            let piece = buffer.get_mut(..count as usize).unwrap_or_default();
            let (host, len) = ((span.host + at) as usize, (count * PAGE) as usize);
            // SAFETY: the kernel writes one byte for each page, and reads nothing of the mapping.
            if unsafe { libc::mincore(host as *mut libc::c_void, len, piece.as_mut_ptr()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut add = |number: usize, pages: u64, there: bool| {
                let start = span.offset + at + number as u64 * PAGE;
                match (&mut open, there) {
                    (Some(run), true) => run.end = start + pages * PAGE,
                    (None, true) => open = Some(Run { start, end: start + pages * PAGE }),
                    (open, false) => open.take().into_iter().for_each(&mut tell),
                }
            };
            let (words, rest) = piece.as_chunks::<8>();
            for (number, word) in words.iter().enumerate() {
                match u64::from_ne_bytes(*word) & EIGHT {
                    0 => add(number * 8, 8, false),
                    EIGHT => add(number * 8, 8, true),
                    _ => (number * 8..).zip(word).for_each(|(at, byte)| add(at, 1, byte & 1 != 0)),
                }
            }
            (words.len() * 8..).zip(rest).for_each(|(at, byte)| add(at, 1, byte & 1 != 0));
            at += count * PAGE;
        }
        open.into_iter().for_each(tell);
        Ok(())
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

/// Whether pages of this host may be swapped out.
fn has_swap() -> bool {
    // SAFETY: `sysinfo` is plain numbers, for which all zeroes is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the structure it is given.
    unsafe { libc::sysinfo(&raw mut info) != 0 || info.totalswap != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_find_pages_agree() {
        const PAGES: u64 = 4099;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice, of pages that stay small.
        let at = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), (PAGES * PAGE) as usize, access, flags, -1, 0);
            libc::madvise(at, (PAGES * PAGE) as usize, libc::MADV_NOHUGEPAGE);
            at as u64
        };
        // Single pages, long runs, both ends, and where words of eight begin and end.
        let touched = |page: u64| page % 37 == 5 || (512..1536).contains(&page) || page >= PAGES - 2;
        for page in (0..PAGES).filter(|page| touched(*page)) {
            // SAFETY: a page of the mapping.
            unsafe { ((at + page * PAGE) as *mut u8).write_volatile(1) };
        }
        let map = PageMap::open().unwrap();
        for skip in [0, 1, 511, 513] {
            let span = Span { host: at + skip * PAGE, len: (PAGES - skip) * PAGE, offset: skip * PAGE };
            let (mut one, mut other) = (Vec::new(), Vec::new());
            map.scan(span, |run, _| one.push(run)).unwrap();
            map.scan_present(span, |run| other.push(run)).unwrap();
            assert_eq!(one, other);
            assert!((skip..PAGES).all(|page| {
                touched(page) == one.iter().any(|r| (r.start..r.end).contains(&(page * PAGE)))
            }));
        }
    }
}
