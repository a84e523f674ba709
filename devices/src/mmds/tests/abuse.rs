//! What a hostile guest gets, and that others still get what is theirs.

use std::time::{Duration, Instant};

use smoltcp::{
    phy::ChecksumCapabilities,
    socket::tcp::State,
    wire::{
        IpAddress, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr,
        TcpSeqNumber, TcpTimestampRepr,
    },
};

use super::guest::{Guest, MAC, SERVICE, parts, service};
use crate::mmds::{
    Detour, MTU, MmdsVersion,
    http::HEAD_MAX,
    stack::{ANSWERS_MAX, CONNECTIONS_MAX},
};

const GUEST: Ipv4Address = Ipv4Address::new(169, 254, 1, 9);

fn segment(port: u16, control: TcpControl, seq: u32, payload: &[u8]) -> TcpRepr<'_> {
    TcpRepr {
        src_port: port,
        dst_port: 80,
        control,
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: (control != TcpControl::Syn).then_some(TcpSeqNumber(0)),
        window_len: 65_535,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None::<TcpTimestampRepr>,
        payload,
    }
}

/// The frame of a segment whose TCP checksum the guest left to the device.
fn frame(repr: &TcpRepr<'_>) -> Vec<u8> {
    let mut checksums = ChecksumCapabilities::default();
    checksums.tcp = smoltcp::phy::Checksum::None;
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: SERVICE,
        next_header: IpProtocol::Tcp,
        payload_len: repr.buffer_len(),
        hop_limit: 64,
    };
    let mut frame = vec![0xff; 14 + 20 + repr.buffer_len()];
    frame[6..12].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[8, 0]);
    let mut packet = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.emit(&mut packet, &checksums);
    let mut tcp = TcpPacket::new_unchecked(packet.payload_mut());
    repr.emit(&mut tcp, &IpAddress::Ipv4(GUEST), &IpAddress::Ipv4(SERVICE), &checksums);
    frame
}

/// A segment that waited for the guest.
struct Reply {
    port: u16,
    flags: u8,
    seq: u32,
    ack: u32,
    payload: Vec<u8>,
}

fn replies(detour: &Detour, now: Instant) -> Vec<Reply> {
    let mut buf = [0; MTU + 14];
    let mut all = Vec::new();
    while let Some(len) = detour.next_reply(&mut buf, now) {
        let packet = Ipv4Packet::new_checked(&buf[14..len]).unwrap();
        let tcp = TcpPacket::new_checked(packet.payload()).unwrap();
        all.push(Reply {
            port: tcp.dst_port(),
            flags: packet.payload()[13],
            seq: tcp.seq_number().0 as u32,
            ack: tcp.ack_number().0 as u32,
            payload: tcp.payload().to_vec(),
        });
    }
    all
}

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

#[test]
fn a_segment_far_larger_than_the_cable_takes_and_without_checksum_is_understood() {
    let detour = Detour::new(service(MmdsVersion::V1)).unwrap();
    let now = Instant::now();
    detour.take(&frame(&segment(1000, TcpControl::Syn, 7, &[])), now);
    let opened = replies(&detour, now).remove(0);
    assert_eq!((opened.flags, opened.ack), (SYN | ACK, 8));
    let mut request = b"GET /latest HTTP/1.1\r\n\r\n".to_vec();
    let end = request.len() as u32;
    // A segment of 64 KiB less headers, of which the window takes the first part.
    request.resize(65_495, b' ');
    let mut repr = segment(1000, TcpControl::Psh, 8, &request);
    repr.ack_number = Some(TcpSeqNumber(opened.seq as i32) + 1);
    detour.take(&frame(&repr), now);
    let answers = replies(&detour, now);
    let answer: Vec<u8> = answers.iter().flat_map(|reply| reply.payload.clone()).collect();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer));
    assert!(answers.iter().any(|reply| reply.ack.wrapping_sub(8) >= end));
}

#[test]
fn garbage_is_answered_once_and_the_connection_closed() {
    let mut guest = Guest::new(MmdsVersion::V1);
    for garbage in
        ["\n\n", "\0\u{1}\u{2}\r\n\r\n\r\n\r\n", "PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nGET / HTT"]
    {
        let handle = guest.connect();
        guest.say(handle, garbage);
        assert_eq!(parts(&guest.hear(handle)).0, 400, "{garbage:?}");
        assert_eq!(guest.socket(handle).state(), State::CloseWait);
    }
    let handle = guest.connect();
    guest.say(handle, "PUT /latest/api/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    assert_eq!(parts(&guest.hear(handle)).0, 501);
    assert_eq!(guest.ask("GET /latest HTTP/1.1").0, 200);
}

#[test]
fn a_request_that_never_ends_is_cut_off() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handle = guest.connect();
    for _ in 0..3 {
        guest.say(handle, &"x".repeat(HEAD_MAX / 2));
    }
    assert_eq!(parts(&guest.hear(handle)).0, 431);
    assert_eq!(guest.socket(handle).state(), State::CloseWait);
}

