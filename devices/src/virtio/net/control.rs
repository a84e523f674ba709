//! The control queue: how many queue pairs the driver uses (VIRTIO 1.2 section 5.1.6.5.5).
//!
//! A request is `class`, `command` and data in the readable part, and one byte of answer in
//! the writable part. Only the number of pairs can be set here; everything else is answered
//! with an error, which is what a driver expects of what was not offered.

use std::sync::{Arc, atomic::Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{port::Port, worker::Shared};
use crate::{
    limits::TURN_BUDGET,
    virtio::{
        Interrupt,
        queue::{Chain, Queue, QueueError},
    },
    worker::{Handler, Source, Watch},
};

/// Brings the host's side in line with the number of pairs in use: frames must not be spread
/// to queues that nobody reads. What is taken out of use is marked so first, what is put
/// into use last, so that a pair never reads from a queue that is detached.
pub(super) fn use_pairs(port: &dyn Port, shared: &Shared, pairs: u16) {
    let old = shared.pairs.load(Ordering::Acquire);
    if pairs < old {
        shared.pairs.store(pairs, Ordering::Release);
    }
    for pair in 1..port.descriptors().len() {
        if let Err(e) = port.set_attached(pair, pair < usize::from(pairs)) {
            log::warn!("Queue pair {pair} of a tap cannot be put into or out of use: {e}");
        }
    }
    shared.pairs.store(pairs, Ordering::Release);
}

/// Serves the control queue.
pub(super) struct Control {
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) chain: Chain,
    pub(super) port: Arc<dyn Port>,
    pub(super) shared: Arc<Shared>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// Pairs the driver may use.
    pub(super) pairs_max: u16,
    /// The doorbells of the pairs, rung when their use changes.
    pub(super) pairs: Vec<EventFd>,
    pub(super) spoiled: bool,
}

impl Control {
    fn serve(&mut self) -> Result<(), QueueError> {
        self.queue.disarm();
        for _ in 0..TURN_BUDGET {
            while !self.queue.pop(&mut self.chain)? {
                self.publish();
                if !self.queue.arm() {
                    return Ok(());
                }
                self.queue.disarm();
            }
            let answer = self.answer();
            let written = self.chain.write(&self.queue, 0, &[answer]);
            self.queue.push(self.chain.head(), written as u32);
        }
        self.publish();
        let _ = self.kick.write(1);
        Ok(())
    }

    fn publish(&mut self) {
        if self.queue.publish() {
            self.interrupt.queue(self.queue.index());
        }
    }

    fn answer(&self) -> u8 {
        let mut request = [0; 4];
        let whole = self.chain.read(0, &mut request) == request.len();
        let [class, command, low, high] = request;
        let pairs = u16::from_le_bytes([low, high]);
        let known = u32::from(class) == VIRTIO_NET_CTRL_MQ
            && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
            && self.chain.readable_len() == 4;
        if !whole || !known || !(1..=self.pairs_max).contains(&pairs) {
            return VIRTIO_NET_ERR as u8;
        }
        use_pairs(&*self.port, &self.shared, pairs);
        self.pairs.iter().for_each(|bell| {
            let _ = bell.write(1);
        });
        VIRTIO_NET_OK as u8
    }
}

impl Handler for Control {
    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(&self.kick, 0)]
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_>) {
        let _ = self.kick.read();
        if self.spoiled {
            return;
        }
        if let Err(e) = self.serve() {
            self.spoiled = true;
            log::warn!("The control queue of a network device cannot be served: {e}");
            self.interrupt.needs_reset();
        }
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        let mut queue = self.queue;
        queue.publish();
        vec![queue]
    }
}
