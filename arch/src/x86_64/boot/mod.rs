//! From files to a machine that only has to be started.
//!
//! ```text
//!   kernel file --elf.rs-----+
//!               --bzimage.rs-+-> Plan: entry, protocol, pieces   (headers read, nothing written)
//!   initrd, command line ----+      |
//!                                   | load_pieces: file -> guest memory, no copy between
//!                                   | finish: linux.rs (zero page) or pvh.rs (start info),
//!                                   v         command line, page tables, GDT
//!                                 Loaded: what regs.rs needs
//! ```
//!
//! A [`Plan`] is made from headers alone, so a wrong file ends in a sentence before a machine
//! exists, and the pieces (file range to guest range) can be read by one thread while another
//! makes devices. [`load`] does both in turn.
//!
//! **Which entry.** A Linux `vmlinux` has two. The 64-bit one (`startup_64`) is where both lead:
//! PVH's 32-bit entry first clears BSS, builds page tables, converts the start info into a zero
//! page and enters long mode itself. Entering at `startup_64` with all of that done by the
//! monitor saves those instructions, and needs one structure less to be translated. So
//! [`EntryChoice::Auto`] takes the 64-bit entry of everything that says it is Linux (its ELF
//! notes do), and PVH for other kernels that have that note: their ELF entry is seldom meant for
//! a boot loader. A `bzImage` is entered at its 64-bit entry, 0x200 bytes into the payload; the
//! guest decompresses itself.
//!
//! **Segments are read, not mapped.** Mapping a kernel's pages from the page cache over guest
//! memory makes loading free and everything after it dearer: the pages are small and private, so
//! the guest takes one fault a page instead of one for 2 MiB, and one more where it writes
//! (patches its own text). Measured to init with a 21 MB kernel: 10268 exits and 0.39 s of CPU
//! mapped, 1503 and 0.29 s read. The pieces are public for callers that weigh memory shared
//! between machines higher.
//!
//! **BSS is not written.** Guest memory is new and therefore zero.

mod bzimage;
mod elf;
mod linux;
mod pvh;
#[cfg(test)]
mod tests;

use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::GuestMemoryBackend;

use super::{layout, regs};
use crate::kernel::{BootError, BootFile, CommandLine, DETECT_LEN, Format, machine_name};

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode, `RSI` is the
    /// zero page.
    Linux64,
    /// Xen's PVH start (xen/docs/misc/pvh.pandoc): 32 bits without paging, `EBX` is the start
    /// info.
    Pvh,
}

/// What the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EntryChoice {
    /// The quickest entry the kernel has, see the module.
    #[default]
    Auto,
    /// The 64-bit entry.
    Linux64,
    /// The PVH entry; an error for a kernel without it.
    Pvh,
}

/// Everything a boot is made from.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// An ELF vmlinux or a bzImage.
    pub kernel: &'a BootFile,
    /// The initial ram disk; an empty file is the same as none.
    pub initrd: Option<&'a BootFile>,
    /// The kernel's command line.
    pub command_line: &'a CommandLine,
    /// Which entry of the kernel.
    pub entry: EntryChoice,
    /// Bytes of RAM, as given to [`layout::ram_regions`].
    pub ram: u64,
    /// Guest address of the RSDP ([`super::acpi::write`] returns it); `None` without ACPI.
    pub rsdp: Option<u64>,
}

/// A kernel in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction.
    pub entry: u64,
    /// State to enter with.
    pub protocol: Protocol,
    /// Guest address of the zero page or of the PVH start info.
    pub info: u64,
    /// Guest memory the kernel claims, BSS and room for decompression included.
    pub kernel: Range<u64>,
    /// Where the initrd lies.
    pub initrd: Option<Range<u64>>,
}

/// A range of a file and where it belongs in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The kernel or the initrd.
    pub file: &'a BootFile,
    /// First byte in the file.
    pub offset: u64,
    /// First guest address.
    pub at: u64,
    /// Bytes; never 0.
    pub len: usize,
}

/// What the headers of a kernel say.
#[derive(Debug)]
struct Image {
    protocol: Protocol,
    entry: u64,
    /// (offset in the file, guest address, bytes)
    segments: Vec<(u64, u64, u64)>,
    span: Range<u64>,
    /// Most characters of a command line, without the NUL.
    command_line_max: usize,
    /// First address behind the last that an initrd may have.
    initrd_end: u64,
    /// The file's own header; `None` for ELF.
    header: Option<setup_header>,
}

/// Checked, placed, and nothing written yet.
#[derive(Debug)]
pub struct Plan<'a> {
    payload: Payload<'a>,
    image: Image,
    initrd: Option<Range<u64>>,
    pieces: Vec<Piece<'a>>,
}

impl<'a> Plan<'a> {
    /// Reads the kernel's headers and decides where everything goes.
    ///
    /// # Errors
    /// Each way in which files, memory size and command line do not fit: see [`BootError`].
    pub fn new(payload: Payload<'a>) -> Result<Self, BootError> {
        let low = low_ram(payload.ram);
        let image = read_image(payload.kernel, payload.entry, low)?;
        let len = payload.command_line.as_str().len();
        let limit = image.command_line_max.min(layout::COMMAND_LINE_MAX - 1);
        if len > limit {
            return Err(BootError::CommandLineTooLong { len, limit });
        }
        let mut pieces = Vec::with_capacity(image.segments.len() + 1);
        for &(offset, at, len) in &image.segments {
            pieces.push(Piece {
                file: payload.kernel,
                offset,
                at,
                len: usize::try_from(len).unwrap_or(usize::MAX),
            });
        }
        let initrd = match payload.initrd {
            Some(file) if !file.is_empty() => {
                let range = place_initrd(file, &image, low)?;
                pieces.push(Piece {
                    file,
                    offset: 0,
                    at: range.start,
                    len: usize::try_from(file.len()).unwrap_or(usize::MAX),
                });
                Some(range)
            }
            _ => None,
        };
        Ok(Self { payload, image, initrd, pieces })
    }

