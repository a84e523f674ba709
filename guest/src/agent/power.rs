//! The end: of every process, of the mounts, of the machine. And those who ask for it besides
//! the host's agent connection: the power button, and Ctrl-Alt-Del.

use super::{container::Container, syscall::read};
use guest::protocol::MAIN;
use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

/// Longest wait for killed processes to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How long the container may take to end by itself when someone presses the button.
const GRACE: Duration = Duration::from_secs(10);

/// How the machine ends.
pub struct Power {
    /// There is a machine to turn off; otherwise only this process ends.
    machine: bool,
    done: Mutex<bool>,
}

impl Power {
    pub fn new(machine: bool) -> Self {
        Self { machine, done: Mutex::new(false) }
    }

    /// Ends every process and writes the disks. A second caller waits for the first.
    pub fn shut_down(&self, container: &Container) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if *done {
            return;
        }
        // No process starts after this; then all that run are killed, orphans too: as
        // process 1 we are the only one that -1 leaves out.
        container.processes.close(Duration::ZERO);
        // SAFETY: kill has no memory arguments.
        unsafe { libc::kill(-1, libc::SIGKILL) };
        container.processes.close(KILL_LIMIT);
        // SAFETY: sync has no arguments. Once before unmounting, which may fail; the unmount
        // then has little left to write.
        unsafe { libc::sync() };
        container.release();
        // SAFETY: as above.
        unsafe { libc::sync() };
        *done = true;
    }

    /// Turns the machine off or restarts it.
    pub fn off(&self, reboot: bool) {
        if self.machine {
            let how = if reboot { libc::RB_AUTOBOOT } else { libc::RB_POWER_OFF };
            // SAFETY: reboot has no memory arguments.
            unsafe { libc::reboot(how) };
        }
        std::process::exit(0);
    }

    /// Ends as the button asks: the container is asked first.
    pub fn by_button(&self, container: &Container, reboot: bool) {
        if let Ok(process) = container.processes.get(MAIN)
            && container.processes.signal(MAIN, container.stop_signal()).is_ok()
        {
            let _ =
                super::syscall::wait(&mut [super::syscall::want(&process.ended, libc::POLLIN)], Some(GRACE));
        }
        self.shut_down(container);
        self.off(reboot);
    }
}

/// Listens for the power button, where the kernel shows it as an input device.
pub fn watch_button(power: Arc<Power>, container: Arc<Container>) {
    let Some(button) = find_button() else { return };
    let listen = move || {
        // struct input_event of Linux `input.h`: two longs of time, type, code, value.
        let mut event = [0; 24];
        while read(&button, &mut event).is_ok_and(|n| n == event.len()) {
            let kind = u16::from_ne_bytes([event[16], event[17]]);
            let code = u16::from_ne_bytes([event[18], event[19]]);
            if (kind, code, event[20]) == (1, 116, 1) {
                power.by_button(&container, false);
            }
        }
    };
    let _ = thread::Builder::new().stack_size(64 << 10).spawn(listen);
}

fn find_button() -> Option<OwnedFd> {
    for entry in fs::read_dir("/sys/class/input").ok()?.flatten() {
        let name = entry.file_name();
        let is_button =
            fs::read_to_string(entry.path().join("device/name")).is_ok_and(|n| n.trim() == "Power Button");
        if is_button && name.to_string_lossy().starts_with("event") {
            return File::open(std::path::Path::new("/dev/input").join(name)).ok().map(OwnedFd::from);
        }
    }
    None
}
