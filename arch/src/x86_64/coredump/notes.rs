//! The notes of a core file.
//!
//! A note is three numbers of 32 bits (length of the name with its final zero, length of the
//! content, type), the name and the content, the latter two filled up to multiples of four.

use kvm_bindings::{kvm_dtable, kvm_segment};

use super::{PAGE, Registers};

/// A process's registers, as Linux writes them (`struct elf_prstatus`).
const NT_PRSTATUS: u32 = 1;
/// The type of the notes whose name says what they are.
const NT_NAMED: u32 = 0;

const PRSTATUS: usize = 336;
/// In it: the process id, and the registers.
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGS: usize = 112;

const QEMU: usize = 440;
const QEMU_VERSION: u32 = 1;

const VMCOREINFO: &[u8] = b"VMCOREINFO\0";

/// Bytes that the notes of `vcpus` vCPUs take at most.
pub fn room(vcpus: usize) -> usize {
    vcpus * (note(b"CORE\0", 0, &[0; PRSTATUS]).len() + note(b"QEMU\0", 0, &[0; QEMU]).len()) + 2 * PAGE
}

/// All notes; `vmcoreinfo` is a content that [`vmcoreinfo_in`] found.
pub fn all(vcpus: &[Registers], vmcoreinfo: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (id, vcpu) in (1..).zip(vcpus) {
        bytes.extend(note(b"CORE\0", NT_PRSTATUS, &prstatus(id, vcpu)));
    }
    for vcpu in vcpus {
        bytes.extend(note(b"QEMU\0", NT_NAMED, &qemu_state(vcpu)));
    }
    if let Some(content) = vmcoreinfo {
        bytes.extend(note(VMCOREINFO, NT_NAMED, content));
    }
    bytes
}

fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = [name.len() as u32, content.len() as u32, kind].map(u32::to_le_bytes).concat();
    for part in [name, content] {
        bytes.extend(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// The registers as those of a thread. Threads are numbered from 1, because 0 is no thread.
fn prstatus(id: u32, Registers { regs: r, sregs: s, .. }: &Registers) -> Vec<u8> {
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    // No system call is to be started again.
    let orig_rax = u64::MAX;
    let list = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        orig_rax,
        r.rip,
        selector(&s.cs),
        r.rflags,
        r.rsp,
        selector(&s.ss),
        s.fs.base,
        s.gs.base,
        selector(&s.ds),
        selector(&s.es),
        selector(&s.fs),
        selector(&s.gs),
    ];
    let mut bytes = vec![0; PRSTATUS_PID];
    bytes.extend(id.to_le_bytes());
    bytes.resize(PRSTATUS_REGS, 0);
    bytes.extend(list.map(u64::to_le_bytes).concat());
    bytes.resize(PRSTATUS, 0);
    bytes
}

/// The state that QEMU's dumps have of a vCPU, and that `crash` takes control registers and the
/// interrupt table from. Version and size; general registers; segments; tables; CR0 to CR4; the
/// other GS base.
fn qemu_state(Registers { regs: r, sregs: s, kernel_gs_base }: &Registers) -> Vec<u8> {
    let mut bytes = [QEMU_VERSION, QEMU as u32].map(u32::to_le_bytes).concat();
    let general = [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15, r.rip, r.rflags,
    ];
    bytes.extend(general.map(u64::to_le_bytes).concat());
    for segment in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.ldt, &s.tr] {
        let flags = descriptor_flags(segment);
        bytes.extend(qemu_segment(segment.selector, segment.limit, flags, segment.base));
    }
    for kvm_dtable { base, limit, .. } in [s.gdt, s.idt] {
        bytes.extend(qemu_segment(0, limit.into(), 0, base));
    }
    bytes.extend([s.cr0, 0, s.cr2, s.cr3, s.cr4, *kernel_gs_base].map(u64::to_le_bytes).concat());
    bytes
}

fn qemu_segment(selector: u16, limit: u32, flags: u32, base: u64) -> Vec<u8> {
    let mut bytes = [u32::from(selector), limit, flags, 0].map(u32::to_le_bytes).concat();
    bytes.extend(base.to_le_bytes());
    bytes
}

/// The flags where the second half of a descriptor has them (the processor's manual, volume 3,
/// section 3.4.5).
fn descriptor_flags(s: &kvm_segment) -> u32 {
    let places = [
        (s.type_, 8),
        (s.s, 12),
        (s.dpl, 13),
        (s.present, 15),
        (s.avl, 20),
        (s.l, 21),
        (s.db, 22),
        (s.g, 23),
    ];
    places.into_iter().fold(0, |flags, (value, bit)| flags | u32::from(value) << bit)
}

/// The content of Linux's note about itself, if `page` begins with that note.
pub fn vmcoreinfo_in(page: &[u8]) -> Option<&[u8]> {
    let (head, rest) = page.split_first_chunk::<12>()?;
    let [name, content, kind] = [0, 4, 8].map(|at| head[at..].first_chunk().map(|b| u32::from_le_bytes(*b)));
    if name? as usize != VMCOREINFO.len() || kind? != NT_NAMED {
        return None;
    }
    let rest = rest.strip_prefix(VMCOREINFO)?.strip_prefix(&[0])?;
    // Linux writes less than a page; what it would have after that is not in this one.
    let content = rest.get(..content? as usize)?;
    content.starts_with(b"OSRELEASE=").then_some(content)
}
