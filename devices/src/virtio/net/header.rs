//! The header in front of every frame, and the check of those that come from the guest.
//!
//! ```text
//!   0      1         2..4     4..6      6..8        8..10        10..12
//!   flags  gso_type  hdr_len  gso_size  csum_start  csum_offset  num_buffers
//! ```
//!
//! The host's kernel believes much of it: where the checksum is to be put, into what pieces
//! the frame is to be cut. So it is copied out of guest memory once, checked against the
//! frame and against what was negotiated, and the copy is what the tap gets. Fields that have
//! no meaning for the frame are cleared, so that only meaningful ones pass.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Length in bytes (VIRTIO 1.2 section 5.1.6, without hash report).
pub const LEN: usize = 12;
/// Where `num_buffers` lies.
pub const NUM_BUFFERS: u64 = 10;
/// An Ethernet header: the shortest frame that means anything.
pub const ETHERNET: usize = 14;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const TCP4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCP6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const UFO: u8 = VIRTIO_NET_HDR_GSO_UDP as u8;
const USO: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;

/// Checks the header of a frame of `frame` bytes (header not counted) that comes from a
/// driver which accepted `features`. Returns what may be given to the host, or nothing when
/// the header is false (VIRTIO 1.2 section 5.1.6.2).
pub fn check(raw: [u8; LEN], frame: usize, features: u64) -> Option<[u8; LEN]> {
    let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, ..] = raw;
    let has = |bit: u32| features & 1 << bit != 0;
    let mut checked = [0; LEN];
    // Flags unknown here must be ignored (section 5.1.6.2.2).
    if flags & NEEDS_CSUM != 0 {
        let start = usize::from(u16::from_le_bytes([c0, c1]));
        let offset = usize::from(u16::from_le_bytes([o0, o1]));
        let inside = start >= ETHERNET && start + offset + 2 <= frame;
        if !inside || !has(VIRTIO_NET_F_CSUM) {
            return None;
        }
        checked[0] = NEEDS_CSUM;
        checked[6..10].copy_from_slice(&[c0, c1, o0, o1]);
    }
    let allowed = match gso {
        0 => return Some(checked),
        TCP4 => has(VIRTIO_NET_F_HOST_TSO4),
        TCP6 => has(VIRTIO_NET_F_HOST_TSO6),
        UFO => has(VIRTIO_NET_F_HOST_UFO),
        USO => has(VIRTIO_NET_F_HOST_USO),
        _ => false,
    };
    let header_len = usize::from(u16::from_le_bytes([h0, h1]));
    let size = u16::from_le_bytes([s0, s1]);
    // Segmentation rewrites checksums, so it needs to know where they are.
    if !allowed || checked[0] == 0 || size == 0 || header_len > frame {
        return None;
    }
    checked[1..6].copy_from_slice(&[gso, h0, h1, s0, s1]);
    Some(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_UFO
        | 1 << VIRTIO_NET_F_HOST_USO;

    fn header(flags: u8, gso: u8, len: u16, size: u16, start: u16, offset: u16) -> [u8; LEN] {
        let mut raw = [0xaa; LEN];
        raw[0] = flags;
        raw[1] = gso;
        for (at, value) in [(2, len), (4, size), (6, start), (8, offset)] {
            raw[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        raw
    }

    #[test]
    fn a_plain_frame_passes_with_every_other_field_cleared() {
        assert_eq!(check(header(0, 0, 7, 7, 7, 7), 14, 0), Some([0; LEN]));
        assert_eq!(check(header(0xfe, 0, 7, 7, 7, 7), 14, ALL), Some([0; LEN]), "unknown flags");
    }

    #[test]
    fn a_checksum_must_lie_inside_the_frame_and_be_negotiated() {
        for (start, offset, frame, good) in [
            (34, 16, 52, true),
            (34, 16, 51, false),
            (13, 16, 100, false),
            (65535, 65535, 65550, false),
            (0, 0, 14, false),
        ] {
            let raw = header(1, 0, 0, 0, start, offset);
            assert_eq!(check(raw, frame, ALL).is_some(), good, "{start}+{offset} of {frame}");
            assert_eq!(check(raw, frame, ALL & !1), None);
        }
    }

    #[test]
    fn segmentation_needs_its_feature_a_size_a_checksum_and_a_header_that_fits() {
        let good = header(1, 1, 54, 1448, 34, 16);
        assert_eq!(check(good, 4000, ALL).unwrap()[..10], good[..10]);
        assert_eq!(check(good, 4000, ALL & !(1 << VIRTIO_NET_F_HOST_TSO4)), None);
        for bad in [
            header(1, 1, 54, 0, 34, 16),
            header(0, 1, 54, 1448, 34, 16),
            header(1, 1, 4001, 1448, 34, 16),
            header(1, 2, 54, 1448, 34, 16),
            header(1, 0x81, 54, 1448, 34, 16),
            header(1, 0xff, 54, 1448, 34, 16),
        ] {
            assert_eq!(check(bad, 4000, ALL), None, "{bad:?}");
        }
        for gso in [1, 3, 4, 5] {
            assert!(check(header(1, gso, 54, 1448, 34, 16), 4000, ALL).is_some());
            assert!(check(header(1, gso, 54, 1448, 34, 16), 4000, 1).is_none());
        }
    }

    #[test]
    fn no_header_whatever_passes_something_that_points_outside() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..200_000 {
            let mut raw = [0u8; LEN];
            for byte in &mut raw {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (seed >> 56) as u8 & if seed & 0x100_0000 == 0 { 0x07 } else { 0xff };
            }
            let frame = 14 + (seed >> 20) as usize % 2000;
            let Some(checked) = check(raw, frame, ALL) else { continue };
            let field = |at: usize| usize::from(u16::from_le_bytes([checked[at], checked[at + 1]]));
            assert!(checked[0] & !1 == 0 && checked[10..] == [0, 0]);
            assert!(checked[0] == 0 || field(6) + field(8) + 2 <= frame);
            assert!(checked[1] == 0 || (field(4) > 0 && field(2) <= frame && checked[0] == 1));
        }
    }
}
