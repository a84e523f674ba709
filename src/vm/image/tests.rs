use std::{
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
};

use super::*;

const PAGE: usize = 4096;

/// A private mapping, of a file or of nothing.
struct Mapping {
    at: usize,
    len: usize,
}

impl Mapping {
    fn new(len: usize, file: Option<&std::fs::File>) -> Mapping {
        let flags = libc::MAP_PRIVATE | file.map_or(libc::MAP_ANONYMOUS, |_| 0);
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Mapping { at: at as usize, len }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped, aligned, and only used through atomics.
        unsafe { slice::from_raw_parts(self.at as *const AtomicU64, self.len / 8) }
    }

    /// All that an image has of it.
    fn of(&self, image: &mut Image) -> Vec<u8> {
        let mut all = Vec::new();
        for at in (0..self.len).step_by(PIECE) {
            // SAFETY: it was mapped before the image was taken.
            all.extend_from_slice(unsafe { image.read(self.at + at, PIECE.min(self.len - at)) }.unwrap());
        }
        all
    }

    fn now(&self) -> Vec<u8> {
        self.words().iter().flat_map(|word| word.load(SeqCst).to_ne_bytes()).collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped here; images have it for themselves.
        unsafe { libc::munmap(self.at as *mut libc::c_void, self.len) };
    }
}

/// Runs `f` while two threads write all over the memory, and returns how often they wrote.
fn hammered(mapping: &Mapping, f: impl FnOnce(&AtomicU64)) {
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 1..3u64 {
            let (stop, count) = (&stop, &count);
            scope.spawn(move || {
                let (words, mut state) = (mapping.words(), seed);
                while !stop.load(Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    words[(state >> 20) as usize % words.len()].fetch_add(state | 1, SeqCst);
                    count.fetch_add(1, SeqCst);
                }
            });
        }
        let _stop = StopAtTheEnd(&stop);
        f(&count);
    });
}

struct StopAtTheEnd<'a>(&'a AtomicBool);

impl Drop for StopAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn wait_beyond(count: &AtomicU64, more: u64) {
    let until = count.load(SeqCst) + more;
    while count.load(SeqCst) < until {
        thread::yield_now();
    }
}

fn is_as_it_was(mapping: &Mapping) {
    for (number, word) in (1..).zip(mapping.words()).step_by(97) {
        word.fetch_add(number, SeqCst);
    }
    let before = mapping.now();
    let mut image = Image::take(false).unwrap();
    hammered(mapping, |count| {
        // Thousands of first writes, before anything was read and while it is.
        wait_beyond(count, 20_000);
        assert!(mapping.of(&mut image) == before, "the image is another moment's");
        wait_beyond(count, 1000);
    });
    assert!(mapping.now() != before);
}

#[test]
fn anonymous_memory_is_as_it_was_whoever_writes_it() {
    is_as_it_was(&Mapping::new(8 << 20, None));
}

#[test]
fn a_private_mapping_of_a_file_is_as_it_was() {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..8u32 << 18).flat_map(u32::to_ne_bytes).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    is_as_it_was(&Mapping::new(8 << 20, Some(&file)));
}

#[test]
fn writes_of_the_kernel_are_not_in_it() {
    let (mapping, zeroes) = (Mapping::new(PIECE, None), Mapping::new(PIECE, None));
    mapping.words()[0].store(7, SeqCst);
    let mut image = Image::take(false).unwrap();
    let source = std::fs::File::open("/dev/urandom").unwrap();
    // SAFETY: mapped and this long, and nobody holds a plain reference to it.
    let got = unsafe { libc::read(source.as_raw_fd(), mapping.at as *mut libc::c_void, PIECE) };
    assert_eq!(got, PIECE as isize);
    let held = mapping.of(&mut image);
    assert_eq!(held[..8], 7u64.to_ne_bytes());
    assert!(held[8..].iter().all(|byte| *byte == 0));
    assert_eq!(mapping.of(&mut image), zeroes.now(), "it lets go of what was read");
}

