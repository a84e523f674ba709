//! A guest without an operating system that drives virtio devices by polling.
//!
//! It is entered by Linux's 64-bit boot protocol, lays an identity map of 4 GiB that ring 3
//! may use, and leaves ring 0 after some thirty instructions: where guest kernel code is
//! emulated, ring 3 still runs at the processor's speed, so what is measured is the data path
//! of the monitor and not the host's emulation. Interrupts are off for good: used rings are
//! watched, not waited for.
//!
//! The command line says what to do, as `name=value` words; see `order.rs`. Results are not
//! told: the monitor's own counters of the device have them. The end is an invalid
//! instruction, for which there is no handler and so the machine resets; a guest that found
//! something wrong stands still instead, and whoever waits for it gets tired of it.

#![no_std]
#![no_main]

mod block;
mod clock;
mod net;
mod order;
mod ring;
mod virtio;
mod vsock;

use order::{Order, Work};

core::arch::global_asm!(
    r#"
    .section .text.start, "ax"
    .globl start
start:
    cli
    mov rax, cr4
    or rax, 0x600               # OSFXSR, OSXMMEXCPT: the compiler uses SSE
    mov cr4, rax
    lea rax, [pml4]
    mov cr3, rax
    lgdt [gdt_pointer]
    lea rsp, [stack_top]
    mov rdi, rsi                # the zero page
    push 0x1b                   # SS: user data
    lea rax, [stack_top]
    push rax
    push 2                      # RFLAGS: interrupts off
    push 0x23                   # CS: user code
    lea rax, [in_ring_3]
    push rax
    iretq
in_ring_3:
    and rsp, -16
    call main
    ud2

    .section .data
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad directories + 7, directories + 0x1007, directories + 0x2007, directories + 0x3007
    .fill 508, 8, 0
directories:
    .set page, 0
    .rept 2048
    .quad page + 0x87           # present, writable, user, 2 MiB
    .set page, page + 0x200000
    .endr
gdt:
    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cff2000000ffff, 0x00affa000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt

    .section .bss
    .balign 4096
    .skip 0x10000
stack_top:
    "#
);

/// The first code in ring 3.
#[unsafe(no_mangle)]
extern "C" fn main(zero_page: usize) -> ! {
    let order = Order::read(zero_page);
    match order.work {
        Work::End => {}
        Work::Idle => stand_still(),
        Work::Block => block::run(&order),
        Work::Net => net::run(&order),
        Work::Vsock => vsock::run(&order),
    }
    // SAFETY: the processor stops here for good.
    unsafe { core::arch::asm!("ud2", options(noreturn)) };
}

/// Ring 3 may not halt, so it spins.
fn stand_still() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    stand_still()
}
