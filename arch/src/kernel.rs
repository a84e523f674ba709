//! Kernel and initrd files, and the command line: the parts of a boot that are the same on
//! every processor.
//!
//! A [`BootFile`] is opened once, by name, so that every later sentence can name it. It is read
//! in two ways: headers by [`BootFile::read_at`] into a small buffer, contents by
//! [`BootFile::load`] straight into guest memory (one `pread` for each piece of guest memory,
//! no buffer between). Neither moves the file's offset, so one descriptor can serve many
//! monitors at a time.
//!
//! [`Format::detect`] looks at the first bytes only and also knows the files people mistake for
//! kernels, because "invalid magic" helps nobody who passed a compressed image.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

/// Why a machine cannot be booted from the given files. Sizes are bytes unless a unit stands
/// beside them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// Open, stat or read failed, or the file is of a kind that cannot be read at a position.
    #[error("Cannot read the {what} {name:?}")]
    Read {
        /// Which of the files.
        what: What,
        /// Its name as given.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// Nothing in the first bytes says kernel.
    #[error("{name:?} is not a kernel nacelle can boot: it is {found}; give an ELF vmlinux or a bzImage")]
    NotAKernel {
        /// The file's name.
        name: String,
        /// What it looks like, in words.
        found: String,
    },
    /// The headers promise more than the file has.
    #[error("The kernel {name:?} is cut short: its headers describe {need} bytes, the file has {have}")]
    Truncated {
        /// The file's name.
        name: String,
        /// Bytes the headers ask for.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// A kernel, but of another processor.
    #[error("The kernel {name:?} is for {found}; this host runs {want} kernels only")]
    WrongMachine {
        /// The file's name.
        name: String,
        /// The processor it was built for.
        found: String,
        /// The processor of this host.
        want: &'static str,
    },
    /// A bzImage from before the boot protocol that this monitor speaks.
    #[error(
        "The kernel {name:?} is too old: its boot protocol is {major}.{minor:02}, 2.12 (Linux 3.8) or later is needed"
    )]
    TooOld {
        /// The file's name.
        name: String,
        /// Boot protocol, before the point.
        major: u8,
        /// Boot protocol, after the point.
        minor: u8,
    },
    /// A header field that contradicts itself or asks for something impossible.
    #[error("The kernel {name:?} has a broken header: {why}")]
    Malformed {
        /// The file's name.
        name: String,
        /// Which field, its value, what it should be.
        why: String,
    },
    /// A part of the kernel would lie where the machine has no memory.
    #[error("The kernel {name:?} does not fit: it needs memory from {start:#x} to {end:#x}, the machine has {} below 4 GiB; give it at least {}", Mib(*have), Mib(*needed))]
    OutsideMemory {
        /// The file's name.
        name: String,
        /// First guest address of the part.
        start: u64,
        /// First guest address behind it.
        end: u64,
        /// Memory below the 32-bit gap.
        have: u64,
        /// Memory that would do.
        needed: u64,
    },
    /// The initrd does not fit between the kernel and the end of low memory.
    #[error("The initrd {name:?} of {} does not fit: {} are free behind the kernel; {} of memory would do", Mib(*size), Mib(*room), Mib(*needed))]
    InitrdTooBig {
        /// The file's name.
        name: String,
        /// Its size.
        size: u64,
        /// Free bytes where it could go.
        room: u64,
        /// Memory size that would do.
        needed: u64,
    },
    /// More characters than this kernel reads.
    #[error("The kernel command line has {len} characters; this kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Its length, without the closing NUL.
        len: usize,
        /// The most this kernel takes.
        limit: usize,
    },
    /// A character that would end or split the command line.
    #[error(
        "The kernel command line has the control character {byte:#04x} at position {at}; only printable characters and spaces can be passed"
    )]
    CommandLineCharacter {
        /// The character.
        byte: u8,
        /// Its index, from 0.
        at: usize,
    },
    /// PVH was asked for by name and the kernel has no such entry.
    #[error(
        "The kernel {name:?} has no PVH entry (ELF note Xen 18); use the Linux protocol or a kernel built with CONFIG_PVH=y"
    )]
    NoPvhEntry {
        /// The file's name.
        name: String,
    },
    /// Guest memory could not be written; the caller's memory does not match its size.
    #[error("Cannot write the {0} into guest memory")]
    Memory(&'static str, #[source] GuestMemoryError),
}

