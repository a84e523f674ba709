//! ELF kernels: which segments to load, where to enter.
//!
//! Two reads: the header is in the bytes the format was detected by, the program headers are one
//! `pread`, and the notes one more for each note segment. The entry kinds are told apart by the
//! notes: `Xen` 18 carries the PVH entry, and any note of the name `Linux` (the build salt, in
//! every kernel since 4.19) says whose kernel this is.
//!
//! Own code rather than linux-loader's, for three reasons: that one reads through the file's
//! shared offset with a seek before every read, it says "unable to read" where this can say what
//! is wrong, and it puts no limit on what a header may ask for.

use super::{EntryChoice, Image, Protocol, check_span, malformed, truncated};
use crate::kernel::{BootError, BootFile};

/// More program headers than any kernel has (Linux has 5), fewer than cost time.
const MAX_SEGMENTS: u16 = 64;
/// Notes longer than this are not read; Linux's are below 1 KiB.
const MAX_NOTES: u64 = 64 << 10;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const XEN_PHYS32_ENTRY: u32 = 18;

struct ProgramHeader {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// Reads the headers of an x86-64 ELF file whose first bytes are `head`.
pub(super) fn read(
    kernel: &BootFile,
    head: &[u8],
    choice: EntryChoice,
    low: u64,
) -> Result<Image, BootError> {
    let headers = program_headers(kernel, head)?;
    let segments = segments(kernel, &headers, low)?;
    let (Some(start), Some(end)) =
        (segments.iter().map(|s| s.paddr).min(), segments.iter().map(|s| s.paddr + s.memsz).max())
    else {
        return Err(malformed(kernel, "it has no segment to load"));
    };
    let notes = read_notes(kernel, &headers)?;
    let elf_entry = u64_at(head, 24).unwrap_or(0);
    let (protocol, entry) = match (choice, notes.pvh) {
        (EntryChoice::Pvh, None) => {
            return Err(BootError::NoPvhEntry { name: kernel.name().to_owned() });
        }
        (EntryChoice::Pvh, Some(pvh)) => (Protocol::Pvh, u64::from(pvh)),
        (EntryChoice::Auto, Some(pvh)) if !notes.linux => (Protocol::Pvh, u64::from(pvh)),
        _ => (Protocol::Linux64, elf_entry),
    };
    let inside = |s: &ProgramHeader| entry >= s.paddr && entry - s.paddr < s.memsz;
    if !segments.iter().any(|s| inside(s)) {
        return Err(malformed(
            kernel,
            format!("its entry {entry:#x} lies in none of its segments ({start:#x} to {end:#x})"),
        ));
    }
    Ok(Image {
        protocol,
        entry,
        segments: segments.iter().filter(|s| s.filesz > 0).map(|s| (s.offset, s.paddr, s.filesz)).collect(),
        span: start..end,
        // Linux's COMMAND_LINE_SIZE on x86, which an ELF file does not tell.
        command_line_max: 2047,
        initrd_end: low,
        header: None,
    })
}

fn program_headers(kernel: &BootFile, head: &[u8]) -> Result<Vec<ProgramHeader>, BootError> {
    let short = || truncated(kernel, HEADER as u64);
    let kind = u16_at(head, 16).ok_or_else(short)?;
    let offset = u64_at(head, 32).ok_or_else(short)?;
    let size = u16_at(head, 54).ok_or_else(short)?;
    let count = u16_at(head, 56).ok_or_else(short)?;
    if head.len() < HEADER {
        return Err(short());
    }
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(malformed(
            kernel,
            format!("its ELF type is {kind}, a kernel's is 2 (a module or object file has 1)"),
        ));
    }
    if usize::from(size) != PROGRAM_HEADER || count == 0 || count > MAX_SEGMENTS {
        return Err(malformed(
            kernel,
            format!(
                "{count} program headers of {size} bytes; 1 to {MAX_SEGMENTS} of {PROGRAM_HEADER} are possible"
            ),
        ));
    }
    let bytes = usize::from(count) * PROGRAM_HEADER;
    let end = offset.saturating_add(bytes as u64);
    if end > kernel.len() {
        return Err(truncated(kernel, end));
    }
    let mut table = vec![0u8; bytes];
    let table = kernel.read_at(offset, &mut table)?;
    if table.len() < bytes {
        return Err(truncated(kernel, end));
    }
    let parse = |h: &[u8]| {
        Some(ProgramHeader {
            kind: u32_at(h, 0)?,
            offset: u64_at(h, 8)?,
            paddr: u64_at(h, 24)?,
            filesz: u64_at(h, 32)?,
            memsz: u64_at(h, 40)?,
        })
    };
    Ok(table.chunks_exact(PROGRAM_HEADER).filter_map(parse).collect())
}

