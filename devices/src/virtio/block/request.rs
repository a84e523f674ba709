//! From a descriptor chain to what it asks for, or to the reason why it cannot be had
//! (VIRTIO 1.2 section 5.2.6).
//!
//! ```text
//!   readable:  type u32 | reserved u32 | sector u64 | data out ...
//!   writable:                                         data in ... | status u8
//! ```
//!
//! The driver may cut these bytes into descriptors as it likes (section 2.7.4.2), so neither
//! the header nor the status is looked for in a descriptor of its own. The header and the
//! ranges are copied once and only the copies are looked at. Data is never looked at: its
//! place is noted and the host reads or writes there.
//!
//! Nothing here touches a disk; it is a function of the chain and the [`Terms`].

use crate::{
    disk::{Buffers, Extent, SECTOR},
    limits::{BLOCK_DISCARD_SECTORS_MAX, BLOCK_RANGES_MAX, BLOCK_REQUEST_MAX, BLOCK_ZEROES_SECTORS_MAX},
    virtio::queue::Chain,
};

/// `VIRTIO_BLK_S_OK`.
pub(super) const OK: u8 = 0;
/// `VIRTIO_BLK_S_IOERR`.
pub(super) const IOERR: u8 = 1;
/// `VIRTIO_BLK_S_UNSUPP`.
pub(super) const UNSUPP: u8 = 2;

/// Bytes of a device id (`VIRTIO_BLK_ID_BYTES`).
pub(super) const ID_LEN: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const HEADER: u64 = 16;
const RANGE: u64 = 16;
const FLAG_UNMAP: u32 = 1;
/// Most runs of memory one host call takes (`IOV_MAX`).
const RUNS_MAX: usize = 1024;

/// What the disk and the negotiated features allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Capacity in sectors.
    pub sectors: u64,
    /// Writes, discards and zeroes fail.
    pub read_only: bool,
    /// `VIRTIO_BLK_F_FLUSH` was negotiated.
    pub flush: bool,
    /// `VIRTIO_BLK_F_DISCARD` was negotiated.
    pub discard: bool,
    /// `VIRTIO_BLK_F_WRITE_ZEROES` was negotiated.
    pub zeroes: bool,
    /// Write-zeroes may give space back.
    pub unmap: bool,
}

/// What a chain asks for. Sectors are inside the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read from this sector into the buffers.
    In(u64),
    /// Write the buffers from this sector on.
    Out(u64),
    /// Make completed writes durable.
    Flush,
    /// Tell the device's id.
    GetId,
    /// Forget the extents.
    Discard,
    /// Zero the extents.
    WriteZeroes,
}

impl Request {
    /// What it does, in a word.
    pub fn name(self) -> &'static str {
        match self {
            Request::In(_) => "read",
            Request::Out(_) => "write",
            Request::Flush => "flush",
            Request::GetId => "get-id",
            Request::Discard => "discard",
            Request::WriteZeroes => "write-zeroes",
        }
    }
}

/// Why a chain gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There is no byte to write a status to.
    NoStatus,
    /// The request is malformed, outside the disk or not allowed: `VIRTIO_BLK_S_IOERR`.
    Failed,
    /// The type or a flag is not known here: `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
}

