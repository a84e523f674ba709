//! What of a paused machine goes into a snapshot: its state, and where its pages are.
//!
//! ```text
//!   capture ─► Capture { sections, regions, parts }    taken while the machine stands still
//!                  └─ parts: offset, length ─┬─ this process's memory, read while it is written
//!                                            └─ the file that shows through (never copied by hand)
//! ```
//!
//! What lies beneath a machine's own pages decides what "all of memory" is: nothing (zero pages, it
//! booted here), a memory file that is mapped privately (pages that were never written are still
//! the file's), or something that only a touch brings forth. Nothing is read here: a capture costs
//! the time of the state and of a walk through the list of pages.

use std::{fs::File, io, ops::Range, sync::Arc};

use arch::needs::Needs;
use devices::{Memory, mmds::Mmds, state::Section};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Vm, VmError,
    ahead::Ahead,
    annex::Annex,
    lazy::Layers,
    pages::{self, Piece, Which},
};
use crate::{
    pagemap::PageMap,
    snapshot::{
        Region,
        extents::{Extents, Gathering, Run},
    },
};

/// What shows through where a machine has no page of its own.
#[derive(Debug, Clone, Default)]
pub enum Beneath {
    /// Zero.
    #[default]
    Nothing,
    /// A memory file, mapped privately.
    File(Arc<File>),
    /// Parts of several, each at its own offset.
    Layers(Layers),
    /// What another process serves: every page has to be touched to be had.
    Unknown,
}

/// Where pages are.
#[derive(Debug, Clone)]
pub enum From {
    /// From this address of this process on.
    Memory(usize),
    /// At the same offset of this file.
    File(Arc<File>),
}

/// Pages for a snapshot.
#[derive(Debug, Clone)]
pub struct Part {
    /// Offset in the memory file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub from: From,
}

/// A paused machine.
#[derive(Debug)]
pub struct Capture {
    /// Its state.
    pub sections: Vec<Section>,
    /// What it needs of the CPU.
    pub needs: Needs,
    /// Where guest memory lies in the memory file.
    pub regions: Vec<Region>,
    /// What is to be written, in rising order.
    pub parts: Vec<Part>,
    /// Only what changed was asked for, and nobody knows what did: the parts are all that was ever
    /// touched.
    pub guessed: bool,
    /// What was written since the last snapshot, forgotten by this capture. Given back by
    /// [`Vm::put_back`] if the snapshot fails.
    pub dirty: Vec<Run>,
}

impl Capture {
    /// Bytes to be written at most: files have holes.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }
}

impl Vm {
    /// Captures the machine; only while it is paused, and what is captured is true only as long.
    /// With `changed_only`, of memory only what was written since the snapshot that was taken or
    /// loaded last (or more, never less). An image that was taken before gets what was written since.
    pub fn capture(
        &mut self,
        changed_only: bool,
        mmds: Option<&Arc<Mmds>>,
        ahead: Option<&mut Ahead>,
    ) -> Result<Capture, VmError> {
        let (sections, needs) = self.save(mmds)?;
        let (ram, plugged) = (pages::pieces(&self.ram), plugged(&self.memory, &self.annex));
        let mut found = None;
        if self.tracks_dirty_pages || ahead.is_some() {
            let fresh = self.written_since().map_err(VmError::DirtyLog)?;
            if let Some(ahead) = ahead {
                ahead.keep(&ram, &fresh);
                found = Some(std::mem::take(&mut ahead.found));
            }
        }
        let dirty = std::mem::take(&mut self.carried);
        let all: Vec<Piece> = ram.iter().chain(&plugged).copied().collect();
        let looked_at = if changed_only && self.tracks_dirty_pages {
            found = Some(dirty.clone());
            &plugged
        } else if found.is_some() {
            &plugged
        } else {
            &all
        };
        let map = PageMap::open()
            .inspect_err(|e| log::warn!("All of memory is read, as what was touched is not known: {e}"));
        let mut found = found.unwrap_or_default();
        looked_at.iter().for_each(|piece| self.own(map.as_ref().ok(), *piece, &mut found));
        let own = found.finish();
        let parts = self.parts(&all, &own, changed_only);
        let regions = self.regions();
        let knows = self.tracks_dirty_pages || matches!(self.beneath, Beneath::File(_) | Beneath::Layers(_));
        let (guessed, dirty) = (changed_only && !knows, dirty.finish().runs().to_vec());
        Ok(Capture { sections, needs, regions, parts, guessed, dirty })
    }

