//! The ladder of device status (VIRTIO 1.2 sections 2.1 and 3.1.1), as a pure function.
//!
//! ```text
//!   0 ─► ACKNOWLEDGE ─► +DRIVER ─► +FEATURES_OK ─► +DRIVER_OK
//!   └──────────────►─────┘         any of them ─► +FAILED        any ─► 0 (reset)
//! ```
//!
//! A driver climbs one rung at a time; only the first two, between which nothing happens, may
//! be taken in one write, as small boot drivers do. Bits are never taken back except all at
//! once. What does not fit is ignored, so that a driver that reads the register back sees
//! that it was.

/// The guest noticed the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The guest knows how to drive it.
pub const DRIVER: u8 = 2;
/// The driver is set up: the device runs.
pub const DRIVER_OK: u8 = 4;
/// Features are agreed on.
pub const FEATURES_OK: u8 = 8;
/// The device cannot go on without a reset; set by the device only.
pub const NEEDS_RESET: u8 = 64;
/// The driver gave up on the device.
pub const FAILED: u8 = 128;

/// What a write to the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Back to the start.
    Reset,
    /// Not a legal move: nothing changes.
    Ignore,
    /// This becomes the status, if the device agrees.
    To(u8),
}

/// What the driver's write of `written` means when it had set `status` (without
/// [`NEEDS_RESET`], which is the device's; a driver that writes it back is forgiven).
pub fn next(status: u8, written: u8) -> Step {
    const LADDER: [(u8, u8); 5] = [
        (0, ACKNOWLEDGE),
        (0, ACKNOWLEDGE | DRIVER),
        (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER),
        (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        (ACKNOWLEDGE | DRIVER | FEATURES_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK),
    ];
    if written == 0 {
        return Step::Reset;
    }
    let wanted = written & !NEEDS_RESET;
    if status & FAILED != 0 {
        Step::Ignore
    } else if wanted == status | FAILED || LADDER.contains(&(status, wanted)) {
        Step::To(wanted)
    } else {
        Step::Ignore
    }
}

/// Whether `status` is one that a driver can have reached, for saved states.
pub fn reachable(status: u8) -> bool {
    let rungs = [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, 0xb, 0xf];
    rungs.contains(&(status & !FAILED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_of_three_bytes_stays_on_the_ladder() {
        let apply = |status, written| match next(status, written) {
            Step::Reset => 0,
            Step::Ignore => status,
            Step::To(to) => to,
        };
        for first in 0..=255 {
            for second in 0..=255 {
                let two = apply(apply(0, first), second);
                for third in 0..=255 {
                    let now = apply(two, third);
                    assert!(reachable(now), "{first:#x} {second:#x} {third:#x} led to {now:#x}");
                    assert!(third == 0 || two & !now == 0, "a bit was taken back");
                    let rungs = (now & !two).count_ones();
                    assert!(rungs <= 1 || (two == 0 && now == 3), "a rung was skipped");
                }
            }
        }
    }

    #[test]
    fn a_driver_climbs_and_a_reset_brings_it_down() {
        let mut status = 0;
        for to in [1, 3, 0xb, 0xf] {
            assert_eq!(next(status, to), Step::To(to));
            status = to;
        }
        assert_eq!(next(0xf, 0xf | NEEDS_RESET), Step::Ignore);
        assert_eq!(next(0xf, 0x8f), Step::To(0x8f));
        assert_eq!(next(0x8f, 0xf), Step::Ignore);
        assert_eq!(next(0x8f, 0), Step::Reset);
        assert_eq!(next(0, 3), Step::To(3));
        assert_eq!(next(3, 0xf), Step::Ignore, "features are to be read back first");
    }
}