#[test]
fn handshakes_left_half_open_take_no_place_for_long() {
    let mut guest = Guest::new(MmdsVersion::V1);
    for port in 0..2000u16 {
        let syn = frame(&segment(1 + port, TcpControl::Syn, u32::from(port) << 20, &[]));
        guest.detour.take(&syn, guest.now);
        let _ = replies(&guest.detour, guest.now);
    }
    assert_eq!(guest.count("connections_created"), CONNECTIONS_MAX as u64);
    assert_eq!(guest.count("rx_accepted_unusual"), 2000 - CONNECTIONS_MAX as u64);
    guest.now += Duration::from_millis(250);
    assert_eq!(guest.ask("GET /latest HTTP/1.1").0, 200, "a new one gets the place of an old one");
    guest.pass(Duration::from_secs(30));
    assert_eq!(guest.count("connections_created"), guest.count("connections_destroyed"));
}

#[test]
fn connections_that_say_nothing_give_way_only_after_a_while() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let idle: Vec<_> = (0..CONNECTIONS_MAX).map(|_| guest.connect()).collect();
    let late = guest.connect();
    assert_eq!(guest.socket(late).state(), State::SynSent, "not heard, not refused");
    guest.now += Duration::from_secs(9);
    guest.say(idle[0], "GET /latest HTTP/1.1\r\n\r\n");
    guest.hear(idle[0]);
    guest.pass(Duration::from_secs(20));
    assert_eq!(guest.socket(late).state(), State::Established, "its next try succeeded");
    guest.say(late, "GET /latest HTTP/1.1\r\n\r\n");
    assert_eq!(parts(&guest.hear(late)).0, 200);
    guest.say(idle[0], "GET /latest HTTP/1.1\r\n\r\n");
    assert_eq!(parts(&guest.hear(idle[0])).0, 200, "the one that spoke kept its place");
    guest.say(idle[1], "GET /latest HTTP/1.1\r\n\r\n");
    assert_eq!(guest.socket(idle[1]).state(), State::Closed, "the most silent one was told");
}

#[test]
fn guests_that_do_not_read_their_answers_are_not_read_either() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handles: Vec<_> = (0..CONNECTIONS_MAX).map(|_| guest.connect_with(512)).collect();
    for handle in &handles {
        guest.say(*handle, &"GET /big HTTP/1.1\r\n\r\n".repeat(4));
    }
    let held = guest.detour.held();
    assert!(held > ANSWERS_MAX / 2 && held <= ANSWERS_MAX + 51_000, "{held} bytes are held");
    let mut answered = 0;
    while answered < 4 * CONNECTIONS_MAX {
        let before = answered;
        for handle in &handles {
            answered += guest.hear(*handle).matches("HTTP/1.1 200 OK").count();
        }
        assert!(answered > before, "stuck at {answered}");
    }
    assert_eq!(guest.detour.held(), 0);
}

#[test]
fn a_guest_that_takes_no_replies_makes_nothing_grow() {
    let detour = Detour::new(service(MmdsVersion::V1)).unwrap();
    let now = Instant::now();
    for port in 1..5000 {
        // Each of these is answered by a reset.
        detour.take(&frame(&segment(port, TcpControl::None, 1, b"x")), now);
        detour.tick(now);
    }
    let waiting = replies(&detour, now);
    assert!(waiting.len() <= 33, "{} replies wait", waiting.len());
    assert!(waiting.iter().all(|reply| reply.flags & RST != 0));
}

