//! The keyboard controller: the oldest way to reset a machine, and a keyboard with one chord.
//!
//! ```text
//!   0x60  data      read: next byte of the output buffer   write: to the keyboard, or the
//!                                                           second byte of a command
//!   0x61  port B    read: 0x20, so that timer calibration loops end at once
//!   0x64  status    read: OBF, SYS, CMD                     write: command
//! ```
//!
//! Guests reset through command `0xfe` (pulse the reset line) or through bit 0 of the output
//! port (`0xd1`). Linux drives the rest only to find out that a keyboard is there, which is
//! what lets [`I8042::send_ctrl_alt_del`] ask a guest without ACPI to restart. There is no
//! mouse: the auxiliary port answers its test as broken, so that a driver leaves it at once
//! instead of waiting for a mouse to time out. The crate vm-superio has only the reset
//! command, so this is written here.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    bus::Registers,
    legacy::power::{PowerCallback, PowerEvent},
    limits::KEYBOARD_BUFFER,
    state::{Section, StateError},
};

/// First I/O port.
pub const BASE: u16 = 0x60;
/// Number of ports, of which the first, second and fifth answer.
pub const LEN: u16 = 5;
/// Interrupt line of the keyboard.
pub const GSI: u32 = 1;

const STATUS_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
/// Not "inhibited": the keyboard lock of early machines is open.
const STATUS_UNLOCKED: u8 = 1 << 4;

const CONTROL_INTERRUPT: u8 = 1 << 0;
const CONTROL_SYSTEM: u8 = 1 << 2;
const CONTROL_DISABLED: u8 = 1 << 4;
const CONTROL_AUX_DISABLED: u8 = 1 << 5;
const CONTROL_TRANSLATE: u8 = 1 << 6;

/// Output port as read back: reset line high, A20 open.
const OUTPUT_PORT: u8 = 0b11;
const OUTPUT_PORT_RESET: u8 = 1;

const ACK: u8 = 0xfa;
const KIND: &str = "i8042";

/// Ctrl, Alt and Delete pressed and let go, in the codes a translating controller hands out
/// (set 1) and in those of the keyboard itself (set 2).
const CHORD_SET_1: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const CHORD_SET_2: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// The guest does not listen to its keyboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The guest has no driver listening to its keyboard, so Ctrl-Alt-Del cannot reach it")]
pub struct NotListening;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    control: u8,
    /// The last write went to the command port.
    command: bool,
    /// Command whose second byte is awaited at the data port.
    awaiting: Option<u8>,
    /// Keyboard command whose argument is awaited.
    keyboard_awaiting: Option<u8>,
    /// The keyboard was told to send keys.
    scanning: bool,
    output: VecDeque<u8>,
}

/// The controller with its keyboard.
pub struct I8042 {
    callback: PowerCallback,
    line: EventFd,
    state: Mutex<State>,
    reads: AtomicU64,
    writes: AtomicU64,
    errors: AtomicU64,
}

impl I8042 {
    /// A controller that reports resets to `callback` and raises `line`, interrupt [`GSI`].
    pub fn new(callback: PowerCallback, line: EventFd) -> I8042 {
        let state = State {
            control: CONTROL_SYSTEM | CONTROL_AUX_DISABLED | CONTROL_TRANSLATE,
            command: false,
            awaiting: None,
            keyboard_awaiting: None,
            scanning: true,
            output: VecDeque::new(),
        };
        let [reads, writes, errors] = [(); 3].map(|()| AtomicU64::new(0));
        I8042 { callback, line, state: Mutex::new(state), reads, writes, errors }
    }

