//! Images of machines that run: what can be done of a live snapshot before the machine stands still.
//!
//! ```text
//!   records of what is written begin ─► Image::take ─► which pages are there?
//!        ┌─► what was written since ─► kept aside ─┐
//!        └──────────── still much? ◄───────────────┤
//!   ─── stands still ──────────────────────────────┤
//!        state; the last of what was written, kept aside
//!   ─── goes on ─────────────────────────────────────  records end; the image is written
//! ```
//!
//! To take an [`Image`] costs the time of copying the page tables, 43 ms for 1 GiB of small pages,
//! and to ask what is there costs some more. Neither needs the machine to stand still if it is known
//! what was written since: those pages are copied, and the machine stands still for the last few of
//! them alone. KVM's log tells what the guest wrote, the records of [`devices::written`] what devices
//! wrote. What a balloon gave back meanwhile is as it was or zero, which the guest cannot count on.
//!
//! Where that is of no use, or does not work, the image is taken while the machine stands still:
//! memory of huge pages has page tables that are copied in a millisecond, and logging what is written
//! would have KVM map it in small ones; memory that is plugged has slots that come and go; and a
//! guest that writes faster than pages are copied would stand still for longer.

use std::io;

use super::{
    Vm,
    image::Image,
    memory::{self, MemoryError},
    pages,
};
use crate::{
    pagemap::PageMap,
    snapshot::extents::{Extents, Gathering},
};

/// Bytes that are few enough to be copied while the machine stands still.
const FEW: u64 = 512 << 10;

/// How often pages are copied that were written meanwhile, at most.
const ROUNDS: usize = 6;

/// With more than this left after that, it is not worth it: half a gigabyte a second.
const TOO_MANY: u64 = 16 << 20;

/// An image of a machine that ran when it was taken.
#[derive(Debug)]
pub struct Ahead {
    /// The image, with all pages that were written since, up to the last round.
    pub image: Image,
    /// The pages that are the machine's own.
    pub found: Gathering,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum AheadError {
    /// No process.
    #[error("Memory cannot be held")]
    Image(#[from] io::Error),
    /// No log.
    #[error("KVM does not log what is written")]
    Track(#[from] MemoryError),
    /// The log cannot be read.
    #[error("KVM does not tell what was written")]
    Log(#[from] kvm_ioctls::Error),
    /// The guest is too fast.
    #[error("The guest wrote {0} bytes while those were copied that it had written before")]
    Fast(u64),
}

impl Ahead {
    /// Keeps pages aside that were written. The machine may be running: what it writes while they
    /// are copied is written again, and kept again.
    pub fn keep(&mut self, ram: &[pages::Piece], fresh: &Extents) {
        for run in fresh.runs() {
            self.found.add(*run);
            for piece in ram.iter().filter_map(|piece| piece.cut(*run)) {
                // SAFETY: pieces are guest memory, mapped until the process ends.
                unsafe { self.image.keep(piece.host, piece.len as usize) };
            }
        }
    }
}

impl Vm {
    /// Takes an image while the machine runs; nothing where that is of no use. Unless it fails, what
    /// is written is recorded until [`Vm::unwatch`].
    pub fn image_ahead(&mut self) -> Result<Option<Ahead>, AheadError> {
        if self.huge_pages || self.annex.plugged().is_some() {
            return Ok(None);
        }
        let taken = self.taken_ahead();
        if taken.is_err() {
            self.unwatch();
        }
        taken.map(Some)
    }

    fn taken_ahead(&mut self) -> Result<Ahead, AheadError> {
        if !self.tracks_dirty_pages {
            self.watched = true;
            memory::track(self.host.vm(), &self.ram, true)?;
        }
        // What was written before is in the image.
        self.written_since()?;
        let ram = pages::pieces(&self.ram);
        let mut ahead = Ahead { image: Image::take(self.huge_pages)?, found: Gathering::default() };
        let map = PageMap::open().ok();
        ram.iter().for_each(|piece| self.own(map.as_ref(), *piece, &mut ahead.found));
        let mut left = u64::MAX;
        for _ in 0..ROUNDS {
            let fresh = self.written_since()?;
            ahead.keep(&ram, &fresh);
            left = fresh.bytes();
            // So that none has to be had while the machine stands still.
            ahead.image.make_room(left.clamp(FEW, TOO_MANY) as usize);
            if left <= FEW {
                break;
            }
        }
        if left > TOO_MANY { Err(AheadError::Fast(left)) } else { Ok(ahead) }
    }

    /// What was written since this was asked last. The next diff of a machine that is tracked has it
    /// too.
    pub(super) fn written_since(&mut self) -> Result<Extents, kvm_ioctls::Error> {
        let mut fresh = Gathering::default();
        let taken = pages::take_dirty(self.host.vm(), &self.ram, &mut fresh);
        let fresh = fresh.finish();
        if self.tracks_dirty_pages {
            fresh.runs().iter().for_each(|run| self.carried.add(*run));
        }
        taken.map(|()| fresh)
    }

    /// Ends what [`Vm::image_ahead`] began.
    pub fn unwatch(&mut self) {
        if std::mem::take(&mut self.watched)
            && let Err(error) = memory::track(self.host.vm(), &self.ram, false)
        {
            log::warn!("What the guest writes is still logged, which slows it: {error}");
        }
    }
}
