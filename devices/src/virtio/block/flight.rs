//! The requests the kernel works on, and all that it may touch because of them.
//!
//! The kernel writes into guest memory through the jobs given to a ring until it says that it
//! is done, whether or not the ring's descriptor is still open here. So jobs, ring and guest
//! memory live and end together; and if they are let go while something is in flight (a disk
//! that never answers, a worker thread that ends), they are left behind for good. Memory is
//! lost then, once, instead of another machine's data.

use super::job::Job;
use crate::{Memory, disk::Ring};

/// Jobs by head descriptor, and the ring they were given to.
pub(super) struct Flight {
    /// One job for each descriptor; empty when nothing ever goes to a ring.
    pub table: Vec<Job>,
    /// The ring, once one was needed.
    pub ring: Option<Ring>,
    memory: Memory,
}

impl Flight {
    /// Room for `jobs` requests over `memory`, without a ring yet.
    pub fn new(jobs: u16, memory: Memory) -> Flight {
        Flight { table: (0..jobs).map(|_| Job::default()).collect(), ring: None, memory }
    }

    /// Requests the kernel works on.
    pub fn count(&self) -> u32 {
        self.ring.as_ref().map_or(0, Ring::in_flight)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.count() > 0 {
            std::mem::forget(std::mem::take(&mut self.table));
            std::mem::forget(self.ring.take());
            std::mem::forget(self.memory.clone());
        }
    }
}
