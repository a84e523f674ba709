//! The pages that a restored machine needs first: recorded once, brought at once later.
//!
//! ```text
//!   first restore:   guest runs ─► what was touched (pagemap, or the pager's faults)
//!                                      └─► DIR/memory.working-set
//!   later restores:  DIR/memory.working-set ─► Pager: these first
//!                                           └► mapped file: MADV_POPULATE_WRITE, _READ
//! ```
//!
//! Each page that a guest touches first costs a fault: an exit of the processor, and for the
//! host a look into the page cache, or a copy if the guest writes. Hundreds of them stand
//! between a restore and its first answer, one after the other. Brought in some dozens of
//! calls they cost the copying alone.
//!
//! The file is a hint. It is believed only if its digest is right and it names the snapshot;
//! whatever else is wrong with it, the machine starts without. What it can cost is bounded by
//! [`BYTES_MAX`] and [`RUNS_MAX`]. It is no part of the snapshot: it is not in the manifest,
//! and a copy without it is whole.
//!
//! ```text
//!   0   "NACLWORK"                16  id of the snapshot      40  u64 touched runs, n
//!   8   u32 version, 1            32  u64 size of memory      48  u64 written runs, m
//!   12  u32 zero                  56  n + m times: u64 start, u64 end
//!                                 end digest of all before it
//! ```

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{self, AtFlags};

use super::{PAGE, Range};
use crate::{
    pagemap::PageMap,
    snapshot::{
        Digest, Id, Snapshot,
        digest::LEN,
        disk::{Disk, HostDisk, read_whole},
        extents::{Extents, Run},
    },
};

/// Name of the file in the snapshot's directory.
pub const FILE: &str = "memory.working-set";

/// Most bytes that are brought beforehand; a larger set is cut there. The guest waits for them:
/// some 50 ms if they are in the page cache.
pub const BYTES_MAX: u64 = 256 << 20;

/// Most runs of a set; one that has more is not written, and not read.
pub const RUNS_MAX: usize = 1 << 16;

/// How long the first restore is watched from the moment the guest runs. Most machines are
/// restored because somebody waits for an answer, and answer within it; what a longer look would
/// add is what every restore would then pay for, asked for or not.
pub const RECORD_FOR: Duration = Duration::from_secs(1);

/// Untouched pages between touched ones that are brought along, for fewer calls. Of a file they
/// cost a page-table entry each; the kernel itself brings as many around a fault.
const TOUCHED_GAP: u64 = 16 * PAGE;

const MAGIC: &[u8; 8] = b"NACLWORK";
const VERSION: u32 = 1;
const HEADER: usize = 56;

/// Pages that a machine touched; offsets in the snapshot's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Pages that were read or written.
    pub touched: Extents,
    /// Pages that were written, which are copies of its own in a machine with a mapped file.
    pub written: Extents,
}

/// Where the set of a snapshot lies.
#[derive(Debug)]
pub struct Place {
    directory: File,
    id: Id,
    size: u64,
}

impl Place {
    /// Beside `snapshot`, wherever its directory is moved to.
    pub fn of(snapshot: &Snapshot) -> io::Result<Place> {
        let manifest = snapshot.manifest();
        let directory = snapshot.directory().try_clone()?;
        Ok(Place { directory, id: manifest.id, size: manifest.memory.size })
    }

    /// What lies there, if it is of that snapshot and whole.
    pub fn read(&self) -> Option<WorkingSet> {
        let cap = HEADER + 2 * RUNS_MAX * 16 + LEN;
        let bytes = read_whole(&self.directory, FILE, cap as u64).ok()?;
        WorkingSet::decode(&bytes, self.id, self.size)
    }

    /// Puts `set` there, all of it or nothing.
    pub fn publish(&self, set: &WorkingSet) -> io::Result<()> {
        if set.touched.runs().len() > RUNS_MAX || set.written.runs().len() > RUNS_MAX {
            return Err(io::Error::other("The touched pages lie too scattered to be a help"));
        }
        let bytes = set.encode(self.id, self.size);
        let (disk, at) = (HostDisk, &self.directory);
        let temporary = format!(".{FILE}-{}", Id::random()?);
        // It is not synchronised: what a crash leaves of it is not believed.
        let written = disk
            .create(at.as_fd(), &temporary)
            .and_then(|file| disk.write_at(&file, &bytes, 0))
            .and_then(|()| Ok(fs::renameat(at, temporary.as_str(), at, FILE)?));
        written.inspect_err(|_| {
            let _ = fs::unlinkat(at, temporary.as_str(), AtFlags::empty());
        })
    }
}

