//! The kernels that guests boot: Debian's own, in both its forms, and nacelle's.
//!
//! Debian ships a `bzImage` with drivers as modules. Inside lies, compressed, an ELF `vmlinux`;
//! it is unpacked here, so that ELF is tested without a kernel having been built. nacelle's
//! monitor enters an ELF file that says it is Linux by the 64-bit protocol and others by PVH:
//! for the latter the notes that say so are renamed.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A kernel and where its modules lie, if it has any.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The file to boot.
    pub image: PathBuf,
    /// `/lib/modules/<release>` of it.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// Debian's cloud kernel as it is installed.
    pub fn debian() -> Kernel {
        let place = PathBuf::from(env::var_os("NACELLE_TEST_KERNEL").expect(
            "NACELLE_TEST_KERNEL does not name Debian's cloud kernel; `cargo xtask test` fetches it and sets it",
        ));
        let folder = if place.is_dir() { place.clone() } else { place.parent().unwrap().to_owned() };
        let image = if place.is_dir() { place.join("vmlinuz") } else { place };
        let modules = folder.join("modules/lib/modules");
        let release = fs::read_dir(&modules)
            .unwrap_or_else(|e| panic!("{} has no modules of the kernel: {e}", modules.display()))
            .next()
            .expect("there are no modules")
            .unwrap();
        Kernel { image, modules: Some(release.path()) }
    }

    /// nacelle's own kernel where it is built, because it boots in a fraction of the time;
    /// else Debian's.
    pub fn quick() -> Kernel {
        match env::var_os("NACELLE_TEST_BUILT_KERNEL").map(PathBuf::from) {
            None => Kernel::debian(),
            Some(place) if place.is_dir() => Kernel { image: place.join("vmlinux"), modules: None },
            Some(image) => Kernel { image, modules: None },
        }
    }

    /// Debian's kernel as an ELF file, which is written into `folder`. As `linux` it is what it
    /// is; else its notes do not tell, and its PVH entry is the one to use.
    pub fn debian_elf(folder: &Path, linux: bool) -> Kernel {
        let kernel = Kernel::debian();
        let mut elf = unpack(&fs::read(&kernel.image).unwrap());
        assert!(elf.starts_with(b"\x7fELF"), "the bzImage does not hold an ELF file");
        if !linux {
            hide_linux_notes(&mut elf);
        }
        let image = folder.join("vmlinux");
        fs::write(&image, elf).unwrap();
        Kernel { image, ..kernel }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(*bytes[at..].first_chunk().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())).unwrap()
}

/// The payload of a bzImage (Documentation/arch/x86/boot.rst, `payload_offset`), decompressed.
fn unpack(image: &[u8]) -> Vec<u8> {
    let start = (usize::from(image[0x1f1]) + 1) * 512 + u32_at(image, 0x248);
    let payload = &image[start..start + u32_at(image, 0x24c)];
    // The build appends the length of what comes out.
    let (payload, length) = payload.split_at(payload.len() - 4);
    let length = u32_at(length, 0);
    let out = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4(&payload[4..], length),
        [0xfd, b'7', ..] => through("xz", payload),
        [0x28, 0xb5, ..] => through("zstd", payload),
        [0x1f, 0x8b, ..] => through("gzip", payload),
        other => panic!("the kernel is compressed in an unknown way: {:x?}", &other[..8]),
    };
    assert_eq!(out.len(), length);
    out
}

/// Runs `program -dc`.
fn through(program: &str, input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    command.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child =
        command.spawn().unwrap_or_else(|e| panic!("{program} is needed to unpack the kernel: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program} cannot unpack the kernel");
    output.stdout
}

/// The legacy frame of LZ4: blocks, each after its length.
fn lz4(mut frame: &[u8], length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(length);
    while out.len() < length {
        let (size, rest) = (u32_at(frame, 0), &frame[4..]);
        lz4_block(&rest[..size], &mut out);
        frame = &rest[size..];
    }
    out
}

/// One block: pieces to take from the input, each followed by a piece to repeat.
fn lz4_block(block: &[u8], out: &mut Vec<u8>) {
    let mut input = block.iter().copied();
    let number = |input: &mut dyn Iterator<Item = u8>, nibble: u8| {
        let mut sum = usize::from(nibble);
        if nibble == 15 {
            loop {
                let more = input.next().unwrap();
                sum += usize::from(more);
                if more != 255 {
                    break;
                }
            }
        }
        sum
    };
    while let Some(token) = input.next() {
        let literals = number(&mut input, token >> 4);
        out.extend(input.by_ref().take(literals));
        let Some(low) = input.next() else { return };
        let offset = usize::from(u16::from_le_bytes([low, input.next().unwrap()]));
        for _ in 0..number(&mut input, token & 15) + 4 {
            out.push(out[out.len() - offset]);
        }
    }
}

/// Renames the owner "Linux" of every ELF note.
fn hide_linux_notes(elf: &mut [u8]) {
    const PT_NOTE: usize = 4;
    let (table, count) = (u64_at(elf, 32), usize::from(u16::from_le_bytes([elf[56], elf[57]])));
    for header in (0..count).map(|index| table + index * 56) {
        if u32_at(elf, header) != PT_NOTE {
            continue;
        }
        let (offset, size) = (u64_at(elf, header + 8), u64_at(elf, header + 32));
        let notes = &mut elf[offset..offset + size];
        let found: Vec<_> = (0..size - 6).filter(|at| notes[*at..].starts_with(b"Linux\0")).collect();
        assert!(!found.is_empty(), "the kernel has no note of Linux to hide");
        for at in found {
            notes[at] = b'X';
        }
    }
}

#[test]
fn lz4_repeats_what_it_has_just_written() {
    let mut out = Vec::new();
    lz4_block(&[0x35, b'a', b'b', b'c', 3, 0, 0x10, b'!'], &mut out);
    assert_eq!(out, b"abcabcabcabc!");
}
