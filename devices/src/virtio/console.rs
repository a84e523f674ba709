//! The console device (VIRTIO 1.2 section 5.3): one port, `hvc0` in a Linux guest.
//!
//! ```text
//!   transmit queue ── chain.read ──► Wire ──► far end        never waits; see legacy/wire.rs
//!   receive queue ◄── chain.write ── Pump ◄── far end        only while the guest has buffers
//! ```
//!
//! The far end is the same mechanism as the serial port's. A driver like Linux's spins until
//! what it wrote is taken, so output that the far end does not read is kept as far as it
//! fits and then dropped, oldest first, and never waited for.
//!
//! Only a single port is offered: naming and multiplexing of channels is what vsock is for.
//! The size of the terminal can change while the guest runs ([`Size::set`]).

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use crate::{
    legacy::{
        output::{Output, OutputError},
        pump::{self, Pump, Receiver},
        wire::Wire,
    },
    limits::{CONSOLE_REQUEST_MAX, TURN_BUDGET},
    state::Section,
    virtio::{
        About, Active, DeviceError, F_COMMON, Interrupt, VirtioDevice,
        queue::{Chain, Queue, QueueError},
        read_config_bytes,
    },
    worker::{Handler, HandlerId, Source, Watch, Worker},
};

const KIND: &str = "virtio-console";
const VERSION: u16 = 1;
const QUEUE_SIZE: u16 = 64;
/// `VIRTIO_CONSOLE_F_SIZE`: the configuration has the size of the terminal.
const F_SIZE: u64 = 1 << 0;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`: a byte can be output without any queue.
const F_EMERG_WRITE: u64 = 1 << 2;
/// Where `emerg_wr` lies in the configuration.
const EMERG_WRITE: u32 = 8;
const RX: u16 = 0;
const TX: u16 = 1;
const RX_KICK: u32 = pump::TOKENS;
const TX_KICK: u32 = pump::TOKENS + 1;

/// The size of the terminal, and who is to hear of changes.
#[derive(Clone, Default)]
pub struct Size(Arc<Mutex<SizeState>>);

#[derive(Default)]
struct SizeState {
    columns: u16,
    rows: u16,
    /// The started device's, when the driver asked for the size.
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl Size {
    /// Sets the size in characters and tells the guest when it changed.
    pub fn set(&self, columns: u16, rows: u16) {
        let told = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let same = (state.columns, state.rows) == (columns, rows);
            (state.columns, state.rows) = (columns, rows);
            state.interrupt.clone().filter(|_| !same)
        };
        if let Some(interrupt) = told {
            interrupt.config();
        }
    }

    /// Columns and rows, 0 when never set.
    pub fn get(&self) -> (u16, u16) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (state.columns, state.rows)
    }

    fn tell(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).interrupt = interrupt;
    }
}

/// A console device.
pub struct Console {
    about: About,
    wire: Arc<Wire>,
    size: Size,
    running: Option<(Worker, HandlerId)>,
}

impl Console {
    /// A console whose far end is `output`, opened now.
    pub fn new(output: &Output) -> Result<Console, OutputError> {
        Ok(Console::with_wire(Wire::open(output)?))
    }

    /// The same with a far end that is open already.
    pub fn with_wire(wire: Wire) -> Console {
        let about = About {
            kind: KIND,
            device_id: 3,
            // A communication controller of no further kind.
            pci_class: 0x07_8000,
            features: F_COMMON | F_SIZE | F_EMERG_WRITE,
            queues: vec![QUEUE_SIZE; 2],
            config_len: 12,
        };
        Console { about, wire: Arc::new(wire), size: Size::default(), running: None }
    }

    /// The size of the terminal; the handle stays good while the device is plugged in.
    pub fn size(&self) -> Size {
        self.size.clone()
    }

    /// Path of the file, pseudo-terminal or socket at the far end.
    pub fn place(&self) -> Option<&Path> {
        self.wire.place()
    }

    /// Waits, `limit` at most, for the reader to take what is buffered; true when it has.
    pub fn finish(&self, limit: Duration) -> bool {
        self.wire.finish(limit)
    }
}

impl VirtioDevice for Console {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let (columns, rows) = self.size.get();
        let mut config = [0; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        if let (EMERG_WRITE, [byte, ..]) = (offset, data) {
            self.wire.write(&[*byte]);
        }
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        let Active { features, queues, interrupt, worker, .. } = active;
        let mut handler = Server {
            pump: Pump::new(&self.wire),
            wire: Arc::clone(&self.wire),
            input: Input { queue: None, chain: Chain::new(), held: false, interrupt: Arc::clone(&interrupt) },
            output: None,
            chain: Chain::new(),
            interrupt: Arc::clone(&interrupt),
        };
        for (queue, kick) in queues {
            let index = queue.index();
            let served = Some(Served { queue, kick, spoiled: false });
            match index {
                RX => handler.input.queue = served,
                TX => handler.output = served,
                other => return Err(DeviceError::Driver(format!("A console has no queue {other}"))),
            }
        }
        let id = worker.add(Box::new(handler)).map_err(|source| DeviceError::Host {
            what: "A console cannot start its worker".to_owned(),
            source,
        })?;
        self.running = Some((worker, id));
        self.size.tell((features & F_SIZE != 0).then_some(interrupt));
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        self.size.tell(None);
        let Some((worker, id)) = self.running.take() else { return Ok(Vec::new()) };
        worker.remove(id).map_err(|source| DeviceError::Host {
            what: "A console cannot stop its worker".to_owned(),
            source,
        })
    }

    /// The size of the terminal. Output that waits for the host's reader stays with this
    /// process.
    fn save(&self) -> Section {
        let (columns, rows) = self.size.get();
        Section::new(KIND, VERSION, &Saved { columns, rows })
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let Saved { columns, rows } = section.open(KIND, VERSION)?;
        self.size.set(columns, rows);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.wire.counters()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// What is saved of a console, version 1.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    columns: u16,
    rows: u16,
}

struct Served {
    queue: Queue,
    kick: EventFd,
    /// The driver broke its rules; not looked at any more.
    spoiled: bool,
}

impl Served {
    fn publish(&mut self, interrupt: &dyn Interrupt) {
        if self.queue.publish() {
            interrupt.queue(self.queue.index());
        }
    }

    fn fail(&mut self, error: QueueError, interrupt: &dyn Interrupt) {
        self.spoiled = true;
        log::warn!("Queue {} of a console cannot be served: {error}", self.queue.index());
        interrupt.needs_reset();
    }
}

/// The guest's side of input: its receive queue.
struct Input {
    queue: Option<Served>,
    chain: Chain,
    /// `chain` was popped and waits for bytes.
    held: bool,
    interrupt: Arc<dyn Interrupt>,
}

impl Input {
    /// Sees to it that there is a buffer; false, with the doorbell armed, when there is none.
    fn hold(&mut self) -> Result<bool, QueueError> {
        let Some(served) = &mut self.queue else { return Ok(false) };
        let queue = &mut served.queue;
        queue.disarm();
        // A driver that offers buffers without any room cannot keep this busy for ever.
        for _ in 0..TURN_BUDGET {
            if self.held {
                break;
            }
            if !queue.pop(&mut self.chain)? {
                if !queue.arm() {
                    break;
                }
                queue.disarm();
            } else if self.chain.writable_len() == 0 {
                queue.push(self.chain.head(), 0);
            } else {
                self.held = true;
            }
        }
        served.publish(&*self.interrupt);
        Ok(self.held)
    }
}

impl Receiver for Input {
    fn room(&mut self) -> usize {
        if self.queue.as_ref().is_none_or(|served| served.spoiled) {
            return 0;
        }
        match self.hold() {
            Ok(true) => usize::try_from(self.chain.writable_len()).unwrap_or(usize::MAX),
            Ok(false) => 0,
            Err(e) => {
                let interrupt = Arc::clone(&self.interrupt);
                self.queue.iter_mut().for_each(|served| served.fail(e, &*interrupt));
                0
            }
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let Some(served) = self.queue.as_mut().filter(|_| self.held) else { return };
        let written = self.chain.write(&served.queue, 0, bytes);
        served.queue.push(self.chain.head(), written as u32);
        self.held = false;
        served.publish(&*self.interrupt);
    }
}

struct Server {
    pump: Pump,
    wire: Arc<Wire>,
    input: Input,
    output: Option<Served>,
    chain: Chain,
    interrupt: Arc<dyn Interrupt>,
}

impl Server {
    fn transmit(&mut self) {
        let Some(served) = self.output.as_mut().filter(|served| !served.spoiled) else { return };
        if let Err(e) = transmit(served, &mut self.chain, &self.wire, &*self.interrupt) {
            served.fail(e, &*self.interrupt);
        }
    }
}

fn transmit(
    served: &mut Served,
    chain: &mut Chain,
    wire: &Wire,
    interrupt: &dyn Interrupt,
) -> Result<(), QueueError> {
    served.queue.disarm();
    for _ in 0..TURN_BUDGET {
        while !served.queue.pop(chain)? {
            served.publish(interrupt);
            if !served.queue.arm() {
                return Ok(());
            }
            served.queue.disarm();
        }
        let mut piece = [0; 4096];
        let mut done = 0;
        while done < CONSOLE_REQUEST_MAX {
            let len = chain.read(done, &mut piece);
            if len == 0 {
                break;
            }
            wire.write(piece.get(..len).unwrap_or_default());
            done += len as u64;
        }
        served.queue.push(chain.head(), 0);
    }
    served.publish(interrupt);
    let _ = served.kick.write(1);
    Ok(())
}

impl Handler for Server {
    fn sources(&self) -> Vec<Source> {
        let mut sources = self.pump.sources();
        sources.extend(self.input.queue.as_ref().map(|served| Source::readable(&served.kick, RX_KICK)));
        sources.extend(self.output.as_ref().map(|served| Source::readable(&served.kick, TX_KICK)));
        sources
    }

    fn ready(&mut self, token: u32, _: EventSet, watch: &mut Watch<'_>) {
        match token {
            RX_KICK => {
                let _ = self.input.queue.as_ref().map(|served| served.kick.read());
                self.pump.look(watch, &mut self.input);
            }
            TX_KICK => {
                let _ = self.output.as_ref().map(|served| served.kick.read());
                self.transmit();
            }
            token => self.pump.ready(token, watch, &mut self.input),
        }
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        let Server { pump, mut input, output, .. } = *self;
        pump.give_back();
        if let Some(served) = input.queue.as_mut().filter(|_| input.held) {
            served.queue.undo_pop(1);
        }
        input.queue.into_iter().chain(output).map(|served| served.queue).collect()
    }
}

#[cfg(test)]
mod tests;
