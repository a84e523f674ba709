//! Time, in ticks of the processor's counter.

/// The time stamp counter.
pub fn cycles() -> u64 {
    // SAFETY: reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether `cycles` have passed since `start`.
pub fn is_over(start: u64, duration: u64) -> bool {
    cycles().wrapping_sub(start) >= duration
}
