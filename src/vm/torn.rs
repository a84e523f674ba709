//! Files that memory is mapped from, and that are cut short while the machine runs.
//!
//! ```text
//!   a vCPU touches a page that is gone ──► EFAULT of KVM_RUN ─► reported ───────┐
//!   a thread of ours does ──► SIGBUS ─► rings the owner's bell, and waits ──────┴► ends, by name
//!                                       └─ no answer in time: says it itself, ends the process
//! ```
//!
//! A mapping promises pages, and a file that somebody truncates takes them along, copies that the
//! machine had made of them included: no machine goes on from there. It ends at the next touch,
//! like one whose pager is lost, and tells which file it was. Nothing is looked at before that.
//!
//! The handler is installed when a file is mapped as RAM, and is about those addresses alone; any
//! other `SIGBUS` ends the process as it would have. What it does is safe in a handler: it looks at a
//! table that never changes, writes to two descriptors, sleeps and exits.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    ptr,
    sync::{
        Arc, Weak,
        atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering},
    },
    time::Duration,
};

use devices::Memory;

use super::{Ending, capture::Beneath, pages};
use crate::snapshot::extents::Run;

/// How long the machine has to end in order, as when its pager is lost.
pub const ORDERLY: Duration = Duration::from_millis(800);

/// Some host addresses, and which file is behind them.
struct Place {
    start: usize,
    end: usize,
    file: usize,
}

/// A file that memory is mapped from.
struct Mapped {
    /// Not held open by this.
    file: Weak<File>,
    path: String,
    /// Bytes that the machine needs of it.
    length: u64,
    /// What the handler writes if nobody else can.
    farewell: Box<[u8]>,
}

struct Table {
    places: Vec<Place>,
    files: Vec<Mapped>,
}

/// Never freed once it is here: a handler may be looking.
static TABLE: AtomicPtr<Table> = AtomicPtr::new(ptr::null_mut());
/// Number of the file that was found to be gone, from 1.
static GONE: AtomicUsize = AtomicUsize::new(0);
/// An event descriptor of who can end the machine.
static BELL: AtomicI32 = AtomicI32::new(-1);

/// Has `bell`, an event descriptor, rung when memory is gone; [`gone`] says then what.
pub fn ring(bell: RawFd) {
    BELL.store(bell, Ordering::Relaxed);
}

/// Watches `ram`, which shows what is `beneath` it. Nothing to do where that is no file.
pub fn watch(ram: &Memory, beneath: &Beneath) -> io::Result<()> {
    let whole = Run { start: 0, end: u64::MAX };
    let table = match beneath {
        Beneath::File(file) => table(ram, &[(whole, Arc::clone(file))]),
        Beneath::Layers(layers) => table(ram, layers),
        Beneath::Nothing | Beneath::Unknown => return Ok(()),
    };
    TABLE.store(Box::into_raw(Box::new(table)), Ordering::Release);
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    // SAFETY: a zeroed `sigaction` is an empty mask; the handler has the type that SA_SIGINFO
    // asks for, does only what a handler may, and stays for the life of the process.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Which host addresses show which of the parts.
fn table(ram: &Memory, parts: &[(Run, Arc<File>)]) -> Table {
    let mut table = Table { places: Vec::new(), files: Vec::new() };
    for piece in pages::pieces(ram) {
        for (run, file) in parts {
            let Some(cut) = piece.cut(*run) else { continue };
            let file = table.number(file, cut.offset + cut.len);
            table.places.push(Place { start: cut.host, end: cut.host + cut.len as usize, file });
        }
    }
    table
}

impl Table {
    /// The number of `file`, of which `length` bytes are needed at least.
    fn number(&mut self, file: &Arc<File>, length: u64) -> usize {
        let same = |known: &Mapped| ptr::eq(known.file.as_ptr(), Arc::as_ptr(file));
        if let Some(number) = self.files.iter().position(same) {
            if let Some(known) = self.files.get_mut(number) {
                known.length = known.length.max(length);
            }
            return number;
        }
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let path = link.map_or_else(|_| "a file".to_owned(), |path| path.display().to_string());
        let lost = format!("{path}, which its memory is mapped from, was cut short or cannot be read");
        let farewell = format!("nacelle vmm: {}\n", Ending::Broken(lost).reason());
        let farewell = farewell.into_bytes().into_boxed_slice();
        self.files.push(Mapped { file: Arc::downgrade(file), path, length, farewell });
        self.files.len() - 1
    }
}

impl Mapped {
    /// What became of it.
    fn words(&self) -> Option<String> {
        let found = self.file.upgrade()?.metadata().ok()?.len();
        (found < self.length).then(|| cut_short(&self.path, found, self.length))
    }
}

/// The words for a file that is shorter than it was.
pub fn cut_short(path: &str, found: u64, length: u64) -> String {
    format!("{path}, which its memory is mapped from, was cut short: it has {found} of {length} bytes")
}

fn known() -> Option<&'static Table> {
    // SAFETY: what is stored was leaked and is never changed afterwards.
    unsafe { TABLE.load(Ordering::Acquire).as_ref() }
}

