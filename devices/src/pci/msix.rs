//! Message-signalled interrupts of one function (PCI 3.0 section 6.8.2).
//!
//! ```text
//!   table entry: address (8) data (4) control (4, bit 0: masked)   one for each vector
//!   pending bits: one for each vector, set while it fired but was masked
//! ```
//!
//! Workers fire vectors, vCPUs program them. A message is sent with the table locked: once a
//! guest's write that masks or moves a vector has returned, no message with the old contents
//! is still on its way. The lock is never held while anything waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::host::{Host, Message};

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Most vectors a function here has: as many as fit into a page.
pub const VECTORS_MAX: u16 = 256;
/// Message control: MSI-X is in use.
pub const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const MASK_ALL: u16 = 1 << 14;

const ENTRY: u64 = 16;
const CONTROL_MASKED: u32 = 1;

/// One vector, as it is saved too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

struct Table {
    control: u16,
    vectors: Vec<Vector>,
}

/// The vectors of one function.
pub struct Msix {
    host: Arc<dyn Host>,
    table: Mutex<Table>,
}

impl Msix {
    /// `count` vectors (1 to [`VECTORS_MAX`]), all masked and off.
    pub fn new(host: Arc<dyn Host>, count: u16) -> Msix {
        let vector = Vector { address: 0, data: 0, masked: true, pending: false };
        let vectors = vec![vector; usize::from(count.clamp(1, VECTORS_MAX))];
        Msix { host, table: Mutex::new(Table { control: 0, vectors }) }
    }

    /// The capability behind its id and link: control, where the table lies, where the
    /// pending bits lie (both in BAR 0); and the mask of what software may write there.
    pub fn capability(&self, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let last = (self.count() - 1).to_le_bytes();
        let (t, p) = (table.to_le_bytes(), pending.to_le_bytes());
        let body = [last[0], last[1], t[0], t[1], t[2], t[3], p[0], p[1], p[2], p[3]];
        (body, (ENABLE | MASK_ALL).to_le_bytes())
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.table().vectors.len() as u16
    }

    /// Whether the guest uses message-signalled interrupts.
    pub fn enabled(&self) -> bool {
        self.table().control & ENABLE != 0
    }

    /// The guest wrote message control. Vectors that fired while masked are sent now.
    pub fn set_control(&self, control: u16) {
        let mut table = self.table();
        if table.control != control {
            table.control = control;
            for index in 0..table.vectors.len() {
                self.release(&mut table, index);
            }
        }
    }

    /// Fires vector `index`: sends its message, or remembers it while it is masked. Nothing
    /// happens when there is no such vector or MSI-X is off.
    pub fn fire(&self, index: u16) {
        let mut table = self.table();
        let enabled = table.control & ENABLE != 0;
        if let Some(vector) = table.vectors.get_mut(usize::from(index)).filter(|_| enabled) {
            vector.pending = true;
            self.release(&mut table, usize::from(index));
        }
    }

