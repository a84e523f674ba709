//! The serial port: a 16550 over the crate vm-superio.
//!
//! ```text
//!   port   read                      write
//!   +0     received byte             byte to send              (divisor while DLAB is set)
//!   +1     interrupt enable          interrupt enable          (divisor while DLAB is set)
//!   +2     interrupt identification  FIFO control
//!   +3     line control              line control
//!   +4     modem control             modem control
//!   +5     line status               -
//!   +6     modem status              -
//!   +7     scratch                   scratch
//! ```
//!
//! vm-superio keeps the registers. Output goes into a [`Wire`] and so never makes the vCPU
//! wait; input comes from the [`Pump`] and only as far as the 64-byte FIFO has room, so a
//! flood on standard input stays in the sender's pipe. The pump starts with the first use:
//! the guest enables the receive interrupt (before that, Linux throws input away) and there can
//! be input, or output has to wait. A machine whose console is a file or nothing, or whose input
//! is `/dev/null`, never starts it.
//!
//! A limit of output, if there is one, drops what is beyond it and counts it, as Firecracker
//! does: holding it would either stop the vCPU or need memory without end, and the guest is
//! told by nothing in a UART that it should wait.

use std::{
    io::{self, Write},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use vm_superio::{
    Trigger,
    serial::{SerialEvents, SerialState},
};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    output::{Output, OutputError},
    pump::{Pump, Receiver, Wake},
    wire::Wire,
};
use crate::{
    bus::Registers,
    limiter::{self, Bucket, BucketConfig, BucketState},
    state::{Section, StateError},
    virtio::queue::Queue,
    worker::{Handler, HandlerId, Source, Watch, Worker},
};

/// First I/O port of `ttyS0`.
pub const BASE: u16 = 0x3f8;
/// Number of ports.
pub const LEN: u16 = 8;
/// Interrupt line of `ttyS0`.
pub const GSI: u32 = 4;

/// Bytes in the receive FIFO of vm-superio.
const FIFO: usize = 64;
const IER: u64 = 1;
const IER_RECEIVE: u8 = 1;
const LCR_DIVISOR: u8 = 1 << 7;
const LSR_READY: u8 = 1;
const LSR_IDLE: u8 = 0x60;
const KIND: &str = "serial";
const VERSION: u16 = 2;

type Uart = vm_superio::Serial<Line, Room, Sender>;

/// The interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes the pump when the guest has emptied the FIFO and input was waiting for that.
#[derive(Clone)]
struct Room {
    wake: Wake,
    wanted: Arc<AtomicBool>,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.wanted.swap(false, Ordering::AcqRel) {
            self.wake.wake();
        }
    }
}

