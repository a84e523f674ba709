//! Pages of a snapshot and all that it lies on: a diff over diffs, a store, or both.

use std::{error::Error, sync::Arc};

use super::{PAGE, PageSource};
use crate::snapshot::{
    Chain, Snapshot,
    extents::{Extents, Gathering},
};

/// A chain as a source of pages. Chunks that have hashes are checked when their first page is
/// asked for, and pages are handed out from the bytes that were checked.
#[derive(Debug)]
pub struct ChainSource {
    chain: Arc<Chain>,
}

impl ChainSource {
    /// Takes a chain, whose files stay open until memory is complete.
    pub fn new(chain: Arc<Chain>) -> ChainSource {
        ChainSource { chain }
    }
}

impl PageSource for ChainSource {
    fn present(&self) -> Extents {
        let mut all = Gathering::default();
        for layer in self.chain.layers() {
            layer.extents().runs().iter().for_each(|run| all.add(*run));
        }
        all.finish()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        // Ranges are whole huge pages; what a snapshot's memory ends short of is zero.
        let have = self.chain.size().saturating_sub(offset).min(buffer.len() as u64);
        let (within, beyond) = buffer.split_at_mut(have as usize);
        beyond.fill(0);
        Ok(self.chain.read_checked(offset, within)?)
    }

    fn unit(&self, offset: u64) -> u64 {
        let layer = self.chain.place(offset).and_then(|p| self.chain.layers().get(p.layer?));
        layer.filter(|l| l.manifest().memory.hashed).map_or(PAGE, |l| l.manifest().memory.chunk_size)
    }

    fn rest(&self) {
        self.chain.layers().iter().for_each(Snapshot::forget_chunks);
    }
}