/// The segments to load, each within the file and within RAM, together not more than RAM.
fn segments<'h>(
    kernel: &BootFile,
    headers: &'h [ProgramHeader],
    low: u64,
) -> Result<Vec<&'h ProgramHeader>, BootError> {
    if headers.iter().any(|h| h.kind == PT_INTERP) {
        return Err(BootError::NotAKernel {
            name: kernel.name().to_owned(),
            found: "a program for Linux".to_owned(),
        });
    }
    let mut total = 0u64;
    let mut found = Vec::new();
    for h in headers.iter().filter(|h| h.kind == PT_LOAD && h.memsz > 0) {
        if h.filesz > h.memsz {
            return Err(malformed(
                kernel,
                format!("a segment has {:#x} bytes in the file and only {:#x} in memory", h.filesz, h.memsz),
            ));
        }
        let end = h.offset.saturating_add(h.filesz);
        if end > kernel.len() {
            return Err(truncated(kernel, end));
        }
        check_span(kernel, &(h.paddr..h.paddr.saturating_add(h.memsz)), low)?;
        total = total.saturating_add(h.filesz);
        found.push(h);
    }
    if total > low {
        return Err(malformed(
            kernel,
            format!("its segments overlap: {total:#x} bytes for {low:#x} bytes of memory"),
        ));
    }
    Ok(found)
}

#[derive(Default)]
struct Notes {
    linux: bool,
    pvh: Option<u32>,
}

fn read_notes(kernel: &BootFile, headers: &[ProgramHeader]) -> Result<Notes, BootError> {
    let mut notes = Notes::default();
    for h in headers.iter().filter(|h| h.kind == PT_NOTE) {
        let mut bytes = vec![0u8; h.filesz.min(MAX_NOTES) as usize];
        let bytes = kernel.read_at(h.offset, &mut bytes)?;
        // Linux aligns its notes to 4; others to 8. The wrong alignment finds nothing.
        for align in [4, 8] {
            scan_notes(bytes, align, &mut notes);
        }
    }
    Ok(notes)
}

/// Walks the notes in `bytes`. Every step goes at least one note header forward.
fn scan_notes(bytes: &[u8], align: usize, notes: &mut Notes) {
    let mut at = 0usize;
    while let Some(rest) = bytes.get(at..) {
        let (Some(name_len), Some(desc_len), Some(kind)) =
            (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8))
        else {
            return;
        };
        let padded = |len: u32| (len as usize).checked_next_multiple_of(align);
        let (Some(name_room), Some(desc_room)) = (padded(name_len), padded(desc_len)) else {
            return;
        };
        let Some(desc_at) = name_room.checked_add(12) else {
            return;
        };
        let name = rest.get(12..12usize.saturating_add(name_len as usize));
        notes.linux |= name == Some(b"Linux\0");
        if name == Some(b"Xen\0") && kind == XEN_PHYS32_ENTRY && desc_len >= 4 {
            notes.pvh = notes.pvh.or(u32_at(rest, desc_at));
        }
        let step = desc_at.checked_add(desc_room);
        let Some(next) = step.and_then(|step| at.checked_add(step)) else {
            return;
        };
        at = next;
    }
}
