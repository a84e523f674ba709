//! The connection as the client sees it: what has arrived of the answer, and how its end is
//! found.

use std::{borrow::Cow, io, os::fd::BorrowedFd, time::Instant};

use super::{ClientError, Stream, left};
use crate::http::{MAX_HEAD, MAX_HEADERS, Response, has_token, trimmed};

/// How much is read at once, in bytes.
const PIECE: usize = 16 << 10;

/// The longest line that opens a chunk, in bytes.
const MAX_CHUNK_LINE: usize = 1024;

/// How much of the body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// This many bytes, and then the answer is complete.
    Bytes(usize),
    /// This many bytes of a chunk, and then another chunk.
    Chunk(usize),
    /// The fields after the last chunk, up to an empty line.
    Trailer,
    /// Whatever comes until the connection closes.
    UntilClose,
    /// Nothing.
    Nothing,
}

/// A connection, and the answer that is being read from it.
#[derive(Debug)]
pub(super) struct Incoming {
    stream: Box<dyn Stream>,
    /// Read, but not used.
    buffer: Vec<u8>,
    head: Response,
    rest: Rest,
    keep_alive: bool,
}

impl Incoming {
    pub(super) fn new(stream: Box<dyn Stream>) -> Incoming {
        let head = Response::done();
        Incoming { stream, buffer: Vec::new(), head, rest: Rest::Nothing, keep_alive: true }
    }

    /// The status of the answer whose head was read.
    pub(super) fn status(&self) -> u16 {
        self.head.status
    }

    /// Whether another request can be sent.
    pub(super) fn is_reusable(&self) -> bool {
        self.keep_alive && self.rest == Rest::Nothing && self.buffer.is_empty()
    }

    /// The connection itself, and what was read of it beyond the head.
    pub(super) fn into_stream(self) -> (Box<dyn Stream>, Vec<u8>) {
        (self.stream, self.buffer)
    }

    /// Sends bytes; descriptors go along with the first of them.
    pub(super) fn write(
        &mut self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        end: Instant,
    ) -> Result<(), ClientError> {
        let mut rest = bytes;
        let mut along = descriptors;
        while !rest.is_empty() {
            self.stream.limit(Some(left(end).map_err(ClientError::io)?)).map_err(ClientError::io)?;
            let sent = match along {
                [] => self.stream.write(rest),
                _ => self.stream.send(rest, along),
            };
            match sent {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    along = &[];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::Unsupported => return Err(ClientError::Descriptors),
                Err(e) => return Err(ClientError::io(e)),
            }
        }
        Ok(())
    }

    /// Reads up to the end of the head of the next answer that is not an interim one.
    pub(super) fn read_head(&mut self, end: Instant) -> Result<(), ClientError> {
        loop {
            while !self.parse_head()? {
                if self.buffer.len() > MAX_HEAD {
                    return Err(ClientError::Protocol(format!("its head has more than {MAX_HEAD} bytes")));
                }
                if self.fill(Some(end))? == 0 {
                    return Err(ClientError::Closed);
                }
            }
            if self.head.status >= 200 || self.head.status == 101 {
                return Ok(());
            }
        }
    }

    /// Reads the whole body.
    pub(super) fn body(&mut self, most: usize, end: Instant) -> Result<Response, ClientError> {
        let mut body = Vec::new();
        while let Some(part) = self.part(Some(end))? {
            if body.len().saturating_add(part.len()) > most {
                return Err(ClientError::Protocol(format!("its body has more than {most} bytes")));
            }
            body.extend_from_slice(&part);
        }
        let head = std::mem::replace(&mut self.head, Response::done());
        Ok(Response { body, ..head })
    }

    /// The next part of the body, of any length but 0; none at its end. Without `end` it waits
    /// for ever.
    pub(super) fn part(&mut self, end: Option<Instant>) -> Result<Option<Vec<u8>>, ClientError> {
        loop {
            let want = match self.rest {
                Rest::Nothing => return Ok(None),
                Rest::Bytes(count) | Rest::Chunk(count) if count > 0 => count,
                Rest::Bytes(_) => {
                    self.rest = Rest::Nothing;
                    continue;
                }
                Rest::Chunk(_) => {
                    self.open_chunk(end)?;
                    continue;
                }
                Rest::Trailer => {
                    if self.line(end)?.is_empty() {
                        self.rest = Rest::Nothing;
                    }
                    continue;
                }
                Rest::UntilClose => usize::MAX,
            };
            if self.buffer.is_empty() && self.fill(end)? == 0 {
                if self.rest != Rest::UntilClose {
                    return Err(ClientError::Closed);
                }
                self.rest = Rest::Nothing;
                continue;
            }
            let count = want.min(self.buffer.len());
            let part = self.take(count);
            self.rest = match self.rest {
                Rest::Bytes(left) => Rest::Bytes(left.saturating_sub(count)),
                // The line end after a chunk's last byte is a part of the next opening.
                Rest::Chunk(left) => Rest::Chunk(left.saturating_sub(count)),
                other => other,
            };
            return Ok(Some(part));
        }
    }

