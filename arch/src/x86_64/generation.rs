//! What tells a guest that it is not the machine it was: its generation id, and its clock page.
//!
//! ```text
//!   0x9e000  VMClock, one page      magic, size, version │ sequence │ disruptions, generation
//!   0x9f000  generation id          16 random bytes      (VMGENID)
//!   0x9fc00  multiprocessor table
//! ```
//!
//! A machine that is restored from a snapshot goes on in the middle of an instruction, and so does
//! every other one restored from the same snapshot: with the same random numbers to come, the same
//! keys to be made, the same idea of the time. Two devices without registers say so. The
//! *generation id* (Microsoft, "Virtual Machine Generation ID") is a number that is never the same
//! twice; Linux 5.18 and newer mix a new one into their random numbers at once. *VMClock* (Linux
//! 6.13, `uapi/linux/vmclock-abi.h`) is a page that programs can map, so that each can see with a
//! load that something happened, without being told by anybody. Both are announced by one
//! notification of the event device ([`super::acpi::event::GENERATION`]).
//!
//! VMClock can also tell the time. Here it does not (`counter_id` says so): guests have KVM's
//! clock, which is exact and corrected when a machine is restored.
//!
//! Neither may lie in memory that the guest takes for its own (the id's specification, "OS-visible
//! requirements"); the pages are marked reserved in the memory map. The id shares its page with
//! the multiprocessor table, which is written at each start anyway; VMClock's is its own, because
//! it is mapped into processes.
//!
//! The guest can write all of this, and gains nothing: whatever is found is counted on from.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{GENERATION_ID, VM_CLOCK};

/// A generation id.
pub type Id = [u8; 16];

/// `VMCLOCK_MAGIC`: "VCLK".
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
/// `VMCLOCK_COUNTER_INVALID`: no time is told.
const NO_COUNTER: u8 = 0xff;
/// `VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT` and `VMCLOCK_FLAG_NOTIFICATION_PRESENT`.
const FLAGS: u64 = 1 << 8 | 1 << 9;

/// Where the fields of `struct vmclock_abi` lie.
mod field {
    pub const SIZE: usize = 4;
    pub const VERSION: usize = 8;
    pub const COUNTER_ID: usize = 10;
    pub const SEQUENCE: usize = 12;
    pub const DISRUPTION_MARKER: usize = 16;
    pub const FLAGS: usize = 24;
    pub const GENERATION: usize = 104;
    /// Bytes of all fields; what follows in the page is zero.
    pub const END: usize = 112;
}

fn clock(field: usize) -> GuestAddress {
    GuestAddress(VM_CLOCK.start + field as u64)
}

/// Writes both for a machine that boots, into memory that is zero.
///
/// # Errors
/// When guest memory does not reach there.
pub fn write<M: GuestMemoryBackend>(memory: &M, id: &Id) -> Result<(), GuestMemoryError> {
    let mut page = [0u8; field::END];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(field::SIZE, &((VM_CLOCK.end - VM_CLOCK.start) as u32).to_le_bytes());
    put(field::VERSION, &VERSION.to_le_bytes());
    put(field::COUNTER_ID, &[NO_COUNTER]);
    put(field::FLAGS, &FLAGS.to_le_bytes());
    memory.write_slice(&page, clock(0))?;
    memory.write_slice(id, GuestAddress(GENERATION_ID))
}

/// Puts a new id in place, and counts a disruption and a generation more in VMClock. A reader
/// that runs meanwhile sees an odd sequence number, or another one than before, and reads again.
///
/// # Errors
/// When guest memory does not reach there.
pub fn renew<M: GuestMemoryBackend>(memory: &M, id: &Id) -> Result<(), GuestMemoryError> {
    let sequence = memory.load::<u32>(clock(field::SEQUENCE), Ordering::Acquire)? | 1;
    memory.store(sequence, clock(field::SEQUENCE), Ordering::SeqCst)?;
    for counter in [field::DISRUPTION_MARKER, field::GENERATION] {
        let count = memory.load::<u64>(clock(counter), Ordering::Relaxed)?;
        memory.store(count.wrapping_add(1), clock(counter), Ordering::Release)?;
    }
    memory.write_slice(id, GuestAddress(GENERATION_ID))?;
    memory.store(sequence.wrapping_add(1), clock(field::SEQUENCE), Ordering::SeqCst)
}

/// The id as it is in guest memory now.
///
/// # Errors
/// When guest memory does not reach there.
pub fn id<M: GuestMemoryBackend>(memory: &M) -> Result<Id, GuestMemoryError> {
    let mut id = Id::default();
    memory.read_slice(&mut id, GuestAddress(GENERATION_ID))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Memory = vm_memory::GuestMemoryMmap<()>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn clock_page(memory: &Memory) -> Vec<u8> {
        let mut page = vec![0; 4096];
        memory.read_slice(&mut page, clock(0)).unwrap();
        page
    }

    fn long(page: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_booted_machine_has_an_id_and_a_clock_that_tells_no_time() {
        let memory = memory();
        write(&memory, &[7; 16]).unwrap();
        assert_eq!(id(&memory).unwrap(), [7; 16]);
        let page = clock_page(&memory);
        assert_eq!(&page[..16], b"VCLK\x00\x10\x00\x00\x01\x00\xff\x00\x00\x00\x00\x00");
        assert_eq!((long(&page, 16), long(&page, 24), long(&page, 104)), (0, 0x300, 0));
        assert!(page[32..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_renewed_machine_has_another_id_and_counts_on() {
        let memory = memory();
        write(&memory, &[7; 16]).unwrap();
        let before = clock_page(&memory);
        for round in 1..=3u8 {
            renew(&memory, &[round; 16]).unwrap();
            let page = clock_page(&memory);
            assert_eq!(id(&memory).unwrap(), [round; 16]);
            assert_eq!(page[12], 2 * round, "even: nobody writes");
            assert_eq!((page[16], page[104]), (round, round));
            assert_eq!((&page[..12], &page[24..104]), (&before[..12], &before[24..104]));
        }
    }

    #[test]
    fn what_a_guest_wrote_there_is_counted_on_from() {
        let memory = memory();
        memory.write_slice(&[0xff; 4096], clock(0)).unwrap();
        renew(&memory, &[1; 16]).unwrap();
        let page = clock_page(&memory);
        assert_eq!((&page[12..16], long(&page, 16), long(&page, 104)), (&[0; 4][..], 0, 0));
        renew(&memory, &[2; 16]).unwrap();
        assert_eq!(clock_page(&memory)[12..16], [2, 0, 0, 0]);
    }

    #[test]
    fn memory_that_does_not_reach_there_is_an_error() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 12)]).unwrap();
        assert!(
            write(&memory, &[0; 16]).is_err() && renew(&memory, &[0; 16]).is_err() && id(&memory).is_err()
        );
    }
}
