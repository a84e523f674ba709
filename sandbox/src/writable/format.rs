//! The bytes of an empty ext4.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The block size in bytes.
pub(super) const BLOCK: u64 = 4096;
/// Blocks in a group: as many as one bitmap block has bits.
const GROUP: u64 = 8 * BLOCK;
/// Groups whose metadata stand together (`s_log_groups_per_flex` = 4).
const FLEX: u64 = 16;
const INODE_BYTES: u64 = 256;
/// One inode for each 16 KiB, as mke2fs has it.
const BLOCKS_PER_INODE: u64 = 4;
const DESCRIPTOR_BYTES: u64 = 32;
/// A last group with fewer blocks is left out.
const LEAST_GROUP: u64 = 64;

const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
const LOST_INODE: u32 = 11;
/// Inodes 1 to 11 are taken.
const USED_INODES: u64 = 11;

const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const INODE_ZEROED: u16 = 4;

/// has_journal, ext_attr, dir_index, sparse_super2 (with no backups: the file is as lost as its
/// first block is).
const COMPAT: u32 = 0x4 | 0x8 | 0x20 | 0x200;
/// filetype, extents, flex_bg.
const INCOMPAT: u32 = 0x2 | 0x40 | 0x200;
/// large_file, huge_file, gdt_csum (uninit_bg), dir_nlink, extra_isize.
const RO_COMPAT: u32 = 0x2 | 0x8 | 0x10 | 0x20 | 0x40;

/// Where everything is.
struct Plan {
    blocks: u64,
    groups: u64,
    descriptor_blocks: u64,
    inodes_per_group: u64,
    table_blocks: u64,
    journal: u64,
    journal_blocks: u64,
    root: u64,
    lost: u64,
}

/// A buffer that little-endian fields are put into.
struct Fields(Vec<u8>);

