//! Virtio sockets (VIRTIO 1.2 section 5.10) over unix sockets of the host.
//!
//! ```text
//!            guest                     this device                          host
//!   ┌──────────────────┐   tx ring   ┌──────────────┐                ┌──────────────────┐
//!   │ connect(2, 52)   ├────────────►│ inlet   ┌────┴────┐ connect() │ uds_path_52      │
//!   │                  │             │         │ muxer   ├──────────►│  (a server)      │
//!   │                  │   rx ring   │         │ streams │           │                  │
//!   │ listen(52)       │◄────────────┤ outlet  └────┬────┘◄──────────┤ uds_path         │
//!   └──────────────────┘             └──────────────┘  accept()      │ "CONNECT 52\n"   │
//!                                                                    └──────────────────┘
//! ```
//!
//! A host program reaches guest port P by connecting to `uds_path` and writing `CONNECT P\n`;
//! it gets `OK <port>\n` and then the bytes of the stream. A guest program reaches the host
//! program that listens on `uds_path_P` by connecting to context id 2, port P.
//!
//! No byte is copied in this process as long as both sides keep up: the host's socket is read
//! straight into the buffers that the guest offered, several of them by one call, and the
//! guest's buffers are written straight into the socket. Only what a socket does not take is
//! put aside, within the credit the guest was given.
//!
//! Where things are: [`packet`] the header, [`credit`] flow control, [`backlog`] bytes put
//! aside, [`stream`] one connection, [`table`] all of them, [`muxer`] what packets, sockets
//! and time do to them, [`rings`] the two data queues, [`pump`] the handler that turns it all,
//! [`door`] the paths on the host.
//!
//! Connections live as long as the machine that made them runs: pausing keeps them. A restored
//! machine has none:
//!
//! ```text
//!   restore ─► transport reset on the event queue ─► the guest drops what it had, gives the
//!              event's buffer back ─► a reset for each old connection by name ─► new connections
//! ```
//!
//! Until the guest has given the buffer back it is neither asked for a connection nor told that
//! one it asked for is there: it would drop that with the old ones, and nobody would know.

pub mod backlog;
pub mod credit;
pub mod door;
pub mod muxer;
pub mod packet;
pub mod poller;
pub mod pump;
pub mod rings;
pub mod stream;
pub mod table;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::{
    state::{Section, StateError},
    virtio::{
        About, Active, DeviceError, F_COMMON, VirtioDevice,
        queue::Queue,
        read_config_bytes,
        vsock::{
            door::{Door, DoorError},
            muxer::{Counters, Muxer},
            pump::Pump,
        },
    },
    worker::{HandlerId, Worker},
};

const KIND: &str = "virtio-vsock";
const VERSION: u16 = 1;
/// `VIRTIO_VSOCK_F_STREAM` (VIRTIO 1.2 section 5.10.3).
const F_STREAM: u64 = 1;
/// Sizes of the receive, transmit and event queues.
const QUEUES: [u16; 3] = [256, 256, 32];

/// What a vsock device is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// Context id of the guest, 3 to 2^32 - 2 (0 to 2 and 2^32 - 1 are reserved).
    pub guest_cid: u32,
    /// Where host clients connect; `uds_path_PORT` is where guest connections go. It must not
    /// exist yet and has at most 107 bytes.
    pub uds_path: PathBuf,
}

/// Why a vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is one of the reserved ones.
    #[error("Guest context id {0} is reserved; it must be from 3 to 4294967294")]
    Cid(u32),
    /// The listening socket could not be made.
    #[error(transparent)]
    Door(#[from] DoorError),
}

/// The bits that are saved.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    guest_cid: u32,
    /// The guest has not been told yet that its connections are gone.
    reset_pending: bool,
    /// Turn of the host-side port numbers, so that a restored machine does not start with
    /// ports its guest still remembers.
    turn: u32,
    /// Host and guest port of each connection that the guest knows of.
    peers: Vec<(u32, u32)>,
}

/// Where a pump leaves the muxer when it is drained.
type Home = Arc<Mutex<Option<Box<Muxer>>>>;

