//! Guests that lie and clients that misbehave.

use std::{os::fd::FromRawFd, thread};

use super::{packet::PAYLOAD_MAX, *};
use crate::{
    limits::{VSOCK_BUFFER, VSOCK_CONNECTIONS_MAX, VSOCK_RESETS_MAX},
    virtio::driver::Desc,
};

/// Runs `lie` on one of two connections: that one is reset, the other one goes on.
fn costs_one_connection(what: &str, lie: impl Fn(&mut Guest, &mut Socket)) {
    let mut guest = Guest::new(64, 4096);
    let (mut honest_client, mut honest) = guest.called(5);
    let (mut client, mut liar) = guest.called(6);
    lie(&mut guest, &mut liar);
    loop {
        let (header, _) = guest.next();
        assert_eq!(header.dst_port, 6, "{what}");
        if header.op == op::RESET {
            break;
        }
    }
    let _ = client.read_to_end(&mut Vec::new());
    honest_client.write_all(b"hello").unwrap();
    // Whatever else the liar sent is answered as well.
    let (header, payload) = loop {
        let packet = guest.next();
        if packet.0.dst_port != 6 {
            break packet;
        }
    };
    honest.hear(&header);
    assert_eq!((header.op, payload.as_slice()), (op::DATA, b"hello".as_slice()), "{what}");
    assert_eq!(guest.driver.signals.counts().needs_reset, 0, "{what}");
}

#[test]
fn a_lie_costs_the_guest_the_connection_and_no_other() {
    costs_one_connection("more than its credit", |guest, liar| {
        for _ in 0..20 {
            guest.write(liar, &vec![1; PAYLOAD_MAX as usize]);
        }
    });
    costs_one_connection("took more than it was sent", |guest, liar| {
        liar.taken = 1;
        guest.say(liar, op::CREDIT_UPDATE);
    });
    costs_one_connection("took a negative amount", |guest, liar| {
        liar.taken = 0u32.wrapping_sub((1 << 18) + 1);
        guest.say(liar, op::CREDIT_UPDATE);
    });
    costs_one_connection("a length beyond its buffer", |guest, liar| {
        guest.send(&Header { len: 100, ..liar.header(op::DATA) }, &[1; 99]);
    });
    costs_one_connection("a length beyond the largest", |guest, liar| {
        guest.send(&Header { len: PAYLOAD_MAX + 1, ..liar.header(op::DATA) }, &[1; PAYLOAD_MAX as usize + 1]);
    });
    costs_one_connection("the largest number as length", |guest, liar| {
        guest.send(&Header { len: u32::MAX, ..liar.header(op::DATA) }, &[1; 8]);
    });
    for op in [0, op::REQUEST, op::RESPONSE, 8, u16::MAX] {
        costs_one_connection("an operation out of place", |guest, liar| guest.say(liar, op));
    }
    costs_one_connection("data after its end", |guest, liar| {
        guest.shut(liar, 2);
        guest.write(liar, b"more");
    });
}

#[test]
fn a_buffer_of_no_size_or_of_any_size_is_no_lie() {
    let mut guest = Guest::new(64, 4096);
    let (mut client, mut socket) = guest.called(5);
    socket.room = 0;
    guest.say(&socket, op::CREDIT_UPDATE);
    thread::sleep(Duration::from_millis(50));
    client.write_all(b"hello").unwrap();
    guest.silent();
    socket.room = u32::MAX;
    guest.say(&socket, op::CREDIT_UPDATE);
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"hello");
}

#[test]
fn packets_for_nobody_are_answered_with_a_reset() {
    let mut guest = Guest::new(16, 4096);
    let socket = Socket::new(5, 6);
    for op in [op::RESPONSE, op::SHUTDOWN, op::DATA, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 99] {
        guest.say(&socket, op);
        assert_eq!(guest.next().0, socket.header(op).reset(), "{op}");
    }
    guest.send(&Header { kind: 2, ..socket.header(op::REQUEST) }, &[]);
    let (reset, _) = guest.next();
    assert_eq!((reset.op, reset.kind), (op::RESET, 2), "only streams are served");
    guest.say(&socket, op::RESET);
    guest.send(&Header { src_cid: 43, ..socket.header(op::REQUEST) }, &[]);
    guest.silent();
}

