//! Peers that do not speak the protocol, and peers that come in thousands.

use crate::fixture::{Fixture, LIMIT, shell};
use guest::protocol::{FailureKind, Open, Reply, Request, VERSION, frame};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

fn raw(f: &Fixture) -> UnixStream {
    let stream = guest::client::connect(&f.uds, 1024, LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_le_bytes(), bytes].concat()
}

fn failure(stream: &mut UnixStream) -> FailureKind {
    match frame::read(stream).unwrap() {
        Reply::Failed(failure) => failure.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nonsense_is_answered_with_a_reason_and_the_agent_goes_on() {
    let f = Fixture::running();
    for bytes in [
        framed(b"{}"),
        framed(b"null"),
        framed(&[0xff; 300]),
        framed("[".repeat(1 << 19).as_bytes()),
        framed(br#"{"control":{"version":1,"extra":2}}"#),
        framed(br#"{"stream":{"process":-1,"stream":"stdout","keep":false}}"#),
        u32::MAX.to_le_bytes().to_vec(),
        vec![0; 4],
    ] {
        let mut stream = raw(&f);
        stream.write_all(&bytes).unwrap();
        assert_eq!(failure(&mut stream), FailureKind::BadRequest);
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }
    for cut in [1, 3, 4, 10] {
        let mut stream = raw(&f);
        stream.write_all(&framed(br#"{"events":{}}"#)[..cut]).unwrap();
        drop(stream);
    }
    assert_eq!(f.run(shell("echo alive")).1, "alive\n");
}

#[test]
fn a_bad_request_does_not_end_its_connection() {
    let f = Fixture::running();
    let mut stream = raw(&f);
    frame::write(&mut stream, &Open::Control { version: VERSION }).unwrap();
    assert!(matches!(frame::read(&mut stream).unwrap(), Reply::Hello(_)));
    for text in [r#"{"list":{"x":1}}"#, r#"{"reformat":{}}"#, r#""list""#, "{\"list\":{}}{"] {
        stream.write_all(&framed(text.as_bytes())).unwrap();
        assert_eq!(failure(&mut stream), FailureKind::BadRequest);
    }
    // Requests may be sent ahead; answers come in order.
    for _ in 0..100 {
        frame::write(&mut stream, &Request::List {}).unwrap();
    }
    for _ in 0..100 {
        assert!(matches!(frame::read(&mut stream).unwrap(), Reply::Processes(_)));
    }
}

#[test]
fn another_version_is_refused_by_name() {
    let f = Fixture::running();
    let mut stream = raw(&f);
    frame::write(&mut stream, &Open::Control { version: 999 }).unwrap();
    assert_eq!(failure(&mut stream), FailureKind::Version);
}

#[test]
fn ten_thousand_connections_come_and_go() {
    let f = Fixture::running();
    let count = if std::env::var_os("NACELLE_TEST_LONG").is_some() { 10_000 } else { 2_000 };
    for _ in 0..count {
        drop(raw(&f));
    }
    assert_eq!(f.run(shell("echo alive")).1, "alive\n");
}

#[test]
fn silent_connections_beyond_the_cap_are_closed_and_the_rest_time_out() {
    let f = Fixture::running();
    let begun = Instant::now();
    let mut held = Vec::new();
    let mut closed = 0;
    for _ in 0..1300 {
        match guest::client::connect(&f.uds, 1024, LIMIT) {
            Ok(stream) => held.push(stream),
            Err(_) => closed += 1,
        }
    }
    assert!(closed >= 200 || begun.elapsed() > Duration::from_secs(9), "{closed}");
    // The agent lets go of those who say nothing, without help.
    let until = Instant::now() + LIMIT;
    let control = loop {
        match f.machine.control() {
            Ok(agent) => break agent,
            Err(e) if Instant::now() > until => panic!("{e:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    };
    drop(control);
    drop(held);
}

#[test]
fn a_waiter_that_hangs_up_is_let_go() {
    let f = Fixture::running();
    for _ in 0..1500 {
        let mut stream = raw(&f);
        frame::write(&mut stream, &Open::Control { version: VERSION }).unwrap();
        let wait = Request::Wait { process: guest::protocol::MAIN, timeout_ms: None };
        frame::write(&mut stream, &wait).unwrap();
        let _: Reply = frame::read(&mut stream).unwrap();
    }
    assert_eq!(f.run(shell("echo alive")).1, "alive\n");
}
