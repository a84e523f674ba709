//! The client against a peer that follows a script.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread::JoinHandle,
};

use super::*;

/// A peer that answers each connection's requests with the given bytes, a piece at a time, and
/// closes it; it returns what it read.
fn peer(connections: Vec<Vec<&'static [u8]>>) -> (PathBuf, JoinHandle<Vec<String>>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let mut read = Vec::new();
        for answers in connections {
            let (mut stream, _) = listener.accept().unwrap();
            for answer in answers {
                read.push(request(&mut stream));
                for piece in answer.chunks(7) {
                    // A client that has seen enough may be gone.
                    let _ = stream.write_all(piece);
                }
            }
        }
        read
    });
    (path, thread, directory)
}

fn request(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    let mut text = String::from_utf8(text).unwrap();
    if let Some(length) = text.lines().find_map(|l| l.strip_prefix("Content-Length: ")) {
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).unwrap();
        text.push_str(str::from_utf8(&body).unwrap());
    }
    text
}

const OK: &[u8] = b"HTTP/1.1 200 \r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n[1]";

#[test]
fn values_go_out_and_come_back_over_one_connection() {
    let none: &[u8] = b"HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n";
    let (path, peer, _directory) = peer(vec![vec![OK, none, OK]]);
    let mut client = Client::unix(path).under("/machines/a");
    assert_eq!(client.get::<Vec<u8>>("/x").unwrap(), [1]);
    client.put::<()>("/y", Some(&["z"])).unwrap();
    assert_eq!(client.patch::<serde_json::Value>("/z", None::<&()>).unwrap(), serde_json::json!([1]));
    let read = peer.join().unwrap();
    assert!(read[0].starts_with("GET /machines/a/x HTTP/1.1\r\n"), "{}", read[0]);
    assert!(read[1].starts_with("PUT /machines/a/y HTTP/1.1\r\n") && read[1].ends_with("\r\n\r\n[\"z\"]"));
}

#[test]
fn a_fault_has_the_servers_words() {
    let fault: &[u8] = b"HTTP/1.1 400 Bad\r\nContent-Length: 23\r\n\r\n{\"fault_message\": \"No\"}";
    let plain: &[u8] = b"HTTP/1.1 503 \r\nContent-Length: 4\r\n\r\nfull";
    let (path, peer, _directory) = peer(vec![vec![fault, plain]]);
    let mut client = Client::unix(path);
    for (status, message) in [(400, "No"), (503, "full")] {
        match client.get::<()>("/") {
            Err(ClientError::Fault { status: s, message: m }) => {
                assert_eq!((s, m.as_str()), (status, message));
            }
            other => panic!("{other:?}"),
        }
    }
    peer.join().unwrap();
}

#[test]
fn chunks_interim_answers_and_bodies_to_the_end_are_read() {
    let chunks: &[u8] = b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                          1\r\n[\r\n2;x=y\r\n7]\r\n0\r\nTrailer: a\r\n\r\n";
    let to_the_end: &[u8] = b"HTTP/1.0 200 OK\r\n\r\n[8]";
    let (path, peer, _directory) = peer(vec![vec![chunks, to_the_end]]);
    let mut client = Client::unix(path);
    assert_eq!(client.get::<Vec<u8>>("/").unwrap(), [7]);
    assert_eq!(client.get::<Vec<u8>>("/").unwrap(), [8]);
    peer.join().unwrap();
}

#[test]
fn lines_come_whole_however_they_are_cut() {
    let events: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                          3\r\none\r\n5\r\n\ntwo\n\r\n1\r\n\n\r\n2\r\n3\n\r\n0\r\n\r\n";
    let (path, peer, _directory) = peer(vec![vec![events], vec![&events[..70]]]);
    let mut client = Client::unix(path);
    let lines: Vec<String> = client.lines("/events").unwrap().map(Result::unwrap).collect();
    assert_eq!(lines, ["one", "two", "3"]);
    let mut cut = client.lines("/events").unwrap().skip_while(Result::is_ok);
    assert!(matches!(cut.next(), Some(Err(ClientError::Closed))));
    assert!(cut.next().is_none());
    peer.join().unwrap();
}

#[test]
fn a_connection_that_was_closed_while_idle_is_made_again() {
    let (path, peer, _directory) = peer(vec![vec![OK], vec![OK]]);
    let mut client = Client::unix(path);
    client.get::<serde_json::Value>("/a").unwrap();
    client.get::<serde_json::Value>("/b").unwrap();
    assert_eq!(peer.join().unwrap().len(), 2);
}

#[test]
fn a_stream_that_was_given_is_not_replaced() {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(OK).unwrap();
    let mut client = Client::over(mine);
    client.get::<serde_json::Value>("/").unwrap();
    drop(theirs);
    assert!(matches!(client.get::<()>("/"), Err(ClientError::Closed)));
    assert!(matches!(client.get::<()>("/"), Err(ClientError::Closed)));
}

#[test]
fn a_server_that_dribbles_does_not_hold_a_caller() {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let dribble = std::thread::spawn(move || {
        while theirs.write_all(b"H").is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let mut client = Client::over(mine).patience(Duration::from_millis(100));
    match client.get::<()>("/") {
        Err(ClientError::Deadline | ClientError::Protocol(_)) => {}
        other => panic!("{other:?}"),
    }
    drop(client);
    dribble.join().unwrap();
}

#[test]
fn nonsense_is_an_error_and_not_a_panic() {
    let nonsense: [&'static [u8]; 6] = [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    ];
    for bytes in nonsense {
        let (path, peer, _directory) = peer(vec![vec![bytes]]);
        assert!(Client::unix(path).get::<serde_json::Value>("/").is_err());
        peer.join().unwrap();
    }
}

#[test]
fn a_path_cannot_carry_another_request() {
    for path in ["", "vm", "/a b", "/a\r\nX: y", "/a\u{7f}"] {
        let refused = Client::unix("/nonexistent").get::<()>(path);
        assert!(matches!(refused, Err(ClientError::Path(_))), "{path:?}");
    }
}

#[test]
fn nobody_there_is_said_with_the_path() {
    let error = Client::unix("/nonexistent/api.sock").get::<()>("/").unwrap_err();
    assert_eq!(error.to_string(), "Nothing answers at the API socket '/nonexistent/api.sock'");
}

#[test]
fn another_protocol_goes_on_where_the_answer_ends() {
    let answer: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: vsock\r\n\r\nOK 5\n";
    let (path, peer, _directory) = peer(vec![vec![answer], vec![OK]]);
    let mut client = Client::unix(path);
    let (mut stream, mut got) = client.upgrade("/tunnel", "vsock").unwrap();
    stream.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"OK 5\n");
    assert!(matches!(client.upgrade("/tunnel", "vsock"), Err(ClientError::Upgrade(_))));
    let read = peer.join().unwrap();
    assert!(read[0].contains("Connection: Upgrade\r\nUpgrade: vsock\r\n"), "{}", read[0]);
}

#[test]
fn parts_come_as_they_are_in_the_type_that_was_asked_for() {
    let chunks: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n2\r\n\0\n\r\n0\r\n\r\n";
    let (path, peer, _directory) = peer(vec![vec![chunks]]);
    let parts: Result<Vec<Vec<u8>>, _> = Client::unix(path).parts("/logs", "a/b").unwrap().collect();
    assert_eq!(parts.unwrap().concat(), b"one\0\n");
    assert!(peer.join().unwrap()[0].contains("\r\nAccept: a/b\r\n"));
}
