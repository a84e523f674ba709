//! The way to the metadata service, through the device.

use serde_json::json;
use smoltcp::{
    phy::{Checksum, ChecksumCapabilities},
    wire::{
        IpAddress, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr,
        TcpSeqNumber,
    },
};

use super::*;
use crate::mmds::{Mmds, MmdsConfig};

const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);
const SERVICE: Ipv4Address = Ipv4Address::new(169, 254, 169, 254);

fn rig_with(pairs: usize, features: u64) -> (Rig, Arc<Mmds>) {
    let mut rig = rig_of(pairs, features);
    let mmds = Arc::new(Mmds::new(1000).unwrap());
    mmds.configure(MmdsConfig::for_interface("eth0"), &["eth0"]).unwrap();
    mmds.put(json!({"name": "vm", "long": "x".repeat(900)})).unwrap();
    rig.net.connect_mmds(Arc::clone(&mmds)).unwrap();
    rig.start();
    (rig, mmds)
}

/// A segment of the guest with its virtio header, its checksum left to the device.
fn segment(control: TcpControl, seq: u32, ack: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let mut checksums = ChecksumCapabilities::default();
    checksums.tcp = Checksum::None;
    let repr = TcpRepr {
        src_port: 1234,
        dst_port: 80,
        control,
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: ack.map(|ack| TcpSeqNumber(ack as i32)),
        window_len: 65_535,
        window_scale: None,
        max_seg_size: Some(1460).filter(|_| control == TcpControl::Syn),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: SERVICE,
        next_header: IpProtocol::Tcp,
        payload_len: repr.buffer_len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; header::LEN + 14 + 20 + repr.buffer_len()];
    bytes[0] = 1;
    bytes[6..10].copy_from_slice(&[34, 0, 16, 0]);
    bytes[header::LEN + 6..header::LEN + 12].copy_from_slice(&ADDRESS.0);
    bytes[header::LEN + 12..header::LEN + 14].copy_from_slice(&[8, 0]);
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes[header::LEN + 14..]);
    ip.emit(&mut packet, &checksums);
    let mut tcp = TcpPacket::new_unchecked(packet.payload_mut());
    repr.emit(&mut tcp, &IpAddress::Ipv4(GUEST), &IpAddress::Ipv4(SERVICE), &checksums);
    bytes
}

/// Sequence number and payload of a reply, whose checksums must be right.
fn reply(frame: &[u8]) -> (u32, Vec<u8>) {
    assert_eq!(frame[..10], [0; 10], "nothing is left to do");
    assert_eq!(frame[header::LEN..header::LEN + 6], ADDRESS.0);
    let packet = Ipv4Packet::new_checked(&frame[header::LEN + 14..]).unwrap();
    assert!(packet.verify_checksum());
    let tcp = TcpPacket::new_checked(packet.payload()).unwrap();
    assert!(tcp.verify_checksum(&IpAddress::Ipv4(SERVICE), &IpAddress::Ipv4(GUEST)));
    (tcp.seq_number().0 as u32, tcp.payload().to_vec())
}

const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;

/// Asks for `path` and returns the answer.
fn ask(rig: &mut Rig, path: &str) -> String {
    rig.send(&segment(TcpControl::Syn, 99, None, &[]), &[]);
    let (isn, _) = reply(&rig.receive().0);
    let request = format!("GET {path} HTTP/1.1\r\n\r\n");
    rig.send(&segment(TcpControl::Psh, 100, Some(isn + 1), request.as_bytes()), &[header::LEN, 20, 30]);
    let mut text = String::new();
    while !text.contains("\r\n\r\n") {
        text += &String::from_utf8(reply(&rig.receive().0).1).unwrap();
    }
    text
}

#[test]
fn a_guest_reads_metadata_and_the_host_sees_nothing_of_it() {
    for features in [CSUM, CSUM | MRG] {
        let (mut rig, mmds) = rig_with(1, features);
        for _ in 0..16 {
            rig.post(&[if features & MRG == 0 { 2048 } else { 400 }]);
        }
        let answer = ask(&mut rig, "/long");
        assert!(answer.ends_with(&"x".repeat(900)), "{answer}");
        assert!(rig.peers[0].take_for(Duration::from_millis(50)).is_none(), "the tap got something");
        assert_eq!(rig.counter("tx_packets"), 0);
        assert!(mmds.counters().contains(&("rx_accepted", 2)));
    }
}

#[test]
fn other_frames_pass_as_they_are() {
    let (mut rig, _mmds) = rig_with(1, CSUM);
    for len in [14, 30, 41, 42, 43, 1514] {
        let mut bytes = frame(len, 7);
        bytes[header::LEN + 12..header::LEN + 14].copy_from_slice(&[8, 0]);
        rig.send(&bytes, &[13, 9, 1]);
        assert_eq!(rig.peers[0].take().unwrap(), bytes);
        rig.post(&[2048]);
        assert!(rig.peers[0].send(&bytes));
        assert_eq!(rig.receive().0, with_count(bytes, 1));
    }
}

#[test]
fn replies_wait_for_buffers_and_come_when_there_are_some() {
    for features in [CSUM, CSUM | MRG] {
        let (mut rig, mmds) = rig_with(1, features);
        rig.send(&segment(TcpControl::Syn, 99, None, &[]), &[]);
        std::thread::sleep(Duration::from_millis(20));
        assert!(mmds.counters().contains(&("tx_frames", 0)));
        rig.post(&[2048]);
        reply(&rig.receive().0);
    }
}

#[test]
fn a_reply_that_is_not_acknowledged_is_repeated_by_the_devices_own_timer() {
    let (mut rig, _mmds) = rig_with(1, CSUM);
    rig.post(&[2048]);
    rig.post(&[2048]);
    rig.send(&segment(TcpControl::Syn, 99, None, &[]), &[]);
    let first = reply(&rig.receive().0);
    assert_eq!(reply(&rig.receive().0), first);
}

#[test]
fn the_service_answers_while_the_tap_is_gone() {
    let (mut rig, _mmds) = rig_with(1, CSUM | STATUS);
    rig.peers.clear();
    for _ in 0..8 {
        rig.post(&[2048]);
    }
    rig.driver.kick(0);
    assert!(ask(&mut rig, "/name").ends_with("\r\n\r\nvm"));
}

#[test]
fn a_connection_survives_a_pause_and_not_a_reset() {
    let (mut rig, mmds) = rig_with(1, CSUM);
    for _ in 0..8 {
        rig.post(&[2048]);
    }
    rig.send(&segment(TcpControl::Syn, 99, None, &[]), &[]);
    let (isn, _) = reply(&rig.receive().0);
    rig.stop();
    rig.start();
    let request = b"GET /name HTTP/1.1\r\n\r\n";
    rig.send(&segment(TcpControl::Psh, 100, Some(isn + 1), request), &[]);
    assert!(reply(&rig.receive().0).1.ends_with(b"vm"));
    rig.stop();
    rig.net.reset();
    assert!(mmds.counters().contains(&("connections_destroyed", 1)));
}