    /// The file ranges to bring into guest memory, the kernel's first.
    #[must_use]
    pub fn pieces(&self) -> &[Piece<'a>] {
        &self.pieces
    }

    /// Reads every piece into guest memory.
    ///
    /// # Errors
    /// [`BootError::Read`] and [`BootError::Memory`].
    pub fn load_pieces<M: GuestMemoryBackend>(&self, memory: &M) -> Result<(), BootError> {
        for piece in &self.pieces {
            piece.file.load(memory, piece.at, piece.offset, piece.len)?;
        }
        Ok(())
    }

    /// Writes what the kernel is told: command line, zero page or start info, page tables, GDT.
    /// Independent of [`Plan::load_pieces`] and in any order with it.
    ///
    /// # Errors
    /// [`BootError::Memory`].
    pub fn finish<M: GuestMemoryBackend>(&self, memory: &M) -> Result<Loaded, BootError> {
        let image = &self.image;
        self.payload.command_line.write(memory, layout::COMMAND_LINE, image.command_line_max)?;
        let info = match image.protocol {
            Protocol::Linux64 => {
                linux::write_zero_page(memory, self)?;
                regs::write_page_tables(memory, image.span.end)
                    .map_err(|e| BootError::Memory("page tables", e))?;
                layout::ZERO_PAGE
            }
            Protocol::Pvh => {
                pvh::write_start_info(memory, self)?;
                layout::PVH_INFO
            }
        };
        regs::write_gdt(memory, image.protocol).map_err(|e| BootError::Memory("descriptor table", e))?;
        Ok(Loaded {
            entry: image.entry,
            protocol: image.protocol,
            info,
            kernel: image.span.clone(),
            initrd: self.initrd.clone(),
        })
    }
}

/// Brings kernel, initrd, command line and boot information into guest memory.
///
/// # Errors
/// See [`BootError`]: each names the file, what is wrong and what would do.
pub fn load<M: GuestMemoryBackend>(memory: &M, payload: Payload<'_>) -> Result<Loaded, BootError> {
    let plan = Plan::new(payload)?;
    plan.load_pieces(memory)?;
    plan.finish(memory)
}

/// End of the RAM below the gap: all that a kernel can be loaded into.
fn low_ram(bytes: u64) -> u64 {
    bytes.min(layout::GAP.start)
}

fn read_image(kernel: &BootFile, entry: EntryChoice, low: u64) -> Result<Image, BootError> {
    let mut head = [0u8; DETECT_LEN];
    let head = kernel.read_at(0, &mut head)?;
    let name = || kernel.name().to_owned();
    match Format::detect(head) {
        Format::Elf64 { machine: 62 } => elf::read(kernel, head, entry, low),
        Format::BzImage => bzimage::read(kernel, entry, low),
        Format::Elf64 { machine } => Err(BootError::WrongMachine {
            name: name(),
            found: machine_name(machine).to_owned(),
            want: "x86_64",
        }),
        Format::Foreign(found) => {
            Err(BootError::WrongMachine { name: name(), found: found.to_owned(), want: "x86_64" })
        }
        Format::Other(found) => Err(BootError::NotAKernel { name: name(), found: found.to_owned() }),
    }
}

/// As high as it may lie, on a page: away from the kernel, which grows upwards at start.
fn place_initrd(file: &BootFile, image: &Image, low: u64) -> Result<Range<u64>, BootError> {
    const PAGE: u64 = 4096;
    let bottom = image.span.end.next_multiple_of(PAGE);
    let top = low.min(image.initrd_end);
    let start = top.checked_sub(file.len()).map(|s| s & !(PAGE - 1));
    match start {
        Some(start) if start >= bottom => Ok(start..start + file.len()),
        _ => Err(BootError::InitrdTooBig {
            name: file.name().to_owned(),
            size: file.len(),
            room: top.saturating_sub(bottom),
            needed: bottom.saturating_add(file.len()),
        }),
    }
}

/// Refuses a part of a kernel that would not lie in RAM, or on top of what the monitor writes
/// into the first MiB.
fn check_span(kernel: &BootFile, span: &Range<u64>, low: u64) -> Result<(), BootError> {
    if span.start < layout::HIGH_RAM {
        return Err(malformed(
            kernel,
            format!(
                "it wants to be loaded at {:#x}; kernels lie at {:#x} or above",
                span.start,
                layout::HIGH_RAM
            ),
        ));
    }
    if span.end > low || span.end < span.start {
        return Err(BootError::OutsideMemory {
            name: kernel.name().to_owned(),
            start: span.start,
            end: span.end,
            have: low,
            needed: span.end,
        });
    }
    Ok(())
}

fn malformed(kernel: &BootFile, why: impl Into<String>) -> BootError {
    BootError::Malformed { name: kernel.name().to_owned(), why: why.into() }
}

fn truncated(kernel: &BootFile, need: u64) -> BootError {
    BootError::Truncated { name: kernel.name().to_owned(), need, have: kernel.len() }
}