/// A size for people: MiB, rounded up.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0.div_ceil(1 << 20))
    }
}

/// Which of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The kernel image.
    Kernel,
    /// The initial ram disk.
    Initrd,
}

impl What {
    fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A kernel or initrd, open and known to be readable at any position.
#[derive(Debug)]
pub struct BootFile {
    file: File,
    name: String,
    what: What,
    len: u64,
}

impl BootFile {
    /// Opens `path` for reading. A pipe does not block and a directory is refused here, not at
    /// the first read.
    ///
    /// # Errors
    /// [`BootError::Read`] when it cannot be opened, or is no regular file or block device.
    pub fn open(what: What, path: &Path) -> Result<Self, BootError> {
        let name = path.display().to_string();
        match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path) {
            Ok(file) => Self::from_file(what, name, file),
            Err(source) => Err(BootError::Read { what, name, source }),
        }
    }

    /// Takes a file that is already open; `name` is what messages call it.
    ///
    /// # Errors
    /// [`BootError::Read`] when it is no regular file or block device.
    pub fn from_file(what: What, name: String, file: File) -> Result<Self, BootError> {
        let refuse = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
        let checked = file.metadata().and_then(|meta| {
            let kind = meta.file_type();
            if kind.is_file() {
                Ok(meta.len())
            } else if kind.is_block_device() {
                // A block device has no length in its inode.
                io::Seek::seek(&mut &file, io::SeekFrom::End(0))
            } else if kind.is_dir() {
                Err(refuse("It is a directory, not a file"))
            } else {
                Err(refuse("It is not a regular file"))
            }
        });
        match checked {
            Ok(len) => Ok(Self { file, name, what, len }),
            Err(source) => Err(BootError::Read { what, name, source }),
        }
    }

    /// Size in bytes when it was opened.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file without a byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Which of the two it is.
    #[must_use]
    pub fn what(&self) -> What {
        self.what
    }

    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end of the file. The bytes
    /// read are returned as a slice.
    ///
    /// # Errors
    /// [`BootError::Read`] when the host cannot read.
    pub fn read_at<'b>(&self, offset: u64, buf: &'b mut [u8]) -> Result<&'b [u8], BootError> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.read_error(e)),
            }
        }
        Ok(&buf[..done])
    }

    /// Reads `len` bytes at `offset` of the file straight into guest memory at `at`.
    ///
    /// # Errors
    /// [`BootError::Read`] when the file ends early or cannot be read, [`BootError::Memory`]
    /// when the range is not guest memory.
    pub fn load<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        at: u64,
        offset: u64,
        len: usize,
    ) -> Result<(), BootError> {
        if len == 0 {
            return Ok(());
        }
        let mut source = PositionedRead { file: &self.file, offset };
        let place = |e| BootError::Memory(self.what.as_str(), e);
        // Slice by slice, because vm-memory's own loop takes a short read (2 GiB is the most
        // that one call moves) for the end.
        let slices = memory
            .get_slices(GuestAddress(at), len)
            .map(|slice| slice.map_err(place))
            .collect::<Result<Vec<_>, _>>()?;
        for mut slice in slices {
            match source.read_exact_volatile(&mut slice) {
                Ok(()) => {}
                Err(VolatileMemoryError::IOError(e)) => return Err(self.read_error(e)),
                Err(e) => return Err(place(e.into())),
            }
        }
        Ok(())
    }

    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read { what: self.what, name: self.name.clone(), source }
    }
}

/// Reads a file into guest memory from a position of its own, leaving the file's offset alone.
struct PositionedRead<'a> {
    file: &'a File,
    offset: u64,
}

impl ReadVolatile for PositionedRead<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let guard = buf.ptr_guard_mut();
        let offset = libc::off64_t::try_from(self.offset)
            .map_err(|_| VolatileMemoryError::IOError(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: the descriptor is open for the life of `self.file`; the slice stands for
        // `buf.len()` bytes that stay mapped and writable while `guard` lives.
        let got = unsafe { libc::pread64(self.file.as_raw_fd(), guard.as_ptr().cast(), buf.len(), offset) };
        // A negative result is the only one that does not fit.
        let Ok(got) = usize::try_from(got) else {
            buf.bitmap().mark_dirty(0, buf.len());
            return Err(VolatileMemoryError::IOError(io::Error::last_os_error()));
        };
        buf.bitmap().mark_dirty(0, got);
        self.offset = self.offset.saturating_add(got as u64);
        Ok(got)
    }
}

