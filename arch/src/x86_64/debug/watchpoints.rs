//! The four debug registers (Intel SDM volume 3 section 18.2, AMD APM volume 2 section 13.1).

/// How many addresses a processor watches.
pub const SLOTS: usize = 4;

/// What is done at a watched address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// An instruction there is executed.
    Execute,
    /// Something is written.
    Write,
    /// Something is read or written. The processor cannot watch for reads alone.
    ReadWrite,
}

/// One debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchpoint {
    /// Linear address, a multiple of the length.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8; 1 for instructions.
    pub len: u8,
    /// What stops.
    pub access: Access,
}

impl Watchpoint {
    /// Its bits of DR7 in slot `index`: enabled in all tasks, kind and length.
    pub(super) fn control(&self, index: usize) -> u64 {
        let kind = match self.access {
            Access::Execute => 0,
            Access::Write => 1,
            Access::ReadWrite => 3,
        };
        let len = match self.len {
            2 => 1,
            4 => 3,
            8 => 2,
            _ => 0,
        };
        2 << (2 * index) | (kind | len << 2) << (16 + 4 * index)
    }
}

/// Splits a range of memory into pieces that a debug register can watch: of 1, 2, 4 or 8 bytes,
/// each at a multiple of its length. `None` when it would take more than [`SLOTS`] of them, is
/// empty, or runs past the last address.
#[must_use]
pub fn pieces(address: u64, len: u64) -> Option<Vec<(u64, u8)>> {
    let end = address.checked_add(len)?;
    let mut pieces = Vec::new();
    let mut at = address;
    while at < end {
        if pieces.len() == SLOTS {
            return None;
        }
        let fits = |size: &u8| at.is_multiple_of(u64::from(*size)) && u64::from(*size) <= end - at;
        // One byte always fits.
        let size = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
        pieces.push((at, size));
        at += u64::from(size);
    }
    (!pieces.is_empty()).then_some(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_where_the_processor_wants_it() {
        assert_eq!(pieces(0x1000, 8), Some(vec![(0x1000, 8)]));
        assert_eq!(pieces(0x1003, 6), Some(vec![(0x1003, 1), (0x1004, 4), (0x1008, 1)]));
        assert_eq!(pieces(0x1000, 32).map(|p| p.len()), Some(4));
    }

    #[test]
    fn what_does_not_fit_into_four_registers_is_refused() {
        for (address, len) in [(0x1000, 33), (0x1001, 31), (0x1000, 0), (u64::MAX, 2), (0, u64::MAX)] {
            assert_eq!(pieces(address, len), None, "{address:#x} {len}");
        }
    }
}