/// Why the machine has to end, once a thread has met a page that is gone.
pub fn gone() -> Option<String> {
    let number = GONE.load(Ordering::Acquire).checked_sub(1)?;
    let file = known()?.files.get(number)?;
    let unread = || format!("{}, which its memory is mapped from, cannot be read", file.path);
    Some(file.words().unwrap_or_else(unread))
}

/// The file that was cut short, if one was: the reason of a vCPU that cannot go on.
pub fn found() -> Option<String> {
    known()?.files.iter().find_map(Mapped::words)
}

extern "C" fn on_bus_error(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid structure, which for SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let place = known().and_then(|table| {
        let place = table.places.iter().find(|place| (place.start..place.end).contains(&address))?;
        Some((place.file, table.files.get(place.file)?))
    });
    let Some((number, file)) = place else {
        // SAFETY: the same access fails again, and ends the process.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        return;
    };
    let first = GONE.swap(number + 1, Ordering::AcqRel) == 0;
    let bell = BELL.load(Ordering::Relaxed);
    // SAFETY: calls that are safe in a handler, on values of this function. The thread never goes
    // on: there is nothing where it reads.
    unsafe {
        if bell >= 0 && libc::gettid() != libc::getpid() {
            if first {
                let one = 1u64;
                libc::write(bell, (&raw const one).cast(), size_of::<u64>());
            }
            let wait = libc::timespec { tv_sec: 0, tv_nsec: ORDERLY.subsec_nanos().into() };
            libc::nanosleep(&raw const wait, ptr::null_mut());
        }
        libc::write(libc::STDERR_FILENO, file.farewell.as_ptr().cast(), file.farewell.len());
        libc::_exit(1);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::Command, thread};

    use api::spec::MachineConfig;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vm::memory::{self, Backing};

    const HOW: &str = "NACELLE_TEST_TORN";

    /// What a process does whose memory goes: this program again, with this test alone.
    #[test]
    fn the_process() {
        let Some(how) = std::env::var_os(HOW) else { return };
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(16 << 20).unwrap();
        let config = MachineConfig { mem_size_mib: 16, ..MachineConfig::default() };
        let ram = memory::map(&config, Backing::File(&file)).unwrap();
        watch(&ram, &Beneath::File(Arc::clone(&file))).unwrap();
        assert_eq!((found(), gone()), (None, None));
        file.set_len(1 << 20).unwrap();
        let touch = move || drop(ram.read_obj::<u64>(GuestAddress(2 << 20)));
        match how.to_str() {
            Some("ours") => touch(),
            Some("owned") => {
                let bell = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
                ring(bell.as_raw_fd());
                let _thread = thread::spawn(touch);
                bell.read().unwrap();
                let words = gone().unwrap();
                assert!(words.contains("it has 1048576 of 16777216 bytes"), "{words}");
                assert_eq!(found(), Some(words));
                std::process::exit(7);
            }
            _ => {
                let map = memory::map(&config, Backing::File(&file)).unwrap();
                drop(map.read_obj::<u64>(GuestAddress(2 << 20)));
            }
        }
        unreachable!("there is nothing where it reads");
    }

    fn process(how: &str) -> std::process::Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "vm::torn::tests::the_process", "--nocapture"]);
        command.env(HOW, how).output().unwrap()
    }

    #[test]
    fn a_page_that_is_gone_ends_the_process_by_name_or_has_its_owner_end_it() {
        let ended = process("ours");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(said.contains("The machine cannot go on: /") && said.contains("was cut short"), "{said}");
        let ended = process("owned");
        assert_eq!(ended.status.code(), Some(7), "{}", String::from_utf8_lossy(&ended.stderr));
    }

    #[test]
    fn other_bus_errors_end_a_process_as_ever() {
        assert_eq!(process("others").status.signal(), Some(libc::SIGBUS));
    }
}
