//! Gets the ELF kernel out of a bzImage.
//!
//! The setup header (Documentation/arch/x86/boot.rst) names the compressed payload by
//! `payload_offset` and `payload_length`, both counted from the end of the real-mode part; the
//! payload's last four bytes are the unpacked size.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Writes the ELF file packed in the bzImage at `image` to `target`.
///
/// Understands the packers Debian has used (xz, zstd, lz4, gzip), by their programs.
pub fn extract(image: &Path, target: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("Cannot read {}", image.display()))?;
    let payload = payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?;
    let (program, arguments): (&str, &[&str]) = match payload {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz", &["-dc", "--single-stream"]),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", &["-dcq"]),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", &["-dcq"]),
        [0x1f, 0x8b, ..] => ("gzip", &["-dcq"]),
        [a, b, ..] => bail!("{} is packed in an unknown way ({a:#x} {b:#x})", image.display()),
        _ => bail!("{} has an empty payload", image.display()),
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(target)?)
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("Cannot run {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // The unpacker may stop at the end of its stream and close the pipe early.
        let _ = stdin.write_all(payload);
    }
    let _ = child.wait()?;
    // What follows the stream makes some unpackers complain, so the result is the judge.
    let unpacked = fs::read(target)?;
    if unpacked.starts_with(b"\x7fELF") {
        return Ok(());
    }
    bail!("{} does not unpack to an ELF kernel", image.display())
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let field: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(field)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = ((sectors + 1) * 512).checked_add(word(0x248)?)?;
    let end = start.checked_add(word(0x24c)?)?;
    image.get(start..end.checked_sub(4)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_lies_where_the_header_says() {
        let mut image = vec![0u8; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12u32.to_le_bytes());
        image[1040..1048].copy_from_slice(b"payload!");
        assert_eq!(payload(&image), Some(&b"payload!"[..]));
    }

    #[test]
    fn a_payload_beyond_the_file_and_a_file_without_header_are_refused() {
        let mut image = vec![0u8; 1024];
        assert_eq!(payload(&image), None);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None);
    }
}
