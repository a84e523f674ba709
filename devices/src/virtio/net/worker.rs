//! The queue half: one queue pair and its descriptor of the host's side.
//!
//! What is watched follows from what can be done:
//!
//! ```text
//!   host's side readable   while the guest has buffers and the pair is in use
//!   host's side writable   while a frame waits that it would not take
//!   doorbells              always
//!   timers                 while a limiter holds a direction back (then nothing else of that
//!                          direction is served: frames stay in the tap, or in the driver's ring)
//! ```
//!
//! So every state in which something is stuck has an event that ends it, and no state has an
//! event that comes again and again without anything being done.

use std::{
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    time::Instant,
};

use vmm_sys_util::epoll::EventSet;

use super::{
    port::Port,
    rx::{self, Rx},
    tally::{Counters, Tally},
    tx::{self, Tx},
};
use crate::{
    limiter::{Gate, Throttle},
    limits::TURN_BUDGET,
    mmds::Detour,
    trouble::Trouble,
    virtio::{Interrupt, queue::Queue},
    worker::{Handler, Source, Watch},
};

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const PORT: u32 = 2;
pub(super) const RX_TIMER: u32 = 3;
pub(super) const TX_TIMER: u32 = 4;
const MMDS: u32 = 5;

/// What the pairs of a device and its register half share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) counters: Counters,
    /// The host's side is gone. Negative, so that a new device has its link up.
    pub(super) link_down: AtomicBool,
    /// Queue pairs in use.
    pub(super) pairs: AtomicU16,
    /// Limits towards the guest.
    pub(super) rx_limits: Arc<Throttle>,
    /// Limits from the guest.
    pub(super) tx_limits: Arc<Throttle>,
}

/// A queue pair at work.
pub(super) struct Pair {
    pub(super) number: u16,
    pub(super) rx: Option<Rx>,
    pub(super) tx: Option<Tx>,
    pub(super) port: Arc<dyn Port>,
    pub(super) shared: Arc<Shared>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// The driver wants to hear of the link.
    pub(super) status: bool,
    /// What is watched of the host's side; empty: it is not watched at all.
    pub(super) watched: EventSet,
    pub(super) blocked: bool,
    pub(super) gone: bool,
    pub(super) rx_spoiled: bool,
    pub(super) tx_spoiled: bool,
    /// The way to the metadata service.
    pub(super) mmds: Option<Detour>,
    pub(super) tally: Tally,
}

impl Pair {
    fn in_use(&self) -> bool {
        !self.gone && self.number < self.shared.pairs.load(Ordering::Acquire)
    }

    fn receive(&mut self, alarm: bool) {
        if !self.in_use() || self.rx_spoiled {
            return;
        }
        let Some(port) = self.port.descriptors().get(usize::from(self.number)) else { return };
        let Some(rx) = &mut self.rx else { return };
        let index = rx.queue.index();
        let interrupt = &self.interrupt;
        match rx.run(port, TURN_BUDGET, &mut self.tally, &mut || interrupt.queue(index)) {
            Ok(rx::Turn::Gone) => self.lost(),
            // The descriptor reports an error of which reading says nothing.
            Ok(rx::Turn::Idle) if alarm => self.lost(),
            Ok(rx::Turn::Idle | rx::Turn::Starved | rx::Turn::Limited) => {}
            Ok(rx::Turn::Budget) => {
                // The last frame may have taken the last buffer that was popped. Then the
                // host's side is not watched, and no doorbell was asked for either.
                let _ = rx.kick.write(1);
            }
            Err(e) => {
                self.rx_spoiled = true;
                self.spoiled(index, &e);
            }
        }
    }

    fn transmit(&mut self) {
        let in_use = self.in_use();
        if self.tx_spoiled {
            return;
        }
        let Some(port) = self.port.descriptors().get(usize::from(self.number)) else { return };
        let Some(tx) = &mut self.tx else { return };
        let index = tx.queue.index();
        let interrupt = &self.interrupt;
        tx.unplugged = !in_use;
        self.blocked = false;
        match tx.run(port, TURN_BUDGET, &mut self.tally, &mut || interrupt.queue(index)) {
            Ok(tx::Turn::Idle | tx::Turn::Limited) => {}
            Ok(tx::Turn::Blocked) => {
                self.tally.tx_blocked += 1;
                self.blocked = true;
            }
            Ok(tx::Turn::Budget) => {
                let _ = tx.kick.write(1);
            }
            Ok(tx::Turn::Gone) => {
                // What waits is dropped in the next turn.
                let _ = tx.kick.write(1);
                self.lost();
            }
            Err(e) => {
                self.tx_spoiled = true;
                self.spoiled(index, &e);
            }
        }
    }

    /// Hands the metadata service's replies to the guest. They need no host's side.
    fn reply(&mut self) {
        let Some(mmds) = self.mmds.as_ref().filter(|mmds| mmds.has_reply()) else { return };
        if self.rx_spoiled || self.number >= self.shared.pairs.load(Ordering::Acquire) {
            return;
        }
        let Some(rx) = &mut self.rx else { return };
        let index = rx.queue.index();
        let interrupt = &self.interrupt;
        if let Err(e) = rx.inject(mmds, &mut self.tally, &mut || interrupt.queue(index)) {
            self.rx_spoiled = true;
            self.spoiled(index, &e);
        }
    }

