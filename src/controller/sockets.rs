//! The console sockets a machine made, to be removed at its end.

use api::{Spec, spec::ConsoleMode};
use devices::own_path::OwnPath;

/// Each socket with what it was when the machine was built, so that something else that somebody
/// has put in its place meanwhile is left alone. That of vsock stays, as Firecracker's does: its
/// clients insist on removing it themselves.
pub struct Sockets(Vec<OwnPath>);

impl Sockets {
    /// Those of a machine that was just built.
    pub fn of(spec: &Spec) -> Sockets {
        let serial = spec.serial.as_ref().filter(|s| s.far_end() == ConsoleMode::Socket);
        let serial = serial.and_then(|s| s.serial_out_path.as_ref());
        let console = spec.console.as_ref().filter(|c| c.mode == ConsoleMode::Socket);
        let console = console.and_then(|c| c.path.as_ref());
        let paths = [serial, console].into_iter().flatten();
        Sockets(paths.map(OwnPath::made).collect())
    }

    /// Removes those that are still the same.
    pub fn remove(&self) {
        self.0.iter().for_each(OwnPath::remove);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use api::spec::Serial;

    use super::*;

    #[test]
    fn what_took_a_sockets_place_since_the_start_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let serial = Serial {
            serial_out_path: Some(path.clone()),
            mode: Some(ConsoleMode::Socket),
            ..Serial::default()
        };
        let spec = Spec { serial: Some(serial), ..Spec::default() };
        let _own = UnixListener::bind(&path).unwrap();
        let sockets = Sockets::of(&spec);
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        sockets.remove();
        assert!(path.exists());
        Sockets::of(&spec).remove();
        assert!(!path.exists());
    }
}