/// What prefetching did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefetched {
    /// System calls.
    pub calls: u64,
    /// Bytes that they covered.
    pub bytes: u64,
}

impl WorkingSet {
    /// What was touched of private mappings of a snapshot's memory file since they were made.
    pub fn of_mappings(ranges: &[Range]) -> io::Result<WorkingSet> {
        let (mut touched, mut written) = (Vec::new(), Vec::new());
        let map = PageMap::open()?;
        for range in ranges {
            map.scan(range.span(), |run, own| {
                join(&mut touched, run, TOUCHED_GAP);
                if own {
                    join(&mut written, run, 0);
                }
            })?;
        }
        Ok(WorkingSet { touched: sorted(touched), written: sorted(written) })
    }

    /// Brings the pages into private mappings of the memory file: written ones as copies, the
    /// others as they lie in the page cache. What fails is left to the guest's faults.
    pub fn prefetch(&self, ranges: &[Range]) -> Prefetched {
        let mut done = Prefetched::default();
        for (extents, advice) in
            [(&self.written, libc::MADV_POPULATE_WRITE), (&self.touched, libc::MADV_POPULATE_READ)]
        {
            for range in ranges {
                let window = Run { start: range.offset, end: range.offset + range.len };
                for run in extents.inside(window) {
                    let len = run.len().min(BYTES_MAX.saturating_sub(done.bytes));
                    if len == 0 {
                        return done;
                    }
                    let at = range.host + (run.start - range.offset);
                    // SAFETY: the run lies inside the range, which `Range::new` was promised to
                    // be a mapping; the advice changes nothing that it holds.
                    let result = unsafe { libc::madvise(at as *mut libc::c_void, len as usize, advice) };
                    done.calls += 1;
                    done.bytes += if result == 0 { len } else { 0 };
                }
            }
        }
        done
    }

