//! Memory that comes when it is touched, on plain mappings without a machine.

mod chains;
mod handlers;
mod hostile;
mod removals;
mod serving;
mod sets;

use std::{
    collections::BTreeMap,
    error::Error,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    time::{Duration, Instant},
};

use super::*;
use crate::{
    pagemap::PageMap,
    snapshot::extents::{Gathering, Run},
};

/// No test waits longer, and none needs a hundredth of it.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// A private mapping that stays: threads may wait in it to the end.
#[derive(Clone, Copy)]
pub(super) struct Area {
    at: usize,
    pub(super) pages: u64,
}

impl Area {
    pub(super) fn anonymous(pages: u64) -> Area {
        Area::map(pages, libc::MAP_ANONYMOUS, -1)
    }

    pub(super) fn map(pages: u64, flags: i32, fd: i32) -> Area {
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let open = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel chooses touches no memory of ours.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), (pages * PAGE) as usize, open, flags, fd, 0) };
        assert!(at != libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Area { at: at as usize, pages }
    }

    pub(super) fn range(self, offset: u64) -> Range {
        self.part(0, self.pages, offset)
    }

    pub(super) fn part(self, first: u64, pages: u64, offset: u64) -> Range {
        let at = NonNull::new((self.at + (first * PAGE) as usize) as *mut u8).unwrap();
        // SAFETY: the mapping stays, and is only used through raw pointers.
        unsafe { Range::new(at, pages * PAGE, offset, PAGE) }.unwrap()
    }

    /// Reads a page as a guest would: the thread waits until it is there.
    pub(super) fn page(self, number: u64) -> Vec<u8> {
        assert!(number < self.pages);
        let mut bytes = vec![0; PAGE as usize];
        // SAFETY: the page lies in the mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address(number), bytes.as_mut_ptr(), PAGE as usize);
        }
        bytes
    }

    pub(super) fn write(self, number: u64, byte: u8) {
        // SAFETY: the page lies in the mapping.
        unsafe { self.address(number).write_volatile(byte) };
    }

    pub(super) fn advise(self, first: u64, pages: u64, advice: i32) {
        // SAFETY: the pages lie in the mapping.
        let result = unsafe { libc::madvise(self.address(first).cast(), (pages * PAGE) as usize, advice) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    pub(super) fn address(self, number: u64) -> *mut u8 {
        (self.at + (number * PAGE) as usize) as *mut u8
    }

    /// Pages that are there, without touching any.
    pub(super) fn there(self) -> Vec<u64> {
        let mut found = Vec::new();
        let tell = |run: Run, _| found.extend(run.start / PAGE..run.end / PAGE);
        PageMap::open().unwrap().scan(self.range(0).span(), tell).unwrap();
        found
    }
}

pub(super) fn page(number: u64) -> Vec<u8> {
    (0..PAGE).map(|n| (number * 31 + n % 251 + 1) as u8).collect()
}

/// A source in memory: page `n` holds `page(n)`, or nothing.
#[derive(Default)]
pub(super) struct Model {
    pub(super) pages: BTreeMap<u64, Vec<u8>>,
    pub(super) delay: Duration,
    /// From this page on it fails.
    pub(super) fails_at: Option<u64>,
    pub(super) reads: Arc<AtomicU64>,
}

impl Model {
    pub(super) fn of(pages: impl IntoIterator<Item = u64>) -> Model {
        Model { pages: pages.into_iter().map(|n| (n, page(n))).collect(), ..Model::default() }
    }

    pub(super) fn expected(&self, number: u64) -> Vec<u8> {
        self.pages.get(&number).cloned().unwrap_or_else(|| vec![0; PAGE as usize])
    }
}

#[derive(Debug, thiserror::Error)]
#[error("The disk is gone")]
struct Gone(#[source] io::Error);

impl PageSource for Model {
    fn present(&self) -> Extents {
        let mut all = Gathering::default();
        self.pages.keys().for_each(|n| all.add(Run { start: n * PAGE, end: (n + 1) * PAGE }));
        all.finish()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.reads.fetch_add(1, SeqCst);
        std::thread::sleep(self.delay);
        for (number, piece) in (offset / PAGE..).zip(buffer.chunks_mut(PAGE as usize)) {
            if self.fails_at.is_some_and(|at| number >= at) {
                return Err(Box::new(Gone(io::Error::from_raw_os_error(libc::EIO))));
            }
            piece.copy_from_slice(&self.expected(number));
        }
        Ok(())
    }
}

/// What a pager says when it cannot go on.
pub(super) fn complaints() -> (Broken, mpsc::Receiver<String>) {
    let (sender, receiver) = mpsc::channel();
    (Box::new(move |reason| sender.send(reason).unwrap()), receiver)
}

pub(super) fn never() -> Broken {
    Box::new(|reason| panic!("{reason}"))
}

pub(super) fn serve(area: Area, model: Model) -> Pager {
    Pager::start(&[area.range(0)], Box::new(model), &Prefetch::default(), false, never()).unwrap()
}

pub(super) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
