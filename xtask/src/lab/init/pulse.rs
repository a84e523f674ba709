//! Wakes every processor of the machine when the host says so.
//!
//! The emulation loses an interrupt now and then (see `machine.rs`), and with it a processor's
//! timer or its call to take up work: it stands still until the next one. A frame from the host is
//! an interrupt from outside the machine, so it arrives even where all timers are lost. Here it
//! wakes a thread on each processor, by an interrupt between processors where they sleep; on its
//! way out of each the kernel looks after its timers and its work.

use std::thread::{self, Thread};

/// A thread on each processor.
pub struct Pulse(Vec<Thread>);

impl Pulse {
    /// Starts the threads; they sleep.
    pub fn new() -> Pulse {
        let count = thread::available_parallelism().map_or(1, usize::from);
        Pulse((0..count).map(|number| thread::spawn(move || sleep_on(number)).thread().clone()).collect())
    }

    /// Wakes each once.
    pub fn beat(&self) {
        self.0.iter().for_each(Thread::unpark);
    }
}

fn sleep_on(number: usize) {
    // SAFETY: a cpu_set_t is an array of integers; CPU_SET checks its index.
    unsafe {
        let mut own: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(number, &mut own);
        // A thread elsewhere wakes a processor twice and another never: no worse than none.
        let _ = libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const own);
    }
    loop {
        thread::park();
    }
}
