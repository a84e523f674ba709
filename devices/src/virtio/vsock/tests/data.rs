//! Bytes through the device, both ways.

use std::thread;

use super::*;
use crate::limits::VSOCK_BUFFER;

#[test]
fn a_host_client_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(52);
    client.write_all(b"question").unwrap();
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"question");
    guest.write(&mut socket, b"answer");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn a_guest_reaches_a_program_of_the_host() {
    let mut guest = Guest::new(16, 4096);
    let listener = guest.listen(7);
    let (mut server, mut socket) = guest.call(&listener, 1000, 7);
    guest.write(&mut socket, b"question");
    let mut question = [0; 8];
    server.read_exact(&mut question).unwrap();
    server.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"answer");
}

#[test]
fn a_guest_is_refused_where_nobody_listens() {
    let mut guest = Guest::new(16, 4096);
    let mut socket = Socket::new(9, 1000);
    guest.say(&socket, op::REQUEST);
    guest.expect(&mut socket, op::RESET);
    assert_eq!(guest.count("refused"), 1);
}

#[test]
fn a_client_is_hung_up_on_when_the_guest_refuses() {
    let mut guest = Guest::new(16, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (header, _) = guest.next();
    guest.send(&header.reset(), &[]);
    assert_eq!(read_all(&mut client), b"");
}

#[test]
fn bytes_behind_the_connect_line_belong_to_the_guest() {
    let mut guest = Guest::new(16, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\nearly\nbytes").unwrap();
    let mut socket = guest.answer(5);
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"early\nbytes");
}

#[test]
fn a_connect_line_may_come_byte_by_byte() {
    let mut guest = Guest::new(16, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    for byte in b"CONNECT 1234\n" {
        client.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    guest.answer(1234);
}

#[test]
fn one_read_fills_many_small_buffers() {
    let mut guest = Guest::new(64, 1044);
    let (mut client, mut socket) = guest.called(5);
    guest.stop();
    client.write_all(&pattern(0, 10_500)).unwrap();
    guest.start();
    let mut lens = Vec::new();
    let mut all = Vec::new();
    while all.len() < 10_500 {
        let (header, payload) = guest.expect(&mut socket, op::DATA);
        lens.push(header.len);
        all.extend(payload);
    }
    assert_eq!(all, pattern(0, 10_500));
    assert_eq!(lens, [vec![1000; 10], vec![500]].concat(), "every buffer but the last is full");
}

/// Both ways at once, in chunks of random lengths, each way checked to the byte.
fn exchange(total: usize, buffers: usize, len: u32, features: u64) {
    let mut guest = Guest::with(buffers, len, features);
    let (client, mut socket) = guest.called(5);
    let (mut reader, mut writer) = (client.try_clone().unwrap(), client);
    let writing = thread::spawn(move || {
        let (mut at, mut dice) = (0, Dice(1));
        while at < total {
            let len = dice.up_to(70_000).min(total - at);
            writer.write_all(&pattern(at, len)).unwrap();
            at += len;
        }
        writer
    });
    let reading = thread::spawn(move || {
        let (mut at, mut dice, mut chunk) = (0, Dice(2), vec![0; 90_000]);
        while at < total {
            let len = dice.up_to(90_000);
            let got = reader.read(&mut chunk[..len]).unwrap();
            assert!(got > 0 && chunk[..got] == pattern(at, got), "at {at}");
            at += got;
        }
    });
    let (mut put, mut got, mut told, mut dice) = (0, 0, 0, Dice(3));
    while put < total || got < total {
        let len = dice.up_to(65_536).min(total - put).min(socket.allowance() as usize);
        if len > 0 {
            guest.write(&mut socket, &pattern(put, len));
            put += len;
        }
        let patience = if len > 0 { Duration::ZERO } else { Duration::from_millis(20) };
        while let Some((header, payload)) = guest.poll(if got % 2 == 0 { Duration::ZERO } else { patience }) {
            assert!(matches!(header.op, op::DATA | op::CREDIT_UPDATE | op::CREDIT_REQUEST), "{header:?}");
            socket.hear(&header);
            assert!(payload == pattern(got, payload.len()), "at {got}");
            got += payload.len();
            socket.taken = got as u32;
            if got - told > 65_536 {
                told = got;
                guest.say(&socket, op::CREDIT_UPDATE);
            }
        }
    }
    writing.join().unwrap();
    reading.join().unwrap();
    assert_eq!(guest.count("to_host_bytes"), total as u64);
    assert_eq!(guest.count("to_guest_bytes"), total as u64);
    assert_eq!(guest.count("resets") + guest.count("bad_packets"), 0);
}

#[test]
fn every_byte_arrives_in_order_with_event_indices() {
    exchange(6 << 20, 128, 3700, F_COMMON);
}

#[test]
fn every_byte_arrives_in_order_without_event_indices() {
    exchange(6 << 20, 16, 65_580, crate::virtio::F_VERSION_1);
}

#[test]
fn every_byte_arrives_in_order_through_tiny_buffers() {
    exchange(1 << 20, 250, 145, F_COMMON);
}

#[test]
fn credit_updates_come_once_per_half_buffer() {
    let mut guest = Guest::new(64, 4096);
    let (mut client, mut socket) = guest.called(5);
    let reading = thread::spawn(move || read_all(&mut client).len());
    let (total, mut updates) = (4 << 20, 0);
    while (socket.sent as usize) < total {
        if socket.allowance() >= 8192 {
            guest.write(&mut socket, &pattern(0, 8192));
        } else {
            guest.expect(&mut socket, op::CREDIT_UPDATE);
            updates += 1;
        }
    }
    while guest.poll(Duration::from_millis(50)).is_some() {
        updates += 1;
    }
    guest.shut(&socket, 3);
    guest.expect(&mut socket, op::RESET);
    assert_eq!(reading.join().unwrap(), total);
    let least = total / VSOCK_BUFFER as usize;
    assert!((least - 1..=2 * least + 2).contains(&updates), "{updates} updates");
}

#[test]
fn no_byte_goes_beyond_the_guests_credit() {
    let mut guest = Guest::new(64, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (header, _) = guest.next();
    let mut socket = Socket { room: 10_000, ..Socket::new(header.src_port, 5) };
    guest.say(&socket, op::RESPONSE);
    client.write_all(&pattern(0, 30_000)).unwrap();
    let mut all = Vec::new();
    for step in 1..=3 {
        while all.len() < 10_000 * step {
            let (header, payload) = guest.next();
            // After two seconds without credit the device asks for it once.
            if header.op == op::DATA {
                all.extend(payload);
            }
        }
        assert_eq!(all.len(), 10_000 * step);
        guest.silent();
        socket.taken = all.len() as u32;
        guest.say(&socket, op::CREDIT_UPDATE);
    }
    assert_eq!(all, pattern(0, 30_000));
}

#[test]
fn a_guest_that_forgets_to_give_credit_is_asked_once() {
    let mut guest = Guest::new(64, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\nhello").unwrap();
    let (header, _) = guest.next();
    let mut socket = Socket { room: 0, ..Socket::new(header.src_port, 5) };
    guest.say(&socket, op::RESPONSE);
    guest.expect(&mut socket, op::CREDIT_REQUEST);
    guest.say(&socket, op::CREDIT_UPDATE);
    assert!(guest.poll(Duration::from_millis(2500)).is_none());
    socket.room = u32::MAX;
    guest.say(&socket, op::CREDIT_UPDATE);
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"hello");
}

#[test]
fn a_credit_request_is_answered() {
    let mut guest = Guest::new(16, 4096);
    let (_client, mut socket) = guest.called(5);
    guest.say(&socket, op::CREDIT_REQUEST);
    let (header, _) = guest.expect(&mut socket, op::CREDIT_UPDATE);
    assert_eq!(header.buf_alloc, VSOCK_BUFFER);
}

#[test]
fn busy_streams_take_turns() {
    let mut guest = Guest::new(16, 4096);
    guest.repost = false;
    let pairs: Vec<_> = (0..8)
        .map(|i| {
            let pair = guest.called(100 + i);
            guest.post_idle();
            pair
        })
        .collect();
    guest.stop();
    for (client, _) in &pairs {
        (&*client).write_all(&pattern(0, 150_000)).unwrap();
    }
    guest.repost = true;
    guest.start();
    let mut order = Vec::new();
    for _ in 0..8 * 17 {
        order.push(guest.next().0.dst_port);
    }
    order.dedup();
    let mut sorted: Vec<_> = order.iter().take(8).collect();
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), 8, "each once before any twice: {order:?}");
}
