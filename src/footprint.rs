//! What the monitor keeps in memory once its machine runs.
//!
//! ```text
//!   program text ── clean pages of its file, read again when they are touched
//!   heap ────────── what was freed, between what is still in use and at its end
//!   stack ───────── what lies below the frames that are in use
//! ```
//!
//! Most of what a monitor has resident is the program itself: reading a specification, building
//! a machine and loading a kernel touch some three MiB of code that a running machine never
//! comes back to. These pages are clean copies of the page cache, so giving them back is one
//! system call a segment, and what is needed again is mapped again on touch, sixteen pages at a
//! time. That happens once the machine has settled: done at its start it was measured to make a
//! short life 2 % dearer.

/// Gives back what only the start of a machine needed. For the main thread, whose stack it is.
pub fn give_back() {
    give_back_program_text();
    // SAFETY: gives freed memory back to the kernel; nobody has pointers there.
    unsafe { libc::malloc_trim(0) };
    give_back_stack();
}

/// How far below the frame in use the stack is given back: further than a start is deep, and less
/// than the 128 MiB that the kernel leaves free below the first thread's stack at the least.
const DEPTH: usize = 1 << 20;

/// What a signal's handler, or a call from here, may be using.
const BELOW: usize = 4096;

/// Gives back the pages of the first thread's stack that no frame is on.
fn give_back_stack() {
    // SAFETY: both return numbers.
    if unsafe { libc::gettid() != libc::getpid() } {
        return;
    }
    let here = 0u8;
    let end = (&raw const here as usize).saturating_sub(BELOW) / PAGE as usize * PAGE as usize;
    // SAFETY: nothing but this stack lies so close below a frame of it, and nothing is in use below
    // the frames: what is written there next finds zeros. Where the stack ends sooner, the call gives
    // back what there is and says that there was not all.
    unsafe { libc::madvise(end.saturating_sub(DEPTH) as *mut libc::c_void, DEPTH, libc::MADV_DONTNEED) };
}

/// Takes the program's read-only pages out of this process's memory. They stay in the page
/// cache, from where they return when they are touched. Data that relocation has changed is in
/// writable segments and stays.
fn give_back_program_text() {
    // SAFETY: the auxiliary vector's address and count of the program headers are the kernel's;
    // they lie in this program's own image, which stays mapped until the end.
    let headers = unsafe {
        let first = libc::getauxval(libc::AT_PHDR) as *const libc::Elf64_Phdr;
        if first.is_null() {
            return;
        }
        std::slice::from_raw_parts(first, libc::getauxval(libc::AT_PHNUM) as usize)
    };
    let address = headers.as_ptr() as u64;
    let Some(own) = headers.iter().find(|header| header.p_type == libc::PT_PHDR) else { return };
    let base = address.wrapping_sub(own.p_vaddr);
    for segment in headers.iter().filter(|header| is_unchanging(header)) {
        let start = base.wrapping_add(segment.p_vaddr).next_multiple_of(PAGE);
        let end = base.wrapping_add(segment.p_vaddr).wrapping_add(segment.p_memsz) / PAGE * PAGE;
        if start < end {
            // SAFETY: whole pages of a segment of this program that is mapped from its file and
            // not writable, so that what is dropped is read from the file again. A refusal
            // leaves everything as it was.
            unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        }
    }
}

const PAGE: u64 = 4096;

fn is_unchanging(header: &libc::Elf64_Phdr) -> bool {
    header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// KiB of this process's file-backed memory that is resident.
    fn resident_file_kib() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_in_use_stays_when_the_rest_is_given_back() {
        let (kept, freed) = (vec![7u8; 100_000], vec![8u8; 100_000]);
        let deep = [9u8; 20_000];
        drop(freed);
        give_back();
        assert!(kept.iter().all(|byte| *byte == 7) && deep.iter().all(|byte| *byte == 9));
    }

    #[test]
    fn program_text_leaves_memory_and_the_program_goes_on() {
        let path = std::env::current_exe().unwrap();
        let before = resident_file_kib();
        give_back_program_text();
        let after = resident_file_kib();
        assert!(after < before, "{before} KiB became {after}");
        assert_eq!(std::env::current_exe().unwrap(), path);
    }
}
