//! How connections end, and that nothing is lost when they do.

use std::{net::Shutdown, thread};

use super::{
    packet::{SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND},
    *,
};
use crate::limits::VSOCK_BUFFER;

#[test]
fn a_host_that_stops_sending_still_receives() {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(5);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"last words");
    assert_eq!(guest.expect(&mut socket, op::SHUTDOWN).0.flags, SHUT_SEND);
    guest.write(&mut socket, b"reply");
    guest.shut(&socket, SHUT_BOTH);
    assert_eq!(read_all(&mut client), b"reply");
    guest.expect(&mut socket, op::RESET);
}

#[test]
fn a_guest_that_stops_sending_still_receives() {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(5);
    guest.write(&mut socket, b"last words");
    guest.shut(&socket, SHUT_SEND);
    assert_eq!(read_all(&mut client), b"last words");
    client.write_all(b"reply").unwrap();
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"reply");
    drop(client);
    assert_eq!(guest.expect(&mut socket, op::SHUTDOWN).0.flags, SHUT_BOTH);
    guest.say(&socket, op::RESET);
    guest.silent();
}

#[test]
fn a_host_cannot_write_to_a_guest_that_does_not_receive() {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(5);
    guest.shut(&socket, SHUT_RECEIVE);
    guest.write(&mut socket, b"still here");
    let mut text = [0; 10];
    client.read_exact(&mut text).unwrap();
    let error = client.write_all(b"?").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    guest.silent();
    drop(client);
    assert_eq!(guest.expect(&mut socket, op::SHUTDOWN).0.flags, SHUT_BOTH);
}

#[test]
fn a_guest_hears_that_the_host_does_not_receive() {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(5);
    client.shutdown(Shutdown::Read).unwrap();
    guest.write(&mut socket, b"for nobody");
    assert_eq!(guest.expect(&mut socket, op::SHUTDOWN).0.flags, SHUT_RECEIVE);
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"still here");
}

/// The guest sends all its credit allows to a client that does not read, then ends with
/// `end`; the client must find every byte.
fn ends_over_a_full_buffer(end: impl Fn(&mut Guest, &Socket)) -> (Guest, Socket) {
    let mut guest = Guest::new(16, 4096);
    let (mut client, mut socket) = guest.called(5);
    while socket.allowance() > 0 {
        let len = socket.allowance().min(50_000) as usize;
        let part = pattern(socket.sent as usize, len);
        guest.write(&mut socket, &part);
        if let Some((header, _)) = guest.poll(Duration::from_millis(30)) {
            socket.hear(&header);
        }
    }
    assert!(socket.sent > VSOCK_BUFFER, "the socket and the backlog are full");
    end(&mut guest, &socket);
    // Longer than any deadline that might take the bytes away.
    thread::sleep(Duration::from_millis(2500));
    let all = read_all(&mut client);
    assert_eq!(all.len(), socket.sent as usize);
    assert!(all == pattern(0, all.len()));
    (guest, socket)
}

#[test]
fn a_slow_reader_gets_everything_before_the_end() {
    let (mut guest, _) = ends_over_a_full_buffer(|guest, socket| guest.shut(socket, SHUT_BOTH));
    while guest.next().0.op != op::RESET {}
    guest.silent();
}

#[test]
fn a_reset_does_not_take_back_what_was_sent_before() {
    let (mut guest, _) = ends_over_a_full_buffer(|guest, socket| guest.say(socket, op::RESET));
    while let Some((header, _)) = guest.poll(Duration::from_millis(50)) {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
}

#[test]
fn everything_a_host_wrote_before_it_closed_arrives() {
    let mut guest = Guest::new(64, 4096);
    let (mut client, mut socket) = guest.called(5);
    let writing = thread::spawn(move || client.write_all(&pattern(0, 1 << 20)).unwrap());
    let (all, end) = guest.read_to_end(&mut socket);
    writing.join().unwrap();
    assert!(all == pattern(0, 1 << 20), "{} bytes", all.len());
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUT_BOTH));
    // A guest that does not confirm is reset.
    let started = Instant::now();
    guest.expect(&mut socket, op::RESET);
    assert!(started.elapsed() > Duration::from_secs(1));
}

#[test]
fn a_client_that_writes_and_runs_is_still_heard() {
    let mut guest = Guest::new(16, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\nfire and forget").unwrap();
    drop(client);
    let mut socket = guest.answer(5);
    assert_eq!(guest.expect(&mut socket, op::DATA).1, b"fire and forget");
    assert_eq!(guest.expect(&mut socket, op::SHUTDOWN).0.flags, SHUT_BOTH);
}

#[test]
fn a_guest_that_does_not_answer_a_request_is_given_up() {
    let mut guest = Guest::new(16, 4096);
    let mut client = UnixStream::connect(guest.path(None)).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (header, _) = guest.next();
    assert_eq!(read_all(&mut client), b"");
    let (reset, _) = guest.next();
    assert_eq!((reset.op, reset.src_port), (op::RESET, header.src_port));
    // An answer that comes too late is for nobody.
    guest.say(&Socket::new(header.src_port, 5), op::RESPONSE);
    assert_eq!(guest.next().0.op, op::RESET);
}