#[test]
fn what_is_not_for_the_port_or_no_tcp_is_swallowed_in_silence() {
    let mmds = service(MmdsVersion::V1);
    let detour = Detour::new(mmds.clone()).unwrap();
    let now = Instant::now();
    let mut other_port = segment(1000, TcpControl::Syn, 1, &[]);
    other_port.dst_port = 81;
    let whole = frame(&segment(1000, TcpControl::Syn, 1, &[]));
    let edited = |at: usize, value: u8| {
        let mut frame = whole.clone();
        frame[at] = value;
        frame
    };
    let short = whole[..13].to_vec();
    for bad in
        [frame(&other_port), edited(14, 0x65), edited(17, 0), edited(46, 0xf0), short, edited(14, 0x40)]
    {
        detour.take(&bad, now);
    }
    for unusual in [edited(23, 17), edited(23, 1), edited(20, 0x20), edited(21, 9)] {
        detour.take(&unusual, now);
    }
    assert!(!detour.has_reply());
    let counters = mmds.counters();
    for (name, count) in [
        ("rx_accepted", 10),
        ("rx_accepted_err", 5),
        ("rx_accepted_unusual", 4),
        ("rx_bad_eth", 1),
        ("connections_created", 0),
    ] {
        assert!(counters.contains(&(name, count)), "{name}: {counters:?}");
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

#[test]
fn no_frame_of_random_bytes_does_harm() {
    let detour = Detour::new(service(MmdsVersion::V2)).unwrap();
    let mut now = Instant::now();
    let mut dice = Dice(1);
    let mut buf = [0; MTU + 14];
    for round in 0..40_000 {
        let mut frame: Vec<u8> = (0..dice.roll(200)).map(|_| dice.roll(256) as u8).collect();
        if let (true, Some(head)) = (round % 4 != 0, frame.get_mut(12..42)) {
            // Random, but for the service, with decreasing randomness.
            head[..2].copy_from_slice(if round % 8 == 1 { &[8, 6] } else { &[8, 0] });
            head[18..22].copy_from_slice(&[169, 254, 169, 254]);
            head[26..30].copy_from_slice(&[169, 254, 169, 254]);
            if round % 2 == 0 {
                head[2] = 0x45;
                head[4..6].copy_from_slice(&[0, 40]);
                head[8..12].copy_from_slice(&[0, 0, 64, 6]);
                head[24..26].copy_from_slice(&[0, 80]);
            }
        }
        detour.take(&frame, now);
        while detour.next_reply(&mut buf, now).is_some() {}
        if round % 16 == 0 {
            now += Duration::from_millis(dice.roll(3000) as u64);
            detour.tick(now);
        }
    }
}

/// Segments that follow a conversation but for some number that is off.
#[test]
fn no_conversation_gone_wrong_does_harm() {
    let mmds = service(MmdsVersion::V1);
    let detour = Detour::new(mmds.clone()).unwrap();
    let mut now = Instant::now();
    let mut dice = Dice(2);
    let controls = [TcpControl::None, TcpControl::Psh, TcpControl::Fin, TcpControl::Rst];
    // Port, next number of the guest and of the service.
    let mut known: [(u16, u32, u32); 8] = std::array::from_fn(|at| (at as u16, 0, 0));
    let mut ports = 100..;
    let text = b"GET /big HTTP/1.1\r\n\r\nGET /latest HTTP/1.1\r\nX: y\r\n\r\n".repeat(40);
    for _ in 0..60_000 {
        let at = dice.roll(known.len());
        let control = match dice.roll(20) {
            0..=2 => TcpControl::Syn,
            3 => controls[dice.roll(controls.len())],
            _ => TcpControl::Psh,
        };
        if control == TcpControl::Syn && dice.roll(2) == 0 {
            known[at].0 = ports.next().unwrap();
        }
        let (port, mine, theirs) = known[at];
        let start = if dice.roll(4) == 0 { dice.roll(text.len()) } else { 0 };
        let payload = &text[start..(start + dice.roll(1500)).min(text.len())];
        let near = |dice: &mut Dice, base: u32| match dice.roll(24) {
            0 => (dice.roll(1 << 31) << dice.roll(2)) as u32,
            1 => base.wrapping_add(dice.roll(9000) as u32).wrapping_sub(4500),
            2 => base.wrapping_add(0x8000_0000).wrapping_sub(dice.roll(3) as u32),
            _ => base,
        };
        let mut repr = segment(port, control, near(&mut dice, mine), payload);
        let acknowledged = TcpSeqNumber(near(&mut dice, theirs) as i32);
        repr.ack_number = repr.ack_number.map(|_| acknowledged);
        repr.window_len = [0, 1, 100, 5000, 65_535][dice.roll(5)];
        if control == TcpControl::Syn {
            repr.payload = if dice.roll(4) == 0 { payload } else { &[] };
            repr.max_seg_size = [None, Some(0), Some(1), Some(1460), Some(65_535)][dice.roll(5)];
            repr.window_scale = [None, Some(0), Some(7), Some(14), Some(255)][dice.roll(5)];
            repr.sack_permitted = dice.roll(2) == 0;
            known[at].1 = (repr.seq_number.0 as u32).wrapping_add(1);
        }
        let mut bytes = frame(&repr);
        if dice.roll(10) == 0 {
            let at = dice.roll(bytes.len());
            bytes[at] = dice.roll(256) as u8;
        }
        detour.take(&bytes, now);
        for reply in replies(&detour, now).iter().filter(|reply| reply.flags & RST == 0) {
            let ends = reply.payload.len() as u32 + u32::from(reply.flags & 3 != 0);
            if let Some(known) = known.iter_mut().find(|known| known.0 == reply.port) {
                (known.1, known.2) = (reply.ack, reply.seq.wrapping_add(ends));
            }
        }
        if dice.roll(20) == 0 {
            now += Duration::from_millis(dice.roll(4000) as u64);
            detour.tick(now);
        }
    }
    let counters = mmds.counters();
    let count = |name: &str| counters.iter().find(|(n, _)| *n == name).unwrap().1;
    assert!(count("connections_created") > 500, "{counters:?}");
    assert!(count("rx_no_token") > 200, "requests were understood: {counters:?}");
    assert!(detour.held() <= ANSWERS_MAX + 51_000);
}
