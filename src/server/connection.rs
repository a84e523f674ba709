//! One client: its half-read request, its half-written answer, and what it waits for.
//!
//! ```text
//!             ┌────────── answer written ◄─────────────┐
//!   Reading ──┴─ request ─► Now ──► answer ── backlog ─┘
//!      │                 ├► Later ─► Owed ── answer() ──► Reading
//!      │                 └► Stream ► Streaming ── push() … finish() ──► Reading
//!      └─ bad request ─► fault ──► Draining ──► closed
//! ```
//!
//! While an answer is owed or not yet taken by the client, nothing more is read from it: the
//! kernel's socket buffer is what a client that does not read can fill, not ours. Draining
//! reads and drops what a client still sends after it was refused, because closing at once
//! would make the client's write fail before it reads why.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use api::http::{BadRequest, CHUNK_END, CONTINUE, Framing, Method, Parser, Request, Response, Version};
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{
        self, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendFlags, Shutdown,
    },
};

use super::{Answer, Limits, Ticket};

/// Requests of one connection that are served before others have their turn.
const TURN: usize = 16;

/// How much a refused client may still send before the connection is closed on it.
const DRAIN: usize = 1 << 20;

/// How long a refused client may take for that.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// What the connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for a request or the rest of one, or has an answer to get rid of.
    Reading,
    /// The handler owes the answer.
    Owed,
    /// The handler pushes parts of a body.
    Streaming(Framing),
    /// Nothing of what comes matters any more; bytes until it is cut.
    Draining(usize),
}

/// What is to become of a connection after its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Fate {
    /// It goes on.
    Lives,
    /// It is over.
    Ends,
}

/// What a connection borrows from the server for its turn.
pub(super) struct Turn<'a> {
    /// Where bytes are received, shared by all connections.
    pub(super) scratch: &'a mut [u8],
    /// Where heads are written, shared by all connections.
    pub(super) head: &'a mut Vec<u8>,
    pub(super) limits: &'a Limits,
    /// The last ticket number given out.
    pub(super) serial: &'a mut u64,
    /// The connection's place.
    pub(super) slot: u32,
    /// Whether one more answer may be owed.
    pub(super) may_owe: bool,
    pub(super) now: Instant,
    pub(super) handler: &'a mut dyn FnMut(Request, Ticket) -> Answer,
}