/// What a file is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// ELF, 64 bits, little endian; `machine` is `e_machine`.
    Elf64 {
        /// The ELF machine number (62 is x86-64, 183 aarch64).
        machine: u16,
    },
    /// A Linux/x86 image with a setup header (boot protocol 2.00 or later).
    BzImage,
    /// A kernel for another processor, named in words.
    Foreign(&'static str),
    /// No kernel; what it looks like, in words.
    Other(&'static str),
}

/// Bytes [`Format::detect`] wants to see.
pub const DETECT_LEN: usize = 0x210;

impl Format {
    /// Looks at the first [`DETECT_LEN`] bytes of a file (fewer if it is shorter).
    #[must_use]
    pub fn detect(head: &[u8]) -> Self {
        let at =
            |offset: usize, magic: &[u8]| head.get(offset..offset.saturating_add(magic.len())) == Some(magic);
        if head.is_empty() {
            return Self::Other("an empty file");
        }
        if at(0, b"\x7fELF") {
            return Self::detect_elf(head);
        }
        if at(0x202, b"HdrS") {
            return Self::BzImage;
        }
        if at(0x38, b"ARM\x64") {
            return Self::Foreign("aarch64");
        }
        if at(0x38, b"RSC\x05") || at(0x30, b"RISCV") {
            return Self::Foreign("riscv64");
        }
        if at(0x24, b"\x18\x28\x6f\x01") {
            return Self::Foreign("arm (32 bits)");
        }
        let known: [(&[u8], &'static str); 9] = [
            (b"\x1f\x8b", "gzip data (decompress it first)"),
            (b"\xfd7zXZ\0", "xz data (decompress it first)"),
            (b"\x28\xb5\x2f\xfd", "zstd data (decompress it first)"),
            (b"BZh", "bzip2 data (decompress it first)"),
            (b"\x02\x21\x4c\x18", "lz4 data (decompress it first)"),
            (b"\x27\x05\x19\x56", "a U-Boot image"),
            (b"070701", "a cpio archive (an initrd?)"),
            (b"MZ", "an EFI program without a Linux header"),
            (b"#!", "a script"),
        ];
        known
            .into_iter()
            .find(|(magic, _)| at(0, magic))
            .map_or(Self::Other("data of an unknown kind"), |(_, name)| Self::Other(name))
    }

    fn detect_elf(head: &[u8]) -> Self {
        let (Some(&class), Some(&order), Some(machine)) = (head.get(4), head.get(5), head.get(18..20)) else {
            return Self::Other("an ELF file cut short");
        };
        let machine = [machine[0], machine[1]];
        let number = match order {
            1 => u16::from_le_bytes(machine),
            2 => u16::from_be_bytes(machine),
            _ => return Self::Other("an ELF file of unknown byte order"),
        };
        if class == 2 && order == 1 && matches!(number, 62 | 183 | 243) {
            return Self::Elf64 { machine: number };
        }
        Self::Foreign(match number {
            3 => "i386",
            2 | 18 | 43 => "SPARC",
            8 => "MIPS",
            20 => "PowerPC",
            21 => "ppc64",
            22 => "s390x",
            40 => "arm (32 bits)",
            62 => "x32",
            183 => "aarch64 (ILP32 or big endian)",
            243 => "riscv32",
            258 => "LoongArch",
            _ => "an unknown processor",
        })
    }
}

/// The name of an ELF machine that [`Format::Elf64`] can carry.
#[must_use]
pub fn machine_name(machine: u16) -> &'static str {
    match machine {
        62 => "x86_64",
        183 => "aarch64",
        243 => "riscv64",
        _ => "an unknown processor",
    }
}

/// A kernel command line under construction: parameters with one space between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine(String);

impl CommandLine {
    /// Takes a command line as a person wrote it.
    ///
    /// # Errors
    /// [`BootError::CommandLineCharacter`] for a NUL, a newline or another control character:
    /// the kernel would stop there, or read something else than what was written.
    pub fn new(text: &str) -> Result<Self, BootError> {
        let mut line = Self::default();
        line.push(text)?;
        Ok(line)
    }

    /// Appends one or more parameters.
    ///
    /// # Errors
    /// As [`CommandLine::new`].
    pub fn push(&mut self, text: &str) -> Result<(), BootError> {
        let text = text.trim();
        if let Some(at) = text.bytes().position(|b| b.is_ascii_control() && b != b'\t') {
            let byte = text.as_bytes()[at];
            return Err(BootError::CommandLineCharacter { byte, at });
        }
        if !self.0.is_empty() && !text.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(text);
        Ok(())
    }

    /// The line, without a closing NUL.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Writes the line and its closing NUL to guest memory at `at`.
    ///
    /// # Errors
    /// [`BootError::CommandLineTooLong`] over `limit` characters, [`BootError::Memory`].
    pub fn write<M: GuestMemoryBackend>(&self, memory: &M, at: u64, limit: usize) -> Result<(), BootError> {
        let len = self.0.len();
        if len > limit {
            return Err(BootError::CommandLineTooLong { len, limit });
        }
        let mut bytes = Vec::with_capacity(len + 1);
        bytes.extend_from_slice(self.0.as_bytes());
        bytes.push(0);
        memory.write_slice(&bytes, GuestAddress(at)).map_err(|e| BootError::Memory("command line", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> BootFile {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(bytes).unwrap();
        BootFile::from_file(What::Kernel, "k".into(), f).unwrap()
    }

    #[test]
    fn a_directory_a_pipe_and_nothing_are_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let why = |path: &Path| match BootFile::open(What::Kernel, path) {
            Err(BootError::Read { source, .. }) => source.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(why(dir.path()).contains("directory"));
        assert!(why(&dir.path().join("none")).contains("No such file"));
        assert!(why(Path::new("/dev/null")).contains("not a regular file"));
    }

    #[test]
    fn formats_are_told_apart_by_their_first_bytes() {
        let mut bz = vec![0u8; 0x210];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(Format::detect(&bz), Format::BzImage);
        let mut elf = vec![0u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 183;
        assert_eq!(Format::detect(&elf), Format::Elf64 { machine: 183 });
        elf[4] = 1;
        elf[18] = 3;
        assert_eq!(Format::detect(&elf), Format::Foreign("i386"));
        let mut arm = vec![0u8; 64];
        arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert_eq!(Format::detect(&arm), Format::Foreign("aarch64"));
        assert_eq!(Format::detect(b""), Format::Other("an empty file"));
        assert!(matches!(Format::detect(b"\x1f\x8b\x08"), Format::Other(w) if w.contains("gzip")));
        assert!(matches!(Format::detect(b"\x7fELF"), Format::Other(_)));
    }

    #[test]
    fn contents_land_in_guest_memory_across_regions_without_moving_the_file() {
        let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
        ])
        .unwrap();
        let bytes: Vec<u8> = (0..0x1800u32).map(|i| (i % 251) as u8).collect();
        let f = file(&bytes);
        f.load(&memory, 0x200, 0x10, 0x1700).unwrap();
        let mut back = vec![0; 0x1700];
        memory.read_slice(&mut back, GuestAddress(0x200)).unwrap();
        assert_eq!(back, bytes[0x10..0x1710]);
        assert_eq!(io::Seek::stream_position(&mut &f.file).unwrap(), bytes.len() as u64);
        assert!(matches!(f.load(&memory, 0, 0x1000, 0x1000), Err(BootError::Read { .. })));
        assert!(matches!(f.load(&memory, 0x1f00, 0, 0x200), Err(BootError::Memory(..))));
    }

    #[test]
    fn a_command_line_is_joined_checked_and_bounded() {
        let mut line = CommandLine::new(" console=ttyS0 ").unwrap();
        line.push("quiet").unwrap();
        line.push("").unwrap();
        assert_eq!(line.as_str(), "console=ttyS0 quiet");
        assert!(matches!(line.push("a\nb"), Err(BootError::CommandLineCharacter { byte: b'\n', at: 1 })));
        let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(matches!(
            line.write(&memory, 0, 18),
            Err(BootError::CommandLineTooLong { len: 19, limit: 18 })
        ));
        line.write(&memory, 0x10, 19).unwrap();
        let end: u8 = memory.read_obj(GuestAddress(0x10 + 19)).unwrap();
        assert_eq!(end, 0);
    }
}
