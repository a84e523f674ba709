//! Every cap of the snapshot format, in one place.
//!
//! A directory that somebody else wrote decides how much it claims to hold; these constants
//! decide how much of it is ever believed.

/// Version of the format that is written.
pub const FORMAT: u32 = 1;

/// How many versions before the one that is written are still read, of the format and of each of
/// its files.
pub const VERSIONS_BEHIND: u32 = 2;

/// The versions that are read where `newest` is written.
pub const fn readable(newest: u32) -> std::ops::RangeInclusive<u32> {
    let oldest = newest.saturating_sub(VERSIONS_BEHIND);
    (if oldest == 0 { 1 } else { oldest })..=newest
}

/// Bytes of a page, the unit of everything in a memory file.
pub const PAGE: u64 = 4096;

/// Bytes of a chunk, the unit of hashing and of the store, where nobody asks for another.
pub const CHUNK: u64 = 2 << 20;

/// Smallest and largest chunk that is read.
pub const CHUNK_RANGE: std::ops::RangeInclusive<u64> = 64 << 10..=64 << 20;

/// Largest manifest, in bytes. Its JSON values are held whole, at some thirty times this.
pub const MANIFEST_MAX: u64 = 1 << 20;

/// Largest state file, in bytes.
pub const STATE_MAX: u64 = 256 << 20;

/// Most sections of a state file.
pub const SECTIONS_MAX: usize = 4096;

/// Longest name of a section's kind, in bytes.
pub const KIND_MAX: usize = 128;

/// Largest index, in bytes: 64 Mi extents or 32 Mi chunks.
pub const INDEX_MAX: u64 = 1 << 30;

/// Largest guest memory, in bytes.
pub const MEMORY_MAX: u64 = 1 << 46;

/// End of the guest's addresses (52 bits, the most that x86-64 and Armv8 have).
pub const ADDRESS_END: u64 = 1 << 52;

/// Most memory regions.
pub const REGIONS_MAX: usize = 1024;

/// Most captured drives.
pub const DRIVES_MAX: usize = 256;

/// Longest file name, in bytes.
pub const NAME_MAX: usize = 255;

/// Longest hint of where a parent or store lies, in bytes.
pub const HINT_MAX: usize = 4096;

/// Most snapshots of a chain, the full one included.
pub const CHAIN_MAX: usize = 256;