    /// Accesses by the guest, and those among them to registers that do not exist.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters =
            [("read_count", &self.reads), ("write_count", &self.writes), ("error_count", &self.errors)];
        counters.map(|(name, count)| (name, count.load(Relaxed))).to_vec()
    }

    /// Presses Ctrl, Alt and Delete.
    pub fn send_ctrl_alt_del(&self) -> Result<(), NotListening> {
        let mut state = self.lock();
        let listens = state.scanning
            && state.control & (CONTROL_INTERRUPT | CONTROL_DISABLED) == CONTROL_INTERRUPT
            && state.output.len() + CHORD_SET_2.len() <= KEYBOARD_BUFFER;
        if !listens {
            return Err(NotListening);
        }
        let translate = state.control & CONTROL_TRANSLATE != 0;
        let chord: &[u8] = if translate { &CHORD_SET_1 } else { &CHORD_SET_2 };
        chord.iter().for_each(|code| self.put(&mut state, *code));
        Ok(())
    }

    /// The controller's registers and the bytes the guest has not read yet.
    pub fn save(&self) -> Section {
        Section::new(KIND, 1, &*self.lock())
    }

    /// Takes over saved registers; a byte that waits raises its interrupt again.
    pub fn restore(&self, section: &Section) -> Result<(), StateError> {
        let saved: State = section.open(KIND, 1)?;
        if saved.output.len() > KEYBOARD_BUFFER {
            let reason = format!("{} bytes wait, at most {KEYBOARD_BUFFER} can", saved.output.len());
            return Err(StateError::Impossible { kind: KIND, reason });
        }
        let mut state = self.lock();
        *state = saved;
        self.interrupt(&state);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: &mut State, byte: u8) {
        if state.output.len() < KEYBOARD_BUFFER {
            state.output.push_back(byte);
            if state.output.len() == 1 {
                self.interrupt(state);
            }
        }
    }

    /// Raises the line for the byte at the head of the output buffer.
    fn interrupt(&self, state: &State) {
        if state.control & CONTROL_INTERRUPT != 0 && !state.output.is_empty() {
            // The counter of an event descriptor cannot overflow by ones.
            let _ = self.line.write(1);
        }
    }

    fn command(&self, state: &mut State, command: u8) {
        state.command = true;
        state.awaiting = None;
        match command {
            0x20 => self.put(state, state.control),
            0x60 | 0xd1..=0xd4 => state.awaiting = Some(command),
            0xa7 => state.control |= CONTROL_AUX_DISABLED,
            0xa8 => state.control &= !CONTROL_AUX_DISABLED,
            // The auxiliary port's clock line is stuck: there is no such port.
            0xa9 => self.put(state, 0x01),
            // A self test also empties the buffer and ends a command half given.
            0xaa => {
                state.output.clear();
                self.put(state, 0x55);
            }
            0xab => self.put(state, 0x00),
            0xad => state.control |= CONTROL_DISABLED,
            0xae => state.control &= !CONTROL_DISABLED,
            0xc0 => self.put(state, 0x80),
            0xd0 => self.put(state, OUTPUT_PORT),
            // Pulse the lines whose bit is clear; line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => (self.callback)(PowerEvent::Reset),
            _ => {}
        }
    }

    fn data(&self, state: &mut State, byte: u8) {
        state.command = false;
        match state.awaiting.take() {
            Some(0x60) => {
                let was = state.control;
                state.control = byte;
                if was & CONTROL_INTERRUPT == 0 {
                    self.interrupt(state);
                }
            }
            Some(0xd1) if byte & OUTPUT_PORT_RESET == 0 => (self.callback)(PowerEvent::Reset),
            // Written back as if a device had sent it. The loop through the auxiliary port
            // (0xd3) comes back as keyboard data, which says that there is no such port.
            Some(0xd2 | 0xd3) => self.put(state, byte),
            Some(_) => {}
            None => self.keyboard(state, byte),
        }
    }

    /// A byte for the keyboard itself, which sends no keys before it is told to.
    fn keyboard(&self, state: &mut State, byte: u8) {
        state.control &= !CONTROL_DISABLED;
        if let Some(command) = state.keyboard_awaiting.take() {
            self.put(state, ACK);
            if command == 0xf0 && byte == 0 {
                self.put(state, 2);
            }
            return;
        }
        match byte {
            0xee => self.put(state, 0xee),
            0xed | 0xf0 | 0xf3 => {
                state.keyboard_awaiting = Some(byte);
                self.put(state, ACK);
            }
            0xf2 => [ACK, 0xab, 0x83].iter().for_each(|b| self.put(state, *b)),
            0xf4 | 0xf6 => {
                state.scanning = true;
                self.put(state, ACK);
            }
            0xf5 => {
                state.scanning = false;
                self.put(state, ACK);
            }
            0xff => {
                state.scanning = true;
                [ACK, 0xaa].iter().for_each(|b| self.put(state, *b));
            }
            _ => self.put(state, ACK),
        }
    }
}

