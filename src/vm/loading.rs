//! Kernel and initrd on their way into guest memory.
//!
//! ```text
//!   controller: build ──► headers read and checked, places decided ──► vCPUs run ──► answers
//!   first vCPU thread:                                                    └► load ──► KVM_RUN
//! ```
//!
//! Reading the files is nearly all that a start costs: guest memory is cleared as it is touched,
//! and then written. Nobody but the guest waits for it, so it is not done by the thread that serves
//! the API but by the one that enters the guest next. `InstanceStart` is then answered a good deal
//! earlier, a file that comes slowly keeps no other request waiting, and the guest runs as soon as
//! it did before: there is no other thread, and no work is done that was not done anyway.
//!
//! What can be wrong with the files is found before: they are open, their headers were read, each
//! piece lies within its file and within memory. What remains is a disk that fails, or a file that
//! is cut while it is read. Then the machine ends and says so.

use std::sync::{Mutex, PoisonError};

use arch::{
    boot::{Piece, Plan},
    kernel::{BootError, BootFile, What},
};
use devices::Memory;

/// What is read from files before a machine runs.
pub struct Files {
    /// The kernel.
    pub kernel: BootFile,
    /// The initial RAM disk.
    pub initrd: Option<BootFile>,
}

/// Where a part of a file belongs.
pub struct Part {
    of: What,
    offset: u64,
    at: u64,
    len: usize,
}

struct Work {
    files: Files,
    parts: Vec<Part>,
    memory: Memory,
}

/// The parts of the files that `plan` was made of.
pub fn parts(plan: &Plan<'_>) -> Vec<Part> {
    let of = |piece: &Piece<'_>| Part {
        of: piece.file.what(),
        offset: piece.offset,
        at: piece.at,
        len: piece.len,
    };
    plan.pieces().iter().map(of).collect()
}

enum State {
    Ahead(Box<Work>),
    Done,
    Failed,
}

/// What is still to be loaded.
pub struct Loading(Mutex<State>);

/// Why the guest cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum LoadingError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] BootError),
    /// Another vCPU has met an error and reported it.
    #[error("The kernel was not loaded")]
    Before,
}

impl Loading {
    /// `parts` of `files` are to be brought to `memory`.
    pub fn ahead(files: Files, parts: Vec<Part>, memory: Memory) -> Loading {
        Loading(Mutex::new(State::Ahead(Box::new(Work { files, parts, memory }))))
    }

    /// Nothing is to be loaded.
    pub fn done() -> Loading {
        Loading(Mutex::new(State::Done))
    }

    /// Loads what was not loaded yet; whoever calls meanwhile waits until it is.
    ///
    /// Fails when a file cannot be read, and from then on.
    pub fn finish(&self) -> Result<(), LoadingError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Failed) {
            State::Failed => Err(LoadingError::Before),
            State::Done => {
                *state = State::Done;
                Ok(())
            }
            State::Ahead(work) => {
                work.load()?;
                *state = State::Done;
                Ok(())
            }
        }
    }
}

impl Work {
    fn load(&self) -> Result<(), BootError> {
        for part in &self.parts {
            let file = match (part.of, &self.files.initrd) {
                (What::Initrd, Some(initrd)) => initrd,
                _ => &self.files.kernel,
            };
            file.load(&self.memory, part.at, part.offset, part.len)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn loading(parts: Vec<Part>) -> (Loading, Memory, tempfile::NamedTempFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0123456789").unwrap();
        let open = || File::open(file.path()).unwrap();
        let kernel = BootFile::from_file(What::Kernel, "kernel".to_owned(), open()).unwrap();
        let initrd = BootFile::from_file(What::Initrd, "initrd".to_owned(), open()).unwrap();
        let config = api::spec::MachineConfig { mem_size_mib: 16, ..Default::default() };
        let memory = crate::vm::memory::map(&config, crate::vm::memory::Backing::Empty).unwrap();
        let files = Files { kernel, initrd: Some(initrd) };
        (Loading::ahead(files, parts, memory.clone()), memory, file)
    }

    #[test]
    fn each_part_comes_to_its_place_once() {
        let parts = vec![
            Part { of: What::Kernel, offset: 2, at: 0x100, len: 3 },
            Part { of: What::Initrd, offset: 0, at: 0x200, len: 10 },
        ];
        let (loading, memory, _file) = loading(parts);
        loading.finish().unwrap();
        let read = |at: u64| memory.read_obj::<[u8; 3]>(GuestAddress(at)).unwrap();
        assert_eq!((&read(0x100), &read(0x207)), (b"234", b"789"));
        memory.write_obj(0u8, GuestAddress(0x100)).unwrap();
        loading.finish().unwrap();
        assert_eq!(read(0x100)[0], 0, "what the guest wrote was written over");
    }

    #[test]
    fn a_file_that_was_cut_lets_nobody_run() {
        let (loading, _, file) = loading(vec![Part { of: What::Kernel, offset: 0, at: 0, len: 10 }]);
        file.as_file().set_len(5).unwrap();
        let first = loading.finish().unwrap_err();
        assert!(first.to_string().contains("Cannot read the kernel"), "{first}");
        assert!(matches!(loading.finish(), Err(LoadingError::Before)));
    }
}
