//! The lab's initrd: this very program as `/init`, an order, and kernel modules, as a cpio
//! archive in memory.
//!
//! It is put together anew for every start (a few megabytes copied), so no cached file can be
//! older than the program, and it is never written to a disk, so nothing can be left behind.
//! The archive is not compressed: unpacking costs the emulated processor more than reading.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A cpio archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/
/// buffer-format.rst), kept in memory.
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// An archive with nothing in it.
    pub fn new() -> Self {
        Self { bytes: Vec::new(), inode: 0 }
    }

    /// Adds a directory; parents first.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, (0, 0), &[]);
    }

    /// Adds a regular file that may be run.
    pub fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, PROGRAM, (0, 0), content);
    }

    /// Adds a character device node; no privilege is needed, the kernel makes it on unpacking.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// Ends the archive and gives its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Puts the initrd together: `order` as JSON, `first` and `rest` the modules in their order.
pub fn build(order: &[u8], first: &[PathBuf], rest: &[PathBuf]) -> Result<Vec<u8>> {
    let program = fs::read("/proc/self/exe").context("Cannot read this program's own file")?;
    let mut archive = Archive::new();
    for name in ["dev", "lower", "upper", "root", "modules", "modules/first", "modules/rest"] {
        archive.directory(name);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", &loaded_part(&program)?);
    archive.file("order.json", order);
    for (folder, modules) in [("modules/first", first), ("modules/rest", rest)] {
        for (place, path) in modules.iter().enumerate() {
            let content = fs::read(path).with_context(|| format!("Cannot read {}", path.display()))?;
            archive.file(&format!("{folder}/{place:03}-{}", file_name(path)), &content);
        }
    }
    Ok(archive.finish())
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The part of an ELF program that the kernel loads: what lies behind it (symbols and line
/// tables, most of a debug build) is cut off and the section table forgotten.
fn loaded_part(elf: &[u8]) -> Result<Vec<u8>> {
    const LOAD: u32 = 1;
    const INTERPRETER: u32 = 3;
    let table = usize::try_from(number::<8>(elf, 0x20)?)?;
    let count = usize::try_from(number::<2>(elf, 0x38)?)?;
    let mut end = table + count * 56;
    for header in (0..count).map(|i| table + i * 56) {
        let kind = u32::try_from(number::<4>(elf, header)?)?;
        if kind == INTERPRETER {
            bail!(
                "This program is linked dynamically and cannot be the lab's init; build it with \
                 the repository's .cargo/config.toml (target-feature=+crt-static)"
            );
        }
        if kind == LOAD {
            let offset = usize::try_from(number::<8>(elf, header + 8)?)?;
            end = end.max(offset + usize::try_from(number::<8>(elf, header + 32)?)?);
        }
    }
    let mut part = elf.get(..end).context("This program's file is shorter than it says")?.to_vec();
    for (at, length) in [(0x28, 8), (0x3a, 6)] {
        part[at..at + length].fill(0);
    }
    Ok(part)
}

/// The little-endian number of `N` bytes at `at`.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + N).context("This program's file is no whole ELF file")?;
    Ok(field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_archive_ends_in_its_trailer() {
        let mut archive = Archive::new();
        archive.directory("d");
        archive.file("d/f", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        let at = bytes.windows(5).position(|w| w == b"hello").unwrap();
        assert_eq!(at % 4, 0);
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn the_loaded_part_of_this_program_is_smaller_and_still_an_elf_file() {
        let whole = fs::read("/proc/self/exe").unwrap();
        let part = loaded_part(&whole).unwrap();
        assert!(part.starts_with(b"\x7fELF") && part.len() < whole.len());
    }

    #[test]
    fn a_file_that_is_no_program_is_refused() {
        assert!(loaded_part(b"#!/bin/sh").is_err());
    }
}