#[test]
fn another_context_id_is_refused_at_once() {
    let mut guest = Guest::new(16, 4096);
    guest.repost = false;
    let header = Header { dst_cid: 77, ..Socket::new(5, 6).header(op::REQUEST) };
    guest.send(&header, &[]);
    let used = guest.driver.wait_used(0).unwrap();
    let raw = guest.driver.peek(guest.posted[&used.head].address, HEADER_LEN);
    let reset = Header::parse(raw.first_chunk().unwrap());
    assert_eq!((reset.src_cid, reset.dst_cid, reset.op), (77, u64::from(CID), op::RESET));
}

#[test]
fn a_header_may_lie_in_pieces_and_must_be_whole() {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(5);
    let header = Header { len: 5, ..socket.header(op::DATA) };
    let raw = [header.bytes().as_slice(), b"hello"].concat();
    guest.driver.wait_used(1).unwrap();
    let pieces: Vec<_> = raw.chunks(7).map(|part| guest.driver.readable(part)).collect();
    guest.driver.request(1, &pieces).unwrap();
    let mut text = [0; 5];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    let short = guest.driver.readable(&raw[..43]);
    assert_eq!(guest.driver.request(1, &[short]), Some(0));
    assert_eq!(guest.count("bad_packets"), 1);
    client.write_all(b"still here").unwrap();
    guest.expect(&mut socket, op::DATA);
}

#[test]
fn receive_buffers_too_small_for_a_packet_come_back_empty() {
    let mut guest = Guest::new(0, 0);
    for len in [1, 43, 44] {
        let buffer = guest.driver.writable(len);
        guest.post(buffer);
    }
    let readable = guest.driver.readable(&[1; 100]);
    guest.driver.send(0, &[readable]);
    let good = guest.driver.writable(4096);
    guest.post(good);
    guest.say(&Socket::new(5, 6), op::DATA);
    for _ in 0..4 {
        assert_eq!(guest.driver.wait_used(0).unwrap().len, 0);
    }
    assert_eq!(guest.driver.wait_used(0).unwrap().len, HEADER_LEN as u32);
}

#[test]
fn a_broken_ring_stops_its_queue_and_asks_for_a_reset() {
    for index in 0..3 {
        let mut guest = Guest::new(0, 0);
        let bad = Desc { address: u64::MAX - 5, len: 100, flags: 0, next: 0 };
        guest.driver.rings[index].write_desc(3, bad);
        guest.driver.rings[index].offer(3);
        if index == 0 {
            guest.say(&Socket::new(5, 6), op::DATA);
        }
        if index == 2 {
            guest.stop();
            let section = guest.device.save();
            guest.device.restore(&section).unwrap();
            guest.start();
        }
        guest.driver.kick(index as u16);
        assert!(guest.driver.signals.wait(|c| c.needs_reset == 1), "queue {index}");
        guest.driver.kick(index as u16);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.driver.signals.counts().needs_reset, 1, "said once");
        guest.stop();
    }
}

