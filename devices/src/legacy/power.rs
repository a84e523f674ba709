//! The power registers of a machine without the hardware that ACPI once assumed.
//!
//! A hardware-reduced ACPI machine (ACPI 6.5 section 4.1) has no fixed power block. It needs
//! a sleep control and a sleep status register (4.8.3.7), a reset register (4.8.3.6), and a
//! Generic Event Device (5.6.9) that tells the guest of a pressed power button. All four
//! live here in sixteen I/O ports, whose places the ACPI tables name:
//!
//! ```text
//!   +0  sleep control  u8   guest writes SLP_EN | S5 << 2: the machine goes off
//!   +1  sleep status   u8   WAK_STS, cleared by writing it
//!   +2  reset          u8   guest writes RESET_VALUE: the machine is reset
//!   +4  event status   u32  what happened; reading clears the bits that were read
//! ```
//!
//! The event register and the interrupt line go together: [`Power::raise`] sets the bit
//! first and then pulls the line, so a guest that sees the interrupt finds its cause.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU32, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use crate::{
    bus::Registers,
    state::{Section, StateError},
};

/// First I/O port of the block.
pub const BASE: u16 = 0x600;
/// Number of ports.
pub const LEN: u16 = 16;
/// Port of the sleep control register, 8 bits (FADT `SLEEP_CONTROL_REG`).
pub const SLEEP_CONTROL: u16 = BASE;
/// Port of the sleep status register, 8 bits (FADT `SLEEP_STATUS_REG`).
pub const SLEEP_STATUS: u16 = BASE + 1;
/// Port of the reset register, 8 bits (FADT `RESET_REG`).
pub const RESET: u16 = BASE + 2;
/// What resets the machine when written to [`RESET`] (FADT `RESET_VALUE`).
pub const RESET_VALUE: u8 = 1;
/// Port of the event status register, 32 bits, for the Generic Event Device's method.
pub const EVENT_STATUS: u16 = BASE + 4;
/// Sleep type of the soft-off state, as the `_S5` package must name it.
pub const S5_TYPE: u8 = 5;

/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1 << 0;
/// Event bit: processors came or are to go.
pub const EVENT_PROCESSORS: u32 = 1 << 1;
/// Event bit: memory came or is to go.
pub const EVENT_MEMORY: u32 = 1 << 2;
/// Event bit: the machine was restored and has a new generation id.
pub const EVENT_GENERATION: u32 = 1 << 3;
/// Event bit: PCI devices came or are to go.
pub const EVENT_PCI: u32 = 1 << 4;

const SLP_EN: u8 = 1 << 5;
const SLP_TYPE_SHIFT: u8 = 2;
const SLP_TYPE_MASK: u8 = 7;
const WAK_STS: u8 = 1 << 7;
const KIND: &str = "power";

/// What the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Switch the machine off.
    Off,
    /// Start it again from the beginning.
    Reset,
}

/// Called, on the vCPU thread that wrote the register, with what the guest asked for. It may
/// be called more than once and must not block.
pub type PowerCallback = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// The register block.
pub struct Power {
    callback: PowerCallback,
    line: EventFd,
    sleep_status: AtomicU8,
    pending: AtomicU32,
}

impl Power {
    /// A block that reports to `callback` and raises `line`, the interrupt of the Generic
    /// Event Device.
    pub fn new(callback: PowerCallback, line: EventFd) -> Power {
        Power { callback, line, sleep_status: AtomicU8::new(0), pending: AtomicU32::new(0) }
    }

    /// Tells the guest of `events` (the `EVENT_` bits). Several may be pending at once.
    pub fn raise(&self, events: u32) {
        self.pending.fetch_or(events, Ordering::AcqRel);
        if let Err(e) = self.line.write(1) {
            log::warn!("The interrupt of the event device cannot be raised: {e}");
        }
    }

