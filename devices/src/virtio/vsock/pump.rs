//! The handler of a vsock device: what its worker thread runs.
//!
//! One turn takes the guest's packets, then serves the connections round by round. Each round
//! ends with one publication and at most one interrupt, so a guest begins to work on the
//! first buffers while later ones are filled, and a lone small message does not wait for
//! anything.
//!
//! When the guest offers no buffers, the turn ends with a doorbell asked for, and only then;
//! a guest that refills its ring in time never rings. Doorbells and sockets are watched
//! edge-triggered, so a device that cannot go on is not woken by what it cannot take.

use std::{os::fd::AsRawFd, sync::Arc, sync::PoisonError};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use crate::{
    limits::TURN_BUDGET,
    virtio::{
        Active, DeviceError, Interrupt,
        queue::{Chain, Queue, QueueError},
        vsock::{
            Home,
            muxer::{Muxer, Round},
            rings::{Inlet, Outlet, Taken},
        },
    },
    worker::{Handler, Source, Watch},
};

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
/// Token of the muxer's sockets; those of the queues are their numbers.
const SOCKETS: u32 = 3;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (VIRTIO 1.2 section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The queue half of a vsock device.
pub struct Pump {
    muxer: Box<Muxer>,
    outlet: Outlet,
    inlet: Inlet,
    events: Option<Events>,
    interrupt: Arc<dyn Interrupt>,
    bells: Vec<(u32, EventFd)>,
    home: Home,
    /// A broken queue was reported.
    reported: bool,
}

/// The event queue.
struct Events {
    queue: Queue,
    chain: Chain,
    broken: Option<QueueError>,
}

impl Pump {
    /// Over the queues of `active`; gives the muxer back when they will not do.
    pub fn new(active: Active, muxer: Box<Muxer>, home: Home) -> Result<Pump, (Box<Muxer>, DeviceError)> {
        let (mut rx, mut tx, mut events, mut bells) = (None, None, None, Vec::new());
        for (queue, bell) in active.queues {
            bells.push((u32::from(queue.index()), bell));
            match queue.index() {
                RX => rx = Some(queue),
                TX => tx = Some(queue),
                EVENT => events = Some(queue),
                _ => {
                    bells.pop();
                }
            }
        }
        let (Some(rx), Some(tx)) = (rx, tx) else {
            let text = "A vsock driver must enable the receive and the transmit queue";
            return Err((muxer, DeviceError::Driver(text.to_owned())));
        };
        let mut pump = Pump {
            muxer,
            outlet: Outlet::new(rx),
            inlet: Inlet::new(tx),
            events: events.map(|queue| Events { queue, chain: Chain::new(), broken: None }),
            interrupt: active.interrupt,
            bells,
            home,
            reported: false,
        };
        if pump.muxer.reset_pending {
            pump.muxer.settle();
        }
        if let Some(events) = &mut pump.events {
            events.queue.disarm();
        }
        Ok(pump)
    }

    fn turn(&mut self) {
        let mut budget = TURN_BUDGET;
        loop {
            let interrupt = &self.interrupt;
            let taken = self.inlet.take(&mut self.muxer, &mut budget, || interrupt.queue(TX));
            let round = self.rounds(&mut budget);
            let blocked = taken == Taken::Blocked && self.muxer.has_room_for_answers();
            if taken == Taken::Budget || round == Round::More || (blocked && budget == 0) {
                break self.ring_myself();
            }
            if !blocked {
                break;
            }
        }
        if self.muxer.is_unfinished() {
            self.ring_myself();
        }
        self.report();
    }

    /// Serves connections until nobody wants, the guest has no buffers, or the budget is gone.
    fn rounds(&mut self, budget: &mut usize) -> Round {
        loop {
            let round = self.muxer.round(&mut self.outlet, budget);
            if self.outlet.publish() {
                self.interrupt.queue(RX);
            }
            match round {
                Round::Idle => return round,
                Round::More => {}
                Round::Starved => {
                    if !self.outlet.wait() {
                        return round;
                    }
                    // A driver whose buffers are of no use gets no further than its budget.
                    *budget = budget.saturating_sub(1);
                }
            }
            if *budget == 0 {
                return Round::More;
            }
        }
    }

    /// There is more to do, after the neighbours on this worker had their turn.
    fn ring_myself(&self) {
        self.ring(RX);
    }

    fn ring(&self, queue: u16) {
        if let Some((_, bell)) = self.bells.iter().find(|(token, _)| *token == u32::from(queue)) {
            let _ = bell.write(1);
        }
    }

    /// Tells the guest that its connections are gone, if that is due, and sees when it has
    /// understood: it gives the buffer of the event back after acting on it.
    fn tell_events(&mut self) {
        let Some(events) = self.events.as_mut().filter(|e| e.broken.is_none()) else { return };
        let result = if self.muxer.reset_pending {
            events.send(&TRANSPORT_RESET).map(|left| {
                self.muxer.reset_pending = left.is_none();
                self.muxer.events_left = left.unwrap_or(0);
                false
            })
        } else {
            events.queue.waiting().map(|now| self.muxer.is_settling() && now > self.muxer.events_left)
        };
        match result {
            Ok(true) => self.muxer.settled(),
            Ok(false) => {}
            Err(e) => events.broken = Some(e),
        }
        if events.queue.publish() {
            self.interrupt.queue(EVENT);
        }
        // While something is awaited of the guest, ask for a doorbell.
        if self.muxer.reset_pending || self.muxer.is_settling() {
            let more = events.listen();
            if more && self.muxer.reset_pending && events.broken.is_none() {
                self.ring(EVENT);
            }
        } else {
            events.queue.disarm();
        }
    }

    /// Tells the driver, once, when it has broken a queue.
    fn report(&mut self) {
        let events = self.events.as_ref().and_then(|e| e.broken);
        let Some(error) = self.outlet.broken().or(self.inlet.broken()).or(events) else { return };
        if !self.reported {
            self.reported = true;
            self.muxer.count_queue_error();
            log::warn!("A vsock queue cannot be served any more: {error}");
            self.interrupt.needs_reset();
        }
    }
}

impl Events {
    /// Sends an event and says how many buffers are left; none when the guest offers no buffer
    /// for it.
    fn send(&mut self, event: &[u8; 4]) -> Result<Option<u16>, QueueError> {
        // Once round the ring at most: a driver may add useless buffers for ever.
        for _ in 0..self.queue.size() {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            let len = self.chain.write(&self.queue, 0, event);
            self.queue.push(self.chain.head(), len as u32);
            if len == event.len() {
                return self.queue.waiting().map(Some);
            }
        }
        Ok(None)
    }

    /// Asks for a doorbell for the next buffer the guest adds, behind those that wait; true
    /// when some wait.
    fn listen(&mut self) -> bool {
        let mut passed = 0;
        // A doorbell is asked for at the place the device has come to, so come to the end.
        while passed < self.queue.size() && self.queue.pop(&mut self.chain).is_ok_and(|taken| taken) {
            passed += 1;
        }
        let more = self.queue.arm();
        self.queue.undo_pop(passed);
        more || passed > 0
    }
}

impl Handler for Pump {
    fn sources(&self) -> Vec<Source> {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let bells = self.bells.iter().map(|(token, bell)| Source {
            fd: bell.as_raw_fd(),
            events: edge,
            token: *token,
        });
        let sockets = Source { fd: self.muxer.watched(), events: EventSet::IN, token: SOCKETS };
        bells.chain([sockets]).collect()
    }

    fn ready(&mut self, token: u32, _: EventSet, _: &mut Watch<'_>) {
        if token == u32::from(EVENT) {
            self.tell_events();
        } else if token == u32::from(RX) {
            self.outlet.quiet();
        }
        // The sockets only in their own event: a turn that re-rings must not starve others.
        if token == SOCKETS || self.muxer.is_unfinished() {
            self.muxer.collect();
        }
        self.turn();
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        let Pump { mut muxer, outlet, inlet, events, home, .. } = *self;
        muxer.rest();
        *home.lock().unwrap_or_else(PoisonError::into_inner) = Some(muxer);
        let events = events.map(|e| e.queue);
        [outlet.into_queue(), inlet.into_queue()].into_iter().chain(events).collect()
    }
}
