//! Places for connections: how many there are, and who gives theirs up.
//!
//! A newcomer is never turned away because others are slow. When all seats are taken, the one that
//! has waited longest between requests, or has not brought a whole one, is put out; failing that,
//! one whose plain answer is not read in [`UNREAD`]. Streams and waits keep their seats, but there
//! are at most [`STREAMS`] of them, fewer than seats, so there is always somebody to put out.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

/// Connections of one listener.
pub const SEATS: usize = 256;
/// Endless answers of one listener.
pub const STREAMS: usize = 192;
/// How long an answer may stay unread before its seat can be given away.
const UNREAD: Duration = Duration::from_secs(60);

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// It is to bring a request.
    Waiting,
    /// It is owed an answer, or reads it.
    Answered,
    /// Its answer has no end of its own.
    Streaming,
}

/// The seats of one listener.
#[derive(Debug)]
pub struct Seats {
    taken: Mutex<Vec<Arc<Seat>>>,
    streams: Arc<AtomicUsize>,
    most: usize,
}

/// One connection's seat.
#[derive(Debug)]
pub struct Seat {
    now: Mutex<(Doing, Instant)>,
    put_out: Notify,
    streams: Arc<AtomicUsize>,
}

impl Seats {
    /// This many, all free.
    pub fn new(most: usize) -> Arc<Seats> {
        Arc::new(Seats { taken: Mutex::default(), streams: Arc::default(), most })
    }

    /// A seat for a newcomer; none if all are taken by those who keep theirs.
    pub fn take(self: &Arc<Self>) -> Option<Taken> {
        let now = Instant::now();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.len() >= self.most {
            let evictable = |seat: &&Arc<Seat>| match seat.doing() {
                (Doing::Waiting, _) => true,
                (Doing::Answered, since) => now.saturating_duration_since(since) > UNREAD,
                (Doing::Streaming, _) => false,
            };
            let rank = |seat: &&Arc<Seat>| {
                let (doing, since) = seat.doing();
                (doing != Doing::Waiting, since)
            };
            let victim = taken.iter().filter(evictable).min_by_key(rank).cloned()?;
            victim.put_out.notify_one();
            taken.retain(|seat| !Arc::ptr_eq(seat, &victim));
        }
        let seat = Arc::new(Seat {
            now: Mutex::new((Doing::Waiting, now)),
            put_out: Notify::new(),
            streams: Arc::clone(&self.streams),
        });
        taken.push(Arc::clone(&seat));
        Some(Taken { seats: Arc::clone(self), seat })
    }
}

/// A seat until it is dropped.
#[derive(Debug)]
pub struct Taken {
    seats: Arc<Seats>,
    seat: Arc<Seat>,
}

impl Taken {
    /// The seat itself.
    pub fn seat(&self) -> Arc<Seat> {
        Arc::clone(&self.seat)
    }

    /// Waits until another one needs it.
    pub async fn put_out(&self) {
        self.seat.put_out.notified().await;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|seat| !Arc::ptr_eq(seat, &self.seat));
    }
}

impl Seat {
    fn doing(&self) -> (Doing, Instant) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn does(&self, doing: Doing) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = (doing, Instant::now());
    }

    /// It is owed an answer until what comes back is dropped.
    pub fn answering(self: &Arc<Self>) -> Answering {
        self.does(Doing::Answered);
        Answering { seat: Arc::clone(self), streams: false }
    }
}

/// An answer on its way.
#[derive(Debug)]
pub struct Answering {
    seat: Arc<Seat>,
    streams: bool,
}

impl Answering {
    /// The answer has no end of its own; false if there are too many of those.
    pub fn streams(&mut self) -> bool {
        let one_more = |count: usize| (count < STREAMS).then_some(count + 1);
        let counter = &self.seat.streams;
        if !self.streams && counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_err() {
            return false;
        }
        self.streams = true;
        self.seat.does(Doing::Streaming);
        true
    }
}

impl Answering {
    /// The place of this stream, for the connection that goes on in its stead as a tunnel.
    pub fn for_the_tunnel(&mut self) -> Place {
        self.streams = false;
        Place(Arc::clone(&self.seat.streams))
    }
}

/// A place among the streams, until it is dropped.
#[derive(Debug)]
pub struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if self.streams {
            self.seat.streams.fetch_sub(1, Ordering::Relaxed);
        }
        self.seat.does(Doing::Waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_quietest_gives_its_seat_to_a_newcomer() {
        let seats = Seats::new(2);
        let first = seats.take().unwrap();
        let second = seats.take().unwrap();
        let busy = first.seat().answering();
        let third = seats.take().unwrap();
        second.put_out().await;
        drop(busy);
        drop(third);
        assert!(seats.take().is_some());
    }

    #[test]
    fn those_who_are_owed_an_answer_keep_their_seats() {
        let seats = Seats::new(1);
        let taken = seats.take().unwrap();
        let mut answering = taken.seat().answering();
        assert!(seats.take().is_none());
        assert!(answering.streams());
        assert!(seats.take().is_none());
        drop(answering);
        assert!(seats.take().is_some());
    }

    #[test]
    fn streams_have_a_cap_and_give_it_back() {
        let seats = Seats::new(SEATS);
        let taken: Vec<Taken> = (0..=STREAMS).map(|_| seats.take().unwrap()).collect();
        let mut answers: Vec<Answering> = taken.iter().map(|t| t.seat().answering()).collect();
        let granted = answers.iter_mut().map(Answering::streams).filter(|granted| *granted).count();
        assert_eq!(granted, STREAMS);
        answers.remove(0);
        assert!(answers.last_mut().unwrap().streams());
    }
}
