//! The packet header of a virtio socket (VIRTIO 1.2 section 5.10.6).
//!
//! ```text
//!   0        8        16     20     24    28   30   32     36       40      44
//!   src_cid  dst_cid  src_p  dst_p  len   type op   flags  buf_all  fwd_cnt  payload ...
//! ```
//!
//! A header is copied out of guest memory once, as 44 bytes, and parsed from the copy: the
//! guest may rewrite its own memory at any time, and a length that is checked in one reading
//! and used in another is no check at all. Parsing itself cannot fail; what the numbers mean
//! is judged by the muxer.

/// Length of a header in bytes.
pub const HEADER_LEN: usize = 44;
/// Largest payload of one packet, in either direction, in bytes.
pub const PAYLOAD_MAX: u32 = 64 * 1024;
/// Context id of the host (VIRTIO 1.2 section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The only socket type served: a stream of bytes.
pub const TYPE_STREAM: u16 = 1;

/// Shutdown flag: the sender of the packet will receive no more.
pub const SHUT_RECEIVE: u32 = 1;
/// Shutdown flag: the sender of the packet will send no more.
pub const SHUT_SEND: u32 = 2;
/// Both shutdown flags.
pub const SHUT_BOTH: u32 = SHUT_RECEIVE | SHUT_SEND;

/// What a packet asks for or says (VIRTIO 1.2 section 5.10.6, `VIRTIO_VSOCK_OP_*`).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends one at once.
    pub const RESET: u16 = 3;
    /// Ends one direction or both.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const DATA: u16 = 5;
    /// Tells how much may be sent.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A header in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Socket type; only [`TYPE_STREAM`] is served.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Shutdown flags, for [`op::SHUTDOWN`].
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header from its bytes.
    pub fn parse(raw: &[u8; HEADER_LEN]) -> Header {
        let mut rest = raw.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The bytes of a header.
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        raw[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        raw[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        raw[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        raw[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        raw[24..28].copy_from_slice(&self.len.to_le_bytes());
        raw[28..30].copy_from_slice(&self.kind.to_le_bytes());
        raw[30..32].copy_from_slice(&self.op.to_le_bytes());
        raw[32..36].copy_from_slice(&self.flags.to_le_bytes());
        raw[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        raw[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        raw
    }

    /// Whether the payload belongs to the stream.
    pub fn carries_data(&self) -> bool {
        self.op == op::DATA
    }

    /// The reset that answers this packet: everything turned round.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RESET,
            ..Header::default()
        }
    }
}

/// The next `N` bytes; zeros past the end, which the lengths of the fields rule out.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    rest.split_first_chunk::<N>().map_or([0; N], |(first, tail)| {
        *rest = tail;
        *first
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let mut raw = [0u8; HEADER_LEN];
        for (i, byte) in raw.iter_mut().enumerate() {
            *byte = i as u8;
        }
        let header = Header::parse(&raw);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.bytes(), raw);
    }
}
