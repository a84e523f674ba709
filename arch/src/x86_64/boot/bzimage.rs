//! bzImage: a boot sector's worth of header, real-mode code that nobody needs, and a payload
//! that decompresses itself.
//!
//! ```text
//!   0x000  setup_sects + 1 sectors: header at 0x1f1, real-mode code     skipped
//!   ...    payload, syssize * 16 bytes  ----------------------------->  pref_address
//!          0x200 into it: the 64-bit entry
//! ```
//!
//! The payload goes to `pref_address`, also when the kernel is relocatable: the decompressor
//! refuses to run below it and otherwise has no gain from another place. From there it needs
//! `init_size` bytes of RAM to decompress in place.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::{EntryChoice, Image, Protocol, check_span, malformed, truncated};
use crate::kernel::{BootError, BootFile};

const SECTOR: u64 = 512;
/// Where the header begins in the file and in the zero page.
const HEADER_AT: usize = 0x1f1;
/// The 64-bit entry and `xloadflags` came with 2.12.
const MIN_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Reads the header of a bzImage.
pub(super) fn read(kernel: &BootFile, choice: EntryChoice, low: u64) -> Result<Image, BootError> {
    let header = read_header(kernel)?;
    let version = header.version;
    if version < MIN_VERSION {
        let [major, minor] = version.to_be_bytes();
        return Err(BootError::TooOld { name: kernel.name().to_owned(), major, minor });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::WrongMachine {
            name: kernel.name().to_owned(),
            found: "i386".to_owned(),
            want: "x86_64",
        });
    }
    if choice == EntryChoice::Pvh {
        return Err(BootError::NoPvhEntry { name: kernel.name().to_owned() });
    }
    // 0 stands for 4, since the days of the first boot loaders.
    let sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * SECTOR;
    let len = u64::from(header.syssize) * 16;
    let need = offset + len;
    if kernel.len() < need {
        return Err(truncated(kernel, need));
    }
    if len <= ENTRY_64 {
        return Err(malformed(kernel, format!("its payload has only {len} bytes")));
    }
    let at = header.pref_address;
    let room = u64::from(header.init_size).max(len);
    let span = at..at.saturating_add(room);
    check_span(kernel, &span, low)?;
    Ok(Image {
        protocol: Protocol::Linux64,
        entry: at + ENTRY_64,
        segments: vec![(offset, at, len)],
        span,
        command_line_max: header.cmdline_size as usize,
        initrd_end: u64::from(header.initrd_addr_max) + 1,
        header: Some(header),
    })
}

/// The setup header as far as this file's protocol version has it; zero behind.
fn read_header(kernel: &BootFile) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let room = header.as_mut_slice();
    let mut bytes = [0u8; size_of::<setup_header>()];
    let bytes = kernel.read_at(HEADER_AT as u64, &mut bytes)?;
    // The jump at 0x200 leads over the header: its offset says where the header ends.
    let Some(&jump) = bytes.get(0x201 - HEADER_AT) else {
        return Err(truncated(kernel, 0x268));
    };
    let len = (0x202 - HEADER_AT + usize::from(jump)).min(room.len());
    let Some(bytes) = bytes.get(..len) else {
        return Err(truncated(kernel, (HEADER_AT + len) as u64));
    };
    room[..len].copy_from_slice(bytes);
    Ok(header)
}
