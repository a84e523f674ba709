//! Hosts that differ: without io_uring, with dirty pages tracked.

use std::{ops::Deref, thread};

use vm_memory::{GuestMemoryBackend, bitmap::Bitmap};

use super::*;
use crate::virtio::driver::tracked_memory;

/// Runs `f` on a thread where making an io_uring fails with `error`, as under a seccomp
/// filter or a sysctl; threads it starts inherit that.
fn without_rings(error: i32, f: impl FnOnce() + Send + 'static) {
    let refuse = move || {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut filter = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | error as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: both calls concern this thread alone; the program outlives the second one.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_MODE_FILTER;
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
        }
        f();
    };
    thread::spawn(refuse).join().unwrap();
}

#[test]
fn without_io_uring_a_thread_that_waits_serves() {
    // Not allowed; not known; and allowed by the looks of it, but then there is none.
    for error in [libc::EPERM, libc::ENOSYS, libc::EINVAL] {
        without_rings(error, move || {
            assert_eq!(crate::disk::available(), error == libc::EINVAL);
            let image = image(64);
            let mut guest = Guest::new(slow(settings(image.path(), Engine::Async)));
            assert_eq!(guest.write(3, &[3; 512]), (OK, 1));
            assert_eq!(guest.read(3, 512), (OK, 513, vec![3; 512]));
            assert_eq!(guest.request(FLUSH, 0, None), (OK, 1));
            assert_eq!(guest.ranges(ZEROES, &[(3, 1, 0)]), (OK, 1));
            guest.driver.stop(&mut guest.block).unwrap();
            assert_eq!(fs::read(image.path()).unwrap()[3 * 512..4 * 512], [0; 512]);
        });
    }
}

/// Which of `pages` are marked; takes all marks away.
fn take_marks<const N: usize>(driver: &Driver, pages: [u64; N]) -> [bool; N] {
    let region = driver.memory.iter().next().unwrap();
    let bitmap = region.deref().bitmap();
    let marks = pages.map(|page| bitmap.dirty_at(page as usize));
    bitmap.take();
    marks
}

#[test]
fn pages_the_host_wrote_are_marked_and_others_are_not() {
    for (name, make) in engines() {
        let image = image(64);
        let mut block = make(settings(image.path(), Engine::Sync));
        let mut driver = Driver::new(tracked_memory(&[(0, 1 << 20)]), &block.about().queues);
        let pages = [(); 5].map(|()| driver.alloc(4096, 4096));
        let [header, from, into, beyond, status] = pages;
        let (head, tail) = (Buffer::readable(header, 16), Buffer::writable(status, 1));
        let features = block.about().features;
        driver.start(&mut block, features).unwrap();
        driver.poke(header, &OUT.to_le_bytes());
        take_marks(&driver, pages);
        driver.request(0, &[head, Buffer::readable(from, 4096), tail]).unwrap();
        assert_eq!(take_marks(&driver, pages), [false, false, false, false, true], "{name}");
        driver.poke(header, &IN.to_le_bytes());
        take_marks(&driver, pages);
        driver.request(0, &[head, Buffer::writable(into, 4096), tail]).unwrap();
        assert_eq!(take_marks(&driver, pages), [false, false, true, false, true], "{name}");
        driver.request(0, &[head, Buffer::writable(into + 2048, 4096), tail]).unwrap();
        assert_eq!(take_marks(&driver, pages), [false, false, true, true, true], "{name}: {beyond:#x}");
        driver.stop(&mut block).unwrap();
    }
}