impl Registers for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.reads.fetch_add(1, Relaxed);
        let [value] = data else { return };
        let mut state = self.lock();
        *value = match offset {
            0 => {
                let byte = state.output.pop_front().unwrap_or(0);
                self.interrupt(&state);
                byte
            }
            1 => 0x20,
            4 => {
                let full = if state.output.is_empty() { 0 } else { STATUS_FULL };
                let command = if state.command { STATUS_COMMAND } else { 0 };
                full | command | STATUS_UNLOCKED | state.control & STATUS_SYSTEM
            }
            _ => {
                self.errors.fetch_add(1, Relaxed);
                0xff
            }
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.writes.fetch_add(1, Relaxed);
        let &[value] = data else { return };
        let mut state = self.lock();
        match offset {
            0 => self.data(&mut state, value),
            4 => self.command(&mut state, value),
            _ => {
                self.errors.fetch_add(1, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::*};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    struct Rig {
        i8042: I8042,
        line: EventFd,
        resets: Arc<AtomicU32>,
    }

    fn rig() -> Rig {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let resets = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&resets);
        let callback: PowerCallback = Arc::new(move |event| {
            assert_eq!(event, PowerEvent::Reset);
            count.fetch_add(1, Ordering::SeqCst);
        });
        Rig { i8042: I8042::new(callback, line.try_clone().unwrap()), line, resets }
    }

    impl Rig {
        fn command(&self, command: u8, argument: Option<u8>) {
            self.i8042.write(4, &[command]);
            argument.iter().for_each(|a| self.i8042.write(0, &[*a]));
        }
        fn get(&self, offset: u64) -> u8 {
            let mut data = [0xee];
            self.i8042.read(offset, &mut data);
            data[0]
        }
        fn drain(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.get(4) & STATUS_FULL != 0 {
                bytes.push(self.get(0));
            }
            bytes
        }
    }

    #[test]
    fn both_ways_of_reset_reach_the_callback() {
        let rig = rig();
        rig.command(0xff, None);
        rig.command(0xd1, Some(0b11));
        assert_eq!(rig.resets.load(Ordering::SeqCst), 0);
        rig.command(0xfe, None);
        rig.command(0xd1, Some(0b10));
        assert_eq!(rig.resets.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_driver_finds_a_keyboard_and_no_mouse() {
        let rig = rig();
        rig.command(0xaa, None);
        assert_eq!(rig.drain(), [0x55]);
        rig.command(0x60, Some(0x44));
        rig.command(0x20, None);
        assert_eq!(rig.drain(), [0x44]);
        rig.command(0xd3, Some(0x5a));
        assert_eq!((rig.get(4) & 0x20, rig.drain()), (0, vec![0x5a]), "not marked as auxiliary data");
        rig.command(0xa9, None);
        assert_eq!(rig.drain(), [0x01]);
        rig.command(0xab, None);
        assert_eq!(rig.drain(), [0x00]);
        rig.i8042.write(0, &[0xff]);
        assert_eq!(rig.drain(), [ACK, 0xaa]);
        rig.i8042.write(0, &[0xf2]);
        assert_eq!(rig.drain(), [ACK, 0xab, 0x83]);
        for byte in [0xed, 0xfe] {
            rig.i8042.write(0, &[byte]);
            assert_eq!(rig.drain(), [ACK], "an argument is never taken for a command");
        }
        assert_eq!(rig.resets.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn the_chord_needs_a_listener_and_interrupts_once_a_byte() {
        let rig = rig();
        assert_eq!(rig.i8042.send_ctrl_alt_del(), Err(NotListening));
        rig.command(0x60, Some(CONTROL_INTERRUPT | CONTROL_TRANSLATE));
        rig.i8042.send_ctrl_alt_del().unwrap();
        let mut interrupts = rig.line.read().unwrap();
        for code in CHORD_SET_1 {
            assert_eq!(rig.get(0), code);
            interrupts += rig.line.read().unwrap_or(0);
        }
        assert_eq!(interrupts, CHORD_SET_1.len() as u64);
        rig.command(0x60, Some(CONTROL_INTERRUPT));
        rig.i8042.send_ctrl_alt_del().unwrap();
        assert_eq!(rig.drain(), CHORD_SET_2);
        rig.i8042.write(0, &[0xf5]);
        rig.drain();
        assert_eq!(rig.i8042.send_ctrl_alt_del(), Err(NotListening));
    }

    #[test]
    fn a_guest_that_never_reads_fills_nothing() {
        let rig = rig();
        rig.command(0x60, Some(CONTROL_INTERRUPT | CONTROL_TRANSLATE));
        for byte in 0..100_000u32 {
            rig.i8042.write(u64::from(byte % 5), &[byte as u8 | 1]);
        }
        assert!(rig.i8042.lock().output.len() <= KEYBOARD_BUFFER);
        let _ = rig.i8042.send_ctrl_alt_del();
        assert!(rig.drain().len() <= KEYBOARD_BUFFER);
    }

    #[test]
    fn state_with_a_waiting_byte_survives_a_save() {
        let rig = rig();
        rig.command(0x60, Some(CONTROL_INTERRUPT | CONTROL_TRANSLATE));
        rig.i8042.send_ctrl_alt_del().unwrap();
        rig.get(0);
        let other = self::rig();
        other.i8042.restore(&rig.i8042.save()).unwrap();
        assert_eq!(other.line.read().unwrap(), 1);
        assert_eq!(other.drain(), CHORD_SET_1[1..]);
        let mut long = rig.i8042.lock().clone();
        long.output = vec![0; KEYBOARD_BUFFER + 1].into();
        let section = Section::new(KIND, 1, &long);
        assert!(matches!(other.i8042.restore(&section), Err(StateError::Impossible { .. })));
    }
}
