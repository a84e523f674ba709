//! The server with real sockets: its owner's loop in a thread, clients around it.

mod clients;
mod crowd;
mod late;

use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use api::http::{Method, Request, Response};

use super::*;

/// Long enough for the busiest host, and never waited for in a test that passes.
const LONG: Duration = Duration::from_secs(60);

/// The body of `/big`: more than a socket buffer takes.
const BIG: usize = 3 << 20;

/// What the owner of a test's server keeps.
#[derive(Default)]
struct Owner {
    later: Vec<Ticket>,
    streams: Vec<Ticket>,
    next: usize,
}

impl Owner {
    fn obey(&mut self, request: Request, ticket: Ticket) -> Answer {
        match (request.method, request.path.as_str()) {
            (Method::Get, "/") => Answer::Now(Response::value("here")),
            (Method::Get, "/big") => Answer::Now(Response::text("text/plain", vec![b'x'; BIG])),
            (Method::Put, "/none") => Answer::Now(Response::done()),
            (Method::Put, "/echo") => Answer::Now(Response::json(200, request.body)),
            (Method::Get, "/later") => {
                self.later.push(ticket);
                Answer::Later
            }
            (Method::Get, "/events") => {
                self.streams.push(ticket);
                Answer::Stream(Response::text("application/jsonl", "\"first\"\n"))
            }
            (Method::Put, "/files") => {
                let mut texts = Vec::new();
                for descriptor in request.descriptors {
                    let flags = rustix::io::fcntl_getfd(&descriptor).unwrap();
                    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
                    texts.push(io::read_to_string(std::fs::File::from(descriptor)).unwrap());
                }
                Answer::Now(Response::value(&texts))
            }
            (method, path) => Answer::Now(Response::fault(400, &format!("Not here: {method} {path}"))),
        }
    }

    /// What it does between requests: answers what is owed, and feeds the streams.
    fn work(&mut self, server: &mut Server) {
        for ticket in self.later.drain(..) {
            server.answer(ticket, &Response::value("late"));
        }
        let next = &mut self.next;
        self.streams.retain(|stream| {
            *next += 1;
            server.push(*stream, format!("{{\"number\":{next}}}\n").as_bytes())
        });
    }
}

/// A server that runs until it is dropped.
struct Running {
    path: PathBuf,
    ends: Arc<AtomicBool>,
    /// Streams that are open.
    streams: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

fn run(limits: Limits) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let mut server = Server::new(&path, limits).unwrap();
    let ends = Arc::new(AtomicBool::new(false));
    let streams = Arc::new(AtomicUsize::new(0));
    let (ending, open) = (Arc::clone(&ends), Arc::clone(&streams));
    let thread = std::thread::spawn(move || {
        let mut owner = Owner::default();
        while !ending.load(Ordering::Relaxed) {
            // SAFETY: the server's descriptor is open as long as the server, which outlives this.
            let watched = unsafe { BorrowedFd::borrow_raw(server.as_raw_fd()) };
            wait(&watched, Duration::from_millis(5));
            server.serve(&mut |request, ticket| owner.obey(request, ticket)).unwrap();
            owner.work(&mut server);
            open.store(owner.streams.len(), Ordering::Relaxed);
        }
        server.flush(LONG);
    });
    Running { path, ends, streams, thread: Some(thread), _directory: directory }
}

fn wait(descriptor: &impl AsFd, limit: Duration) -> bool {
    let mut watched = [rustix::event::PollFd::new(descriptor, rustix::event::PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap();
    rustix::event::poll(&mut watched, Some(&limit)).is_ok_and(|ready| ready > 0)
}

impl Running {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Sends bytes over a connection of their own, sends no more, and reads to the end.
    fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// That a client that comes now is served.
    fn serves_a_fresh_client(&self) {
        let answer = self.exchange(b"GET / HTTP/1.1\r\n\r\n");
        assert!(answer.ends_with("\"here\""), "{answer}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

/// Reads one answer with a length from a connection: its head and its body.
fn answer(stream: &mut UnixStream) -> (String, Vec<u8>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |l| l.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    (head, body)
}