#[test]
fn connections_beyond_the_cap_are_refused_and_places_come_free() {
    let mut guest = Guest::new(64, 4096);
    let mut clients: Vec<_> = (0..VSOCK_CONNECTIONS_MAX as u32).map(|i| guest.called(i)).collect();
    let mut refused = UnixStream::connect(guest.path(None)).unwrap();
    let _ = refused.write_all(b"CONNECT 5\n");
    assert_eq!(refused.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    let _listener = guest.listen(7);
    let mut socket = Socket::new(7, 1000);
    guest.say(&socket, op::REQUEST);
    guest.expect(&mut socket, op::RESET);
    let (client, last) = clients.pop().unwrap();
    guest.say(&last, op::RESET);
    assert_eq!(read_all(&mut { client }), b"");
    guest.say(&socket, op::REQUEST);
    guest.expect(&mut socket, op::RESPONSE);
    let (mut client, mut other) = clients.pop().unwrap();
    client.write_all(b"hello").unwrap();
    assert_eq!(guest.expect(&mut other, op::DATA).1, b"hello");
}

#[test]
fn clients_that_do_not_say_connect_are_hung_up_on() {
    let guest = Guest::new(16, 4096);
    for text in ["HELLO\n", "CONNECT\n", "CONNECT x\n", "CONNECT 99999999999\n", "\n", "CONNECT 1 2\n"] {
        let mut client = UnixStream::connect(guest.path(None)).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        assert_eq!(client.read_to_end(&mut Vec::new()).unwrap_or(0), 0, "{text:?}");
    }
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    assert!(client.write_all(&vec![b'C'; 1 << 20]).is_err(), "a megabyte without a newline is not read");
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONN").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    let (mut slow, started) = (UnixStream::connect(guest.path(None)).unwrap(), Instant::now());
    slow.write_all(b"CONNECT 5").unwrap();
    assert_eq!(slow.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    assert!(started.elapsed() > Duration::from_secs(1), "a slow one has its time");
}

#[test]
fn ports_that_are_no_sockets_refuse() {
    let mut guest = Guest::new(16, 4096);
    std::fs::create_dir(guest.path(Some(1))).unwrap();
    std::fs::write(guest.path(Some(2)), b"file").unwrap();
    std::os::unix::fs::symlink("v_4", guest.path(Some(3))).unwrap();
    drop(guest.listen(4));
    for port in 1..6 {
        let mut socket = Socket::new(port, 1000);
        guest.say(&socket, op::REQUEST);
        guest.expect(&mut socket, op::RESET);
    }
}

#[test]
fn a_listener_with_a_full_queue_is_tried_again() {
    let mut guest = Guest::new(64, 4096);
    let listener = guest.listen(7);
    // SAFETY: a plain call on a listening socket; it makes the queue as short as can be.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) }, 0);
    for i in 0..10 {
        guest.say(&Socket::new(7, 1000 + i), op::REQUEST);
    }
    let mut accepted = Vec::new();
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(5));
        accepted.push(listener.accept().unwrap());
    }
    for _ in 0..10 {
        assert_eq!(guest.next().0.op, op::RESPONSE);
    }
    // And given up when nobody ever accepts.
    for i in 0..5 {
        guest.say(&Socket::new(7, 2000 + i), op::REQUEST);
    }
    let answers: Vec<_> = (0..5).map(|_| guest.next().0.op).collect();
    assert!(answers.contains(&op::RESET) && answers.contains(&op::RESPONSE), "{answers:?}");
}

/// Nanoseconds the thread called `name` has run.
fn run_time(name: &str) -> u64 {
    let found = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .find(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name));
    let text = std::fs::read_to_string(found.unwrap().path().join("schedstat")).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_guest_without_buffers_costs_no_time() {
    let mut guest = Guest::new(16, 4096);
    let pairs: Vec<_> = (0..200).map(|i| guest.called(i)).collect();
    guest.stop();
    guest.driver.worker = Worker::new("vsock-starved");
    guest.repost = false;
    guest.start();
    for (client, _) in &pairs {
        client.set_nonblocking(true).unwrap();
    }
    let fill = |limit: Duration| {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            for (client, _) in &pairs {
                let _ = (&*client).write(&[7; 4096]);
            }
            thread::sleep(Duration::from_millis(5));
        }
    };
    fill(Duration::from_millis(700));
    let before = run_time("vsock-starved");
    fill(Duration::from_millis(1000));
    let spent = Duration::from_nanos(run_time("vsock-starved") - before);
    assert!(spent < Duration::from_millis(50), "{spent:?} of one second");
    while guest.poll(Duration::from_millis(100)).is_some() {}
    guest.post_idle();
    assert_eq!(guest.next().0.op, op::DATA, "it goes on when there are buffers");
}