    /// Where the machine's `own` pages are, and what shows through between them.
    fn parts(&self, all: &[Piece], own: &Extents, changed_only: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        for piece in all {
            let window = Run { start: piece.offset, end: piece.offset + piece.len };
            let mut at = window.start;
            for run in own.inside(window) {
                self.gap(changed_only, Run { start: at, end: run.start }, &mut parts);
                parts.extend(piece.cut(run).map(|cut| Part {
                    offset: cut.offset,
                    len: cut.len,
                    from: From::Memory(cut.host),
                }));
                at = run.end;
            }
            self.gap(changed_only, Run { start: at, end: window.end }, &mut parts);
        }
        parts
    }

    /// RAM that only a touch brings forth, if there is such: it must all be there before the machine
    /// is captured by an [`Image`](super::image::Image), for which nobody serves faults.
    pub fn served_memory(&self) -> Option<Vec<Piece>> {
        matches!(self.beneath, Beneath::Unknown).then(|| pages::pieces(&self.ram))
    }

    /// Remembers what was written before a capture that came to nothing.
    pub fn put_back(&mut self, dirty: &[Run]) {
        dirty.iter().for_each(|run| self.carried.add(*run));
    }

    /// Where guest memory lies in the memory file. Pluggable memory has its place whether it is
    /// plugged or not, so that the file of a later snapshot is laid out as this one is.
    pub fn regions(&self) -> Vec<Region> {
        let page_size = if self.huge_pages { 2 << 20 } else { 4096 };
        let region = |piece: Piece| Region {
            guest_address: piece.guest,
            size: piece.len,
            offset: piece.offset,
            page_size,
        };
        pages::pieces(&self.memory).into_iter().map(region).collect()
    }

    /// Adds the pages of `piece` that are the machine's own.
    pub(super) fn own(&self, map: Option<&PageMap>, piece: Piece, found: &mut Gathering) {
        let which = match self.beneath {
            Beneath::File(_) | Beneath::Layers(_) => Which::Own,
            Beneath::Nothing | Beneath::Unknown => Which::Touched,
        };
        let known = !matches!(self.beneath, Beneath::Unknown);
        if let Some(map) = map.filter(|_| known) {
            match pages::find(map, piece, which, found) {
                Ok(()) => return,
                Err(e) => log::warn!("All of memory is read, as what was touched is not known: {e}"),
            }
        }
        found.add(Run { start: piece.offset, end: piece.offset + piece.len });
    }

    /// Adds what shows through between two runs of the machine's own pages.
    fn gap(&self, changed_only: bool, run: Run, parts: &mut Vec<Part>) {
        if changed_only || run.is_empty() {
            return;
        }
        // Only RAM comes from the file; memory that was plugged is read from it.
        let ram: u64 = pages::pieces(&self.ram).iter().map(|piece| piece.len).sum();
        let run = run.within(Run { start: 0, end: ram });
        let mut add = |run: Run, file: &Arc<File>| {
            if !run.is_empty() {
                parts.push(Part { offset: run.start, len: run.len(), from: From::File(Arc::clone(file)) });
            }
        };
        match &self.beneath {
            Beneath::File(file) => add(run, file),
            Beneath::Layers(layers) => layers.iter().for_each(|(layer, file)| add(run.within(*layer), file)),
            Beneath::Nothing | Beneath::Unknown => {}
        }
    }
}

/// The pieces of pluggable memory that are plugged.
pub fn plugged(memory: &Memory, annex: &Annex) -> Vec<Piece> {
    let all = pages::pieces(memory);
    let piece = |run: Range<u64>| {
        let piece = all.iter().find(|p| (p.guest..p.guest + p.len).contains(&run.start))?;
        let start = piece.offset + (run.start - piece.guest);
        piece.cut(Run { start, end: start + (run.end - run.start) })
    };
    let runs = annex.plugged().map(|plugged| plugged.runs()).unwrap_or_default();
    runs.into_iter().filter_map(piece).collect()
}

/// Fills memory: `read` fills a buffer from an offset of the memory file on. Pages that are zero
/// stay untouched.
pub fn fill(
    memory: &Memory,
    pieces: &[Piece],
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for piece in pieces {
        let mut done = 0;
        while done < piece.len {
            let count = (piece.len - done).min(buffer.len() as u64) as usize;
            let bytes = buffer.get_mut(..count).unwrap_or_default();
            read(piece.offset + done, bytes)?;
            for (page, bytes) in (0..).zip(bytes.chunks(4096)) {
                if bytes.iter().any(|byte| *byte != 0) {
                    let at = GuestAddress(piece.guest + done + page * 4096);
                    memory.write_slice(bytes, at).map_err(io::Error::other)?;
                }
            }
            done += count as u64;
        }
    }
    Ok(())
}