/// The UART's way out.
struct Sender {
    wire: Arc<Wire>,
    /// Bytes wait for the pump; looked at once the register is written.
    backlog: bool,
    /// A limit of bytes.
    limit: Option<Bucket>,
    /// Bytes beyond it.
    limited: Arc<AtomicU64>,
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let passes = |bucket: &mut Bucket| bucket.take(bytes.len() as u64, limiter::now());
        if self.limit.as_mut().is_none_or(passes) {
            self.backlog |= self.wire.write(bytes);
        } else {
            self.limited.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub struct Serial {
    uart: Arc<Mutex<Uart>>,
    wire: Arc<Wire>,
    worker: Worker,
    pump: Mutex<Running>,
    limited: Arc<AtomicU64>,
}

enum Running {
    /// There will never be anything to do.
    Never,
    NotYet(Pump),
    Started(HandlerId),
    Failed,
}

impl Serial {
    /// A port whose far end is `output`; `line` raises interrupt [`GSI`]. Waiting is done on
    /// `worker`, once there is something to wait for.
    pub fn new(output: &Output, line: EventFd, worker: Worker) -> Result<Serial, OutputError> {
        Ok(Serial::with_wire(Wire::open(output)?, line, worker))
    }

    /// The same with a far end that is open already.
    pub fn with_wire(wire: Wire, line: EventFd, worker: Worker) -> Serial {
        let wire = Arc::new(wire);
        let room = Room { wake: Wake::new(&wire), wanted: Arc::default() };
        let limited = Arc::default();
        let sender =
            Sender { wire: Arc::clone(&wire), backlog: false, limit: None, limited: Arc::clone(&limited) };
        let uart = Arc::new(Mutex::new(Uart::with_events(Line(line), room, sender)));
        let pump = match wire.needs_no_pump() {
            true => Running::Never,
            false => Running::NotYet(Pump::new(&wire)),
        };
        Serial { uart, wire, worker, pump: Mutex::new(pump), limited }
    }

    /// Limits output from now on, or no longer; bytes beyond the limit are dropped and
    /// counted. The bucket is full at first; its tokens are saved with the port.
    pub fn limit(&self, limit: Option<BucketConfig>) {
        lock(&self.uart).writer_mut().limit = limit.and_then(|config| Bucket::new(config, limiter::now()));
    }

    /// Path of the file, pseudo-terminal or socket at the far end.
    pub fn place(&self) -> Option<&Path> {
        self.wire.place()
    }

    /// Waits, `limit` at most, for the reader to take what is buffered; true when it has.
    pub fn finish(&self, limit: Duration) -> bool {
        self.wire.finish(limit)
    }

    /// Counters for metrics, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.wire.counters();
        counters.push(("rate_limiter_dropped_bytes", self.limited.load(Ordering::Relaxed)));
        counters
    }

    /// The UART's registers, the input the guest has not read, and the limit of output with its
    /// tokens. Output that waits for the host's reader stays with this process.
    pub fn save(&self) -> Section {
        let mut uart = lock(&self.uart);
        let limit = uart.writer_mut().limit.as_mut().map(|bucket| bucket.save(limiter::now()));
        let state = uart.state();
        drop(uart);
        let saved = Saved {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
            limit,
        };
        Section::new(KIND, VERSION, &saved)
    }

    /// Takes over saved registers. A pending interrupt is raised again, because the one that was
    /// raised may have been under way (a lost transmit interrupt stops a driver for good). The
    /// limit is this port's own; where it is the one that was saved, its tokens come back.
    pub fn restore(&self, section: &Section) -> Result<(), StateError> {
        let saved = Saved::read(section)?;
        let impossible = |reason: String| StateError::Impossible { kind: KIND, reason };
        let listens = saved.interrupt_enable & IER_RECEIVE != 0;
        let bucket = saved.limit.map(|bucket| Bucket::restore(&bucket, limiter::now())).transpose();
        let bucket = bucket.map_err(impossible)?;
        let state = saved.check()?;
        {
            let mut uart = lock(&self.uart);
            let line = uart.interrupt_evt().0.try_clone();
            let line = Line(line.map_err(|e| impossible(format!("no descriptor for its interrupt: {e}")))?);
            let (wire, limited) = (Arc::clone(&self.wire), Arc::clone(&self.limited));
            let own = uart.writer_mut().limit.take();
            let is_same = own.as_ref().map(Bucket::config) == bucket.as_ref().map(Bucket::config);
            let limit = if is_same { bucket } else { own };
            let sender = Sender { wire, backlog: false, limit, limited };
            let events = uart.events().clone();
            *uart = Uart::from_state(&state, line, events, sender).map_err(|e| impossible(e.to_string()))?;
        }
        self.wire.ring_bell();
        if listens {
            self.listen();
        }
        Ok(())
    }

    /// The guest takes input. Most machines have none to give, and no thread for it.
    fn listen(&self) {
        let mut running = self.pump.lock().unwrap_or_else(PoisonError::into_inner);
        let has_input = match &mut *running {
            Running::NotYet(pump) => pump.has_input(),
            _ => false,
        };
        drop(running);
        if has_input {
            self.start();
        }
    }

    /// Starts the pump if it is of use and has not been started.
    fn start(&self) {
        let mut running = self.pump.lock().unwrap_or_else(PoisonError::into_inner);
        *running = match std::mem::replace(&mut *running, Running::Failed) {
            Running::NotYet(pump) => {
                let handler = PortHandler { pump, port: Port(Arc::clone(&self.uart)) };
                match self.worker.add(Box::new(handler)) {
                    Ok(id) => Running::Started(id),
                    Err(e) => {
                        log::error!("The serial port has no input, because its worker failed: {e}");
                        Running::Failed
                    }
                }
            }
            other => other,
        };
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        let running = self.pump.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Running::Started(id) = *running {
            let _ = self.worker.remove(id);
        }
    }
}

impl Registers for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (data, u8::try_from(offset)) {
            ([value], Ok(offset)) => *value = lock(&self.uart).read(offset),
            (data, _) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (&[value], Ok(register)) = (data, u8::try_from(offset)) else { return };
        let (listens, jams) = {
            let mut uart = lock(&self.uart);
            // The line is an event descriptor and the sender never fails.
            let _ = uart.write(register, value);
            let listens = offset == IER && value & IER_RECEIVE != 0 && uart.read(3) & LCR_DIVISOR == 0;
            (listens, std::mem::take(&mut uart.writer_mut().backlog))
        };
        if jams {
            self.start();
        } else if listens {
            self.listen();
        }
    }
}

