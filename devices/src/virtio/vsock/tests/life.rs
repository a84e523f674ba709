//! Many connections, pauses, restores.

use std::{collections::HashSet, thread};

use super::*;

#[test]
fn a_thousand_connections_in_turn() {
    let mut guest = Guest::new(64, 4096);
    let mut ports = HashSet::new();
    for i in 0..1000 {
        let (mut client, mut socket) = guest.called(5);
        assert!(ports.insert(socket.host_port));
        client.write_all(&[i as u8; 10]).unwrap();
        assert_eq!(guest.expect(&mut socket, op::DATA).1, [i as u8; 10]);
        if i % 2 == 0 {
            guest.shut(&socket, 3);
            guest.expect(&mut socket, op::RESET);
            assert_eq!(read_all(&mut client), b"");
        } else {
            drop(client);
            guest.expect(&mut socket, op::SHUTDOWN);
            guest.say(&socket, op::RESET);
        }
    }
    assert_eq!(guest.count("accepted"), 1000);
    assert_eq!(guest.count("bad_packets"), 0);
}

#[test]
fn two_hundred_connections_at_once_both_ways() {
    let mut guest = Guest::new(128, 4096);
    let path = guest.path(None);
    let clients: Vec<_> = (0..200u32)
        .map(|i| {
            let path = path.clone();
            thread::spawn(move || {
                let mut client = UnixStream::connect(path).unwrap();
                client.write_all(format!("CONNECT {i}\n").as_bytes()).unwrap();
                assert!(line(&mut client).starts_with("OK "));
                client.write_all(&pattern(i as usize, 5000)).unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
                assert_eq!(read_all(&mut client), pattern(i as usize, 5000));
            })
        })
        .collect();
    let mut sockets: HashMap<u32, (Socket, Vec<u8>)> = HashMap::new();
    let mut over = 0;
    while over < 200 {
        let (header, payload) = guest.next();
        let (socket, data) = sockets
            .entry(header.dst_port)
            .or_insert_with(|| (Socket::new(header.src_port, header.dst_port), Vec::new()));
        match header.op {
            op::REQUEST => guest.send(&socket.header(op::RESPONSE), &[]),
            op::DATA => data.extend(payload),
            op::SHUTDOWN => {
                let (mut socket, data) = (*socket, std::mem::take(data));
                guest.write(&mut socket, &data);
                guest.shut(&socket, 3);
            }
            op::RESET => over += 1,
            _ => {}
        }
    }
    clients.into_iter().for_each(|client| client.join().unwrap());
}

#[test]
fn a_pause_in_the_middle_is_not_seen() {
    let mut guest = Guest::new(64, 2000);
    let listener = guest.listen(7);
    let (mut server, mut socket) = guest.call(&listener, 1000, 7);
    let total = 3 << 20;
    let echo = thread::spawn(move || {
        let (mut all, mut chunk) = (0, vec![0; 30_000]);
        while all < total {
            let got = server.read(&mut chunk).unwrap();
            assert!(got > 0 && chunk[..got] == pattern(all, got));
            server.write_all(&chunk[..got]).unwrap();
            all += got;
        }
    });
    let (mut put, mut got, mut dice, mut pauses) = (0, 0, Dice(5), 0);
    while got < total {
        let len = dice.up_to(40_000).min(total - put).min(socket.allowance() as usize);
        if len > 0 && put - got < 200_000 {
            guest.write(&mut socket, &pattern(put, len));
            put += len;
        }
        if dice.up_to(20) == 1 {
            guest.stop();
            guest.start();
            pauses += 1;
        }
        while let Some((header, payload)) = guest.poll(Duration::from_millis(1)) {
            assert!(matches!(header.op, op::DATA | op::CREDIT_UPDATE | op::SHUTDOWN), "{header:?}");
            socket.hear(&header);
            assert!(payload == pattern(got, payload.len()), "at {got}");
            got += payload.len();
            socket.taken = got as u32;
        }
        guest.say(&socket, op::CREDIT_UPDATE);
    }
    echo.join().unwrap();
    assert!(pauses > 3, "{pauses} pauses");
}

