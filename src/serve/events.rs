//! `GET /events`: what happened to all machines, in one stream.
//!
//! ```text
//!   {"cursor":"18c…-7","event":"MachineStarted","machine":"web","machine_id":"3f…"}
//!   {"cursor":"18c…-8","event":"Paused","machine":"web","machine_id":"3f…","sequence":2,…}
//! ```
//!
//! The first kind is of the service: `MachineFound` (it was there when the service began),
//! `MachineCreated`, `MachineStarted`, `MachineEnded` with `exit_code` and `reason`,
//! `MachineRemoved`. The second is a line of a machine's own `/events` with its name put in.
//!
//! The last [`KEPT`] lines are kept. A client that comes back with `since=CURSOR` gets what came
//! after it, and if some of that is gone, first a line that says how many (`Missed`). A cursor of
//! a service that has ended is told apart by its first half; its client then gets all that is kept,
//! where machines' own events have the numbers they had before.
//!
//! Readers have a place in the ring and nothing of their own, so a slow one costs nothing and
//! misses what it was too slow for.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_core::Stream;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::{
    Service,
    answer::{Answered, Refusal, stream},
    routes::Asked,
};

/// Lines that are kept.
const KEPT: usize = 4096;
/// Bytes of lines that are kept.
const KEPT_BYTES: usize = 4 << 20;
/// Bytes that a reader is handed at once, unless a single line has more.
const PIECE: usize = 64 << 10;

/// All that happened lately.
pub struct Hub {
    /// Tells one run of the service from another.
    run: u64,
    ring: Mutex<Ring>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Ring {
    /// Number of the last line; the first one has number 1.
    last: u64,
    bytes: usize,
    lines: VecDeque<Bytes>,
}

impl Hub {
    /// Nothing happened yet.
    pub fn new() -> Hub {
        Hub { run: now_us(), ring: Mutex::default(), changed: watch::Sender::new(0) }
    }

    /// Tells whoever waits that machines may have changed.
    pub fn nudge(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// To be told of changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Adds an event of a machine. `details` are put into its line.
    pub fn add(&self, machine: &str, id: &str, mut details: Map<String, Value>) {
        details.insert("machine".to_owned(), machine.into());
        details.insert("machine_id".to_owned(), id.into());
        details.entry("utc_timestamp_us").or_insert_with(|| now_us().into());
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.last += 1;
        details.insert("cursor".to_owned(), self.cursor(ring.last).into());
        let line = Bytes::from(format!("{}\n", Value::Object(details)));
        ring.bytes = ring.bytes.saturating_add(line.len());
        ring.lines.push_back(line);
        while ring.lines.len() > KEPT || ring.bytes > KEPT_BYTES {
            let gone = ring.lines.pop_front().map_or(0, |line| line.len());
            ring.bytes = ring.bytes.saturating_sub(gone);
        }
        drop(ring);
        self.nudge();
    }

    fn cursor(&self, number: u64) -> String {
        format!("{:x}-{number}", self.run)
    }

    /// The number after which a client with this cursor goes on.
    fn place(&self, cursor: &str) -> Option<u64> {
        let (run, number) = cursor.split_once('-')?;
        let number = number.parse::<u64>().ok()?;
        let run = u64::from_str_radix(run, 16).ok()?;
        Some(if run == self.run { number } else { 0 })
    }

    /// Some lines after the one numbered `seen`, and the number of the last of them.
    fn after(&self, seen: u64) -> Option<(Bytes, u64)> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let first = ring.last.saturating_sub(ring.lines.len() as u64).saturating_add(1);
        if seen >= ring.last {
            return None;
        }
        let mut piece = Vec::new();
        let mut number = seen;
        if seen + 1 < first {
            let missed = json!({ "event": "Missed", "count": first - seen - 1 });
            piece.extend_from_slice(format!("{missed}\n").as_bytes());
            number = first - 1;
        }
        let skip = usize::try_from((number + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        for line in ring.lines.iter().skip(skip) {
            if !piece.is_empty() && piece.len() + line.len() > PIECE {
                break;
            }
            piece.extend_from_slice(line);
            number += 1;
        }
        Some((piece.into(), number))
    }
}

/// Passes on what is kept and what comes.
pub fn follow(service: &Arc<Service>, asked: &mut Asked) -> Answered {
    asked.only(&["since"])?;
    let seen = match asked.parameter("since") {
        None => 0,
        Some(cursor) => service.hub.place(cursor).ok_or_else(|| {
            Refusal::wrong(format!(
                "since is {cursor:?}; it must be the cursor of the last event that was read"
            ))
        })?,
    };
    asked.streams()?;
    let reader = Reader { service: Arc::clone(service), seen, wait: None };
    Ok(stream(reader, "application/x-ndjson"))
}

/// One client's place.
struct Reader {
    service: Arc<Service>,
    seen: u64,
    wait: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Stream for Reader {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(wait) = &mut self.wait {
                if wait.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.wait = None;
            }
            // Asked for before looking, so that nothing that comes in between is slept through.
            let mut changes = self.service.hub.changes();
            if let Some((piece, seen)) = self.service.hub.after(self.seen) {
                self.seen = seen;
                return Poll::Ready(Some(Ok(piece)));
            }
            self.wait = Some(Box::pin(async move {
                let _ = changes.changed().await;
            }));
        }
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str) -> Map<String, Value> {
        Map::from_iter([("event".to_owned(), kind.into())])
    }

    fn all(hub: &Hub, mut seen: u64) -> Vec<Value> {
        let mut lines = Vec::new();
        while let Some((piece, next)) = hub.after(seen) {
            lines.extend(piece.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(<[u8]>::to_vec));
            seen = next;
        }
        lines.iter().map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    #[test]
    fn a_reader_goes_on_after_its_cursor() {
        let hub = Hub::new();
        for kind in ["MachineCreated", "MachineStarted", "MachineEnded"] {
            hub.add("web", "ab", event(kind));
        }
        let first = &all(&hub, 0)[0];
        assert_eq!((&first["event"], &first["machine"]), (&json!("MachineCreated"), &json!("web")));
        let place = hub.place(first["cursor"].as_str().unwrap()).unwrap();
        assert_eq!(all(&hub, place).len(), 2);
        assert_eq!(hub.place("1-77"), Some(0), "another run's cursor is no place here");
        assert_eq!(hub.place("nonsense"), None);
        assert!(hub.after(3).is_none() && hub.after(u64::MAX).is_none());
    }

    #[test]
    fn what_is_gone_is_counted_and_the_ring_does_not_grow() {
        let hub = Hub::new();
        for _ in 0..KEPT + 10 {
            hub.add("web", "ab", event("Paused"));
        }
        let lines = all(&hub, 0);
        assert_eq!((&lines[0]["event"], &lines[0]["count"]), (&json!("Missed"), &json!(10)));
        assert_eq!(lines.len(), KEPT + 1);
        let mut large = event("Paused");
        large.insert("text".to_owned(), "x".repeat(KEPT_BYTES / 2).into());
        for _ in 0..5 {
            hub.add("web", "ab", large.clone());
        }
        let ring = hub.ring.lock().unwrap();
        assert!(ring.bytes <= KEPT_BYTES && ring.lines.len() == 1, "{} lines", ring.lines.len());
    }
}