    /// Reads the line that opens a chunk.
    fn open_chunk(&mut self, end: Option<Instant>) -> Result<(), ClientError> {
        let bad = |line: &[u8]| {
            ClientError::Protocol(format!("'{}' does not open a chunk", String::from_utf8_lossy(line)))
        };
        let mut line = self.line(end)?;
        // The line end of the chunk before.
        if line.is_empty() {
            line = self.line(end)?;
        }
        let digits = line.split(|b| *b == b';').next().unwrap_or_default();
        let size = str::from_utf8(trimmed(digits)).ok().filter(|d| !d.starts_with('+'));
        let size = size.and_then(|d| usize::from_str_radix(d, 16).ok()).ok_or_else(|| bad(&line))?;
        self.rest = if size == 0 { Rest::Trailer } else { Rest::Chunk(size) };
        Ok(())
    }

    /// A line without its end.
    fn line(&mut self, end: Option<Instant>) -> Result<Vec<u8>, ClientError> {
        loop {
            if let Some(at) = self.buffer.iter().position(|b| *b == b'\n') {
                let mut line = self.take(at.saturating_add(1));
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                return Ok(line);
            }
            if self.buffer.len() > MAX_CHUNK_LINE {
                return Err(ClientError::Protocol("a chunk's opening has no end".to_owned()));
            }
            if self.fill(end)? == 0 {
                return Err(ClientError::Closed);
            }
        }
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(count.min(self.buffer.len()));
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Reads what there is, waiting for at least one byte; 0 at the end of the stream.
    fn fill(&mut self, end: Option<Instant>) -> Result<usize, ClientError> {
        let mut piece = [0; PIECE];
        loop {
            let wait = end.map(left).transpose().map_err(ClientError::io)?;
            self.stream.limit(wait).map_err(ClientError::io)?;
            match self.stream.read(&mut piece) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ClientError::io(e)),
                Ok(count) => {
                    self.buffer.extend_from_slice(piece.get(..count).unwrap_or_default());
                    return Ok(count);
                }
            }
        }
    }

    /// Takes a head from the buffer, if there is a whole one.
    fn parse_head(&mut self) -> Result<bool, ClientError> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut fields);
        let used = match response.parse(&self.buffer) {
            Ok(httparse::Status::Complete(used)) => used,
            Ok(httparse::Status::Partial) => return Ok(false),
            Err(e) => return Err(ClientError::Protocol(e.to_string())),
        };
        let status = response.code.unwrap_or(0);
        let mut head = Response { content_type: Cow::Borrowed(""), ..Response::json(status, Vec::new()) };
        let (mut length, mut chunked, mut keep_alive) = (None, false, response.version == Some(1));
        for field in response.headers.iter() {
            let value = String::from_utf8_lossy(field.value).into_owned();
            match field.name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    let bad = || ClientError::Protocol(format!("its Content-Length is '{value}'"));
                    length = Some(value.trim().parse().map_err(|_| bad())?);
                }
                "transfer-encoding" => chunked = has_token(field.value, "chunked"),
                "connection" => {
                    keep_alive |= has_token(field.value, "keep-alive");
                    keep_alive &= !has_token(field.value, "close");
                }
                "content-type" => head.content_type = Cow::Owned(value),
                _ => head.headers.push((Cow::Owned(field.name.to_owned()), Cow::Owned(value))),
            }
        }
        self.rest = match (status, chunked, length) {
            (100..=199 | 204 | 304, _, _) => Rest::Nothing,
            (_, true, _) => Rest::Chunk(0),
            (_, false, Some(length)) => Rest::Bytes(length),
            (_, false, None) => Rest::UntilClose,
        };
        self.keep_alive = keep_alive && self.rest != Rest::UntilClose;
        self.head = head;
        self.take(used);
        Ok(true)
    }
}
