//! What happened to the machine, in order, for those who read along (`GET /events`).
//!
//! Each event is one line of JSON with a sequence number. The last [`KEPT`] are kept, so that
//! a reader whose connection broke asks again with the number it has seen and misses nothing;
//! one that was away for longer is told how many it missed. Readers never hold the machine up:
//! one that does not read is cut by the server.

use std::{
    collections::VecDeque,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use devices::trouble::Trouble;

use crate::{
    server::{Server, Ticket},
    vm::faults::Incident,
};

/// Events kept for readers that come later.
const KEPT: usize = 256;

/// The events of one machine.
#[derive(Default)]
pub struct Events {
    /// Number of the next event; the first one has number 1.
    last: u64,
    lines: VecDeque<(u64, Vec<u8>)>,
    readers: Vec<Ticket>,
}

impl Events {
    /// Adds an event and passes it to all readers. `details`, an object, is put into its line.
    pub fn add(&mut self, kind: &str, details: Value, server: Option<&mut Server>) {
        self.last += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        let mut event = json!({ "sequence": self.last, "event": kind, "utc_timestamp_us": time });
        if let (Some(event), Value::Object(details)) = (event.as_object_mut(), details) {
            event.extend(details);
        }
        let mut line = event.to_string().into_bytes();
        line.push(b'\n');
        if let Some(server) = server {
            self.readers.retain(|reader| server.push(*reader, &line));
        }
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back((self.last, line));
    }

    /// What a new reader gets first: everything after the event numbered `seen` that is still
    /// kept, and before it, if some are not, how many are missing.
    pub fn backlog(&self, seen: u64) -> Vec<u8> {
        let mut text = Vec::new();
        let first = self.lines.front().map_or(self.last + 1, |(number, _)| *number);
        if seen + 1 < first {
            let missed = first - seen - 1;
            text.extend_from_slice(json!({ "event": "Missed", "count": missed }).to_string().as_bytes());
            text.push(b'\n');
        }
        for (_, line) in self.lines.iter().filter(|(number, _)| *number > seen) {
            text.extend_from_slice(line);
        }
        text
    }

    /// Adds a reader that has been given the backlog.
    pub fn subscribe(&mut self, reader: Ticket) {
        self.readers.push(reader);
    }

    /// Ends all readers' streams.
    pub fn finish(&mut self, server: &mut Server) {
        for reader in self.readers.drain(..) {
            server.finish(reader);
        }
    }
}

/// The event of an incident: its name, and what is known.
pub fn incident(incident: &Incident, untold: u64) -> (&'static str, Value) {
    let (event, mut details) = match incident {
        Incident::Panic(panic) => ("GuestPanicked", json!({ "action": panic.name() })),
        Incident::Device { name, kind, trouble } => {
            let mut details = json!({ "device": name, "kind": kind, "fault": trouble.name() });
            if let Trouble::Io { operation, .. } = trouble {
                details["operation"] = json!(operation);
                details["error"] = json!(trouble.error());
            }
            ("DeviceFault", details)
        }
    };
    if untold > 0 {
        details["untold"] = json!(untold);
    }
    (event, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_comes_back_misses_nothing_that_is_kept() {
        let mut events = Events::default();
        for _ in 0..3 {
            events.add("Paused", json!({ "n": 1 }), None);
        }
        let text = String::from_utf8(events.backlog(1)).unwrap();
        let numbers: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["sequence"].as_u64().unwrap())
            .collect();
        assert_eq!(numbers, [2, 3]);
        assert!(events.backlog(3).is_empty());
    }

    #[test]
    fn what_is_no_longer_kept_is_counted() {
        let mut events = Events::default();
        for _ in 0..KEPT + 10 {
            events.add("Paused", Value::Null, None);
        }
        let text = String::from_utf8(events.backlog(0)).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!((&first["event"], &first["count"]), (&json!("Missed"), &json!(10)));
        assert_eq!(text.lines().count(), KEPT + 1);
    }
}
