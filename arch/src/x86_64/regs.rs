//! The registers a vCPU starts with.
//!
//! Three starts exist. The boot processor enters a kernel either in **64-bit** mode (Linux's
//! 64-bit boot protocol: identity page tables, flat segments, `RSI` = zero page) or in
//! **32-bit** protected mode without paging (PVH: `EBX` = start info). Every other processor
//! waits for the guest's start-up message, and the state it then starts in is KVM's and the
//! guest's business: it gets its CPUID and its MSRs and nothing else.
//!
//! What is *not* done, because KVM's reset state already is what a boot needs, and each is a
//! system call a vCPU: the FPU (control word 0x37f, MXCSR 0x1f80), and the local APIC's LINT0
//! and LINT1 (there is no PIC to pass through, and Linux programs both itself).

use kvm_bindings::{CpuId, Msrs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::boot::{Loaded, Protocol};
use super::{layout, msr};

/// A vCPU could not be given its first state.
#[derive(Debug, thiserror::Error)]
#[error("Cannot set the {what} of vCPU {vcpu}")]
pub struct VcpuError {
    /// Which part of the state.
    pub what: &'static str,
    /// Index of the vCPU.
    pub vcpu: u8,
    /// What KVM said.
    pub source: kvm_ioctls::Error,
}

/// Gives vCPU `index` everything it needs before its first `KVM_RUN`. `loaded` matters only for
/// vCPU 0, the boot processor. Two ioctls for each vCPU, three more for the first.
///
/// # Errors
/// [`VcpuError`] when KVM refuses a part.
pub fn configure_vcpu(vcpu: &VcpuFd, index: u8, cpuid: &CpuId, loaded: &Loaded) -> Result<(), VcpuError> {
    configure_waiting_vcpu(vcpu, index, cpuid)?;
    if index == 0 {
        let fail = |what| move |source| VcpuError { what, vcpu: index, source };
        let mut sregs = vcpu.get_sregs().map_err(fail("segment registers"))?;
        set_entry_sregs(&mut sregs, loaded.protocol);
        vcpu.set_sregs(&sregs).map_err(fail("segment registers"))?;
        vcpu.set_regs(&entry_regs(loaded)).map_err(fail("registers"))?;
    }
    Ok(())
}

/// Gives a vCPU that waits for the guest's start-up message everything it needs: also one that
/// comes while the machine runs.
///
/// # Errors
/// [`VcpuError`] when KVM refuses a part.
pub fn configure_waiting_vcpu(vcpu: &VcpuFd, index: u8, cpuid: &CpuId) -> Result<(), VcpuError> {
    let fail = |what| move |source| VcpuError { what, vcpu: index, source };
    vcpu.set_cpuid2(cpuid).map_err(fail("CPUID"))?;
    let entries = msr::boot();
    let too_many = |_| fail("MSRs")(kvm_ioctls::Error::new(libc::E2BIG));
    let msrs = Msrs::from_entries(&entries).map_err(too_many)?;
    let written = vcpu.set_msrs(&msrs).map_err(fail("MSRs"))?;
    if written != entries.len() {
        return Err(fail("MSRs")(kvm_ioctls::Error::new(libc::EINVAL)));
    }
    Ok(())
}

/// The general registers of the boot processor.
#[must_use]
pub fn entry_regs(loaded: &Loaded) -> kvm_regs {
    // Bit 1 of RFLAGS is always set; interrupts are off.
    let regs = kvm_regs { rip: loaded.entry, rflags: 2, ..Default::default() };
    match loaded.protocol {
        Protocol::Linux64 => {
            kvm_regs { rsi: loaded.info, rsp: layout::BOOT_STACK, rbp: layout::BOOT_STACK, ..regs }
        }
        Protocol::Pvh => kvm_regs { rbx: loaded.info, ..regs },
    }
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Changes the reset state of the boot processor into what `protocol` wants at its entry.
pub fn set_entry_sregs(sregs: &mut kvm_sregs, protocol: Protocol) {
    let long = protocol == Protocol::Linux64;
    let data = segment(3, 0x3, false);
    // 0xb: code, execute and read, accessed; 0x3: data, read and write, accessed.
    sregs.cs = segment(2, 0xb, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 4 << 3, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: (GDT_ENTRIES * 8 - 1) as u16, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    if long {
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.efer = 0;
    }
}

/// A flat segment: base 0, limit 4 GiB, ring 0. Selector 2 is the code and 3 the data segment
/// of Linux's boot protocol (`__BOOT_CS`, `__BOOT_DS`).
fn segment(index: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

const GDT_ENTRIES: usize = 6;

/// Writes the descriptors that [`set_entry_sregs`] names, so that a kernel that reloads a
/// segment before it has a GDT of its own finds the same one again.
///
/// # Errors
/// When the address is not guest memory.
pub fn write_gdt<M: GuestMemoryBackend>(memory: &M, protocol: Protocol) -> Result<(), GuestMemoryError> {
    // Access byte and flags of the manual: code 0x9b with L or D, data 0x93 with D, TSS 0x8b.
    let code = match protocol {
        Protocol::Linux64 => 0x00af_9b00_0000_ffff,
        Protocol::Pvh => 0x00cf_9b00_0000_ffff,
    };
    let table: [u64; GDT_ENTRIES] = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];
    let mut bytes = [0u8; GDT_ENTRIES * 8];
    for (slot, entry) in bytes.chunks_exact_mut(8).zip(table) {
        slot.copy_from_slice(&entry.to_le_bytes());
    }
    memory.write_slice(&bytes, GuestAddress(layout::GDT))
}

/// Writes page tables that map the first GiBs one to one in pages of 2 MiB, enough to cover
/// everything below `end` (at most 3 GiB, the RAM below the gap).
///
/// # Errors
/// When the address is not guest memory.
pub fn write_page_tables<M: GuestMemoryBackend>(memory: &M, end: u64) -> Result<(), GuestMemoryError> {
    const PAGE: u64 = 4096;
    const PRESENT_WRITABLE: u64 = 0x3;
    const HUGE: u64 = 0x83;
    let gibs = end.div_ceil(1 << 30).clamp(1, 3);
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + PAGE;
    let put = |at: u64, value: u64| memory.write_obj(value.to_le(), GuestAddress(at));
    put(pml4, pdpt | PRESENT_WRITABLE)?;
    for gib in 0..gibs {
        let directory = pdpt + (gib + 1) * PAGE;
        put(pdpt + gib * 8, directory | PRESENT_WRITABLE)?;
        let mut page = [0u8; PAGE as usize];
        for (slot, index) in page.chunks_exact_mut(8).zip(0u64..) {
            let entry = (gib << 30) | (index << 21) | HUGE;
            slot.copy_from_slice(&entry.to_le_bytes());
        }
        memory.write_slice(&page, GuestAddress(directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> vm_memory::GuestMemoryMmap {
        vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn page_tables_map_every_page_below_the_end_to_itself() {
        let memory = memory();
        write_page_tables(&memory, (2 << 30) + 1).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let pdpt = read(layout::PAGE_TABLES) & !0xfff;
        for address in (0..3u64 << 30).step_by(2 << 20) {
            let directory = read(pdpt + (address >> 30) * 8) & !0xfff;
            let entry = read(directory + ((address >> 21) & 511) * 8);
            assert_eq!(entry, address | 0x83);
        }
        assert_eq!(read(pdpt + 3 * 8), 0);
    }

    #[test]
    fn descriptors_agree_with_the_cached_segments() {
        for protocol in [Protocol::Linux64, Protocol::Pvh] {
            let memory = memory();
            write_gdt(&memory, protocol).unwrap();
            let mut sregs = kvm_sregs::default();
            set_entry_sregs(&mut sregs, protocol);
            for segment in [sregs.cs, sregs.ds, sregs.tr] {
                let at = sregs.gdt.base + u64::from(segment.selector);
                let d: u64 = memory.read_obj(GuestAddress(at)).unwrap();
                assert_eq!((d >> 40 & 0xf) as u8, segment.type_);
                assert_eq!((d >> 44 & 1) as u8, segment.s);
                assert_eq!((d >> 47 & 1) as u8, segment.present);
                assert_eq!((d >> 53 & 1) as u8, segment.l);
                assert_eq!((d >> 54 & 1) as u8, segment.db);
                assert_eq!((d >> 55 & 1) as u8, segment.g);
                assert!(segment.selector < sregs.gdt.limit);
            }
            assert_eq!(sregs.cr0 & CR0_PG != 0, protocol == Protocol::Linux64);
        }
    }
}
