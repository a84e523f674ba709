//! Requests out of bytes that arrive in pieces.
//!
//! The caller hands over what it received; the parser takes from it what belongs to the
//! current request and leaves the rest, so pipelined requests need no copy. A head that is
//! whole in one piece is parsed where it lies; only an unfinished one is kept. A kept head is
//! parsed again when a piece with a line end arrives, which bounds the work by the number of
//! lines, not by the number of bytes, and still finds a bad line before the head is complete.

use std::mem::MaybeUninit;

use httparse::Header;

use super::{Method, Request, Version};

/// The longest head, from the request line to the empty line, in bytes.
pub const MAX_HEAD: usize = 8192;

/// The most header fields in a request.
pub const MAX_HEADERS: usize = 64;

/// Why bytes are not a request. The connection cannot be used afterwards, because where the
/// next request starts is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// The request line or a field breaks the syntax.
    #[error("The request is not HTTP/1: {0} (RFC 9112)")]
    Syntax(httparse::Error),
    /// The version is neither 1.0 nor 1.1.
    #[error("The request's version of HTTP is not supported; it must be HTTP/1.1 or HTTP/1.0")]
    Version,
    /// The head does not end within the cap.
    #[error("The request's head is longer than {MAX_HEAD} bytes")]
    HeadTooLong,
    /// There are too many fields.
    #[error("The request has more than {MAX_HEADERS} header fields")]
    TooManyHeaders,
    /// The target is neither a path nor an http URI with one.
    #[error("The request's target '{0}' is no path; it must start with '/'")]
    Target(String),
    /// The length is not a number.
    #[error("The Content-Length '{0}' is not a decimal number of at most 64 bits")]
    Length(String),
    /// Two fields say how long the body is.
    #[error("The request has more than one Content-Length")]
    LengthTwice,
    /// The body comes in a coding that is not understood.
    #[error("A request body with 'Transfer-Encoding: {0}' is not supported; send it with a Content-Length")]
    Coding(String),
    /// The body is too long.
    #[error("The request's body of {length} bytes is larger than the limit of {limit} bytes")]
    BodyTooLarge {
        /// What `Content-Length` says, in bytes.
        length: u64,
        /// The cap, in bytes.
        limit: usize,
    },
    /// More descriptors came along than a request may have.
    #[error("More than {0} file descriptors came with one request")]
    TooManyDescriptors(usize),
    /// The sender stopped sending before the end.
    #[error("The request ended before its {0} was complete")]
    Cut(&'static str),
}

impl BadRequest {
    /// The status to answer with: 400 for all, as Firecracker does, for a body over the cap
    /// too.
    pub fn status(&self) -> u16 {
        400
    }
}

/// The part of a head that outlives it.
#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    query: String,
    version: Version,
    keep_alive: bool,
    length: usize,
}

/// Makes requests of bytes.
#[derive(Debug)]
pub struct Parser {
    max_body: usize,
    /// The beginning of a head that is not complete.
    held: Vec<u8>,
    head: Option<Head>,
    body: Vec<u8>,
    expects: bool,
}

impl Parser {
    /// A parser that refuses bodies of more than `max_body` bytes.
    pub fn new(max_body: usize) -> Parser {
        Parser { max_body, held: Vec::new(), head: None, body: Vec::new(), expects: false }
    }

    /// Takes bytes from the front of `input` until a request is complete or none is left.
    ///
    /// After an error the parser must not be used again.
    pub fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Request>, BadRequest> {
        if self.head.is_none() && !self.read_head(input)? {
            return Ok(None);
        }
        let Some(head) = &self.head else { return Ok(None) };
        let missing = head.length.saturating_sub(self.body.len());
        let (part, rest) = input.split_at(missing.min(input.len()));
        keep(&mut self.body, part, missing);
        *input = rest;
        if part.len() < missing {
            return Ok(None);
        }
        self.expects = false;
        let body = std::mem::take(&mut self.body);
        Ok(self.head.take().map(|head| Request {
            method: head.method,
            path: head.path,
            query: head.query,
            body,
            version: head.version,
            keep_alive: head.keep_alive,
            descriptors: Vec::new(),
        }))
    }

    /// Whether the sender waits for [`super::CONTINUE`] before it sends the body. True once,
    /// and only while no byte of the body has arrived.
    pub fn wants_continue(&mut self) -> bool {
        std::mem::take(&mut self.expects) && self.body.is_empty()
    }