    /// Reads the table at `offset`: aligned words of 4 or 8 bytes, all ones otherwise.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !aligned(offset, data.len()) {
            return;
        }
        let table = self.table();
        for (word, at) in data.chunks_mut(4).zip((offset..).step_by(4)) {
            if let Some(vector) = table.vectors.get((at / ENTRY) as usize) {
                let value = match at % ENTRY {
                    0 => vector.address as u32,
                    4 => (vector.address >> 32) as u32,
                    8 => vector.data,
                    _ => u32::from(vector.masked),
                };
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table at `offset`: aligned words of 4 or 8 bytes, others are dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        let mut table = self.table();
        for (word, at) in data.chunks(4).zip((offset..).step_by(4)) {
            let index = (at / ENTRY) as usize;
            let (Some(vector), Ok(word)) = (table.vectors.get_mut(index), <[u8; 4]>::try_from(word)) else {
                return;
            };
            let value = u32::from_le_bytes(word);
            match at % ENTRY {
                // The two lowest address bits are always zero.
                0 => vector.address = vector.address & !0xffff_ffff | u64::from(value & !3),
                4 => vector.address = vector.address & 0xffff_ffff | u64::from(value) << 32,
                8 => vector.data = value,
                _ => vector.masked = value & CONTROL_MASKED != 0,
            }
            self.release(&mut table, index);
        }
    }

    /// Reads the pending bits at `offset`; zero behind the last vector. They cannot be
    /// written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.table();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = table.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, vector)| byte | u8::from(vector.pending) << bit);
        }
    }

    /// The vectors, for saving. Message control lies in configuration space.
    pub fn save(&self) -> Vec<Vector> {
        self.table().vectors.clone()
    }

    /// Takes over saved vectors and message control; false, and nothing done, when it is not
    /// the same number of vectors.
    pub fn restore(&self, vectors: &[Vector], control: u16) -> bool {
        let mut table = self.table();
        let fits = table.vectors.len() == vectors.len();
        if fits {
            table.vectors.copy_from_slice(vectors);
            table.control = control;
        }
        fits
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a pending message if nothing masks it.
    fn release(&self, table: &mut Table, index: usize) {
        let open = table.control & (ENABLE | MASK_ALL) == ENABLE;
        if let Some(vector) = table.vectors.get_mut(index).filter(|v| open && v.pending && !v.masked) {
            vector.pending = false;
            let message = Message { address: vector.address, data: vector.data };
            if let Err(error) = self.host.message(message) {
                // The guest chose the address: one that leads nowhere is its own affair.
                log::debug!("Interrupt message {message:x?} was not delivered: {error}");
            }
        }
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::Bench;

    const MESSAGE: Message = Message { address: 0xfee0_1000, data: 0x31 };

    fn msix() -> (Arc<Bench>, Msix) {
        let bench = Bench::new();
        let msix = Msix::new(bench.clone(), 3);
        msix.set_control(ENABLE);
        msix.write_table(16, &MESSAGE.address.to_le_bytes());
        msix.write_table(24, &MESSAGE.data.to_le_bytes());
        msix.write_table(28, &[0; 4]);
        (bench, msix)
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn an_open_vector_sends_its_message() {
        let (bench, msix) = msix();
        msix.fire(1);
        assert_eq!(bench.messages(), [MESSAGE]);
        for other in [3, 255, 0xffff] {
            msix.fire(other);
        }
        msix.set_control(0);
        msix.fire(1);
        msix.set_control(ENABLE);
        assert!(bench.messages().is_empty());
    }

    #[test]
    fn masked_vectors_wait_until_they_are_opened() {
        let (bench, msix) = msix();
        msix.write_table(28, &[1, 0, 0, 0]);
        msix.fire(1);
        msix.fire(1);
        assert_eq!((pending(&msix), bench.messages()), (2, vec![]));
        msix.write_table(28, &[0; 4]);
        assert_eq!((pending(&msix), bench.messages()), (0, vec![MESSAGE]));
        msix.set_control(ENABLE | MASK_ALL);
        msix.fire(1);
        msix.fire(0);
        assert_eq!((pending(&msix), bench.messages()), (3, vec![]));
        msix.set_control(ENABLE);
        assert_eq!((pending(&msix), bench.messages()), (1, vec![MESSAGE]), "vector 0 is still masked");
    }

    #[test]
    fn the_table_takes_aligned_words_and_reads_back() {
        let (_bench, msix) = msix();
        let mut data = [0; 8];
        msix.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), MESSAGE.address);
        msix.read_table(24, &mut data);
        assert_eq!(u64::from_le_bytes(data), u64::from(MESSAGE.data));
        for (offset, len) in [(17, 4), (20, 8), (16, 2), (48, 8), (1 << 40, 4)] {
            let mut data = vec![0; len];
            msix.read_table(offset, &mut data);
            assert!(data.iter().all(|b| *b == 0xff), "{offset}+{len}");
            msix.write_table(offset, &vec![0xa5; len]);
        }
        msix.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), MESSAGE.address);
    }

    #[test]
    fn a_saved_table_keeps_what_is_pending() {
        let (_, msix) = msix();
        msix.write_table(28, &[1, 0, 0, 0]);
        msix.fire(1);
        let (bench, other) = self::msix();
        assert!(!other.restore(&msix.save()[1..], ENABLE));
        assert!(other.restore(&msix.save(), ENABLE));
        other.write_table(28, &[0; 4]);
        assert_eq!(bench.messages(), [MESSAGE]);
    }
}
