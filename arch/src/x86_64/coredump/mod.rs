//! A machine's memory and registers as an ELF core file, which `crash` and gdb open.
//!
//! ```text
//!   0      ELF header, ET_CORE                          all of the head is
//!   64     program headers: one PT_NOTE, a PT_LOAD      written last, so that an
//!          for each region of memory                    unfinished file is no ELF
//!   ...    notes: NT_PRSTATUS of each vCPU, "QEMU" of   file at all
//!          each vCPU, VMCOREINFO of the guest's kernel
//!   4 KiB  memory, region after region, page-aligned;   pages of zeros are holes
//!   aligned                                             of the file
//! ```
//!
//! **Addresses are physical.** `p_paddr` and `p_vaddr` of a region both are where the guest has
//! it; page tables are the reader's to follow. `crash` finds the kernel from the control
//! registers in the "QEMU" notes, whatever address the kernel chose for itself. Its rules for
//! telling this kind of file from older ones are kept: notes before memory, and an alignment of
//! 0 in the program headers.
//!
//! **VMCOREINFO.** Linux keeps a note about itself (release, offsets, where it moved itself to)
//! at the beginning of a page of its own, for whoever dumps it. On the way through memory the
//! first page that begins as this note is remembered and put among the notes. It is the guest's
//! own word, like all of its memory: its length is checked, its text is not.

mod notes;
#[cfg(test)]
mod tests;

use std::io::{self, Seek, SeekFrom, Write};

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

/// What the notes tell of one vCPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Registers {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, tables and control registers.
    pub sregs: kvm_sregs,
    /// What SWAPGS exchanges (MSR 0xc0000102).
    pub kernel_gs_base: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Bytes of memory that are not holes.
    pub data: u64,
    /// The guest's kernel had a note about itself.
    pub vmcoreinfo: bool,
}

/// Why there is no core file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreDumpError {
    /// The file could not be written.
    #[error("Cannot write the core file")]
    Write(#[from] io::Error),
    /// Guest memory could not be read.
    #[error("Cannot read guest memory at {at:#x}")]
    Read {
        /// Guest physical address.
        at: u64,
        /// Why.
        source: GuestMemoryError,
    },
    /// More regions than an ELF header counts, or larger than a file can be.
    #[error("A core file has room for {MAX_REGIONS} regions of memory and 2^63 bytes; this machine has more")]
    TooLarge,
}

/// An ELF header counts 65534 program headers; one is for the notes.
const MAX_REGIONS: usize = 0xfffe - 1;
const PAGE: usize = 4096;
/// Read at once: fits the second-level cache.
const CHUNK: usize = 256 << 10;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// A region of guest memory and its place in the file.
#[derive(Clone, Copy)]
struct Region {
    base: u64,
    len: u64,
    offset: u64,
}

/// Writes the core file of a machine that does not run. `vcpus` in the order of their indices.
///
/// # Errors
/// See [`CoreDumpError`]; what was written until then is no ELF file.
pub fn write<M, W>(memory: &M, vcpus: &[Registers], out: &mut W) -> Result<Written, CoreDumpError>
where
    M: GuestMemoryBackend,
    W: Write + Seek,
{
    let count = memory.num_regions();
    let head = ELF_HEADER + PROGRAM_HEADER * (count + 1);
    let room = head + notes::room(vcpus.len());
    let regions = place(memory, room as u64)?;
    let size = regions.last().map_or(room as u64, |r| r.offset + r.len);

    let mut copy = Copy { out, at: 0, data: 0, vmcoreinfo: None };
    copy.seek(0)?;
    let mut buffer = vec![0; CHUNK];
    for region in &regions {
        copy.region(memory, *region, &mut buffer)?;
    }
    // A hole at the end would be missing from the file's length.
    if copy.at < size {
        copy.put(size - 1, &[0])?;
    }
    let notes = notes::all(vcpus, copy.vmcoreinfo.as_deref());
    let mut bytes = header(count as u16 + 1);
    bytes.extend(program_header(PT_NOTE, 0, head as u64, notes.len() as u64));
    for Region { base, len, offset } in regions {
        bytes.extend(program_header(PT_LOAD, base, offset, len));
    }
    bytes.extend(notes);
    copy.put(0, &bytes)?;
    copy.out.flush()?;
    Ok(Written { size, data: copy.data, vmcoreinfo: copy.vmcoreinfo.is_some() })
}