#[test]
fn deadlines_do_not_run_during_a_pause() {
    let mut guest = Guest::new(16, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (header, _) = guest.next();
    guest.stop();
    thread::sleep(Duration::from_millis(2200));
    guest.start();
    thread::sleep(Duration::from_millis(100));
    guest.say(&Socket::new(header.src_port, 5), op::RESPONSE);
    assert_eq!(line(&mut client), format!("OK {}", header.src_port));
}

/// Posts buffers for events; the addresses by head.
fn post_events(guest: &mut Guest, count: usize) {
    for _ in 0..count {
        let buffer = guest.driver.writable(4);
        guest.driver.poke(buffer.address, &[0xff; 4]);
        guest.driver.send(2, &[buffer]);
    }
}

#[test]
fn a_restored_guest_is_told_once_that_its_connections_are_gone() {
    let mut guest = Guest::new(64, 4096);
    let (mut client, mut socket) = guest.called(5);
    post_events(&mut guest, 4);
    guest.stop();
    let section = guest.device.save();
    guest.device.restore(&section).unwrap();
    assert_eq!(read_all(&mut client), b"", "the host's end is closed");
    guest.start();
    assert_eq!(guest.driver.wait_used(2).unwrap().len, 4);
    // What the guest still sends on its old connection is reset.
    guest.write(&mut socket, b"old");
    guest.expect(&mut socket, op::RESET);
    post_events(&mut guest, 1);
    guest.silent();
    for _ in 0..3 {
        guest.stop();
        guest.start();
    }
    thread::sleep(Duration::from_millis(50));
    assert!(guest.driver.rings[2].take_used().is_none(), "told once");
}

#[test]
fn new_clients_wait_until_a_restored_guest_has_understood() {
    let mut guest = Guest::new(64, 4096);
    let (_client, mut old) = guest.called(5);
    post_events(&mut guest, 2);
    guest.stop();
    let section = guest.device.save();
    guest.device.restore(&section).unwrap();
    guest.start();
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.silent();
    assert!(guest.driver.wait_used(2).is_some());
    // The guest gives the event's buffer back when it has acted on it.
    post_events(&mut guest, 1);
    let started = Instant::now();
    guest.expect(&mut old, op::RESET);
    let new = guest.answer(5);
    assert!(started.elapsed() < Duration::from_millis(300));
    assert_ne!(new.host_port, old.host_port);
    assert_eq!(line(&mut client), format!("OK {}", new.host_port));
}

/// Restores the guest's device from its own state, with the events' buffers as they are.
fn restore(guest: &mut Guest) {
    guest.stop();
    let section = guest.device.save();
    guest.device.restore(&section).unwrap();
    guest.start();
}

#[test]
fn what_a_restored_guest_asks_for_is_answered_once_it_has_understood() {
    let mut guest = Guest::new(64, 4096);
    let listener = guest.listen(7);
    post_events(&mut guest, 2);
    restore(&mut guest);
    // Before it gives the event's buffer back, and the host's program has something to say.
    let mut socket = Socket::new(7, 1000);
    guest.say(&socket, op::REQUEST);
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"welcome").unwrap();
    guest.silent();
    assert!(guest.driver.wait_used(2).is_some());
    post_events(&mut guest, 1);
    guest.expect(&mut socket, op::RESPONSE);
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"welcome");
}

#[test]
fn a_connection_that_was_being_opened_ends_by_a_packet_of_its_own() {
    let mut guest = Guest::new(0, 0);
    let listener = guest.listen(7);
    let mut socket = Socket::new(7, 1000);
    // Without a receive buffer the answer does not get through.
    guest.say(&socket, op::REQUEST);
    let (mut server, _) = listener.accept().unwrap();
    restore(&mut guest);
    assert_eq!(read_all(&mut server), b"");
    for _ in 0..8 {
        let buffer = guest.driver.writable(4096);
        guest.post(buffer);
    }
    post_events(&mut guest, 1);
    assert!(guest.driver.wait_used(2).is_some());
    guest.silent();
    post_events(&mut guest, 1);
    guest.expect(&mut socket, op::RESET);
    guest.silent();
    assert!(listener.set_nonblocking(true).is_ok() && listener.accept().is_err(), "dialed once");
}

#[test]
fn ports_that_a_guest_uses_again_are_not_reset_for_what_they_were() {
    let mut guest = Guest::new(64, 4096);
    let listener = guest.listen(7);
    let (_server, mut socket) = guest.call(&listener, 1000, 7);
    post_events(&mut guest, 2);
    restore(&mut guest);
    assert!(guest.driver.wait_used(2).is_some());
    guest.say(&socket, op::REQUEST);
    let (mut server, _) = listener.accept().unwrap();
    post_events(&mut guest, 1);
    guest.expect(&mut socket, op::RESPONSE);
    socket = Socket { host_room: socket.host_room, host_taken: 0, ..Socket::new(7, 1000) };
    guest.write(&mut socket, b"new");
    let mut text = [0; 3];
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"new");
    guest.silent();
}

