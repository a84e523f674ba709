//! The client against agents that lie, stall and vanish.

use super::*;
use crate::protocol::{FailureKind, Hello, Open, Reply, Request, VERSION, frame};
use std::{
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    thread,
    time::Instant,
};

const SOON: Duration = Duration::from_millis(200);

fn hello() -> Reply {
    Reply::Hello(Hello { version: VERSION, agent: "x".into(), kernel: "6".into(), ready_us: 1 })
}

/// A pair where the other end is driven by `agent` after the greeting.
fn greeted(agent: impl FnOnce(&mut UnixStream) + Send + 'static) -> Agent {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let _: Open = frame::read(&mut theirs).unwrap();
        frame::write(&mut theirs, &hello()).unwrap();
        agent(&mut theirs);
    });
    Agent::over(ours, Duration::from_secs(5)).unwrap()
}

#[test]
fn a_silent_agent_costs_only_the_timeout() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let begun = Instant::now();
    assert!(matches!(Agent::over(ours, SOON), Err(ClientError::Timeout { .. })));
    assert!(begun.elapsed() < SOON * 10);
}

#[test]
fn a_dribbling_agent_costs_only_the_timeout() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let _ = theirs.write_all(&1000u32.to_le_bytes());
        while theirs.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let begun = Instant::now();
    assert!(matches!(Agent::over(ours, SOON), Err(ClientError::Timeout { .. })));
    assert!(begun.elapsed() < SOON * 10);
}

#[test]
fn a_connection_is_not_used_again_after_a_timeout() {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let mut agent = greeted(move |peer| {
        let _: Request = frame::read(peer).unwrap();
        let _ = stopped.recv();
    });
    agent.timeout_for_test(SOON);
    assert!(matches!(agent.list(), Err(ClientError::Timeout { .. })));
    assert!(matches!(agent.list(), Err(ClientError::Closed { .. })));
    drop(stop);
}

#[test]
fn control_characters_of_a_guest_never_reach_a_terminal() {
    let mut agent = greeted(|peer| {
        let _: Request = frame::read(peer).unwrap();
        let message = format!("\x1b]0;owned\x07{}", "a".repeat(10_000));
        frame::write(peer, &Reply::Failed(Failure::new(FailureKind::System, message))).unwrap();
    });
    let error = agent.sync().unwrap_err().to_string();
    assert!(!error.chars().any(char::is_control));
    assert!(error.chars().count() <= 4097);
}

#[test]
fn an_answer_to_another_question_is_an_error() {
    let mut agent = greeted(|peer| {
        let _: Request = frame::read(peer).unwrap();
        frame::write(peer, &Reply::Running {}).unwrap();
    });
    assert!(matches!(agent.stats(), Err(ClientError::Answer { .. })));
}

#[test]
fn an_agent_of_another_version_is_named() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let _: Open = frame::read(&mut theirs).unwrap();
        let Reply::Hello(h) = hello() else { unreachable!() };
        frame::write(&mut theirs, &Reply::Hello(Hello { version: 99, ..h })).unwrap();
    });
    assert!(matches!(Agent::over(ours, SOON * 10), Err(ClientError::Version { agent: 99, ours: VERSION })));
}

#[test]
fn failure_kinds_of_a_newer_agent_are_read_as_system() {
    let failure: Failure = serde_json::from_str(r#"{"kind":"out_of_cheese","message":"x"}"#).unwrap();
    assert_eq!(failure.kind, FailureKind::System);
}

#[test]
fn exit_codes_are_dockers() {
    let code = |kind| ClientError::from(Failure::new(kind, "x")).exit_code();
    assert_eq!(code(FailureKind::CommandNotFound), 127);
    assert_eq!(code(FailureKind::CommandNotExecutable), 126);
    assert_eq!(code(FailureKind::Disk), 125);
}

#[test]
fn connecting_hands_over_the_first_byte_after_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut line = [0; 13];
        peer.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        peer.write_all(b"OK 1073741824\nhi").unwrap();
    });
    let mut stream = connect(&path, 1024, Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut hi = [0; 2];
    stream.read_exact(&mut hi).unwrap();
    assert_eq!(&hi, b"hi");
}

#[test]
fn a_port_without_listener_a_stranger_and_an_absent_socket_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    assert!(matches!(connect(&path, 1, SOON), Err(ClientError::Connect { .. })));
    let listener = UnixListener::bind(&path).unwrap();
    let answer = |bytes: &'static [u8]| {
        let listener = listener.try_clone().unwrap();
        thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut line = [0; 10];
            peer.read_exact(&mut line).unwrap();
            let _ = peer.write_all(bytes);
        })
    };
    for (bytes, refused) in [(&b""[..], true), (b"HTTP/1.1 400 Bad Request\r\n", false)] {
        let peer = answer(bytes);
        match connect(&path, 1, Duration::from_secs(5)) {
            Err(ClientError::Refused { port: 1 }) => assert!(refused),
            Err(ClientError::Handshake { .. }) => assert!(!refused),
            other => panic!("{other:?}"),
        }
        peer.join().unwrap();
    }
}

#[test]
fn a_full_backlog_does_not_hang_the_connector() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    // SAFETY: listen has no memory arguments; it makes the backlog as short as it can be.
    let shorten = |l: &UnixListener| unsafe { libc::listen(l.as_raw_fd(), 0) };
    let listener = UnixListener::bind(&path).unwrap();
    assert_eq!(shorten(&listener), 0);
    let _first = UnixStream::connect(&path).unwrap();
    let begun = Instant::now();
    assert!(matches!(connect(&path, 1, SOON), Err(ClientError::Connect { .. })));
    assert!(begun.elapsed() < SOON * 10);
}

#[test]
fn the_ready_socket_is_gone_once_the_agent_has_come() {
    let dir = tempfile::tempdir().unwrap();
    let uds = dir.path().join("v.sock");
    let ready = ReadyListener::bind(&uds).unwrap();
    let path = ready.path().to_owned();
    assert_eq!(path, dir.path().join("v.sock_1024"));
    drop(ready);
    let ready = ReadyListener::bind(&uds).unwrap();
    let _agent = UnixStream::connect(&path).unwrap();
    ready.accept(SOON * 10).unwrap();
    assert!(UnixStream::connect(&path).is_err());
    assert!(matches!(ReadyListener::bind(&uds).unwrap().accept(SOON), Err(ClientError::Timeout { .. })));
}

#[test]
fn an_archive_that_breaks_off_is_not_a_small_archive() {
    let archive = |script: fn(&mut UnixStream)| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || script(&mut theirs));
        let mut all = Vec::new();
        ArchiveReader::new(ours).read_to_end(&mut all).map(|_| all)
    };
    let whole = archive(|peer| {
        frame::write_block(peer, b"tar").unwrap();
        frame::write_block(peer, b"").unwrap();
        frame::write(peer, &Reply::Done {}).unwrap();
    });
    assert_eq!(whole.unwrap(), b"tar");
    assert!(archive(|peer| frame::write_block(peer, b"tar").unwrap()).is_err());
    let failed = archive(|peer| {
        frame::write_block(peer, b"").unwrap();
        frame::write(peer, &Reply::Failed(Failure::new(FailureKind::System, "No"))).unwrap();
    });
    assert_eq!(failed.unwrap_err().to_string(), "No");
}
