//! What the driver is told: feature bits and the configuration space (VIRTIO 1.2 sections
//! 5.2.3 and 5.2.4).
//!
//! ```text
//!   0 capacity u64      20 blk_size u32        34 num_queues u16              52 max_write_zeroes_seg u32
//!   8 size_max u32      24 physical_exp u8     36 max_discard_sectors u32     56 write_zeroes_may_unmap u8
//!  12 seg_max u32       25 align_offset u8     40 max_discard_seg u32         60 max_secure_erase_sectors u32
//!  16 geometry 4 bytes  26 min_io_size u16     44 discard_alignment u32       64 max_secure_erase_seg u32
//!                       28 opt_io_size u32     48 max_write_zeroes_sectors    68 secure_erase_alignment u32
//!                       32 writeback u8
//! ```

use super::{BlockConfig, Cache};
use crate::{
    disk::{Disk, SECTOR},
    limits::{BLOCK_DISCARD_SECTORS_MAX, BLOCK_RANGES_MAX, BLOCK_SEGMENTS_MAX, BLOCK_ZEROES_SECTORS_MAX},
};

/// Length of the configuration space.
pub(super) const LEN: usize = 72;

/// `VIRTIO_BLK_F_SEG_MAX`: how many segments a request may have.
pub(super) const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`: writes fail.
pub(super) const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`: the block size is told.
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`: writes are durable after a flush.
pub(super) const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_TOPOLOGY`: sizes the medium likes are told.
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
/// `VIRTIO_BLK_F_MQ`: there are several request queues.
pub(super) const F_MQ: u64 = 1 << 12;
/// `VIRTIO_BLK_F_DISCARD`: sectors may be given back.
pub(super) const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`: sectors may be zeroed without sending zeroes.
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// The block features offered for these settings. They do not depend on the file, so that it
/// can be replaced under a running driver.
pub(super) fn features(settings: &BlockConfig) -> u64 {
    let when = |wanted, bit| if wanted { bit } else { 0 };
    let writable = !settings.read_only;
    F_SEG_MAX
        | F_BLK_SIZE
        | F_TOPOLOGY
        | when(settings.read_only, F_RO)
        | when(settings.cache == Cache::Writeback, F_FLUSH)
        | when(settings.queues > 1, F_MQ)
        | when(writable && settings.discard, F_DISCARD)
        | when(writable, F_WRITE_ZEROES)
}

/// The configuration space of `disk`.
pub(super) fn space(disk: &Disk, settings: &BlockConfig) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = space.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let sizes = disk.geometry();
    // A request takes two descriptors besides its data when it is not in an indirect table.
    let segments = BLOCK_SEGMENTS_MAX.min(u32::from(settings.queue_size) - 2);
    put(0, &disk.sectors().to_le_bytes());
    put(12, &segments.to_le_bytes());
    put(20, &sizes.logical.to_le_bytes());
    let exponent = (sizes.physical / sizes.logical).max(1).ilog2();
    put(24, &[exponent as u8, 0]);
    put(26, &((sizes.physical / sizes.logical).max(1) as u16).to_le_bytes());
    put(28, &(sizes.optimal / sizes.logical).to_le_bytes());
    put(32, &[u8::from(settings.cache == Cache::Writeback)]);
    put(34, &settings.queues.to_le_bytes());
    if settings.read_only {
        return space;
    }
    if settings.discard {
        put(36, &BLOCK_DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &BLOCK_RANGES_MAX.to_le_bytes());
        put(44, &(sizes.physical / SECTOR as u32).to_le_bytes());
    }
    put(48, &BLOCK_ZEROES_SECTORS_MAX.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[u8::from(settings.discard)]);
    space
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disk::DiskOptions;

    #[test]
    fn features_follow_the_settings() {
        let mut settings = BlockConfig::new("a", Path::new("/"));
        assert_eq!(features(&settings), F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_WRITE_ZEROES);
        settings.cache = Cache::Writeback;
        settings.queues = 2;
        settings.discard = true;
        assert_eq!(features(&settings) & (F_FLUSH | F_MQ | F_DISCARD | F_RO), F_FLUSH | F_MQ | F_DISCARD);
        settings.read_only = true;
        assert_eq!(features(&settings) & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    }

    #[test]
    fn the_space_tells_capacity_segments_and_sizes() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(3 * 512).unwrap();
        let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
        let mut settings = BlockConfig::new("a", image.path());
        settings.queue_size = 16;
        settings.discard = true;
        let space = space(&disk, &settings);
        let number = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!((number(0), number(4), number(8), number(12), number(20)), (3, 0, 0, 14, 512));
        assert_eq!((number(36), number(40)), (BLOCK_DISCARD_SECTORS_MAX, BLOCK_RANGES_MAX));
        assert_eq!((number(48), number(52), number(56)), (BLOCK_ZEROES_SECTORS_MAX, 1, 1));
        assert_eq!(number(60), 0);
    }
}