#[test]
fn a_pause_between_the_event_and_its_answer_lets_nobody_in_early() {
    let mut guest = Guest::new(64, 4096);
    post_events(&mut guest, 4);
    restore(&mut guest);
    assert!(guest.driver.wait_used(2).is_some());
    guest.stop();
    guest.start();
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.silent();
    post_events(&mut guest, 1);
    let socket = guest.answer(5);
    assert_eq!(line(&mut client), format!("OK {}", socket.host_port));
}

#[test]
fn a_guest_that_has_a_new_context_id_is_answered_where_it_was() {
    let mut guest = Guest::new(16, 4096);
    let (_client, socket) = guest.called(5);
    post_events(&mut guest, 2);
    guest.stop();
    let saved: Saved = guest.device.save().open(KIND, VERSION).unwrap();
    let saved = Saved { guest_cid: 77, ..saved };
    guest.device.restore(&Section::new(KIND, VERSION, &saved)).unwrap();
    guest.start();
    let old = |header: Header| Header { src_cid: 77, ..header };
    guest.send(&old(Socket::new(9, 1000).header(op::REQUEST)), &[]);
    let mut resets = Vec::new();
    for events in [1, 0] {
        post_events(&mut guest, events);
        let used = guest.driver.wait_used(0).unwrap();
        let buffer = guest.posted.remove(&used.head).unwrap();
        let header = Header::parse(guest.driver.peek(buffer.address, HEADER_LEN).first_chunk().unwrap());
        resets.push((header.op, header.dst_cid, header.src_port, header.dst_port));
    }
    assert_eq!(resets, [(op::RESET, 77, 9, 1000), (op::RESET, 77, socket.host_port, 5)]);
    assert_eq!(guest.count("bad_packets"), 0);
    guest.send(&Header { src_cid: 78, ..socket.header(op::REQUEST) }, &[]);
    guest.called(6);
    assert_eq!(guest.count("bad_packets"), 1);
}

#[test]
fn a_reset_waits_for_a_buffer_and_survives_a_save() {
    let mut guest = Guest::new(64, 4096);
    guest.stop();
    let section = guest.device.save();
    guest.device.restore(&section).unwrap();
    guest.start();
    thread::sleep(Duration::from_millis(20));
    guest.stop();
    let section = guest.device.save();
    let saved: Saved = section.open(KIND, VERSION).unwrap();
    assert!(saved.reset_pending);
    guest.start();
    post_events(&mut guest, 2);
    assert!(guest.driver.wait_used(2).is_some());
    guest.stop();
    let saved: Saved = guest.device.save().open(KIND, VERSION).unwrap();
    assert!(!saved.reset_pending);
    // Without an answer new clients come through after a while all the same.
    guest.start();
    guest.called(9);
}

#[test]
fn saved_state_that_cannot_be_is_refused() {
    let mut guest = Guest::new(0, 0);
    guest.stop();
    let saved = Saved { guest_cid: 2, reset_pending: false, turn: u32::MAX, peers: Vec::new() };
    assert!(guest.device.restore(&Section::new(KIND, VERSION, &saved)).is_err());
    let saved = Saved { guest_cid: 3, peers: vec![(1, 2); 5000], ..saved };
    let error = guest.device.restore(&Section::new(KIND, VERSION, &saved)).unwrap_err();
    assert!(error.to_string().contains("5000 connections"), "{error}");
    assert!(guest.device.restore(&Section::new("virtio-net", VERSION, &saved)).is_err());
    assert!(guest.device.restore(&Section::new(KIND, VERSION + 1, &saved)).is_err());
    assert!(guest.device.restore(&Section::new(KIND, VERSION, &1u8)).is_err());
}

#[test]
fn a_reset_of_the_device_drops_all_connections() {
    let mut guest = Guest::new(64, 4096);
    let (mut client, _) = guest.called(5);
    guest.stop();
    guest.device.reset();
    assert_eq!(read_all(&mut client), b"");
    guest.start();
    guest.called(6);
}

#[test]
fn the_configuration_is_the_context_id() {
    let guest = Guest::new(0, 0);
    let mut cid = [0xff; 8];
    guest.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID));
    assert_eq!(guest.device.about().device_id, 19);
    let dir = tempfile::tempdir().unwrap();
    for guest_cid in [0, 1, 2, u32::MAX] {
        let config = VsockConfig { guest_cid, uds_path: dir.path().join("x") };
        assert!(matches!(Vsock::new(config), Err(VsockError::Cid(cid)) if cid == guest_cid));
    }
    assert!(!dir.path().join("x").exists());
}
