//! The service with machines that only seem to run: a record of this very process, and sockets
//! that a thread of it answers.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use api::client::{Client, ClientError};
use serde_json::{Value, json};

use super::*;
use crate::cli::state::{Machine, ProcessName, Record, now};

/// A service on a thread of its own, and a state directory.
struct Bench {
    directory: tempfile::TempDir,
    state: State,
}

impl Bench {
    fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path().to_owned()).unwrap();
        let bench = Bench { state: state.clone(), directory };
        let unix = listen::Unix::bind(&bench.socket()).unwrap();
        let service = Service {
            state,
            hub: Hub::new(),
            program: "/bin/false".into(),
            launches: Semaphore::new(LAUNCHES),
            slow: Semaphore::new(SLOW),
            logs: Arc::new(Semaphore::new(LOGS)),
        };
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(listen::run(Arc::new(service), unix, None))
        });
        bench
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn client(&self) -> Client {
        Client::unix(self.socket())
    }

    /// A machine that runs as long as this process does.
    fn machine(&self, id: &str, name: &str) -> Machine {
        let record = Record {
            started: Some(now()),
            keeper: ProcessName::of(std::process::id().cast_signed()),
            ..Record::example(&id.repeat(16), name)
        };
        self.state.create(record).unwrap()
    }
}

/// Answers each connection's requests with what `answer` makes of their first lines.
fn api(machine: &Machine, answer: impl Fn(&str) -> String + Send + Sync + 'static) {
    let listener = UnixListener::bind(machine.api()).unwrap();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let answer = Arc::clone(&answer);
            thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                while let Some(first) = lines.next() {
                    lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
                    (&stream).write_all(answer(&first).as_bytes()).unwrap();
                    if first.contains("/events") {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                }
            });
        }
    });
}