pub(super) struct Connection {
    socket: OwnedFd,
    parser: Parser,
    descriptors: Vec<OwnedFd>,
    /// Received, but its turn has not come: further requests of a pipeline.
    input: Vec<u8>,
    /// To be sent as soon as the client takes it.
    output: Vec<u8>,
    state: State,
    /// The number of the ticket for the request being served.
    serial: u64,
    /// Whether the connection goes on after the present answer.
    keep_alive: bool,
    /// Whether it is cut, after the answer, without a further look.
    refused: bool,
    /// When it last came to be idle, began a request, or got a backlog.
    since: Instant,
    /// Whether it ever made a whole request: such a client is evicted later.
    proven: bool,
    /// What the epoll watches it for.
    pub(super) interest: EventFlags,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, max_body: usize, now: Instant) -> Connection {
        Connection {
            socket,
            parser: Parser::new(max_body),
            descriptors: Vec::new(),
            input: Vec::new(),
            output: Vec::new(),
            state: State::Reading,
            serial: 0,
            keep_alive: true,
            refused: false,
            since: now,
            proven: false,
            interest: EventFlags::IN,
        }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// What it should be watched for. A hang-up is always reported.
    pub(super) fn wants(&self) -> EventFlags {
        match self.state {
            _ if !self.output.is_empty() => EventFlags::OUT,
            // Nothing to wait for but a turn: writable is true at once.
            State::Reading if !self.input.is_empty() => EventFlags::OUT,
            State::Reading | State::Draining(_) => EventFlags::IN,
            State::Owed | State::Streaming(_) => EventFlags::empty(),
        }
    }

    /// Memory held for what the client sent or has not taken, in bytes.
    pub(super) fn held(&self) -> usize {
        self.parser.held() + self.input.capacity() + self.output.capacity()
    }

    /// Descriptors of an unfinished request.
    pub(super) fn descriptors(&self) -> usize {
        self.descriptors.len()
    }

    /// Whether the handler owes it something, so that it must not be evicted for being quiet.
    pub(super) fn is_served(&self) -> bool {
        matches!(self.state, State::Owed | State::Streaming(_))
    }

    /// Whether this ticket is the one being served.
    pub(super) fn serves(&self, ticket: Ticket) -> bool {
        self.is_served() && self.serial == ticket.serial
    }

    /// Who is evicted first is what sorts first: who never made a request, then who has been
    /// quiet or unfinished for longest.
    pub(super) fn rank(&self) -> (bool, Instant) {
        (self.proven, self.since)
    }

    /// When it is cut if nothing changes. None while it is idle or served without a backlog.
    pub(super) fn deadline(&self, limits: &Limits) -> Option<Instant> {
        match self.state {
            State::Draining(_) => Some(self.since + DRAIN_TIME),
            State::Owed => None,
            _ if !self.output.is_empty() => Some(self.since + limits.patience),
            State::Reading if self.parser.pending().is_some() => Some(self.since + limits.patience),
            _ => None,
        }
    }

    /// Tells a client whose time is over why, as far as that is possible without waiting.
    pub(super) fn expire(&mut self, head: &mut Vec<u8>) {
        if self.state == State::Reading && self.output.is_empty() {
            let late = Response::fault(408, "The request was not complete in time");
            let _ = self.send_answer(&late, false, head);
        }
    }

    /// Does what the events call for.
    pub(super) fn turn(&mut self, events: EventFlags, turn: &mut Turn<'_>) -> Fate {
        let hung_up = events.intersects(EventFlags::HUP | EventFlags::ERR);
        let may_read = self.state == State::Reading && self.output.is_empty();
        if hung_up && !may_read {
            return Fate::Ends;
        }
        if !self.output.is_empty() && self.flush(turn.now) == Fate::Ends {
            return Fate::Ends;
        }
        if !self.output.is_empty() {
            return Fate::Lives;
        }
        match self.state {
            State::Reading => self.read(turn),
            State::Draining(left) => self.drain(left, turn.scratch),
            State::Owed | State::Streaming(_) => Fate::Lives,
        }
    }

    /// Serves what has arrived.
    fn read(&mut self, turn: &mut Turn<'_>) -> Fate {
        if !self.input.is_empty() {
            let input = std::mem::take(&mut self.input);
            return self.digest(&input, turn);
        }
        // Lent out, so that the bytes can be read while the turn is used.
        let scratch = std::mem::take(&mut turn.scratch);
        let fate = match self.receive(scratch) {
            Ok(Received::Bytes(0)) => self.ended(turn),
            Ok(Received::Bytes(count)) => self.digest(scratch.get(..count).unwrap_or_default(), turn),
            Ok(Received::TooManyDescriptors) => {
                self.refuse(&BadRequest::TooManyDescriptors(super::MAX_DESCRIPTORS), turn)
            }
            Err(Errno::AGAIN | Errno::INTR) => Fate::Lives,
            Err(_) => Fate::Ends,
        };
        turn.scratch = scratch;
        fate
    }

    /// The client will send no more.
    fn ended(&mut self, turn: &mut Turn<'_>) -> Fate {
        if let Some(what) = self.parser.pending() {
            let cut = BadRequest::Cut(what);
            let _ = self.send_answer(&Response::fault(cut.status(), &cut.to_string()), false, turn.head);
        }
        Fate::Ends
    }

    /// Serves the requests in `bytes`, and keeps what must wait.
    fn digest(&mut self, bytes: &[u8], turn: &mut Turn<'_>) -> Fate {
        let mut rest = bytes;
        for _ in 0..TURN {
            let began = self.parser.pending().is_some();
            match self.parser.advance(&mut rest) {
                Err(bad) => return self.refuse(&bad, turn),
                Ok(None) => {
                    if !began && self.parser.pending().is_some() {
                        self.since = turn.now;
                    }
                    return self.invite(turn.now);
                }
                Ok(Some(request)) => {
                    if self.obey(request, turn) == Fate::Ends {
                        return Fate::Ends;
                    }
                }
            }
            if rest.is_empty() || self.state != State::Reading || !self.output.is_empty() {
                break;
            }
        }
        if self.keep_alive && !self.refused {
            self.input = rest.to_vec();
        }
        Fate::Lives
    }

    /// Asks for the body if the client waits to be asked.
    fn invite(&mut self, now: Instant) -> Fate {
        if self.parser.wants_continue() {
            return self.send(&[CONTINUE], now);
        }
        Fate::Lives
    }

    /// Has a request served.
    fn obey(&mut self, mut request: Request, turn: &mut Turn<'_>) -> Fate {
        *turn.serial += 1;
        self.serial = *turn.serial;
        self.since = turn.now;
        self.proven = true;
        request.descriptors = std::mem::take(&mut self.descriptors);
        // What HEAD and the like expect of the connection afterwards is not known here.
        self.keep_alive = request.keep_alive && request.method != Method::Other;
        let version = request.version;
        let ticket = Ticket { slot: turn.slot, serial: self.serial };
        match (turn.handler)(request, ticket) {
            Answer::Now(response) => self.answer(&response, turn.head, turn.now),
            Answer::Later | Answer::Stream(_) if !turn.may_owe => {
                let busy = Response::fault(
                    503,
                    &format!("{} requests wait for their answer already", turn.limits.owed),
                );
                self.answer(&busy.with("Retry-After", "1"), turn.head, turn.now)
            }
            Answer::Later => {
                self.state = State::Owed;
                Fate::Lives
            }
            Answer::Stream(response) => self.begin(&response, version, turn),
        }
    }

    /// Sends the head of a stream, and what of its body is there already.
    fn begin(&mut self, response: &Response, version: Version, turn: &mut Turn<'_>) -> Fate {
        let framing = match version {
            Version::Http11 => Framing::Chunks,
            Version::Http10 => {
                self.keep_alive = false;
                Framing::Close
            }
        };
        self.state = State::Streaming(framing);
        turn.head.clear();
        response.head(self.keep_alive, framing, turn.head);
        if self.send(&[turn.head], turn.now) == Fate::Ends {
            return Fate::Ends;
        }
        self.push(&response.body, turn.limits.backlog, turn.now)
    }

    /// Sends one more part of a stream. It ends if more than `backlog` bytes wait.
    pub(super) fn push(&mut self, part: &[u8], backlog: usize, now: Instant) -> Fate {
        let State::Streaming(framing) = self.state else { return Fate::Ends };
        // A chunk of no bytes would end the stream.
        if part.is_empty() {
            return Fate::Lives;
        }
        if !self.output.is_empty() && self.output.len().saturating_add(part.len()) > backlog {
            return Fate::Ends;
        }
        let fate = match framing {
            Framing::Chunks => {
                let size = api::http::chunk_head(part.len());
                self.send(&[size.as_bytes(), part, b"\r\n"], now)
            }
            Framing::Length | Framing::Close => self.send(&[part], now),
        };
        if self.output.len() > backlog { Fate::Ends } else { fate }
    }

    /// Ends a stream, and with it the request.
    pub(super) fn finish(&mut self, now: Instant) -> Fate {
        let State::Streaming(framing) = self.state else { return Fate::Ends };
        if framing == Framing::Chunks && self.send(&[CHUNK_END], now) == Fate::Ends {
            return Fate::Ends;
        }
        self.answered(now)
    }

    /// Sends the answer to the request being served.
    pub(super) fn answer(&mut self, response: &Response, head: &mut Vec<u8>, now: Instant) -> Fate {
        if self.send_answer(response, self.keep_alive, head) == Fate::Ends {
            return Fate::Ends;
        }
        self.answered(now)
    }

    /// The answer is on its way.
    fn answered(&mut self, now: Instant) -> Fate {
        self.state = State::Reading;
        self.since = now;
        self.after_output()
    }

    /// Answers what is no request, and reads no further.
    fn refuse(&mut self, bad: &BadRequest, turn: &mut Turn<'_>) -> Fate {
        self.descriptors.clear();
        self.parser = Parser::new(0);
        self.keep_alive = false;
        self.refused = true;
        self.since = turn.now;
        let fault = Response::fault(bad.status(), &bad.to_string());
        if self.send_answer(&fault, false, turn.head) == Fate::Ends {
            return Fate::Ends;
        }
        self.after_output()
    }

    /// What follows when everything was sent.
    fn after_output(&mut self) -> Fate {
        if !self.output.is_empty() || self.keep_alive || self.state != State::Reading {
            return Fate::Lives;
        }
        if !self.refused || net::shutdown(&self.socket, Shutdown::Write).is_err() {
            return Fate::Ends;
        }
        self.state = State::Draining(DRAIN);
        Fate::Lives
    }

    fn drain(&mut self, left: usize, scratch: &mut [u8]) -> Fate {
        let received = self.receive(scratch);
        self.descriptors.clear();
        match received {
            Ok(Received::Bytes(count)) if count > 0 && count < left => {
                self.state = State::Draining(left - count);
                Fate::Lives
            }
            Ok(Received::TooManyDescriptors) | Err(Errno::AGAIN | Errno::INTR) => Fate::Lives,
            Ok(Received::Bytes(_)) | Err(_) => Fate::Ends,
        }
    }

    /// Receives bytes, and into `self.descriptors` what came with them.
    fn receive(&mut self, scratch: &mut [u8]) -> rustix::io::Result<Received> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(super::MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(scratch)];
        let received = net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        let cut = received.flags.contains(ReturnFlags::CTRUNC);
        if cut || self.descriptors.len() > super::MAX_DESCRIPTORS {
            return Ok(Received::TooManyDescriptors);
        }
        Ok(Received::Bytes(received.bytes))
    }

    fn send_answer(&mut self, response: &Response, keep_alive: bool, head: &mut Vec<u8>) -> Fate {
        head.clear();
        response.head(keep_alive, Framing::Length, head);
        let body = if response.status == 204 { &[] } else { response.body.as_slice() };
        self.send(&[head, body], self.since)
    }

    /// Sends the parts in one call, and keeps what the client does not take now.
    fn send(&mut self, parts: &[&[u8]], now: Instant) -> Fate {
        let mut sent = 0;
        if self.output.is_empty() {
            let slices: [_; 3] =
                std::array::from_fn(|i| IoSlice::new(parts.get(i).copied().unwrap_or_default()));
            let mut control = SendAncillaryBuffer::new(&mut []);
            sent = match net::sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => sent,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                Err(_) => return Fate::Ends,
            };
            if sent < parts.iter().map(|p| p.len()).sum() {
                self.since = now;
            }
        }
        for part in parts {
            let skip = sent.min(part.len());
            sent -= skip;
            let rest = part.get(skip..).unwrap_or_default();
            if !rest.is_empty() {
                self.output.reserve_exact(rest.len());
                self.output.extend_from_slice(rest);
            }
        }
        Fate::Lives
    }

    /// Sends more of what the client has not taken.
    fn flush(&mut self, now: Instant) -> Fate {
        match net::send(&self.socket, &self.output, SendFlags::NOSIGNAL) {
            Ok(sent) if sent >= self.output.len() => {
                self.output = Vec::new();
                self.since = now;
                self.after_output()
            }
            Ok(sent) => {
                self.output.drain(..sent);
                self.output.shrink_to(self.output.len());
                // A client that takes something is not stuck.
                self.since = now;
                Fate::Lives
            }
            Err(Errno::AGAIN | Errno::INTR) => Fate::Lives,
            Err(_) => Fate::Ends,
        }
    }

    /// Whether something waits to be sent.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }
}

enum Received {
    Bytes(usize),
    TooManyDescriptors,
}