/// Gives each region its place behind the first `room` bytes.
fn place<M: GuestMemoryBackend>(memory: &M, room: u64) -> Result<Vec<Region>, CoreDumpError> {
    if memory.num_regions() > MAX_REGIONS {
        return Err(CoreDumpError::TooLarge);
    }
    let mut end = room;
    let mut regions = Vec::with_capacity(memory.num_regions());
    for region in memory.iter() {
        let (base, len) = (region.start_addr().raw_value(), region.len());
        let offset = end.next_multiple_of(PAGE as u64);
        end = offset.checked_add(len).filter(|&end| end < 1 << 63).ok_or(CoreDumpError::TooLarge)?;
        regions.push(Region { base, len, offset });
    }
    Ok(regions)
}

/// Copies memory to a file.
struct Copy<'a, W> {
    out: &'a mut W,
    /// Where the next byte goes that is written without a seek.
    at: u64,
    data: u64,
    vmcoreinfo: Option<Vec<u8>>,
}

impl<W: Write + Seek> Copy<'_, W> {
    fn region<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        region: Region,
        buffer: &mut [u8],
    ) -> Result<(), CoreDumpError> {
        let mut done = 0;
        while done < region.len {
            let len = usize::try_from(region.len - done).map_or(buffer.len(), |rest| rest.min(buffer.len()));
            let chunk = &mut buffer[..len];
            let at = region.base + done;
            memory
                .read_slice(chunk, GuestAddress(at))
                .map_err(|source| CoreDumpError::Read { at, source })?;
            self.chunk(region.offset + done, chunk)?;
            done += len as u64;
        }
        Ok(())
    }

    /// Writes the pages of `chunk` that are not zero, neighbours in one piece.
    fn chunk(&mut self, offset: u64, chunk: &[u8]) -> io::Result<()> {
        let mut run = 0..0;
        for (start, page) in (0..).step_by(PAGE).zip(chunk.chunks(PAGE)) {
            if is_zero(page) {
                self.data_at(offset, chunk, &run)?;
                run = 0..0;
                continue;
            }
            if self.vmcoreinfo.is_none() {
                self.vmcoreinfo = notes::vmcoreinfo_in(page).map(<[u8]>::to_vec);
            }
            let begin = if run.is_empty() { start } else { run.start };
            run = begin..start + page.len();
        }
        self.data_at(offset, chunk, &run)
    }

    fn data_at(&mut self, offset: u64, chunk: &[u8], run: &std::ops::Range<usize>) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        self.data += run.len() as u64;
        self.put(offset + run.start as u64, &chunk[run.clone()])
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if self.at != at {
            self.seek(at)?;
        }
        self.out.write_all(bytes)?;
        self.at = at + bytes.len() as u64;
        Ok(())
    }

    fn seek(&mut self, at: u64) -> io::Result<()> {
        self.at = self.out.seek(SeekFrom::Start(at))?;
        Ok(())
    }
}

fn is_zero(page: &[u8]) -> bool {
    // In pieces, because the compiler makes one vector operation of each piece, and most pages
    // that are not zero show it early.
    page.chunks(64).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The ELF header (elf(5)) of a core file of this processor with `count` program headers.
fn header(count: u16) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    const VERSION: u32 = 1;
    let mut bytes = Vec::with_capacity(ELF_HEADER + PROGRAM_HEADER * usize::from(count));
    // 64 bits, little endian, version 1, no operating system.
    bytes.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(ET_CORE.to_le_bytes());
    bytes.extend(EM_X86_64.to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    // Entry point, program headers, section headers; then flags.
    bytes.extend([0, ELF_HEADER as u64, 0].map(u64::to_le_bytes).concat());
    bytes.extend(0u32.to_le_bytes());
    let sizes = [ELF_HEADER as u16, PROGRAM_HEADER as u16, count, 0, 0, 0];
    bytes.extend(sizes.map(u16::to_le_bytes).concat());
    bytes
}

/// One program header; `address` is physical and virtual.
fn program_header(kind: u32, address: u64, offset: u64, len: u64) -> Vec<u8> {
    const READ_WRITE_EXECUTE: u32 = 7;
    let flags = if kind == PT_LOAD { READ_WRITE_EXECUTE } else { 0 };
    let mut bytes = Vec::with_capacity(PROGRAM_HEADER);
    bytes.extend(kind.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    // Offset, virtual and physical address, size in the file and in memory, alignment.
    bytes.extend([offset, address, address, len, len, 0].map(u64::to_le_bytes).concat());
    bytes
}