fn lock(uart: &Mutex<Uart>) -> MutexGuard<'_, Uart> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest's side of input: the receive FIFO.
struct Port(Arc<Mutex<Uart>>);

impl Receiver for Port {
    fn room(&mut self) -> usize {
        let uart = lock(&self.0);
        let room = uart.fifo_capacity();
        if room == 0 {
            // Under the UART's lock, so that the guest cannot empty the FIFO in between.
            uart.events().wanted.store(true, Ordering::Release);
        }
        room
    }

    fn receive(&mut self, bytes: &[u8]) {
        // In loopback mode the line is cut and input is lost, as on the real part.
        let _ = lock(&self.0).enqueue_raw_bytes(bytes);
    }
}

struct PortHandler {
    pump: Pump,
    port: Port,
}

impl Handler for PortHandler {
    fn sources(&self) -> Vec<Source> {
        self.pump.sources()
    }

    fn ready(&mut self, token: u32, _: EventSet, watch: &mut Watch<'_>) {
        self.pump.ready(token, watch, &mut self.port);
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        self.pump.give_back();
        Vec::new()
    }
}

/// What is saved of a port, version 2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
    /// Limit of output, if there is one, with its tokens.
    limit: Option<BucketState>,
}

impl Saved {
    /// Of version 1, too, which was all but the limit.
    fn read(section: &Section) -> Result<Saved, StateError> {
        if section.version != 1 {
            return section.open(KIND, VERSION);
        }
        let (divisor, enable, identification, line_control, modem_control, modem_status, scratch, input) =
            section.open(KIND, 1)?;
        Ok(Saved {
            divisor,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            modem_control,
            modem_status,
            scratch,
            input,
            limit: None,
        })
    }

    /// Refuses what no UART can hold; bits that follow from others are computed.
    fn check(self) -> Result<SerialState, StateError> {
        let impossible = |reason: String| Err(StateError::Impossible { kind: KIND, reason });
        if self.input.len() > FIFO {
            return impossible(format!("{} input bytes wait, the FIFO holds {FIFO}", self.input.len()));
        }
        if !matches!(self.interrupt_identification, 1 | 2 | 4 | 6) || self.interrupt_enable > 0xf {
            let (iir, ier) = (self.interrupt_identification, self.interrupt_enable);
            return impossible(format!("interrupt registers {iir:#x} and {ier:#x} have unknown bits"));
        }
        Ok(SerialState {
            baud_divisor_low: self.divisor[0],
            baud_divisor_high: self.divisor[1],
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: LSR_IDLE | if self.input.is_empty() { 0 } else { LSR_READY },
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.input,
        })
    }
}

#[cfg(test)]
mod tests;
