//! Processors that come while the machine runs are put to work: Linux sees them come and leaves
//! it to a program to bring them online.

use super::{
    disks::listen,
    syscall::{read, wait, want},
};
use std::{collections::HashSet, ffi::OsString, fs, path::Path};

const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Watches for processors, if the machine has room for more than are there; otherwise costs two
/// looks.
pub fn watch() {
    let text = |file: &str| fs::read_to_string(Path::new(PROCESSORS).join(file)).unwrap_or_default();
    if text("possible") == text("present") {
        return;
    }
    // Listening begins before looking, so that none can come in between.
    let Ok(news) = listen() else { return };
    let _ = super::spawn(move || {
        let mut seen = HashSet::new();
        loop {
            bring_online(Path::new(PROCESSORS), &mut seen);
            let mut message = [0; 4096];
            if wait(&mut [want(&news, libc::POLLIN)], None).is_err() {
                return;
            }
            while read(&news, &mut message).is_ok() {}
        }
    });
}

/// Brings online whatever is not and was not `seen` before: one that somebody has switched off
/// stays so. The first processor has no switch.
fn bring_online(processors: &Path, seen: &mut HashSet<OsString>) {
    for entry in fs::read_dir(processors).into_iter().flatten().flatten() {
        let switch = entry.path().join("online");
        let Ok(state) = fs::read_to_string(&switch) else { continue };
        if seen.insert(entry.file_name())
            && state.trim() == "0"
            && let Err(e) = fs::write(&switch, "1")
        {
            super::boot::say(&format!("{} cannot be brought online: {e}", entry.path().display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_offline_are_brought_online_and_others_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let switch = |name: &str| directory.path().join(name).join("online");
        for (name, state) in [("cpu0", None), ("cpu1", Some("1\n")), ("cpu2", Some("0\n")), ("power", None)] {
            fs::create_dir(directory.path().join(name)).unwrap();
            state.into_iter().for_each(|state| fs::write(switch(name), state).unwrap());
        }
        fs::write(directory.path().join("online"), "0-1\n").unwrap();
        let mut seen = HashSet::new();
        bring_online(directory.path(), &mut seen);
        assert_eq!(fs::read_to_string(switch("cpu2")).unwrap(), "1");
        assert_eq!(fs::read_to_string(switch("cpu1")).unwrap(), "1\n");
        fs::write(switch("cpu1"), "0\n").unwrap();
        bring_online(directory.path(), &mut seen);
        assert_eq!(fs::read_to_string(switch("cpu1")).unwrap(), "0\n", "somebody wanted it so");
        assert!(!switch("cpu0").exists() && !switch("power").exists());
    }
}
