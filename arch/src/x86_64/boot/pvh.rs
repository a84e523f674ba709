//! The PVH start info: magic, command line, RSDP, the initrd as first module, the memory map.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Plan, layout};
use crate::kernel::BootError;

const MODULES: u64 = layout::PVH_INFO + 0x100;
const MEMORY_MAP: u64 = layout::PVH_INFO + 0x200;

/// Writes the start info for `plan` at [`layout::PVH_INFO`].
pub(super) fn write_start_info<M: GuestMemoryBackend>(memory: &M, plan: &Plan<'_>) -> Result<(), BootError> {
    let fail = |e| BootError::Memory("PVH start info", e);
    let map = layout::memory_map(plan.payload.ram);
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: plan.payload.rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = &plan.initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module =
            hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..Default::default() };
        memory.write_obj(module, GuestAddress(MODULES)).map_err(fail)?;
    }
    for (index, entry) in (0u64..).zip(&map) {
        let at = MEMORY_MAP + index * size_of::<hvm_memmap_table_entry>() as u64;
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind as u32,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at)).map_err(fail)?;
    }
    memory.write_obj(info, GuestAddress(layout::PVH_INFO)).map_err(fail)
}