    /// What of a request is still to come, if one has begun: its head or its body.
    pub fn pending(&self) -> Option<&'static str> {
        match &self.head {
            Some(_) => Some("body"),
            None => (!self.held.is_empty()).then_some("head"),
        }
    }

    /// How much memory the unfinished request holds, in bytes.
    pub fn held(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |h| h.path.capacity() + h.query.capacity());
        self.held.capacity() + self.body.capacity() + head
    }

    /// Completes `self.head` from `input`; false if more is needed, and then `input` is empty.
    fn read_head(&mut self, input: &mut &[u8]) -> Result<bool, BadRequest> {
        if self.held.is_empty() {
            // A server should skip empty lines before a request (RFC 9112 section 2.2).
            let start = input.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(input.len());
            *input = &input[start..];
            if input.is_empty() {
                return Ok(false);
            }
            let window = &input[..input.len().min(MAX_HEAD)];
            if let Some(used) = self.parse_head(window)? {
                *input = &input[used..];
                return Ok(true);
            }
            if window.len() == MAX_HEAD {
                return Err(BadRequest::HeadTooLong);
            }
            keep(&mut self.held, input, MAX_HEAD);
            *input = &[];
            return Ok(false);
        }
        let before = self.held.len();
        let (part, _) = input.split_at(input.len().min(MAX_HEAD.saturating_sub(before)));
        keep(&mut self.held, part, MAX_HEAD);
        let full = self.held.len() >= MAX_HEAD;
        if !full && !part.contains(&b'\n') {
            *input = &[];
            return Ok(false);
        }
        let held = std::mem::take(&mut self.held);
        match self.parse_head(&held)? {
            Some(used) => {
                *input = &input[used.saturating_sub(before)..];
                Ok(true)
            }
            None if full => Err(BadRequest::HeadTooLong),
            None => {
                self.held = held;
                *input = &[];
                Ok(false)
            }
        }
    }

    /// Parses a head at the front of `bytes` into `self.head`; how long it was, or nothing if
    /// it is not complete.
    fn parse_head(&mut self, bytes: &[u8]) -> Result<Option<usize>, BadRequest> {
        let mut fields = [const { MaybeUninit::<Header<'_>>::uninit() }; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut []);
        let used = match request.parse_with_uninit_headers(bytes, &mut fields) {
            Ok(httparse::Status::Complete(used)) => used,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(BadRequest::TooManyHeaders),
            Err(httparse::Error::Version) => return Err(BadRequest::Version),
            Err(e) => return Err(BadRequest::Syntax(e)),
        };
        let version = match request.version {
            Some(0) => Version::Http10,
            _ => Version::Http11,
        };
        let (path, query) = split_target(request.path.unwrap_or_default())?;
        let mut fields = Fields { length: None, close: false, keep_alive: false, expects: false };
        for header in request.headers.iter() {
            fields.note(header)?;
        }
        let length = fields.length.unwrap_or(0);
        let length = usize::try_from(length)
            .ok()
            .filter(|l| *l <= self.max_body)
            .ok_or(BadRequest::BodyTooLarge { length, limit: self.max_body })?;
        self.expects = fields.expects && length > 0 && version == Version::Http11;
        let keep_alive = !fields.close && (fields.keep_alive || version == Version::Http11);
        let method = Method::named(request.method.unwrap_or_default());
        self.head = Some(Head { method, path, query, version, keep_alive, length });
        Ok(Some(used))
    }
}

/// The fields that matter to the parser.
struct Fields {
    length: Option<u64>,
    close: bool,
    keep_alive: bool,
    expects: bool,
}

impl Fields {
    fn note(&mut self, header: &Header<'_>) -> Result<(), BadRequest> {
        let name = header.name;
        if name.eq_ignore_ascii_case("content-length") {
            if self.length.is_some() {
                return Err(BadRequest::LengthTwice);
            }
            self.length = Some(decimal(header.value)?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if !trimmed(header.value).eq_ignore_ascii_case(b"identity") {
                return Err(BadRequest::Coding(shown(header.value)));
            }
        } else if name.eq_ignore_ascii_case("connection") {
            self.close |= has_token(header.value, "close");
            self.keep_alive |= has_token(header.value, "keep-alive");
        } else if name.eq_ignore_ascii_case("expect") {
            self.expects |= has_token(header.value, "100-continue");
        }
        Ok(())
    }
}

/// Appends, growing by what is needed or a quarter, and never beyond `most`: doubling would
/// let a peer hold twice what it sent.
fn keep(buffer: &mut Vec<u8>, part: &[u8], most: usize) {
    let free = buffer.capacity() - buffer.len();
    if part.len() > free {
        let slack = if part.len() == most { 0 } else { (buffer.len() / 4).max(64) };
        buffer.reserve_exact(part.len().saturating_add(slack));
    }
    buffer.extend_from_slice(part);
}

fn decimal(value: &[u8]) -> Result<u64, BadRequest> {
    let digits = trimmed(value);
    let number = (!digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
        .then(|| str::from_utf8(digits).ok()?.parse().ok())
        .flatten();
    number.ok_or_else(|| BadRequest::Length(shown(value)))
}

/// A value without the blanks around it.
pub(crate) fn trimmed(value: &[u8]) -> &[u8] {
    value.trim_ascii()
}

/// Whether a list of tokens, separated by commas, has this one in any case.
pub(crate) fn has_token(value: &[u8], token: &str) -> bool {
    value.split(|b| *b == b',').any(|t| trimmed(t).eq_ignore_ascii_case(token.as_bytes()))
}

/// A peer's bytes for an error text: printable and short.
fn shown(value: &[u8]) -> String {
    let text = String::from_utf8_lossy(value);
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn split_target(target: &str) -> Result<(String, String), BadRequest> {
    let bad = || BadRequest::Target(shown(target.as_bytes()));
    let local = match target.get(..7) {
        Some(scheme) if scheme.eq_ignore_ascii_case("http://") => {
            let rest = target.get(7..).unwrap_or_default();
            rest.find('/').and_then(|slash| rest.get(slash..)).ok_or_else(bad)?
        }
        _ => target,
    };
    if !local.starts_with('/') {
        return Err(bad());
    }
    let (path, query) = local.split_once('?').unwrap_or((local, ""));
    Ok((path.to_owned(), query.to_owned()))
}

#[cfg(test)]
mod tests;