#[test]
fn pages_that_are_kept_later_are_as_they_were_then() {
    let mapping = Mapping::new(2 * PIECE, None);
    mapping.words().iter().for_each(|word| word.store(5, SeqCst));
    let mut image = Image::take(false).unwrap();
    let page = |page: usize| &mapping.words()[page * PAGE / 8];
    let later = [3, 255, 256, 300];
    for round in 6..8 {
        later.iter().for_each(|at| page(*at).store(round, SeqCst));
        // SAFETY: pages of the mapping.
        later.iter().for_each(|at| unsafe { image.keep(mapping.at + at * PAGE, PAGE) });
    }
    let expected = mapping.now();
    mapping.words().iter().for_each(|word| word.store(9, SeqCst));
    assert!(mapping.of(&mut image) == expected);
}

#[test]
fn memory_that_is_given_back_meanwhile_is_still_in_it() {
    let mapping = Mapping::new(4 * PAGE, None);
    mapping.words().iter().for_each(|word| word.store(5, SeqCst));
    let mut image = Image::take(true).unwrap();
    // SAFETY: mapped here, used by nobody.
    unsafe { libc::madvise(mapping.at as *mut libc::c_void, mapping.len, libc::MADV_DONTNEED) };
    assert!(mapping.now().iter().all(|byte| *byte == 0));
    let expected = 5u64.to_ne_bytes().repeat(2 * PAGE / 4);
    assert_eq!(mapping.of(&mut image), expected);
    assert_eq!(mapping.of(&mut image), expected, "pages of a pool are kept");
}

#[test]
fn it_holds_no_descriptor_of_this_process() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mapping = Mapping::new(PAGE, None);
    let mut image = Image::take(false).unwrap();
    // It has answered, so it is past its beginning.
    // SAFETY: mapped before the image was taken.
    unsafe { image.read(mapping.at, PAGE) }.unwrap();
    drop(theirs);
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let end = io::Read::read(&mut &ours, &mut [0]).unwrap();
    assert_eq!(end, 0, "the other end is still open somewhere");
    // SAFETY: as above.
    unsafe { image.read(mapping.at, PAGE) }.unwrap();
}

#[test]
fn one_that_was_killed_is_an_error_and_leaves_nobody() {
    let mapping = Mapping::new(PAGE, None);
    let mut image = Image::take(false).unwrap();
    let child = image.child;
    // SAFETY: the number is that of a child that nobody waited for.
    unsafe { libc::kill(child, libc::SIGKILL) };
    for _ in 0..2 {
        // SAFETY: mapped before the image was taken.
        let error = unsafe { image.read(mapping.at, PAGE) }.unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe), "{error}");
    }
    drop(image);
    // SAFETY: signal 0 asks whether the process is there.
    assert_eq!(unsafe { libc::kill(child, 0) }, -1);
}

#[test]
fn one_that_is_dropped_half_way_is_gone_and_the_writers_go_on() {
    let mapping = Mapping::new(8 << 20, None);
    mapping.words().iter().step_by(8).for_each(|word| word.store(1, SeqCst));
    hammered(&mapping, |count| {
        for _ in 0..20 {
            let mut image = Image::take(false).unwrap();
            let child = image.child;
            // SAFETY: mapped before the image was taken.
            unsafe { image.read(mapping.at, PIECE) }.unwrap();
            drop(image);
            // SAFETY: signal 0 asks whether the process is there.
            assert_eq!(unsafe { libc::kill(child, 0) }, -1);
            wait_beyond(count, 100);
        }
    });
}

#[test]
fn it_ends_with_the_thread_that_took_it() {
    let taken = thread::spawn(|| Image::take(false).unwrap());
    let mut image = taken.join().unwrap();
    let mapping = Arc::new(Mapping::new(PAGE, None));
    // SAFETY: whatever is there, nobody is left who reads it.
    assert!(unsafe { image.read(mapping.at, PAGE) }.is_err());
}