fn whole(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn a_machines_api_is_handed_through_with_its_streams() {
    let bench = Bench::new();
    let machine = bench.machine("abcd", "web");
    api(&machine, |line| match line {
        "GET /vm/config HTTP/1.1" => whole(r#"{"seen": "config"}"#),
        "GET / HTTP/1.1" => whole(r#"{"state": "Running"}"#),
        line if line.starts_with("GET /events?since=") => {
            "HTTP/1.1 200 OK\r\n\r\n{\"event\":\"Paused\",\"sequence\":9}\n".to_owned()
        }
        other => format!("HTTP/1.1 400 Bad\r\nContent-Length: {}\r\n\r\n{other}", other.len()),
    });
    let mut client = bench.client();
    assert_eq!(client.get::<Value>("/machines/web/vm/config").unwrap(), json!({ "seen": "config" }));
    assert_eq!(client.get::<Value>("/machines/abcda/").unwrap()["state"], "Running");
    match client.put::<()>("/machines/web/drives/a?x=1", Some(&json!({}))) {
        Err(ClientError::Fault { status: 400, message }) => {
            assert_eq!(message, "PUT /drives/a?x=1 HTTP/1.1");
        }
        other => panic!("{other:?}"),
    }
    let lines: Vec<String> =
        client.lines("/machines/web/events?since=3").unwrap().map_while(Result::ok).collect();
    assert_eq!(lines, [r#"{"event":"Paused","sequence":9}"#]);
    // The same event, in the stream of all machines, with its name.
    let events = client.lines("/events").unwrap().patience(Some(Duration::from_secs(30)));
    let events = events.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut events = events.filter(|event| event["event"] == "Paused");
    let seen = events.next().unwrap();
    assert_eq!((&seen["machine"], &seen["sequence"]), (&json!("web"), &json!(9)));
}

#[test]
fn a_tunnel_carries_both_ways_and_ends_by_halves() {
    let bench = Bench::new();
    let machine = bench.machine("abcd", "web");
    let listener = UnixListener::bind(machine.vsock()).unwrap();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        // All of it, which needs the end of what comes; only then the answer.
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let (stream, received) = bench.client().upgrade("/machines/web/tunnel", "vsock").unwrap();
    assert!(received.is_empty());
    let any: Box<dyn std::any::Any> = stream;
    let mut stream = any.downcast::<UnixStream>().unwrap();
    let bytes: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
    stream.write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == bytes);
    echo.join().unwrap();
    // Without the upgrade it is refused, with what is missing.
    match bench.client().get::<()>("/machines/web/tunnel") {
        Err(ClientError::Fault { status: 426, message }) => assert!(message.contains("Upgrade: vsock")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn waiting_ends_when_the_record_says_so_and_events_tell_the_story() {
    let bench = Bench::new();
    let mut events = bench.client().lines("/events").unwrap().patience(Some(Duration::from_secs(30)));
    // While it is made it has no keeper; nobody takes it for dead then.
    let mut machine = bench.machine("abcd", "web");
    let kept = machine.record.clone();
    machine.record = Record { keeper: None, started: None, ..kept.clone() };
    machine.save().unwrap();
    thread::sleep(Duration::from_millis(50));
    machine.record = kept;
    machine.save().unwrap();
    let mut waiter = bench.client();
    let waiting = thread::spawn(move || waiter.post::<Value>("/machines/web/wait", None::<&()>));
    let mut next = |kind: &str| loop {
        let event: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
        if event["event"] == kind {
            return event;
        }
    };
    assert_eq!(next("MachineCreated")["machine"], "web");
    next("MachineStarted");
    match bench.client().delete::<()>("/machines/web") {
        Err(ClientError::Fault { status: 409, message }) => assert!(message.contains("force=true")),
        other => panic!("{other:?}"),
    }
    machine.record.end =
        Some(crate::cli::state::End { exit_code: 3, reason: Some("Why".to_owned()), at: now() });
    machine.record.keeper = None;
    machine.save().unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), json!({ "exit_code": 3, "reason": "Why" }));
    assert_eq!(next("MachineEnded")["exit_code"], 3);
    bench.client().delete::<()>("/machines/web").unwrap();
    assert_eq!(next("MachineRemoved")["machine_id"], "abcd".repeat(16));
    assert!(bench.state.machines().unwrap().is_empty());
}

#[test]
fn logs_come_whole_apart_and_by_lines() {
    use crate::cli::log::{ENTRIES, Entry, Stream, Writer};
    let bench = Bench::new();
    let machine = bench.machine("abcd", "web");
    let mut log = Writer::open(&machine.file("output.log")).unwrap();
    log.add(Stream::Out, b"one\n").unwrap();
    log.add(Stream::Err, b"two\n").unwrap();
    let read = |query: &str, kind: &str| -> Vec<u8> {
        let path = format!("/machines/web/logs{query}");
        bench.client().parts(&path, kind).unwrap().flat_map(Result::unwrap).collect()
    };
    assert_eq!(read("", "*/*"), b"one\ntwo\n");
    assert_eq!(read("?tail=1", "*/*"), b"two\n");
    let mut framed = read("", ENTRIES);
    let streams: Vec<Stream> =
        std::iter::from_fn(|| Entry::take(&mut framed).unwrap()).map(|e| e.stream).collect();
    assert_eq!(streams, [Stream::Out, Stream::Err]);
    fs::write(machine.file("console.log"), "Linux version").unwrap();
    assert_eq!(read("?source=kernel", "*/*"), b"Linux version");
    // What is followed goes on.
    let mut parts = bench.client().parts("/machines/web/logs?follow=true&tail=1", "*/*").unwrap();
    assert_eq!(parts.next().unwrap().unwrap(), b"two\n");
    log.add(Stream::Out, b"three\n").unwrap();
    assert_eq!(parts.next().unwrap().unwrap(), b"three\n");
}

#[test]
fn a_launch_that_cannot_be_made_is_said_and_a_monitor_that_is_gone_too() {
    let bench = Bench::new();
    match bench.client().post::<()>("/machines", Some(&json!({ "image": "busybox" }))) {
        Err(ClientError::Fault { status: 500, message }) => assert!(message.contains("without an answer")),
        other => panic!("{other:?}"),
    }
    bench.machine("abcd", "web");
    match bench.client().get::<()>("/machines/web/vm/config") {
        Err(ClientError::Fault { status: 502, message }) => assert!(message.contains("API of machine web")),
        other => panic!("{other:?}"),
    }
    let page =
        bench.client().parts("/metrics/openmetrics", "*/*").unwrap().flat_map(Result::unwrap).collect();
    let page = String::from_utf8(page).unwrap();
    assert!(page.contains("nacelle_host_machines{status=\"running\"} 1\n"), "{page}");
    assert!(page.contains("nacelle_host_silent_machines 1\n"), "{page}");
}

#[test]
fn half_requests_keep_nobody_from_being_served() {
    let bench = Bench::new();
    let slow: Vec<UnixStream> = (0..2 * seats::SEATS)
        .map(|_| {
            let mut stream = UnixStream::connect(bench.socket()).unwrap();
            stream.write_all(b"GET /machines HTTP/1.1\r\nHo").unwrap();
            stream
        })
        .collect();
    let mut client = bench.client().patience(Duration::from_secs(20));
    assert_eq!(client.get::<Value>("/healthz").unwrap()["status"], "ok");
    // Those who came first were put out for those who came last.
    let mut first = &slow[0];
    assert_eq!(first.read(&mut [0]).unwrap_or(0), 0);
}