#[test]
fn a_flood_that_is_not_listened_to_waits_in_the_guests_own_ring() {
    let mut guest = Guest::new(0, 0);
    let buffer = guest.driver.readable(&Socket::new(5, 6).header(op::DATA).bytes());
    let mut taken = 0;
    for sent in 1..=VSOCK_RESETS_MAX + 100 {
        guest.driver.send(1, &[buffer]);
        let end = Instant::now() + PATIENCE;
        // The ring holds no more than 256.
        while sent - taken > 200 {
            assert!(Instant::now() < end, "only {taken} of {sent} were taken");
            thread::yield_now();
            taken += std::iter::from_fn(|| guest.driver.rings[1].take_used()).count();
        }
    }
    let end = Instant::now() + PATIENCE;
    while taken < VSOCK_RESETS_MAX && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
        taken += std::iter::from_fn(|| guest.driver.rings[1].take_used()).count();
    }
    thread::sleep(Duration::from_millis(100));
    taken += std::iter::from_fn(|| guest.driver.rings[1].take_used()).count();
    assert_eq!(taken, VSOCK_RESETS_MAX);
    for _ in 0..64 {
        let buffer = guest.driver.writable(64);
        guest.post(buffer);
    }
    for _ in 0..VSOCK_RESETS_MAX + 100 {
        assert_eq!(guest.next().0.op, op::RESET);
    }
    guest.silent();
}

#[test]
fn descriptors_sent_along_do_not_hold_up_the_stream() {
    let mut guest = Guest::new(64, 4096);
    let (client, mut socket) = guest.called(5);
    guest.stop();
    for _ in 0..3 {
        send_with_descriptor(&client, b"part");
    }
    guest.start();
    let mut all = Vec::new();
    while all.len() < 12 {
        all.extend(guest.expect(&mut socket, op::DATA).1);
    }
    assert_eq!(all, b"partpartpart");
}

fn send_with_descriptor(to: &UnixStream, text: &[u8]) {
    use std::os::fd::AsRawFd;
    let mut control = [0u64; 3];
    let mut iovec = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // SAFETY: the message and what it points to live through the call; the control buffer is
    // aligned and large enough for one descriptor. The duplicate is closed again.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iovec;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        let copy = std::fs::File::from_raw_fd(libc::dup(to.as_raw_fd()));
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(copy.as_raw_fd());
        assert_eq!(libc::sendmsg(to.as_raw_fd(), &raw const message, 0), text.len() as isize);
    }
}

#[test]
fn credit_holds_over_a_stalled_reader() {
    let mut guest = Guest::new(64, 4096);
    let (client, mut socket) = guest.called(5);
    while socket.allowance() > 0 {
        let len = socket.allowance().min(PAYLOAD_MAX);
        guest.write(&mut socket, &vec![1; len as usize]);
        if let Some((header, _)) = guest.poll(Duration::from_millis(30)) {
            socket.hear(&header);
        }
    }
    let held = socket.sent.wrapping_sub(socket.host_taken);
    assert_eq!(held, VSOCK_BUFFER, "all that was promised is used");
    guest.write(&mut socket, b"x");
    assert_eq!(guest.next().0.op, op::RESET);
    drop(client);
}

