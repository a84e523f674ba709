//! The memory index: which pages are present, and a hash for each chunk that has any.
//!
//! ```text
//!   0   magic "NACLINDX"      16  u64 size of memory      32  u64 extents, n
//!   8   u32 version, 1        24  u64 size of a chunk     40  u64 hashes, m
//!   12  u32 zero              48  n times u64 start, u64 end
//!                                 m times 32 bytes: BLAKE3 of the chunk's present pages, in order
//! ```
//!
//! A hole in a file cannot say whether a page is zero or the parent's, and a copy may fill
//! holes; so what is present is listed. A hash covers present pages only: hashing costs what
//! was touched, and equal chunks have equal names in a store whoever took the snapshot.

use super::{
    digest::{Digest, LEN},
    extents::{Extents, Run},
};

const MAGIC: &[u8; 8] = b"NACLINDX";
const VERSION: u32 = 1;
const HEADER: usize = 48;

/// Which pages are present, and what they hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Bytes of memory.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk_size: u64,
    /// The present pages.
    pub extents: Extents,
    /// A hash for each chunk that has a present page, in order; or none at all.
    pub hashes: Vec<Digest>,
}

impl Index {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let runs = self.extents.runs();
        let mut file = Vec::with_capacity(HEADER + runs.len() * 16 + self.hashes.len() * LEN);
        file.extend(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        for number in [self.size, self.chunk_size, runs.len() as u64, self.hashes.len() as u64] {
            file.extend(number.to_le_bytes());
        }
        for run in runs {
            file.extend(run.start.to_le_bytes());
            file.extend(run.end.to_le_bytes());
        }
        self.hashes.iter().for_each(|hash| file.extend(hash.0));
        file
    }

    /// Reads an index that must be of `size` bytes of memory in chunks of `chunk_size`, with
    /// hashes or without.
    pub fn decode(file: &[u8], size: u64, chunk_size: u64, hashed: bool) -> Result<Index, String> {
        let short = || format!("{} bytes are no index", file.len());
        let (header, rest) = file.split_at_checked(HEADER).ok_or_else(short)?;
        let mut words = header.chunks_exact(8).map(word);
        let mut next = || words.next().unwrap_or_default();
        if next() != u64::from_le_bytes(*MAGIC) {
            return Err("it does not begin as an index does".to_owned());
        }
        let version = next();
        if version != u64::from(VERSION) {
            return Err(format!("its version is {version}; this build reads {VERSION}"));
        }
        let (found_size, found_chunk, extents, hashes) = (next(), next(), next(), next());
        if (found_size, found_chunk) != (size, chunk_size) {
            return Err(format!(
                "it is of {found_size} bytes in chunks of {found_chunk}; the manifest says {size} and \
                 {chunk_size}"
            ));
        }
        let wanted = u128::from(extents) * 16 + u128::from(hashes) * LEN as u128;
        if wanted != rest.len() as u128 {
            return Err(format!("{extents} extents and {hashes} hashes are not {} bytes", file.len()));
        }
        let (runs, digests) = rest.split_at_checked(extents as usize * 16).ok_or_else(short)?;
        let runs = runs.chunks_exact(16).map(|pair| {
            let (start, end) = pair.split_at(8);
            Run { start: word(start), end: word(end) }
        });
        let extents = Extents::checked(runs.collect(), size)?;
        // One more than there are tells as much as all: a terabyte takes a line to claim.
        let most = (hashes as usize).saturating_add(1);
        let needed = if hashed { extents.chunks(chunk_size).take(most).count() as u64 } else { 0 };
        if hashes != needed {
            let than = if needed > hashes { "more" } else { "fewer" };
            return Err(format!("it has {hashes} hashes where {than} belong"));
        }
        let digest = |bytes: &[u8]| bytes.try_into().map(Digest).map_err(|_| short());
        let hashes = digests.chunks_exact(LEN).map(digest).collect::<Result<_, _>>()?;
        Ok(Index { size, chunk_size, extents, hashes })
    }

    /// The window of chunk number `chunk`.
    pub fn window(&self, chunk: u64) -> Run {
        let start = chunk.saturating_mul(self.chunk_size).min(self.size);
        Run { start, end: start.saturating_add(self.chunk_size).min(self.size) }
    }

    /// The chunks that have hashes, with them.
    pub fn hashed_chunks(&self) -> impl Iterator<Item = (u64, Digest)> + '_ {
        self.extents.chunks(self.chunk_size).zip(self.hashes.iter().copied())
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 << 10;
    const SIZE: u64 = 4 * CHUNK;

    fn index() -> Index {
        let runs = vec![Run { start: 4096, end: 8192 }, Run { start: CHUNK - 4096, end: CHUNK + 4096 }];
        let extents = Extents::checked(runs, SIZE).unwrap();
        Index { size: SIZE, chunk_size: CHUNK, extents, hashes: vec![Digest([1; LEN]), Digest([2; LEN])] }
    }

    #[test]
    fn an_index_comes_back_as_it_was() {
        let index = index();
        assert_eq!(Index::decode(&index.encode(), SIZE, CHUNK, true).unwrap(), index);
        assert_eq!(index.window(3), Run { start: 3 * CHUNK, end: SIZE });
    }

    #[test]
    fn counts_that_lie_are_refused() {
        let file = index().encode();
        for length in 0..file.len() {
            assert!(Index::decode(&file[..length], SIZE, CHUNK, true).is_err(), "{length}");
        }
        for at in 0..HEADER + 32 {
            for value in [0xff, 0x01, 0x80] {
                let mut lie = file.clone();
                lie[at] ^= value;
                let read = Index::decode(&lie, SIZE, CHUNK, true);
                // A wrong extent that is possible in itself is what the digest is for.
                assert!(read.is_err() || at >= HEADER, "byte {at}");
            }
        }
        assert!(Index::decode(&file, SIZE, CHUNK, false).unwrap_err().contains("where fewer belong"));
    }
}
