//! Guest memory of a saved machine that comes when it is touched.
//!
//! ```text
//!   a full snapshot's file ──────────────► mapped                      Source::File
//!   diffs over it, all of them files ────► mapped, run by run          Source::Layers
//!   a store, or a chain in many pieces ──► our pager, from the chain   Source::Lazy
//!   a page-fault handler ────────────────► its process                 Source::Lazy
//! ```
//!
//! Mapped is better wherever it can be: pages are shared with every clone, there is no thread and
//! no special right, and the machine's own pages are known without any tracking. A mapping costs
//! the kernel some microseconds at the restore and 200 bytes, so a chain that has come to pieces
//! is served by the pager; `nacelle snapshot merge` mends it.

use std::{fs::File, io, path::PathBuf, ptr::NonNull, sync::Arc, thread, time::Duration};

use devices::Memory;

use super::{
    Vm,
    pages::{self, Piece},
};
use crate::{
    pager::{
        Broken, ChainSource, Handler, PATIENCE, Pager, PagerError, Prefetch, Range,
        working_set::{Place, RECORD_FOR, Recorder, WorkingSet},
    },
    snapshot::{Chain, extents::Run},
};

/// Most pieces of files that a chain is mapped from. A process may have 65,530 mappings, and a
/// balloon makes more of them.
pub const LAYERS_MAX: usize = 4096;

/// How long a load waits for the pages of a working set. From a slow source they come beside the
/// guest then.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Parts of memory, each at its own offset of a file.
pub type Layers = Arc<[(Run, Arc<File>)]>;

/// The files and runs that a chain can be mapped from; nothing if a part of it is in a store or it
/// is in too many pieces.
pub fn layers(chain: &Chain) -> io::Result<Option<Layers>> {
    let mut files = Vec::new();
    for layer in chain.layers() {
        let Some(file) = layer.memory_file() else { return Ok(None) };
        files.push(Arc::new(file.try_clone()?));
    }
    let runs = chain.flatten();
    if runs.len() > LAYERS_MAX {
        return Ok(None);
    }
    let part = |(run, layer): (Run, usize)| Some((run, Arc::clone(files.get(layer)?)));
    Ok(Some(runs.into_iter().filter_map(part).collect()))
}

/// Who brings the pages.
pub enum Server {
    /// Our pager, from this chain.
    Chain(Arc<Chain>, Prefetch),
    /// The process that listens at this socket.
    Handler(PathBuf),
}

/// Memory that is to be served, and who is told if it cannot be any more.
pub struct Lazy {
    server: Server,
    broken: Option<Broken>,
    record: bool,
}

/// Memory that is being served, until this is dropped: what is missing then is zero.
#[derive(Debug)]
pub struct Served(Option<Serving>);

#[derive(Debug)]
enum Serving {
    Pager(Pager),
    Handler(Handler),
}

impl Lazy {
    /// With `record`, it is known afterwards what was touched.
    pub fn new(server: Server, record: bool, broken: Broken) -> Lazy {
        Lazy { server, broken: Some(broken), record }
    }

    /// Begins to serve `ram`, which nobody touched yet, in host pages of `page_size` bytes.
    pub fn begin(&mut self, ram: &Memory, page_size: u64) -> Result<Served, PagerError> {
        let ranges = ranges(&pages::pieces(ram), page_size)?;
        let broken = self.broken.take().unwrap_or_else(|| Box::new(|_| {}));
        let serving = match &self.server {
            Server::Chain(chain, prefetch) => {
                let source = Box::new(ChainSource::new(Arc::clone(chain)));
                Serving::Pager(Pager::start(&ranges, source, prefetch, self.record, broken)?)
            }
            Server::Handler(path) => Serving::Handler(Handler::connect(path, &ranges, PATIENCE, broken)?),
        };
        Ok(Served(Some(serving)))
    }

    /// Reads what is not served: memory that was plugged in. A handler has only what it serves.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match &self.server {
            Server::Chain(chain, _) => chain.read_checked(offset, bytes).map_err(io::Error::other),
            Server::Handler(_) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "Memory that was plugged in cannot come from a page-fault handler; load it from a file",
            )),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        match self.0.take() {
            Some(Serving::Pager(pager)) => pager.give_up(),
            Some(Serving::Handler(handler)) => handler.give_up(),
            None => {}
        }
    }
}

impl Vm {
    /// Brings what a working set names into RAM before the guest runs, which would wait for each
    /// page of it otherwise. Pages of a file come on a thread, while whoever had the machine loaded
    /// gets the answer; the next [`Vm::resume`] waits for them. What is served is brought by who serves
    /// it, and waited for a moment here.
    pub fn prefetch(&mut self, set: WorkingSet) {
        match self.served.as_ref().and_then(|served| served.0.as_ref()) {
            Some(Serving::Pager(pager)) => drop(pager.has_first(FIRST_PATIENCE)),
            Some(Serving::Handler(_)) => {}
            None => {
                let Ok(ranges) = ranges(&pages::pieces(&self.ram), 4096) else { return };
                let bring = move || {
                    set.prefetch(&ranges);
                };
                // Without a thread they come as the guest touches them.
                self.prefetching = thread::Builder::new().name("prefetch".to_owned()).spawn(bring).ok();
            }
        }
    }

    /// Waits until what [`Vm::prefetch`] began to bring is there.
    pub(super) fn prefetched(&mut self) {
        if let Some(thread) = self.prefetching.take() {
            let _ = thread.join();
        }
    }

    /// Records what the guest touches from now on, after its first second, at `place`. Nothing if
    /// that cannot be known: memory is another process's.
    pub fn record_working_set(&self, place: Place) -> io::Result<Option<Recorder>> {
        self.record(place, RECORD_FOR)
    }

    fn record(&self, place: Place, wait: Duration) -> io::Result<Option<Recorder>> {
        match self.served.as_ref().and_then(|served| served.0.as_ref()) {
            Some(Serving::Handler(_)) => Ok(None),
            Some(Serving::Pager(pager)) => {
                let touched = pager.touched();
                let look = move || Ok(WorkingSet { touched: touched.take(), ..WorkingSet::default() });
                Recorder::start(place, wait, look).map(Some)
            }
            None => {
                let ranges = ranges(&pages::pieces(&self.ram), 4096).map_err(io::Error::other)?;
                Recorder::start(place, wait, move || WorkingSet::of_mappings(&ranges)).map(Some)
            }
        }
    }
}

fn ranges(pieces: &[Piece], page_size: u64) -> Result<Vec<Range>, PagerError> {
    let range = |piece: &Piece| {
        let at = NonNull::new(piece.host as *mut u8).unwrap_or(NonNull::dangling());
        // SAFETY: a piece is a private mapping of guest memory, which is never unmapped, and which
        // nobody holds a reference into.
        unsafe { Range::new(at, piece.len, piece.offset, page_size) }
    };
    pieces.iter().map(range).collect()
}
