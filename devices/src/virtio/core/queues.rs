//! The queues of one device as registers: what the driver wrote, and their doorbells.
//!
//! Doorbells are made when a queue is first started, not when the machine is built: each
//! costs a system call, and a device offers more queues than its driver uses. They stay over
//! a pause and go with a reset.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    Memory,
    host::{Doorbell, Host},
    virtio::{
        DeviceError,
        queue::{Queue, QueueError, QueueSetup},
    },
};

/// Where the doorbells of a device's queues lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bells {
    /// Guest address of queue 0's doorbell.
    pub base: u64,
    /// Distance to the next queue's; 0 when all share one register and the value written
    /// names the queue.
    pub stride: u64,
}

impl Bells {
    fn of(&self, queue: usize) -> Option<(Doorbell, Option<u32>)> {
        let at = self.stride.checked_mul(queue as u64)?.checked_add(self.base)?;
        let value = if self.stride == 0 { Some(u32::try_from(queue).ok()?) } else { None };
        Some((Doorbell::Mmio(at), value))
    }
}

struct Bell {
    fd: EventFd,
    /// Where the machine listens; `None` when only ordinary writes ring it.
    wired: Option<(Doorbell, Option<u32>)>,
}

/// One queue as its driver sees it.
pub struct Slot {
    /// Largest size, as the device offers it.
    pub max: u16,
    /// What the driver wrote, and how far the queue had come when it was last stopped.
    pub setup: QueueSetup,
    /// Whether the driver enabled it.
    pub ready: bool,
    bell: Option<Bell>,
}

/// Which of a queue's three addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// Descriptor table ("descriptor area").
    Desc,
    /// Avail ring ("driver area").
    Avail,
    /// Used ring ("device area").
    Used,
}

impl Slot {
    fn new(max: u16) -> Slot {
        Slot { max, setup: QueueSetup { size: max, ..QueueSetup::default() }, ready: false, bell: None }
    }

    /// Writes the size. One that cannot be is not taken; a ready queue is not changed.
    pub fn set_size(&mut self, size: u16) {
        if !self.ready && size.is_power_of_two() && size <= self.max {
            self.setup.size = size;
        }
    }

    /// Writes the lower or upper half of an address. A ready queue is not changed.
    pub fn set_address(&mut self, ring: Ring, upper: bool, value: u32) {
        if self.ready {
            return;
        }
        let address = match ring {
            Ring::Desc => &mut self.setup.desc,
            Ring::Avail => &mut self.setup.avail,
            Ring::Used => &mut self.setup.used,
        };
        let value = u64::from(value);
        *address = if upper { *address & 0xffff_ffff | value << 32 } else { *address & !0xffff_ffff | value };
    }

    /// One address as the driver wrote it.
    pub fn address(&self, ring: Ring) -> u64 {
        match ring {
            Ring::Desc => self.setup.desc,
            Ring::Avail => self.setup.avail,
            Ring::Used => self.setup.used,
        }
    }
}

/// All queues of a device.
pub(super) struct Queues {
    slots: Vec<Slot>,
    host: Arc<dyn Host>,
    bells: Option<Bells>,
}

impl Queues {
    pub(super) fn new(sizes: &[u16], host: Arc<dyn Host>, bells: Option<Bells>) -> Queues {
        Queues { slots: sizes.iter().map(|max| Slot::new(*max)).collect(), host, bells }
    }

    pub(super) fn get(&self, index: u32) -> Option<&Slot> {
        self.slots.get(usize::try_from(index).ok()?)
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(index).ok()?)
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(super) fn slots_mut(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    /// Rings queue `index` by hand.
    pub(super) fn ring(&self, index: u32) {
        if let Some(bell) = self.get(index).and_then(|slot| slot.bell.as_ref()) {
            // A full counter is as good as a rung bell.
            let _ = bell.fd.write(1);
        }
    }

    /// Checks the rings of all enabled queues and returns the queues, each with its doorbell
    /// already rung once.
    pub(super) fn build(
        &mut self,
        features: u64,
        memory: &Memory,
    ) -> Result<Vec<(Queue, EventFd)>, DeviceError> {
        let mut built = Vec::with_capacity(self.slots.len());
        for (index, slot) in (0u16..).zip(&self.slots) {
            if slot.ready {
                let queue = checked(index, slot, features, memory)
                    .map_err(|error| DeviceError::Driver(format!("Queue {index}: {error}")))?;
                built.push(queue);
            }
        }
        let doorbells = built.into_iter().map(|queue| {
            let fd = self.doorbell(queue.index())?;
            fd.write(1)?;
            Ok((queue, fd))
        });
        doorbells.collect::<std::io::Result<_>>().map_err(|source| {
            let what = "A doorbell descriptor for a queue cannot be made".to_owned();
            DeviceError::Host { what, source }
        })
    }

    /// The doorbell of queue `index`, made if it is not there yet.
    fn doorbell(&mut self, index: u16) -> std::io::Result<EventFd> {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let at = self.bells.and_then(|bells| bells.of(usize::from(index)));
        let slot = self.slots.get_mut(usize::from(index)).ok_or_else(missing)?;
        if let Some(bell) = &slot.bell {
            return bell.fd.try_clone();
        }
        // Where the place is taken (a guest may move a BAR over anything) the queue still
        // works: the write then arrives as an ordinary one and is passed on by hand.
        let wired = at.and_then(|(at, value)| match self.host.doorbell(at, value) {
            Ok(fd) => Some(Bell { fd, wired: Some((at, value)) }),
            Err(error) => {
                log::warn!("No doorbell at {at:x?} for queue {index}, it will be slow: {error}");
                None
            }
        });
        let bell = match wired {
            Some(bell) => bell,
            None => Bell { fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, wired: None },
        };
        let fd = bell.fd.try_clone();
        slot.bell = Some(bell);
        fd
    }

    /// Keeps how far the returned queues came.
    pub(super) fn take_back(&mut self, queues: &[Queue]) {
        for queue in queues {
            if let Some(slot) = self.slots.get_mut(usize::from(queue.index())) {
                slot.setup = queue.setup();
            }
        }
    }

    /// Takes all doorbells away; new ones will be made at `bells`.
    pub(super) fn move_to(&mut self, bells: Option<Bells>) {
        for slot in &mut self.slots {
            if let Some(Bell { fd, wired: Some((at, value)) }) = slot.bell.take()
                && let Err(error) = self.host.remove_doorbell(at, value, &fd)
            {
                log::warn!("The doorbell at {at:x?} cannot be removed: {error}");
            }
        }
        self.bells = bells;
    }

    /// Forgets what the driver set up.
    pub(super) fn reset(&mut self) {
        self.move_to(self.bells);
        for slot in &mut self.slots {
            *slot = Slot::new(slot.max);
        }
    }
}

fn checked(index: u16, slot: &Slot, features: u64, memory: &Memory) -> Result<Queue, QueueError> {
    let QueueSetup { size, desc, avail, used, .. } = slot.setup;
    let queue = Queue::new(index, slot.setup, slot.max, features, memory)?;
    // Rings that overlap would harm none but the guest. They are a mistake that is easier to
    // find here than in what follows.
    let entries = u64::from(size);
    let rings = [(desc, 16 * entries), (avail, 6 + 2 * entries), (used, 6 + 8 * entries)];
    for (i, (a, a_len)) in rings.iter().enumerate() {
        for (b, b_len) in rings.iter().take(i) {
            if *a < b + b_len && *b < a + a_len {
                return Err(QueueError::Ring { ring: "ring that overlaps another one", address: *a });
            }
        }
    }
    Ok(queue)
}
