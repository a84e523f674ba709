//! Bytes in and out: exact, separate, bounded.

use crate::fixture::{Fixture, LIMIT, code, command, shell};
use guest::{
    client::ClientError,
    protocol::{FailureKind, MAIN, ProcessSpec, Stream},
};
use std::{
    io::{Read, Write},
    net::Shutdown,
    thread,
    time::Duration,
};

fn with_input(spec: ProcessSpec) -> ProcessSpec {
    ProcessSpec { stdin: true, ..spec }
}

#[test]
fn every_byte_goes_in_and_comes_out_in_order() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(with_input(command(&["cat"]))).unwrap();
    let mut input = f.machine.stream(id, Stream::Stdin).unwrap();
    let mut output = f.machine.stream(id, Stream::Stdout).unwrap();
    let sent: Vec<u8> = (0..5_000_000u32).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        input.write_all(&copy).unwrap();
        input.shutdown(Shutdown::Write).unwrap();
        input
    });
    let mut received = Vec::new();
    output.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent);
    assert_eq!(code(&agent.wait(id, Some(LIMIT)).unwrap().unwrap()), 0);
}

#[test]
fn output_and_errors_are_separate_streams() {
    let f = Fixture::running();
    let (code, out, err) = f.run(shell("echo out; echo err >&2; printf no-newline; exit 5"));
    assert_eq!((code, out.as_str(), err.as_str()), (5, "out\nno-newline", "err\n"));
}

#[test]
fn output_from_before_the_stream_was_opened_is_there_and_after_the_end_too() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(shell("echo early; echo quick >&2")).unwrap();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(f.finish(&mut agent, id), (0, "early\n".into(), "quick\n".into()));
    // Everything is read: opening again gives an end at once, not an error.
    let mut rest = Vec::new();
    f.machine.stream(id, Stream::Stdout).unwrap().read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn a_gigabyte_waits_for_a_slow_reader_and_none_of_it_is_lost() {
    let f = Fixture::running();
    let total: u64 = if std::env::var_os("NACELLE_TEST_LONG").is_some() { 1 << 30 } else { 1 << 27 };
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(shell(&format!("head -c {total} /dev/zero; echo end >&2"))).unwrap();
    let mut errors = f.machine.stream(id, Stream::Stderr).unwrap();
    let mut output = f.machine.stream(id, Stream::Stdout).unwrap();
    // Nobody reads: the process must wait, not the machine's memory fill.
    assert_eq!(agent.wait(id, Some(Duration::from_secs(1))).unwrap(), None);
    let (mut buffer, mut received) = (vec![0; 1 << 16], 0);
    loop {
        match output.read(&mut buffer).unwrap() {
            0 => break,
            n => received += n as u64,
        }
        if received < 1 << 22 {
            thread::sleep(Duration::from_millis(5));
        }
    }
    let mut end = String::new();
    errors.read_to_string(&mut end).unwrap();
    assert_eq!((received, end.as_str()), (total, "end\n"));
    assert!(agent.wait(id, Some(LIMIT)).unwrap().is_some());
}

#[test]
fn a_lost_reader_does_not_block_the_process_and_another_may_come() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; read x; echo last";
    let (id, _) = agent.exec(with_input(shell(script))).unwrap();
    let mut first = f.machine.stream(id, Stream::Stdout).unwrap();
    let busy = f.machine.stream(id, Stream::Stdout).unwrap_err();
    assert!(matches!(busy, ClientError::Agent(e) if e.kind == FailureKind::Busy));
    let mut some = [0; 100];
    first.read_exact(&mut some).unwrap();
    drop(first);
    // It runs on without a reader until it waits for input.
    let mut input = f.machine.stream(id, Stream::Stdin).unwrap();
    thread::sleep(Duration::from_secs(1));
    let mut second = f.take_over(id, Stream::Stdout);
    input.write_all(b"go\n").unwrap();
    let mut rest = String::new();
    second.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("last\n"));
    assert!(agent.wait(id, Some(LIMIT)).unwrap().is_some());
}

#[test]
fn a_kept_stream_waits_for_its_keeper() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(with_input(command(&["cat"]))).unwrap();
    let mut input = f.machine.kept_stream(id, Stream::Stdin).unwrap();
    let mut output = f.machine.kept_stream(id, Stream::Stdout).unwrap();
    let read = |stream: &mut std::os::unix::net::UnixStream, expected: &[u8]| {
        let mut bytes = vec![0; expected.len()];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
    };
    input.write_all(b"one").unwrap();
    read(&mut output, b"one");
    drop((input, output));
    let mut input = f.take_over(id, Stream::Stdin);
    input.write_all(b"two").unwrap();
    thread::sleep(Duration::from_millis(100));
    let mut output = f.take_over(id, Stream::Stdout);
    read(&mut output, b"two");
    agent.close_stdin(id).unwrap();
    input.write_all(b"three").unwrap();
    input.shutdown(Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"three");
    assert!(agent.wait(id, Some(LIMIT)).unwrap().is_some());
}

#[test]
fn closing_input_is_its_end_and_no_input_is_empty() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(with_input(command(&["wc", "-c"]))).unwrap();
    drop(f.machine.stream(id, Stream::Stdin).unwrap());
    assert_eq!(f.finish(&mut agent, id).1, "0\n");
    let (id, _) = agent.exec(with_input(command(&["wc", "-c"]))).unwrap();
    agent.close_stdin(id).unwrap();
    assert_eq!(f.finish(&mut agent, id).1, "0\n");
    assert_eq!(f.run(command(&["wc", "-c"])).1, "0\n");
    let refused = f.machine.stream(MAIN, Stream::Stdin).unwrap_err();
    assert!(matches!(refused, ClientError::Agent(e) if e.kind == FailureKind::BadRequest));
}

#[test]
fn a_process_that_closes_its_input_is_noticed() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(with_input(shell("exec <&-; sleep 100"))).unwrap();
    let mut input = f.machine.stream(id, Stream::Stdin).unwrap();
    input.set_write_timeout(Some(LIMIT)).unwrap();
    let error = loop {
        if let Err(e) = input.write_all(&[0; 4096]) {
            break e;
        }
    };
    let kinds = [std::io::ErrorKind::BrokenPipe, std::io::ErrorKind::ConnectionReset];
    assert!(kinds.contains(&error.kind()), "{error}");
    agent.signal(id, libc::SIGKILL).unwrap();
}

#[test]
fn a_background_process_that_keeps_writing_does_not_hold_the_end_back() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(shell("yes & sleep 0.2; echo last >&2; exit 4")).unwrap();
    let (code, out, err) = f.finish(&mut agent, id);
    assert_eq!((code, err.as_str()), (4, "last\n"));
    assert!(out.starts_with("y\ny\n"));
}