/// Finds out what `chain` asks for. The data's place is put into `buffers`, the ranges of a
/// discard or write-zeroes into `extents`; both are emptied first.
pub fn parse(
    chain: &Chain,
    terms: &Terms,
    buffers: &mut Buffers,
    extents: &mut Vec<Extent>,
) -> Result<Request, Refusal> {
    buffers.clear();
    extents.clear();
    let room = chain.writable_len().checked_sub(1).ok_or(Refusal::NoStatus)?;
    let mut header = [0; HEADER as usize];
    if chain.read(0, &mut header) < header.len() {
        return Err(Refusal::Failed);
    }
    let [a, b, c, d, _, _, _, _, e, f, g, h, i, j, k, l] = header;
    let sector = u64::from_le_bytes([e, f, g, h, i, j, k, l]);
    let sent = chain.readable_len() - HEADER;
    match u32::from_le_bytes([a, b, c, d]) {
        T_IN if sent == 0 => {
            check(terms, sector, room)?;
            select(chain.writable(), 0, room, buffers)?;
            Ok(Request::In(sector))
        }
        T_OUT if room == 0 && !terms.read_only => {
            check(terms, sector, sent)?;
            select(chain.readable(), HEADER, sent, buffers)?;
            Ok(Request::Out(sector))
        }
        T_IN | T_OUT => Err(Refusal::Failed),
        T_FLUSH if terms.flush => Ok(Request::Flush),
        T_GET_ID if room >= ID_LEN as u64 => Ok(Request::GetId),
        T_GET_ID => Err(Refusal::Failed),
        T_DISCARD | T_WRITE_ZEROES if terms.read_only => Err(Refusal::Failed),
        T_DISCARD if terms.discard => {
            let rules = Rules { ranges: BLOCK_RANGES_MAX, sectors: BLOCK_DISCARD_SECTORS_MAX, flags: 0 };
            ranges(chain, terms, &rules, extents)?;
            Ok(Request::Discard)
        }
        T_WRITE_ZEROES if terms.zeroes => {
            let rules = Rules { ranges: 1, sectors: BLOCK_ZEROES_SECTORS_MAX, flags: FLAG_UNMAP };
            ranges(chain, terms, &rules, extents)?;
            Ok(Request::WriteZeroes)
        }
        _ => Err(Refusal::Unsupported),
    }
}

/// Whether `len` bytes from `sector` on are whole sectors inside the disk.
fn check(terms: &Terms, sector: u64, len: u64) -> Result<(), Refusal> {
    let end = sector.checked_add(len / SECTOR).ok_or(Refusal::Failed)?;
    let inside = len.is_multiple_of(SECTOR) && len <= BLOCK_REQUEST_MAX && end <= terms.sectors;
    inside.then_some(()).ok_or(Refusal::Failed)
}

/// Notes where bytes `skip..skip + len` of `iovecs` lie.
fn select(iovecs: &[libc::iovec], skip: u64, len: u64, buffers: &mut Buffers) -> Result<(), Refusal> {
    let (mut skip, mut left) = (skip, len);
    for run in iovecs {
        let size = run.iov_len as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let part = (size - skip).min(left);
        if part == 0 {
            break;
        }
        let iov_base = run.iov_base.cast::<u8>().wrapping_add(skip as usize).cast();
        // SAFETY: a part of a chain's run: guest memory, which is mapped for as long as the
        // queue lives, and the handler keeps the queue until the kernel is done with it.
        unsafe { buffers.push(libc::iovec { iov_base, iov_len: part as usize }) };
        left -= part;
        skip = 0;
    }
    (buffers.iovecs().len() <= RUNS_MAX && left == 0).then_some(()).ok_or(Refusal::Failed)
}

struct Rules {
    ranges: u32,
    sectors: u32,
    flags: u32,
}

/// Reads and checks all ranges before any of them is carried out (section 5.2.6.2).
fn ranges(chain: &Chain, terms: &Terms, rules: &Rules, extents: &mut Vec<Extent>) -> Result<(), Refusal> {
    let len = chain.readable_len() - HEADER;
    let count = len / RANGE;
    if len == 0 || !len.is_multiple_of(RANGE) || count > u64::from(rules.ranges) {
        return Err(Refusal::Failed);
    }
    for n in 0..count {
        let mut range = [0; RANGE as usize];
        if chain.read(HEADER + n * RANGE, &mut range) < range.len() {
            return Err(Refusal::Failed);
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = range;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let sectors = u32::from_le_bytes([i, j, k, l]);
        let flags = u32::from_le_bytes([m, n, o, p]);
        if flags & !rules.flags != 0 {
            return Err(Refusal::Unsupported);
        }
        let end = sector.checked_add(u64::from(sectors)).ok_or(Refusal::Failed)?;
        if sectors > rules.sectors || end > terms.sectors {
            return Err(Refusal::Failed);
        }
        let unmap = terms.unmap && flags & FLAG_UNMAP != 0;
        if sectors > 0 {
            extents.push(Extent { sector, sectors, unmap });
        }
    }
    Ok(())
}
