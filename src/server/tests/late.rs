//! Answers that come later, and streams.

use super::*;

/// Waits until something holds, however slow the host is.
fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < end, "it never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_stream_is_read_line_by_line_while_others_are_served() {
    let server = run(Limits::default());
    let mut client = api::client::Client::unix(&server.path);
    let mut lines = client.lines("/events").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "\"first\"");
    for _ in 0..20 {
        assert!(lines.next().unwrap().unwrap().starts_with("{\"number\":"));
        assert_eq!(client.get::<String>("/").unwrap(), "here");
        assert_eq!(client.get::<String>("/later").unwrap(), "late");
    }
    drop(lines);
    until("the stream of a reader that left is closed", || server.streams.load(Ordering::Relaxed) == 0);
}

#[test]
fn a_stream_over_http_1_0_has_no_chunks() {
    let server = run(Limits::default());
    let mut stream = server.connect();
    stream.write_all(b"GET /events HTTP/1.0\r\n\r\n").unwrap();
    let mut bytes = [0; 512];
    let mut text = String::new();
    while !text.contains("\n{\"number\":") {
        let count = stream.read(&mut bytes).unwrap();
        text.push_str(str::from_utf8(&bytes[..count]).unwrap());
    }
    assert!(text.contains("Connection: close\r\n"), "{text}");
    assert!(text.contains("\r\n\r\n\"first\"\n{\"number\":"), "{text}");
}

/// A server without a loop, and a connection to it.
fn alone(limits: Limits) -> (Server, UnixStream, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let server = Server::new(&path, limits).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    (server, client, directory)
}

fn serve(server: &mut Server, owner: &mut Owner) {
    server.serve(&mut |request, ticket| owner.obey(request, ticket)).unwrap();
}

#[test]
fn a_reader_that_does_not_read_is_cut_and_holds_little() {
    let (mut server, mut client, _directory) = alone(Limits::default());
    let mut owner = Owner::default();
    client.write_all(b"GET /events HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    let ticket = owner.streams.pop().unwrap();
    let mut pushed = 0;
    while server.push(ticket, &[b'x'; 1000]) {
        pushed += 1;
        assert!(server.held <= Limits::default().backlog, "{}", server.held);
        assert!(pushed < 10_000, "it is never cut");
    }
    assert!(pushed > 60, "cut after {pushed} parts");
    assert!(!server.is_open(ticket) && !server.push(ticket, b"x"));
    assert_eq!((server.held, server.owed, server.connections()), (0, 0, 0));
    let mut text = Vec::new();
    client.read_to_end(&mut text).unwrap();
    assert!(!text.ends_with(b"0\r\n\r\n"), "a stream that was cut looks complete");
}

#[test]
fn a_stream_that_ends_leaves_the_connection_open() {
    let (mut server, mut client, _directory) = alone(Limits::default());
    let mut owner = Owner::default();
    client.write_all(b"GET /events HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    let ticket = owner.streams.pop().unwrap();
    assert!(server.push(ticket, b"\"second\"\n"));
    assert!(server.push(ticket, b""));
    assert!(server.finish(ticket));
    assert!(!server.finish(ticket) && !server.push(ticket, b"x") && !server.is_open(ticket));
    serve(&mut server, &mut owner);
    drop(server);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert!(text.contains("8\r\n\"first\"\n\r\n9\r\n\"second\"\n\r\n0\r\n\r\nHTTP/1.1 200 OK"), "{text}");
    assert!(text.ends_with("\"here\""), "{text}");
}

#[test]
fn a_ticket_is_good_for_one_answer_and_void_without_its_client() {
    let (mut server, mut client, directory) = alone(Limits::default());
    let mut owner = Owner::default();
    client.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    let ticket = owner.later.pop().unwrap();
    assert!(server.is_open(ticket));
    assert!(!server.push(ticket, b"x"), "an answer is no stream");
    // That was the owner's mistake, and the client is gone now.
    assert!(!server.answer(ticket, &Response::done()));

    let mut client = UnixStream::connect(directory.path().join("api.sock")).unwrap();
    client.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    let ticket = owner.later.pop().unwrap();
    assert!(server.answer(ticket, &Response::done()));
    assert!(!server.answer(ticket, &Response::done()));
    assert!(!server.is_open(ticket));

    client.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    let ticket = owner.later.pop().unwrap();
    drop(client);
    serve(&mut server, &mut owner);
    assert!(!server.is_open(ticket));
    assert!(!server.answer(ticket, &Response::done()));
}

#[test]
fn only_so_many_answers_are_owed() {
    let (mut server, _client, directory) = alone(Limits { owed: 2, ..Limits::default() });
    let mut owner = Owner::default();
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = UnixStream::connect(directory.path().join("api.sock")).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
        serve(&mut server, &mut owner);
        clients.push(client);
    }
    let (head, body) = answer(&mut clients[2]);
    assert!(head.contains("503 Service Unavailable") && head.contains("Retry-After: 1"), "{head}");
    assert!(String::from_utf8_lossy(&body).contains("2 requests wait for their answer already"));
    let open: Vec<bool> = owner.later.iter().map(|t| server.is_open(*t)).collect();
    assert_eq!(open, [true, true, false]);
    assert!(server.answer(owner.later[0], &Response::value("late")));
    assert_eq!(answer(&mut clients[0]).1, b"\"late\"");
}

#[test]
fn a_quiet_server_has_nothing_to_do() {
    let (mut server, mut client, _directory) = alone(Limits::default());
    let mut owner = Owner::default();
    serve(&mut server, &mut owner);
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    // SAFETY: the server's descriptor is open as long as the server, which outlives this.
    let watched = unsafe { BorrowedFd::borrow_raw(server.as_raw_fd()) };
    assert!(!wait(&watched, Duration::ZERO));
    assert!(!server.ticking);
    // A client that is owed an answer and has sent more does not wake it either.
    client.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
    serve(&mut server, &mut owner);
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(!wait(&watched, Duration::ZERO));
    assert!(server.answer(owner.later[0], &Response::value("late")));
    assert!(wait(&watched, LONG));
}