    /// Presses the power button; what the guest does then is its own affair.
    pub fn press_power_button(&self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// The events that the guest has not read yet.
    pub fn save(&self) -> Section {
        let state = (self.sleep_status.load(Ordering::Acquire), self.pending.load(Ordering::Acquire));
        Section::new(KIND, 1, &state)
    }

    /// Takes over saved bits and raises the line again when events were pending: the
    /// interrupt may have been under way.
    pub fn restore(&self, section: &Section) -> Result<(), StateError> {
        let (status, pending): (u8, u32) = section.open(KIND, 1)?;
        self.sleep_status.store(status & WAK_STS, Ordering::Release);
        self.pending.store(0, Ordering::Release);
        if pending != 0 {
            self.raise(pending);
        }
        Ok(())
    }
}

impl Registers for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let first = u64::from(EVENT_STATUS - BASE);
        match offset {
            1 if data.len() == 1 => data[0] = self.sleep_status.load(Ordering::Acquire),
            // A byte or a word of the event register: only the bits read are taken.
            at if at >= first && at + data.len() as u64 <= first + 4 => {
                let shift = 8 * (at - first) as u32;
                let mask = data.iter().enumerate().fold(0, |m, (i, _)| m | 0xff << (shift + 8 * i as u32));
                let taken = self.pending.fetch_and(!mask, Ordering::AcqRel) & mask;
                let bytes = (taken >> shift).to_le_bytes();
                data.iter_mut().zip(bytes).for_each(|(d, b)| *d = b);
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            0 if value & SLP_EN != 0 && value >> SLP_TYPE_SHIFT & SLP_TYPE_MASK == S5_TYPE => {
                (self.callback)(PowerEvent::Off);
            }
            1 => {
                self.sleep_status.fetch_and(!(value & WAK_STS), Ordering::AcqRel);
            }
            2 if value == RESET_VALUE => (self.callback)(PowerEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn power() -> (Power, EventFd, Arc<Mutex<Vec<PowerEvent>>>) {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let callback: PowerCallback = Arc::new(move |event| sink.lock().unwrap().push(event));
        (Power::new(callback, line.try_clone().unwrap()), line, seen)
    }

    fn status(power: &Power) -> u32 {
        let mut data = [0; 4];
        power.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn only_the_soft_off_state_with_the_enable_bit_switches_off() {
        let (power, _, seen) = power();
        for value in [0, S5_TYPE << 2, SLP_EN, SLP_EN | 3 << 2, !(S5_TYPE << 2) | SLP_EN] {
            power.write(0, &[value]);
        }
        assert!(seen.lock().unwrap().is_empty());
        power.write(0, &[SLP_EN | S5_TYPE << 2]);
        power.write(2, &[0]);
        power.write(2, &[RESET_VALUE]);
        assert_eq!(*seen.lock().unwrap(), [PowerEvent::Off, PowerEvent::Reset]);
    }

    #[test]
    fn the_button_raises_the_line_and_reading_takes_the_bit() {
        let (power, line, _) = power();
        power.press_power_button();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(status(&power), EVENT_POWER_BUTTON);
        assert_eq!(status(&power), 0);
    }

    #[test]
    fn a_byte_read_takes_only_its_own_bits() {
        let (power, _, _) = power();
        power.raise(0x0102);
        let mut data = [0xff];
        power.read(5, &mut data);
        assert_eq!((data, status(&power)), ([1], 2));
    }

    #[test]
    fn pending_events_survive_a_save_with_their_interrupt() {
        let (power, ..) = power();
        power.press_power_button();
        let (other, line, _) = self::power();
        other.restore(&power.save()).unwrap();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(status(&other), EVENT_POWER_BUTTON);
        assert!(other.restore(&Section::new("serial", 1, &0u8)).is_err());
    }

    #[test]
    fn accesses_of_any_place_and_size_are_harmless() {
        let (power, _, seen) = power();
        for offset in 0..16u64 {
            for len in 1..=8.min(16 - offset as usize) {
                let mut data = vec![0xff; len];
                power.read(offset, &mut data);
                assert!(data.iter().all(|b| *b == 0), "{offset}+{len}");
                power.write(offset, &vec![0x40; len]);
            }
        }
        assert!(seen.lock().unwrap().is_empty());
    }
}
