//! The zero page: what Linux's 64-bit entry is told.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Plan, layout};
use crate::kernel::BootError;

/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The version whose fields are filled in below (2.14 brought `acpi_rsdp_addr`).
const VERSION: u16 = 0x020e;
const LOADED_HIGH: u8 = 1;

/// Writes `boot_params` for `plan` at [`layout::ZERO_PAGE`].
pub(super) fn write_zero_page<M: GuestMemoryBackend>(memory: &M, plan: &Plan<'_>) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: plan.image.header.unwrap_or(setup_header {
            version: VERSION,
            kernel_alignment: 0x20_0000,
            cmdline_size: plan.image.command_line_max as u32,
            init_size: (plan.image.span.end - plan.image.span.start) as u32,
            ..Default::default()
        }),
        acpi_rsdp_addr: plan.payload.rsdp.unwrap_or(0),
        ..Default::default()
    };
    let header = &mut params.hdr;
    header.header = HEADER_MAGIC;
    header.boot_flag = BOOT_FLAG;
    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= LOADED_HIGH;
    header.code32_start = plan.image.span.start as u32;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    // Anything a header of a file may say about these is not for a kernel that is loaded.
    header.setup_data = 0;
    (header.ramdisk_image, header.ramdisk_size) = (0, 0);
    if let Some(initrd) = &plan.initrd {
        // Below the gap, so 32 bits hold it.
        header.ramdisk_image = initrd.start as u32;
        header.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    let map = layout::memory_map(plan.payload.ram);
    // The layout gives at most five of the 128 entries.
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.len, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE)).map_err(|e| BootError::Memory("zero page", e))
}