impl Fields {
    fn new(length: u64) -> Self {
        // Lossless on 64-bit hosts; lengths are a few blocks.
        Self(vec![0; length as usize])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put16(&mut self, at: usize, value: u64) {
        // Each caller's value is below 2^16 by the plan.
        self.put(at, &(value as u16).to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u64) {
        // Each caller's value is below 2^32: sizes are below 16 TiB.
        self.put(at, &(value as u32).to_le_bytes());
    }

    /// Sets bits `from..to`, the lowest bit of a byte first.
    fn set_bits(&mut self, from: u64, to: u64) {
        for bit in from..to {
            self.0[(bit / 8) as usize] |= 1 << (bit % 8);
        }
    }
}

/// Formats a file of `blocks` blocks that reads as zeros. `random` becomes the UUID and the
/// seed of the directory hash.
pub(super) fn write(file: &File, blocks: u64, random: &[u8; 32]) -> io::Result<()> {
    let plan = Plan::new(blocks);
    let (uuid, seed) = random.split_at(16);
    let mut descriptors = Fields::new(plan.descriptor_blocks * BLOCK);
    let mut free_blocks = 0;
    for group in 0..plan.groups {
        let used = plan.used(group);
        free_blocks += plan.length(group) - used;
        let descriptor = plan.descriptor(group, uuid);
        descriptors.put((group * DESCRIPTOR_BYTES) as usize, &descriptor.0);
        if !plan.is_uninitialised(group) {
            let bitmap = plan.block_bitmap(group);
            file.write_all_at(&bitmap.0, plan.block_bitmap_at(group) * BLOCK)?;
        }
    }
    file.write_all_at(&plan.inode_bitmap().0, plan.inode_bitmap_at(0) * BLOCK)?;
    file.write_all_at(&plan.inodes().0, plan.table_at(0) * BLOCK)?;
    file.write_all_at(&directory(ROOT_INODE, ROOT_INODE, Some(LOST_INODE)).0, plan.root * BLOCK)?;
    file.write_all_at(&directory(LOST_INODE, ROOT_INODE, None).0, plan.lost * BLOCK)?;
    file.write_all_at(&plan.journal_superblock(), plan.journal * BLOCK)?;
    file.write_all_at(&descriptors.0, BLOCK)?;
    // Last: until then the file is no file system.
    let superblock = plan.superblock(free_blocks, uuid, seed);
    file.write_all_at(&superblock.0, 1024)
}

impl Plan {
    fn new(blocks: u64) -> Self {
        let small = blocks < GROUP;
        let inodes_per_group = (blocks.min(GROUP) / BLOCKS_PER_INODE).next_multiple_of(16);
        let table_blocks = inodes_per_group * INODE_BYTES / BLOCK;
        // A last group too short for what would have to stand in it is cut off.
        let tail = blocks % GROUP;
        let first_of_flex = (blocks / GROUP).is_multiple_of(FLEX);
        let needed = LEAST_GROUP + if first_of_flex { 2 + table_blocks } else { 0 };
        let blocks = if !small && tail < needed { blocks - tail } else { blocks };
        let groups = blocks.div_ceil(GROUP);
        let descriptor_blocks = (groups * DESCRIPTOR_BYTES).div_ceil(BLOCK);
        // Numbers of mke2fs, up to its 64 MiB for ordinary sizes.
        let journal_blocks = match blocks {
            0..0x8000 => 1024,
            0x8000..0x40000 => 4096,
            0x40000..0x80000 => 8192,
            _ => 16384,
        };
        let mut plan = Self {
            blocks,
            groups,
            descriptor_blocks,
            inodes_per_group,
            table_blocks,
            journal: 0,
            journal_blocks,
            root: 0,
            lost: 0,
        };
        plan.journal = plan.table_at(0) + plan.flex_groups(0) * table_blocks;
        plan.root = plan.journal + journal_blocks;
        plan.lost = plan.root + 1;
        plan
    }

    /// How many blocks a group has; the last may be short.
    fn length(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP).min(GROUP)
    }

    /// How many groups share metadata with `group`.
    fn flex_groups(&self, group: u64) -> u64 {
        (self.groups - group / FLEX * FLEX).min(FLEX)
    }

    /// Where the metadata of the flex group begin.
    fn flex_at(&self, group: u64) -> u64 {
        let first = group / FLEX * FLEX;
        first * GROUP + if first == 0 { 1 + self.descriptor_blocks } else { 0 }
    }

    fn block_bitmap_at(&self, group: u64) -> u64 {
        self.flex_at(group) + group % FLEX
    }

    fn inode_bitmap_at(&self, group: u64) -> u64 {
        self.flex_at(group) + self.flex_groups(group) + group % FLEX
    }

    fn table_at(&self, group: u64) -> u64 {
        self.flex_at(group) + 2 * self.flex_groups(group) + group % FLEX * self.table_blocks
    }

    /// How many blocks of a group are taken; they are its first ones.
    fn used(&self, group: u64) -> u64 {
        match group {
            0 => self.lost + 1,
            _ if group.is_multiple_of(FLEX) => self.flex_groups(group) * (2 + self.table_blocks),
            _ => 0,
        }
    }

    /// Whether the kernel computes the block bitmap: where nothing is taken and the group is
    /// whole.
    fn is_uninitialised(&self, group: u64) -> bool {
        self.used(group) == 0 && self.length(group) == GROUP && group + 1 < self.groups
    }

    fn descriptor(&self, group: u64, uuid: &[u8]) -> Fields {
        let taken = if group == 0 { USED_INODES } else { 0 };
        let mut flags = INODE_ZEROED;
        if group != 0 {
            flags |= INODE_UNINIT;
        }
        if self.is_uninitialised(group) {
            flags |= BLOCK_UNINIT;
        }
        let mut out = Fields::new(DESCRIPTOR_BYTES);
        out.put32(0, self.block_bitmap_at(group));
        out.put32(4, self.inode_bitmap_at(group));
        out.put32(8, self.table_at(group));
        out.put16(12, self.length(group) - self.used(group));
        out.put16(14, self.inodes_per_group - taken);
        // Root and lost+found.
        out.put16(16, if group == 0 { 2 } else { 0 });
        out.put16(18, flags.into());
        out.put16(28, self.inodes_per_group - taken);
        // Lossless: below 2^17 groups.
        let number = (group as u32).to_le_bytes();
        let sum = crc16(crc16(crc16(0xffff, uuid), &number), &out.0[..30]);
        out.put16(30, sum.into());
        out
    }

    fn block_bitmap(&self, group: u64) -> Fields {
        let mut out = Fields::new(BLOCK);
        out.set_bits(0, self.used(group));
        out.set_bits(self.length(group), GROUP);
        out
    }

    fn inode_bitmap(&self) -> Fields {
        let mut out = Fields::new(BLOCK);
        out.set_bits(0, USED_INODES);
        out.set_bits(self.inodes_per_group, GROUP);
        out
    }

    /// The first block of the inode table: the inodes with something in them.
    fn inodes(&self) -> Fields {
        let mut out = Fields::new(BLOCK);
        let mut put = |number: u32, mode: u64, links: u64, start: u64, blocks: u64| {
            let inode = inode(mode, links, start, blocks);
            out.put((u64::from(number - 1) * INODE_BYTES) as usize, &inode.0);
        };
        put(ROOT_INODE, 0o040_755, 3, self.root, 1);
        put(JOURNAL_INODE, 0o100_600, 1, self.journal, self.journal_blocks);
        put(LOST_INODE, 0o040_700, 2, self.lost, 1);
        out
    }

    /// `journal_superblock_t`, big-endian; an empty journal of version 2.
    fn journal_superblock(&self) -> Vec<u8> {
        let mut out = vec![0; 1024];
        let mut put = |at: usize, value: u32| out[at..at + 4].copy_from_slice(&value.to_be_bytes());
        put(0, 0xC03B_3998);
        put(4, 4);
        put(12, BLOCK as u32);
        put(16, self.journal_blocks as u32);
        // First block of the log, first commit, one user; s_start stays 0: nothing to replay.
        put(20, 1);
        put(24, 1);
        put(64, 1);
        out
    }

    fn superblock(&self, free_blocks: u64, uuid: &[u8], seed: &[u8]) -> Fields {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
        let mut out = Fields::new(1024);
        out.put32(0x00, self.groups * self.inodes_per_group);
        out.put32(0x04, self.blocks);
        out.put32(0x0C, free_blocks);
        out.put32(0x10, self.groups * self.inodes_per_group - USED_INODES);
        // log2(4096 / 1024), twice: blocks and clusters.
        out.put32(0x18, 2);
        out.put32(0x1C, 2);
        out.put32(0x20, GROUP);
        out.put32(0x24, GROUP);
        out.put32(0x28, self.inodes_per_group);
        out.put32(0x30, now);
        // No check after a number of mounts.
        out.put16(0x36, 0xffff);
        out.put16(0x38, 0xEF53);
        // Clean; go on after errors; revision 1.
        out.put16(0x3A, 1);
        out.put16(0x3C, 1);
        out.put32(0x40, now);
        out.put32(0x4C, 1);
        out.put32(0x54, LOST_INODE.into());
        out.put16(0x58, INODE_BYTES);
        out.put32(0x5C, COMPAT.into());
        out.put32(0x60, INCOMPAT.into());
        out.put32(0x64, RO_COMPAT.into());
        out.put(0x68, uuid);
        out.put32(0xE0, JOURNAL_INODE.into());
        out.put(0xEC, seed);
        // Half MD4, unsigned characters.
        out.put(0xFC, &[1]);
        out.put32(0x160, 2);
        // The journal inode's block map is repeated at 0x10C: type 1.
        out.put(0xFD, &[1]);
        let journal = inode(0o100_600, 1, self.journal, self.journal_blocks);
        out.put(0x10C, &journal.0[0x28..0x28 + 60]);
        out.put32(0x14C, self.journal_blocks * BLOCK);
        // user_xattr and acl.
        out.put32(0x100, 0xC);
        out.put32(0x108, now);
        out.put16(0x15C, 32);
        out.put16(0x15E, 32);
        out.put(0x174, &[4]);
        out
    }
}

/// `struct ext4_inode` with one extent.
fn inode(mode: u64, links: u64, start: u64, blocks: u64) -> Fields {
    let mut out = Fields::new(INODE_BYTES);
    out.put16(0x00, mode);
    out.put32(0x04, blocks * BLOCK);
    out.put16(0x1A, links);
    out.put32(0x1C, blocks * BLOCK / 512);
    // EXT4_EXTENTS_FL; then the extent header: magic, one entry of four, depth 0.
    out.put32(0x20, 0x80000);
    out.put16(0x28, 0xF30A);
    out.put16(0x2A, 1);
    out.put16(0x2C, 4);
    out.put16(0x38, blocks);
    out.put32(0x3C, start);
    out.put16(0x80, 32);
    out
}

/// A directory block with `.`, `..` and perhaps `lost+found`.
fn directory(own: u32, parent: u32, lost: Option<u32>) -> Fields {
    let mut out = Fields::new(BLOCK);
    let mut entries: Vec<(u32, &[u8])> = vec![(own, b"."), (parent, b"..")];
    entries.extend(lost.map(|inode| (inode, &b"lost+found"[..])));
    let count = entries.len();
    let mut at = 0;
    for (n, (inode, name)) in entries.into_iter().enumerate() {
        // The last entry takes the rest of the block.
        let length = if n + 1 == count { BLOCK as usize - at } else { 12 };
        out.put(at, &inode.to_le_bytes());
        out.put16(at + 4, length as u64);
        // EXT4_FT_DIR
        out.put(at + 6, &[name.len() as u8, 2]);
        out.put(at + 8, name);
        at += length;
    }
    out
}

/// CRC-16 with the polynomial 0x8005, reflected, as the kernel's `crc16()`.
fn crc16(mut crc: u16, bytes: &[u8]) -> u16 {
    for &byte in bytes {
        crc ^= u16::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { 0xA001 } else { 0 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        // The check value of CRC-16/ARC.
        assert_eq!(crc16(0, b"123456789"), 0xBB3D);
    }

    #[test]
    fn a_group_is_uninitialised_only_where_the_kernel_can_compute_it() {
        let plan = Plan::new(20 * GROUP + 1000);
        assert_eq!(plan.groups, 21);
        for group in 0..21 {
            let plain = !matches!(group, 0 | 16 | 20);
            assert_eq!(plan.is_uninitialised(group), plain, "group {group}");
        }
    }
}