struct Running {
    worker: Worker,
    id: HandlerId,
    home: Home,
}

/// A virtio socket device.
pub struct Vsock {
    about: About,
    guest_cid: u32,
    door: Arc<Door>,
    counters: Arc<Counters>,
    /// All connections while the device is stopped; the pump has them while it runs.
    muxer: Option<Box<Muxer>>,
    running: Option<Running>,
}

impl Vsock {
    /// Makes the device and its listening socket, which is there from now on: clients that
    /// connect before the guest's driver runs wait.
    pub fn new(config: VsockConfig) -> Result<Vsock, VsockError> {
        let VsockConfig { guest_cid, uds_path } = config;
        if guest_cid < 3 || guest_cid == u32::MAX {
            return Err(VsockError::Cid(guest_cid));
        }
        let door = Arc::new(Door::open(&uds_path)?);
        let counters = Arc::new(Counters::default());
        let muxer = Muxer::new(guest_cid, Arc::clone(&door), Arc::clone(&counters));
        let about = About {
            kind: KIND,
            device_id: 19,
            pci_class: 0x07_80_00,
            features: F_COMMON | F_STREAM,
            queues: QUEUES.to_vec(),
            config_len: 8,
        };
        Ok(Vsock { about, guest_cid, door, counters, muxer: Some(Box::new(muxer)), running: None })
    }

    fn muxer(&mut self) -> &mut Muxer {
        let (cid, door, counters) = (self.guest_cid, &self.door, &self.counters);
        // Missing only after a worker that never let go of it: begin anew without connections.
        self.muxer.get_or_insert_with(|| Box::new(Muxer::new(cid, Arc::clone(door), Arc::clone(counters))))
    }
}

impl VirtioDevice for Vsock {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        let host = |what: &str, source| DeviceError::Host { what: what.to_owned(), source };
        if self.running.is_some() {
            return Err(DeviceError::Driver("The vsock device is started already".to_owned()));
        }
        self.muxer().open().map_err(|e| host("Cannot watch the sockets of a vsock device", e))?;
        let Some(muxer) = self.muxer.take() else { return Ok(()) };
        let home = Home::default();
        let worker = active.worker.clone();
        let pump = match Pump::new(active, muxer, Arc::clone(&home)) {
            Ok(pump) => pump,
            Err((muxer, error)) => {
                self.muxer = Some(muxer);
                return Err(error);
            }
        };
        let id = worker
            .add(Box::new(pump))
            .map_err(|e| host("Cannot run a vsock device on its worker thread", e))?;
        self.running = Some(Running { worker, id, home });
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(running) = self.running.take() else { return Ok(Vec::new()) };
        let queues = running
            .worker
            .remove(running.id)
            .map_err(|source| DeviceError::Host { what: "Cannot stop a vsock device".to_owned(), source })?;
        self.muxer = running.home.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(queues)
    }

    fn reset(&mut self) {
        self.muxer().clear();
    }

    fn save(&self) -> Section {
        let muxer = self.muxer.as_ref();
        let (reset_pending, turn) = muxer.map_or((false, 0), |m| (m.reset_pending, m.turn()));
        let peers = muxer.map_or_else(Vec::new, |m| m.peers());
        Section::new(KIND, VERSION, &Saved { guest_cid: self.guest_cid, reset_pending, turn, peers })
    }

    /// The connections of the saved machine are gone, so the guest is told to drop its own.
    /// The context id stays the configured one, which may differ from the saved one: the
    /// guest reads it again when it is told (VIRTIO 1.2 section 5.10.6.7).
    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: Saved = section.open(KIND, VERSION)?;
        let impossible = |reason| StateError::Impossible { kind: KIND, reason };
        if saved.guest_cid < 3 || saved.guest_cid == u32::MAX {
            return Err(impossible(format!("the guest context id is {}", saved.guest_cid)).into());
        }
        let restored = self.muxer().restored(saved.guest_cid, saved.turn, &saved.peers);
        Ok(restored.map_err(impossible)?)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }
}

#[cfg(test)]
mod tests;
