//! Programs that others wrote for Firecracker, as they are published, with nacelle in its place.
//!
//! | client | from | is given | drives |
//! |---|---|---|---|
//! | fctools | the crate registry | a program called `firecracker` | every device, CPU template, MMDS V1, metrics, log, changes while running, a configuration file |
//! | firecracker-python, `Api` | PyPI | a socket | configuration to Ctrl+Alt+Del, call by call |
//! | firecracker-python, `MicroVM` | PyPI | a program called `firecracker` | tap, disk, vsock, MMDS V2, pause, its own way to stop |
//!
//! Plain curl has a module of its own. What is asserted is what the guest printed, wherever it
//! can know. The Python packages lie in an environment that `cargo xtask test` makes, with the
//! versions in `clients/requirements.txt`.

mod fctools;
mod python;

use std::{
    io::{Read, Write},
    os::unix::{fs::symlink, net::UnixListener},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::Duration,
};

/// The longest that one step of a machine may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// What guests of this module can do: the memory they have, and calling this program's port
/// 6000 through vsock.
const PRELUDE: &str = r#"
    total() { awk '/MemTotal/{print $2}' /proc/meminfo; }
    call() { TASK="call 6000 1" side --ignored --exact side::in_the_guest --nocapture; }
"#;

/// This project's program under the name that clients look for.
fn firecracker(folder: &Path) -> PathBuf {
    let link = folder.join("firecracker");
    symlink(env!("CARGO_BIN_EXE_nacelle"), &link).unwrap();
    link
}

/// Sends back what comes on one of the guest's connections; how many bytes that were.
fn echo_once(path: &Path) -> JoinHandle<usize> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut piece, mut all) = (vec![0; 16 << 10], 0);
        loop {
            match stream.read(&mut piece).unwrap() {
                0 => return all,
                got => {
                    stream.write_all(&piece[..got]).unwrap();
                    all += got;
                }
            }
        }
    })
}
