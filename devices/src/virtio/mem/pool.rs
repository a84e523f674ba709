//! Makes the host follow what is plugged.
//!
//! [`Blocks`] is the wish, the list of open slots is what is; [`Pool::arrange`] closes the gap
//! between them. Every change is the same three steps: note the wish, arrange, and take the
//! wish back if the host could not.
//!
//! ```text
//!   to open a slot     memory of its own, then KVM      (the guest never sees the sink)
//!   to close a slot    out of KVM, then the sink        (the guest never gets new pages)
//! ```
//!
//! Two locks: `blocks` is held for moments and asked by vCPU threads that read the
//! configuration; `open` is held while KVM is asked, which may take milliseconds, by the queue
//! half while it runs and by the register half while it does not.

use std::{
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    Slot, Slots,
    blocks::{Blocks, Layout},
    region::Region,
    request::Answer,
};

/// What is counted, by the names of the metrics.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub plug_count: AtomicU64,
    pub plug_bytes: AtomicU64,
    pub plug_fails: AtomicU64,
    pub unplug_count: AtomicU64,
    pub unplug_bytes: AtomicU64,
    pub unplug_fails: AtomicU64,
    pub unplug_discard_fails: AtomicU64,
    pub unplug_all_count: AtomicU64,
    pub unplug_all_fails: AtomicU64,
    pub state_count: AtomicU64,
    pub state_fails: AtomicU64,
    pub queue_event_count: AtomicU64,
    pub queue_event_fails: AtomicU64,
}

impl Counters {
    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        [
            ("plug_count", &self.plug_count),
            ("plug_bytes", &self.plug_bytes),
            ("plug_fails", &self.plug_fails),
            ("unplug_count", &self.unplug_count),
            ("unplug_bytes", &self.unplug_bytes),
            ("unplug_fails", &self.unplug_fails),
            ("unplug_discard_fails", &self.unplug_discard_fails),
            ("unplug_all_count", &self.unplug_all_count),
            ("unplug_all_fails", &self.unplug_all_fails),
            ("state_count", &self.state_count),
            ("state_fails", &self.state_fails),
            ("queue_event_count", &self.queue_event_count),
            ("queue_event_fails", &self.queue_event_fails),
        ]
        .map(|(name, counter)| (name, counter.load(Relaxed)))
        .to_vec()
    }
}

/// Pluggable memory: the wish, and what there is of it on the host.
pub(super) struct Pool {
    pub layout: Layout,
    pub counters: Counters,
    region: Arc<Region>,
    slots: Arc<dyn Slots>,
    blocks: Mutex<Blocks>,
    /// Which slots the guest's processors reach.
    open: Mutex<Vec<bool>>,
    /// A failure was logged; a guest may cause as many as it likes, so others are counted.
    logged: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(super) fn new(layout: Layout, region: Arc<Region>, slots: Arc<dyn Slots>) -> Pool {
        Pool {
            layout,
            counters: Counters::default(),
            region,
            slots,
            blocks: Mutex::new(Blocks::new(layout)),
            open: Mutex::new(vec![false; layout.slots()]),
            logged: AtomicBool::new(false),
        }
    }

    /// The state of all blocks. Not to be held for long: vCPU threads wait for it.
    pub(super) fn blocks(&self) -> MutexGuard<'_, Blocks> {
        lock(&self.blocks)
    }

    /// Plugs blocks that may be plugged.
    pub(super) fn plug(&self, blocks: Range<usize>) -> Answer {
        self.change(self.layout.slots_of(&blocks), &[blocks], true)
    }

    /// Unplugs blocks that may be unplugged and whose pages were given back.
    pub(super) fn unplug(&self, blocks: Range<usize>) -> Answer {
        self.change(self.layout.slots_of(&blocks), &[blocks], false)
    }

    /// Unplugs all that is plugged in a slot, which gives all its pages back.
    pub(super) fn unplug_slot(&self, slot: usize) -> Answer {
        let runs = self.blocks().runs_in(self.layout.blocks_of(slot));
        self.change(slot..slot + 1, &runs, false)
    }

    fn change(&self, slots: Range<usize>, runs: &[Range<usize>], plugged: bool) -> Answer {
        let set = |plugged| {
            let mut blocks = self.blocks();
            runs.iter().for_each(|run| blocks.set(run.clone(), plugged));
        };
        set(plugged);
        let Err(error) = self.arrange(slots.clone()) else { return Answer::Ack };
        let what = if plugged { "plug" } else { "unplug" };
        self.log(&format!("The host could not {what} memory, so the guest is told to try again"), &error);
        set(!plugged);
        if let Err(error) = self.arrange(slots) {
            self.log("Pluggable memory could not be put back as it was", &error);
        }
        Answer::Busy
    }

    /// Opens those of `slots` that hold plugged blocks and closes the others. Ends at the
    /// first failure.
    fn arrange(&self, slots: Range<usize>) -> io::Result<()> {
        let wished: Vec<bool> = {
            let blocks = self.blocks();
            slots.clone().map(|slot| blocks.count(self.layout.blocks_of(slot)) > 0).collect()
        };
        let mut open = lock(&self.open);
        let mut done = Ok(());
        for (slot, wished) in slots.zip(wished) {
            let Some(is_open) = open.get_mut(slot) else { break };
            if *is_open != wished {
                done = if wished { self.open(slot) } else { self.close(slot) };
                if done.is_err() {
                    break;
                }
                *is_open = wished;
            }
        }
        self.region.empty_sink();
        done
    }

    fn describe(&self, slot: usize) -> io::Result<Slot> {
        Ok(Slot {
            index: u32::try_from(slot).map_err(|_| io::ErrorKind::InvalidInput)?,
            guest_address: self.layout.start + slot as u64 * self.layout.slot,
            host_address: self.region.slot(slot)?,
            len: self.layout.slot,
        })
    }

    fn open(&self, slot: usize) -> io::Result<()> {
        self.region.open(slot)?;
        self.describe(slot).and_then(|it| self.slots.plug(&it)).inspect_err(|_| self.show_sink(slot))
    }

    fn close(&self, slot: usize) -> io::Result<()> {
        self.slots.unplug(&self.describe(slot)?)?;
        self.show_sink(slot);
        Ok(())
    }

    /// The guest cannot reach the slot. When its mapping cannot be replaced (a process has
    /// only so many), its pages are given back at least.
    fn show_sink(&self, slot: usize) {
        if let Err(error) = self.region.close(slot) {
            self.log("Unplugged memory stays mapped", &error);
            self.discard(&self.layout.blocks_of(slot));
        }
    }

    /// Gives the pages of `blocks` back. A failure costs the host memory and the guest
    /// nothing: it is counted.
    pub(super) fn discard(&self, blocks: &Range<usize>) {
        let (offset, len) = self.layout.bytes_of(blocks);
        if let Err(error) = self.region.discard(offset, len) {
            self.counters.unplug_discard_fails.fetch_add(1, Relaxed);
            self.log(&format!("{} MiB of unplugged memory could not be given back", len >> 20), &error);
        }
    }

    fn log(&self, what: &str, error: &io::Error) {
        if !self.logged.swap(true, Relaxed) {
            log::error!("{what}; later failures of pluggable memory are only counted: {error}");
        }
    }

    /// Takes over a saved state, and brings the host there.
    pub(super) fn load(&self, blocks: Blocks) -> io::Result<()> {
        *self.blocks() = blocks;
        self.arrange(0..self.layout.slots())
    }
}
