//! Trouble of devices and crashes of guests, told to whoever reads the machine's events, at a rate
//! that no guest can raise.
//!
//! ```text
//!   worker, vCPU ──Trouble──► Faults: news, or not for a minute? ──► tell: controller ──► /events
//! ```
//!
//! A guest that writes to a full disk, or wants to fill the host's log, fails thousands of requests
//! a second. Of each device and kind of trouble the first is told at once, and after that one a
//! [`PAUSE`] with how many there were in between. Counters of the device count them all.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use devices::{
    legacy::pvpanic::PanicEvent,
    trouble::{Trouble, Witness},
};

/// How long after one report the same trouble of the same device is only counted.
const PAUSE: Duration = Duration::from_secs(60);

/// Pairs of device and trouble that are remembered: all kinds for more devices than there is room
/// for. Beyond it the oldest is forgotten.
const REMEMBERED: usize = 256;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incident {
    /// A device met trouble.
    Device {
        /// Its name.
        name: String,
        /// Its kind, such as `virtio-block`.
        kind: &'static str,
        /// The trouble.
        trouble: Trouble,
    },
    /// The guest's kernel crashed.
    Panic(PanicEvent),
}

impl Incident {
    /// The same for incidents of which one stands for all.
    fn key(&self) -> (&str, &'static str) {
        match self {
            Incident::Device { name, trouble, .. } => (name, trouble.name()),
            Incident::Panic(event) => ("", event.name()),
        }
    }
}

/// Told of an incident, and how many like it were not told since the last one. Must not block.
pub type Tell = Box<dyn Fn(Incident, u64) + Send + Sync>;

struct Past {
    name: String,
    what: &'static str,
    told: Instant,
    untold: u64,
}

/// What happened, with a memory.
pub struct Faults {
    tell: Tell,
    past: Mutex<Vec<Past>>,
}

impl Faults {
    /// Nothing has happened yet.
    pub fn new(tell: Tell) -> Arc<Faults> {
        Arc::new(Faults { tell, past: Mutex::default() })
    }

    /// A witness for one device.
    pub fn witness(self: &Arc<Self>, name: &str, kind: &'static str) -> Witness {
        let (faults, name) = (Arc::clone(self), name.to_owned());
        Box::new(move |trouble| {
            faults.happened(Incident::Device { name: name.clone(), kind, trouble }, Instant::now());
        })
    }

    /// The guest's kernel says that it crashed.
    pub fn panicked(&self, event: PanicEvent) {
        self.happened(Incident::Panic(event), Instant::now());
    }

    fn happened(&self, incident: Incident, now: Instant) {
        if let Some(untold) = self.admit(&incident, now) {
            (self.tell)(incident, untold);
        }
    }

    /// How many like this one were not told, if it is time to tell.
    fn admit(&self, incident: &Incident, now: Instant) -> Option<u64> {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, what) = incident.key();
        if let Some(known) = past.iter_mut().find(|known| known.what == what && known.name == name) {
            if now.saturating_duration_since(known.told) < PAUSE {
                known.untold = known.untold.saturating_add(1);
                return None;
            }
            known.told = now;
            return Some(std::mem::take(&mut known.untold));
        }
        if past.len() == REMEMBERED {
            past.remove(0);
        }
        past.push(Past { name: name.to_owned(), what, told: now, untold: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::mpsc};

    use super::*;

    fn full(name: &str) -> Incident {
        let trouble = Trouble::io("write", &io::Error::from_raw_os_error(libc::ENOSPC));
        Incident::Device { name: name.to_owned(), kind: "virtio-block", trouble }
    }

    #[test]
    fn a_flood_is_told_once_a_minute_with_its_number() {
        let (sender, heard) = mpsc::channel();
        let faults = Faults::new(Box::new(move |incident, untold| {
            sender.send((incident.key().0.to_owned(), untold)).unwrap();
        }));
        let begin = Instant::now();
        for second in 0..130 {
            for _ in 0..10 {
                faults.happened(full("a"), begin + Duration::from_secs(second));
            }
        }
        faults.happened(full("b"), begin + Duration::from_secs(130));
        let told: Vec<_> = heard.try_iter().collect();
        let expected = [("a", 0), ("a", 599), ("a", 599), ("b", 0)];
        assert_eq!(told, expected.map(|(name, untold)| (name.to_owned(), untold)));
    }

    #[test]
    fn only_so_much_is_remembered() {
        let faults = Faults::new(Box::new(|_, _| {}));
        for number in 0..1000 {
            faults.happened(full(&number.to_string()), Instant::now());
        }
        assert_eq!(faults.past.lock().unwrap().len(), REMEMBERED);
    }

    #[test]
    fn trouble_says_what_the_host_said() {
        let Incident::Device { trouble, .. } = full("a") else { unreachable!() };
        assert_eq!(trouble.name(), "IoError");
        assert!(trouble.error().unwrap().contains("No space left"));
        assert_eq!(
            Trouble::io("read", &io::ErrorKind::UnexpectedEof.into()).error().unwrap(),
            "unexpected end of file"
        );
    }
}
