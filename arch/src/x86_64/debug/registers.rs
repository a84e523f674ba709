//! A vCPU's registers in the order and form in which gdb is told that they come.
//!
//! The order is that of [`DESCRIPTION`], whose features gdb knows by their names: `core`, `sse`
//! and `segments`; the control registers, which gdb has no name for, are a feature of their own
//! and appear in `info registers` all the same.
//!
//! What is written back is compared with what is there, and only what differs is given to KVM:
//! gdb writes all registers when one of them changes.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::super::state::{StateError, StateShape, get_xsave, set_xsave};

/// Bytes of all registers, in gdb's order.
pub const BLOCK: usize = 17 * 8 + 7 * 4 + 8 * 10 + 8 * 4 + 16 * 16 + 4 + 2 * 8 + 6 * 8;
/// Where the program counter is among them.
pub const PC: usize = 16 * 8;
/// What gdb is told of the registers.
pub const DESCRIPTION: &str = include_str!("description.xml");

/// Offsets in an XSAVE area (Intel SDM volume 1 section 13.4).
mod xsave {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const TAGS: usize = 4;
    pub const OPCODE: usize = 6;
    pub const INSTRUCTION: usize = 8;
    pub const OPERAND: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const IN_USE: usize = 512;
}

/// The registers of a vCPU that stands still.
#[derive(Clone, Debug, PartialEq)]
pub struct Registers {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u8>,
}

impl Registers {
    /// Reads them. Three ioctls.
    ///
    /// # Errors
    /// [`StateError::Kvm`].
    pub fn read(vcpu: &VcpuFd, shape: &StateShape) -> Result<Registers, StateError> {
        let regs = vcpu.get_regs().map_err(|e| StateError::Kvm("read the vCPU's registers", e))?;
        let sregs = vcpu.get_sregs().map_err(|e| StateError::Kvm("read the vCPU's segment registers", e))?;
        Ok(Registers { regs, sregs, xsave: get_xsave(vcpu, shape)? })
    }

    /// Writes what differs from `before`, which is what [`Registers::read`] gave.
    ///
    /// # Errors
    /// [`StateError::Kvm`] when KVM does not take a value; what was written before it stays.
    pub fn write(&self, before: &Registers, vcpu: &VcpuFd, shape: &StateShape) -> Result<(), StateError> {
        if self.sregs != before.sregs {
            let fail = |e| StateError::Kvm("set the vCPU's segment registers", e);
            vcpu.set_sregs(&self.sregs).map_err(fail)?;
        }
        if self.regs != before.regs {
            vcpu.set_regs(&self.regs).map_err(|e| StateError::Kvm("set the vCPU's registers", e))?;
        }
        if self.xsave != before.xsave {
            set_xsave(vcpu, shape, &self.xsave)?;
        }
        Ok(())
    }

    /// All of them as gdb takes them.
    #[must_use]
    pub fn to_block(&self) -> [u8; BLOCK] {
        let mut registers = self.clone();
        let mut writer = Writer { block: [0; BLOCK], at: 0 };
        registers.walk(&mut writer);
        writer.block
    }

    /// Takes over what gdb has written.
    pub fn set_block(&mut self, block: &[u8; BLOCK]) {
        let before = self.xsave.clone();
        self.walk(&mut Reader { block, at: 0 });
        if self.xsave != before {
            // x87 and SSE are no longer as after a reset.
            const LEGACY: u8 = 3;
            self.xsave[xsave::IN_USE] |= LEGACY;
        }
    }

    /// Visits each register in gdb's order.
    fn walk(&mut self, visitor: &mut impl Visitor) {
        let Registers { regs: r, sregs: s, xsave: x } = self;
        for register in [
            &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp, &mut r.rsp,
            &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15,
            &mut r.rip,
        ] {
            visitor.number(register, 8);
        }
        visitor.number(&mut r.rflags, 4);
        for segment in [&mut s.cs, &mut s.ss, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs] {
            selector(segment, visitor);
        }
        // The area is at least 4096 bytes long, see `StateShape`.
        for index in 0..8 {
            visitor.bytes(&mut x[xsave::ST + 16 * index..][..10]);
        }
        control(x, visitor);
        for index in 0..16 {
            visitor.bytes(&mut x[xsave::XMM + 16 * index..][..16]);
        }
        visitor.bytes(&mut x[xsave::MXCSR..][..4]);
        for register in [
            &mut s.fs.base,
            &mut s.gs.base,
            &mut s.cr0,
            &mut s.cr2,
            &mut s.cr3,
            &mut s.cr4,
            &mut s.cr8,
            &mut s.efer,
        ] {
            visitor.number(register, 8);
        }
    }
}

fn selector(segment: &mut kvm_segment, visitor: &mut impl Visitor) {
    let mut value = segment.selector.into();
    visitor.number(&mut value, 4);
    segment.selector = value as u16;
}