#[test]
fn random_packets_do_not_stop_the_device() {
    let mut guest = Guest::new(64, 300);
    let listener = guest.listen(7);
    let mut dice = Dice(99);
    let mut sockets = vec![Socket::new(7, 1000)];
    let mut clients = Vec::new();
    for step in 0..20_000 {
        if step % 50 == 0 {
            let mut client = UnixStream::connect(guest.path(None)).unwrap();
            client.write_all(b"CONNECT 5\nsome bytes").unwrap();
            clients.push(client);
            clients.drain(..clients.len().saturating_sub(30));
            listener.set_nonblocking(true).unwrap();
            while listener.accept().is_ok() {}
        }
        let socket = sockets[dice.up_to(sockets.len()) - 1];
        let mut header = socket.header(dice.up_to(9) as u16 - 1);
        let odd = |dice: &mut Dice| (dice.up_to(1 << 20) as u32).wrapping_mul(0x9e37_79b9);
        match dice.up_to(12) {
            1 => header.fwd_cnt = odd(&mut dice),
            2 => header.buf_alloc = odd(&mut dice),
            3 => header.len = odd(&mut dice),
            4 => header.src_port = odd(&mut dice),
            5 => header.kind = odd(&mut dice) as u16,
            6 => header.flags = odd(&mut dice),
            7 => header.dst_cid = u64::from(odd(&mut dice)),
            8 => header.flags = dice.up_to(4) as u32 - 1,
            _ => {}
        }
        let payload = vec![0; dice.up_to(500) - 1];
        if header.len == 0 {
            header.len = payload.len() as u32;
        }
        guest.send(&header, &payload);
        while let Some(used) = guest.driver.rings[0].take_used() {
            let buffer = guest.posted.remove(&used.head).unwrap();
            let raw = guest.driver.peek(buffer.address, used.len as usize);
            let header = Header::parse(raw.first_chunk().unwrap());
            if header.op == op::REQUEST {
                sockets.push(Socket::new(header.src_port, header.dst_port));
                sockets.drain(..sockets.len().saturating_sub(20));
            }
            guest.post(buffer);
        }
    }
    drop(clients);
    guest.stop();
    guest.device.reset();
    guest.start();
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 77\n").unwrap();
    // Clients that still waited at the door come first.
    let port = loop {
        let used = guest.driver.wait_used(0).unwrap();
        let buffer = guest.posted.remove(&used.head).unwrap();
        let raw = guest.driver.peek(buffer.address, HEADER_LEN);
        guest.post(buffer);
        let header = Header::parse(raw.first_chunk().unwrap());
        if header.op == op::REQUEST && header.dst_port == 77 {
            break header.src_port;
        }
    };
    let mut socket = Socket::new(port, 77);
    guest.say(&socket, op::RESPONSE);
    client.write_all(b"alive").unwrap();
    assert!(line(&mut client).starts_with("OK "));
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"alive");
    assert_eq!(guest.driver.signals.counts().needs_reset, 0);
}

#[test]
fn a_guest_that_adds_useless_buffers_for_ever_can_still_be_stopped() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use vm_memory::{Bytes, GuestAddress};

    let mut guest = Guest::new(0, 0);
    guest.stop();
    let section = guest.device.save();
    guest.device.restore(&section).unwrap();
    // Every entry of both rings names descriptor 0, one byte long.
    let rings = [0, 2].map(|index| {
        let ring = &mut guest.driver.rings[index];
        ring.write_desc(0, Desc { address: 0x100_0000, len: 1, flags: Desc::WRITE, next: 0 });
        ring.setup()
    });
    let done = Arc::new(AtomicBool::new(false));
    let (seen, memory) = (done.clone(), guest.driver.memory.clone());
    thread::spawn(move || {
        while !seen.load(Ordering::Relaxed) {
            for ring in rings {
                let used: u16 = memory.read_obj(GuestAddress(ring.used + 2)).unwrap();
                memory.write_obj(used.wrapping_add(ring.size), GuestAddress(ring.avail + 2)).unwrap();
            }
        }
    });
    guest.start();
    guest.say(&Socket::new(5, 6), op::DATA);
    for queue in [0, 2] {
        guest.driver.kick(queue);
    }
    thread::sleep(Duration::from_millis(100));
    let stopped = guest.device.stop();
    done.store(true, Ordering::Relaxed);
    assert_eq!(stopped.expect("its worker never came back").len(), 3);
    assert_eq!(guest.driver.signals.counts().needs_reset, 0);
}
