//! What goes to the debugger, until its socket takes it.

use gdbstub::conn::Connection;

/// Bytes that may wait for a debugger that does not read. The longest answer to one packet that
/// gdb sends, to read memory, is some 8 KiB; a packet that asks for more ends its session.
pub const WAITING: usize = 64 << 10;

/// There is no more room.
#[derive(Debug, thiserror::Error)]
#[error("An answer is longer than {WAITING} bytes")]
pub struct Full;

/// Answers that were not sent yet.
#[derive(Default)]
pub struct Wire {
    /// The bytes, in order.
    pub waiting: Vec<u8>,
}

impl Connection for Wire {
    type Error = Full;

    fn write(&mut self, byte: u8) -> Result<(), Full> {
        if self.waiting.len() >= WAITING {
            return Err(Full);
        }
        self.waiting.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Full> {
        Ok(())
    }
}