    /// The bytes of the file for snapshot `id`, which has `size` bytes of memory.
    pub fn encode(&self, id: Id, size: u64) -> Vec<u8> {
        let (touched, written) = (self.touched.runs(), self.written.runs());
        let mut file = Vec::with_capacity(HEADER + (touched.len() + written.len()) * 16 + LEN);
        file.extend(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(id.0);
        for number in [size, touched.len() as u64, written.len() as u64] {
            file.extend(number.to_le_bytes());
        }
        for run in touched.iter().chain(written) {
            file.extend(run.start.to_le_bytes());
            file.extend(run.end.to_le_bytes());
        }
        file.extend(Digest::of(&file).0);
        file
    }

    /// Reads them, if they are of that snapshot and whole.
    pub fn decode(file: &[u8], id: Id, size: u64) -> Option<WorkingSet> {
        let (body, digest) = file.split_at_checked(file.len().checked_sub(LEN)?)?;
        let (header, runs) = body.split_at_checked(HEADER)?;
        let expected = [&MAGIC[..], &VERSION.to_le_bytes(), &[0; 4], &id.0, &size.to_le_bytes()].concat();
        let counts = header.strip_prefix(&expected[..])?;
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let (touched, written) = (word(counts.get(..8)?), word(counts.get(8..)?));
        let wanted = u128::from(touched) * 16 + u128::from(written) * 16;
        let few = touched.max(written) <= RUNS_MAX as u64;
        if !few || wanted != runs.len() as u128 || Digest::of(body).0 != digest {
            return None;
        }
        let extents = |bytes: &[u8]| {
            let run = |pair: &[u8]| {
                let (start, end) = pair.split_at(8);
                Run { start: word(start), end: word(end) }
            };
            Extents::checked(bytes.chunks_exact(16).map(run).collect(), size).ok()
        };
        let (touched, written) = runs.split_at_checked(touched as usize * 16)?;
        Some(WorkingSet { touched: extents(touched)?, written: extents(written)? })
    }
}

/// Looks and writes after a while, on a thread of its own. Dropping this changes nothing.
#[derive(Debug)]
pub struct Recorder {
    hurry: Arc<(Mutex<bool>, Condvar)>,
    thread: thread::JoinHandle<io::Result<WorkingSet>>,
}

impl Recorder {
    /// After `wait`, or when told, calls `look` and publishes what it found at `place`.
    pub fn start(
        place: Place,
        wait: Duration,
        look: impl FnOnce() -> io::Result<WorkingSet> + Send + 'static,
    ) -> io::Result<Recorder> {
        let hurry = Arc::new((Mutex::new(false), Condvar::new()));
        let told = Arc::clone(&hurry);
        let record = move || {
            let until = Instant::now() + wait;
            let mut now = told.0.lock().unwrap_or_else(PoisonError::into_inner);
            while !*now {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                now = told.1.wait_timeout(now, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            drop(now);
            let found = look()?;
            place.publish(&found)?;
            Ok(found)
        };
        let thread = thread::Builder::new().name("working-set".to_owned()).spawn(record)?;
        Ok(Recorder { hurry, thread })
    }

    /// Looks now, and waits until it is written.
    pub fn finish(self) -> io::Result<WorkingSet> {
        *self.hurry.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.hurry.1.notify_all();
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("The thread that records ended")))
    }
}

/// Adds a run that lies beyond all before it, one with the last if the gap is small.
fn join(runs: &mut Vec<Run>, run: Run, gap: u64) {
    match runs.last_mut().filter(|last| run.start >= last.end && run.start - last.end <= gap) {
        Some(last) => last.end = run.end,
        None => runs.push(run),
    }
}

/// Ranges come in the order of addresses, which need not be that of offsets.
fn sorted(runs: Vec<Run>) -> Extents {
    let mut all = crate::snapshot::extents::Gathering::default();
    runs.into_iter().for_each(|run| all.add(run));
    all.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> WorkingSet {
        let runs = |runs: &[(u64, u64)]| {
            let runs = runs.iter().map(|&(s, e)| Run { start: s * PAGE, end: e * PAGE }).collect();
            Extents::checked(runs, 64 * PAGE).unwrap()
        };
        WorkingSet { touched: runs(&[(0, 4), (9, 33), (60, 64)]), written: runs(&[(1, 2), (10, 20)]) }
    }

    #[test]
    fn a_set_comes_back_for_its_snapshot_alone() {
        let (id, size) = (Id([7; 16]), 64 * PAGE);
        let file = set().encode(id, size);
        assert_eq!(WorkingSet::decode(&file, id, size), Some(set()));
        assert_eq!(WorkingSet::decode(&file, Id([8; 16]), size), None);
        assert_eq!(WorkingSet::decode(&file, id, size + PAGE), None);
    }

    #[test]
    fn no_length_and_no_flipped_bit_is_believed() {
        let (id, size) = (Id([7; 16]), 64 * PAGE);
        let file = set().encode(id, size);
        for length in 0..file.len() {
            assert_eq!(WorkingSet::decode(&file[..length], id, size), None, "{length}");
        }
        for bit in 0..file.len() * 8 {
            let mut lie = file.clone();
            lie[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(WorkingSet::decode(&lie, id, size), None, "bit {bit}");
        }
    }

    #[test]
    fn counts_and_runs_that_lie_under_a_right_digest_are_refused() {
        let (id, size) = (Id([7; 16]), 64 * PAGE);
        let sealed = |mut body: Vec<u8>| {
            body.extend(Digest::of(&body).0);
            body
        };
        let file = set().encode(id, size);
        let body = &file[..file.len() - LEN];
        for at in [40, 48] {
            for count in [0, 1, 100, 1 << 32, u64::MAX / 16, u64::MAX] {
                let mut lie = body.to_vec();
                lie[at..at + 8].copy_from_slice(&count.to_le_bytes());
                assert_eq!(WorkingSet::decode(&sealed(lie), id, size), None, "{count} at {at}");
            }
        }
        for run in [[4 * PAGE, 2 * PAGE], [1, PAGE], [0, 65 * PAGE], [0, u64::MAX]] {
            let mut lie = body.to_vec();
            lie[56..64].copy_from_slice(&run[0].to_le_bytes());
            lie[64..72].copy_from_slice(&run[1].to_le_bytes());
            assert_eq!(WorkingSet::decode(&sealed(lie), id, size), None, "{run:?}");
        }
    }
}