    /// The host's side is gone: the cable is unplugged, the device lives. Frames from the
    /// guest are dropped from now on.
    fn lost(&mut self) {
        if !self.in_use() {
            // A pair that was just taken out of use answers the same way.
            return;
        }
        self.gone = true;
        if !self.shared.link_down.swap(true, Ordering::AcqRel) {
            log::warn!("The tap of a network device is gone; its link is down");
            self.interrupt.trouble(Trouble::LinkDown);
            if self.status {
                self.interrupt.config();
            }
        }
    }

    fn spoiled(&mut self, index: u16, error: &dyn std::error::Error) {
        self.tally.queue_errors += 1;
        log::warn!("Queue {index} of a network device cannot be served: {error}");
        self.interrupt.needs_reset();
    }

    /// Sets the timers of directions that have to wait.
    fn rest(&mut self, watch: &mut Watch<'_>) {
        let awake = |gate: &mut Gate, watch: &mut Watch<'_>| gate.is_shut() && !gate.sleep(watch);
        if let Some(rx) = self.rx.as_mut().filter(|_| !self.rx_spoiled)
            && awake(&mut rx.gate, watch)
        {
            let _ = rx.kick.write(1);
        }
        if let Some(tx) = self.tx.as_mut().filter(|_| !self.tx_spoiled)
            && awake(&mut tx.gate, watch)
        {
            let _ = tx.kick.write(1);
        }
    }

    /// Watches of the host's side just what something can be done about. Without any wish it
    /// is not watched at all: errors and hang-ups are reported whether asked for or not.
    fn settle(&mut self, watch: &mut Watch<'_>) {
        let mut wanted = EventSet::empty();
        if self.in_use() {
            let room = !self.rx_spoiled && self.rx.as_ref().is_some_and(Rx::has_room);
            wanted.set(EventSet::IN, room);
            wanted.set(EventSet::OUT, self.blocked && !self.tx_spoiled);
        }
        if wanted == self.watched {
            return;
        }
        let Some(source) = self.port_source(wanted) else { return };
        let changed = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, _) => watch.add(source),
            (_, true) => watch.remove(source.fd),
            _ => watch.modify(source),
        };
        match changed {
            Ok(()) => self.watched = wanted,
            Err(e) => {
                log::warn!("A tap cannot be waited for: {e}");
                self.lost();
            }
        }
    }

    fn port_source(&self, events: EventSet) -> Option<Source> {
        let port = self.port.descriptors().get(usize::from(self.number))?;
        Some(Source { fd: port.as_raw_fd(), events, token: PORT })
    }
}

impl Handler for Pair {
    fn sources(&self) -> Vec<Source> {
        let mut sources = Vec::new();
        sources.extend(self.rx.as_ref().map(|rx| Source::readable(&rx.kick, RX_KICK)));
        sources.extend(self.tx.as_ref().map(|tx| Source::readable(&tx.kick, TX_KICK)));
        sources.extend(self.rx.as_ref().and_then(|rx| rx.gate.source()));
        sources.extend(self.tx.as_ref().and_then(|tx| tx.gate.source()));
        // One thread is enough for the timer; which one does not matter.
        let timer = self.mmds.as_ref().filter(|_| self.number == 0).map(Detour::timer);
        sources.extend(timer.map(|fd| Source { fd, events: EventSet::IN, token: MMDS }));
        sources.extend(self.port_source(self.watched).filter(|s| !s.events.is_empty()));
        sources
    }

    fn ready(&mut self, token: u32, events: EventSet, watch: &mut Watch<'_>) {
        let alarm = token == PORT && events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        match token {
            RX_KICK => {
                let _ = self.rx.as_ref().map(|rx| rx.kick.read());
                self.tally.rx_doorbells += 1;
                self.reply();
                self.receive(false);
            }
            TX_KICK => {
                let _ = self.tx.as_ref().map(|tx| tx.kick.read());
                self.tally.tx_doorbells += 1;
                self.transmit();
            }
            RX_TIMER => {
                self.rx.iter_mut().for_each(|rx| rx.gate.opened());
                self.reply();
                self.receive(false);
            }
            TX_TIMER => {
                self.tx.iter_mut().for_each(|tx| tx.gate.opened());
                self.transmit();
            }
            MMDS => self.mmds.iter().for_each(|mmds| mmds.tick(Instant::now())),
            _ => {
                self.tally.port_events += 1;
                if alarm || events.contains(EventSet::IN) {
                    self.receive(alarm);
                }
                if alarm || events.contains(EventSet::OUT) {
                    self.transmit();
                }
            }
        }
        self.reply();
        self.rest(watch);
        self.settle(watch);
        self.shared.counters.add(&mut self.tally);
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        let Pair { rx, tx, mut tally, shared, .. } = *self;
        let rx = rx.map(|rx| rx.give_back(&mut tally));
        let tx = tx.map(Tx::give_back);
        shared.counters.add(&mut tally);
        rx.into_iter().chain(tx).collect()
    }
}