/// The x87's control registers, each as 32 bits: control, status, tags, and segment and offset
/// of the last instruction and its operand, and the opcode.
fn control(x: &mut [u8], visitor: &mut impl Visitor) {
    word(x, xsave::FCW, visitor);
    word(x, xsave::FSW, visitor);
    let before = full_tags(x[xsave::TAGS]);
    let mut tags = before.into();
    visitor.number(&mut tags, 4);
    if tags as u16 != before {
        x[xsave::TAGS] = short_tags(tags as u16);
    }
    for at in [xsave::INSTRUCTION, xsave::OPERAND] {
        word(x, at + 4, visitor);
        visitor.bytes(&mut x[at..at + 4]);
    }
    word(x, xsave::OPCODE, visitor);
}

/// A register of 16 bits that gdb takes as 32.
fn word(x: &mut [u8], at: usize, visitor: &mut impl Visitor) {
    let mut value = u16::from_le_bytes([x[at], x[at + 1]]).into();
    visitor.number(&mut value, 4);
    x[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
}

/// Two bits a register, as FSAVE has them, from the one bit that FXSAVE has: in use, or empty.
fn full_tags(short: u8) -> u16 {
    (0..8).filter(|bit| short >> bit & 1 == 0).fold(0, |tags, bit| tags | 3 << (2 * bit))
}

fn short_tags(full: u16) -> u8 {
    (0..8).filter(|bit| full >> (2 * bit) & 3 != 3).fold(0, |tags, bit| tags | 1 << bit)
}

/// Goes through registers, taking them or setting them.
trait Visitor {
    /// The low `len` bytes of a register.
    fn number(&mut self, register: &mut u64, len: usize) {
        let mut bytes = register.to_le_bytes();
        if let Some(bytes) = bytes.get_mut(..len) {
            self.bytes(bytes);
        }
        *register = u64::from_le_bytes(bytes);
    }

    fn bytes(&mut self, register: &mut [u8]);
}

struct Writer {
    block: [u8; BLOCK],
    at: usize,
}

impl Visitor for Writer {
    fn bytes(&mut self, register: &mut [u8]) {
        let end = self.at + register.len();
        self.block[self.at..end].copy_from_slice(register);
        self.at = end;
    }
}

struct Reader<'a> {
    block: &'a [u8; BLOCK],
    at: usize,
}

impl Visitor for Reader<'_> {
    fn bytes(&mut self, register: &mut [u8]) {
        let end = self.at + register.len();
        register.copy_from_slice(&self.block[self.at..end]);
        self.at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        let mut xsave: Vec<u8> = (0..4096u32).map(|i| i as u8).collect();
        xsave[xsave::IN_USE..xsave::IN_USE + 8].fill(0);
        Registers { regs: kvm_regs::default(), sregs: kvm_sregs::default(), xsave }
    }

    #[test]
    fn what_is_written_back_unchanged_changes_nothing() {
        let mut registers = registers();
        registers.regs.rflags = 0x0020_0246;
        registers.sregs.cs.selector = 0x33;
        let before = registers.clone();
        registers.set_block(&before.to_block());
        assert_eq!(registers, before);
    }

    #[test]
    fn each_register_has_its_place() {
        let mut registers = registers();
        registers.regs.rip = 0x1122_3344_5566_7788;
        registers.sregs.efer = 0xd01;
        let block = registers.to_block();
        assert_eq!(block[PC..PC + 8], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(block[BLOCK - 8..], 0xd01u64.to_le_bytes());
        let mut changed = block;
        changed[0] = 7;
        changed[BLOCK - 8] = 0;
        registers.set_block(&changed);
        assert_eq!((registers.regs.rax, registers.sregs.efer), (7, 0xd00));
        assert_eq!(registers.xsave[xsave::IN_USE], 0, "vector registers were not touched");
    }

    #[test]
    fn a_vector_register_that_was_written_is_in_use() {
        let mut registers = registers();
        let mut block = registers.to_block();
        let first_vector = 17 * 8 + 7 * 4 + 8 * 10 + 8 * 4;
        block[first_vector] ^= 0xff;
        registers.set_block(&block);
        assert_eq!(registers.xsave[xsave::IN_USE], 3);
        assert_eq!(registers.to_block(), block);
    }

    #[test]
    fn the_description_is_as_long_as_the_block() {
        let bits: usize = DESCRIPTION
            .lines()
            .filter(|line| line.contains("<reg "))
            .map(|line| {
                let (_, after) = line.split_once("bitsize=\"").unwrap();
                after.split_once('"').unwrap().0.parse::<usize>().unwrap()
            })
            .sum();
        assert_eq!(bits, BLOCK * 8);
    }

    #[test]
    fn tags_go_both_ways() {
        assert_eq!((full_tags(0xff), full_tags(0)), (0, 0xffff));
        for tags in 0..=255 {
            assert_eq!(short_tags(full_tags(tags)), tags);
        }
    }
}
