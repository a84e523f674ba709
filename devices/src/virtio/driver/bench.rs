//! A machine on the test bench: doorbells and interrupt lines that go nowhere but here.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    host::{Doorbell, Host, Message},
    virtio::driver::PATIENCE,
};

#[derive(Default)]
struct Wiring {
    doorbells: Vec<(Doorbell, Option<u32>, EventFd)>,
    lines: Vec<(u32, EventFd)>,
    messages: Vec<Message>,
    refuse_doorbells: bool,
}

/// A [`Host`] that keeps all it is asked for, so that a test can ring, look and listen.
#[derive(Default)]
pub struct Bench {
    wiring: Mutex<Wiring>,
    arrived: Condvar,
}

impl Bench {
    /// An empty bench.
    pub fn new() -> Arc<Bench> {
        Arc::default()
    }

    /// Makes every further request for a doorbell fail (or succeed again).
    pub fn refuse_doorbells(&self, refuse: bool) {
        self.lock().refuse_doorbells = refuse;
    }

    /// Writes `value` at `at` as the guest would: true when a doorbell took it, false when
    /// the write has to go to the registers.
    pub fn ring(&self, at: Doorbell, value: u32) -> bool {
        let wiring = self.lock();
        let bell = wiring
            .doorbells
            .iter()
            .find(|(place, wanted, _)| *place == at && wanted.is_none_or(|wanted| wanted == value));
        bell.is_some_and(|(_, _, bell)| bell.write(1).is_ok())
    }

    /// The doorbells in place.
    pub fn doorbells(&self) -> Vec<(Doorbell, Option<u32>)> {
        self.lock().doorbells.iter().map(|(at, value, _)| (*at, *value)).collect()
    }

    /// How often line `gsi` was raised since the last call.
    pub fn raised(&self, gsi: u32) -> u64 {
        let wiring = self.lock();
        wiring.lines.iter().filter(|(line, _)| *line == gsi).filter_map(|(_, fd)| fd.read().ok()).sum()
    }

    /// The messages delivered since the last call.
    pub fn messages(&self) -> Vec<Message> {
        std::mem::take(&mut self.lock().messages)
    }

    /// Waits until a message was delivered; false after [`PATIENCE`].
    pub fn wait_message(&self) -> bool {
        let waited = self.arrived.wait_timeout_while(self.lock(), PATIENCE, |w| w.messages.is_empty());
        !waited.unwrap_or_else(PoisonError::into_inner).0.messages.is_empty()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Wiring> {
        self.wiring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl Host for Bench {
    fn doorbell(&self, at: Doorbell, value: Option<u32>) -> io::Result<EventFd> {
        let mut wiring = self.lock();
        let taken = wiring.doorbells.iter().any(|(place, wanted, _)| {
            *place == at && (*wanted == value || wanted.is_none() || value.is_none())
        });
        if taken || wiring.refuse_doorbells {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let bell = event()?;
        wiring.doorbells.push((at, value, bell.try_clone()?));
        Ok(bell)
    }

    fn remove_doorbell(&self, at: Doorbell, value: Option<u32>, _bell: &EventFd) -> io::Result<()> {
        let mut wiring = self.lock();
        let found = wiring.doorbells.iter().position(|(place, wanted, _)| *place == at && *wanted == value);
        let found = found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        wiring.doorbells.remove(found);
        Ok(())
    }

    fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let line = event()?;
        self.lock().lines.push((gsi, line.try_clone()?));
        Ok(line)
    }

    fn message(&self, message: Message) -> io::Result<()> {
        self.lock().messages.push(message);
        self.arrived.notify_all();
        Ok(())
    }
}
