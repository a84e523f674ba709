//! A small blocking client of the API, for the command line, the tests and other programs.
//!
//! ```text
//!   Client::get/put/… ──► one write ──► server
//!          ▲                              │
//!          └── value, or ClientError ◄── Incoming (client/incoming.rs): head, body, chunks
//! ```
//!
//! One connection, kept open, one request at a time: the API serves them in order anyway.
//! A server closes connections that have been quiet when others need the place, so a request
//! that could not even be written, or was answered by nothing but the end of a connection
//! that had been used before, is sent once more over a new one, if it is safe to repeat (GET,
//! and PUT or DELETE whose bytes never left).
//!
//! Every call has a deadline for the whole of it, not for each byte, so a server that dribbles
//! cannot hold a caller.

mod error;
mod incoming;
mod lines;
mod stream;

use std::{
    io,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

pub use error::ClientError;
use incoming::Incoming;
pub use lines::Lines;
pub use stream::{Connect, Stream};

use crate::http::{Method, Response};

/// How long a call may take unless [`Client::patience`] says otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest body a client takes, in bytes.
const MAX_BODY: usize = 64 << 20;

/// A client of one server.
#[derive(Debug)]
pub struct Client {
    /// How to connect again; none for a stream that was given.
    connect: Option<Arc<dyn Connect>>,
    connection: Option<Incoming>,
    patience: Duration,
    /// What goes before every path, such as `/machines/NAME` through a host's service.
    prefix: String,
}

impl Client {
    /// A client of the server at this unix socket. It connects when first used, and again
    /// whenever it must.
    pub fn unix(path: impl Into<PathBuf>) -> Client {
        Client::to(Arc::new(path.into()))
    }

    /// A client of whatever `connect` leads to. It connects when first used, and again whenever it
    /// must.
    pub fn to(connect: Arc<dyn Connect>) -> Client {
        Client { connect: Some(connect), connection: None, patience: PATIENCE, prefix: String::new() }
    }

    /// A client over a stream that is connected already. When the server closes it, calls fail.
    pub fn over(stream: impl Stream + 'static) -> Client {
        let connection = Some(Incoming::new(Box::new(stream)));
        Client { connect: None, connection, patience: PATIENCE, prefix: String::new() }
    }

    /// This client with another limit for the time of a whole call.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Client {
        self.patience = patience;
        self
    }

    /// This client with something that goes before every path, such as `/machines/NAME`.
    #[must_use]
    pub fn under(mut self, prefix: impl Into<String>) -> Client {
        self.prefix = prefix.into();
        self
    }

    /// Reads what is at `path`.
    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ClientError> {
        self.call(Method::Get, path, None::<&()>)
    }

    /// Puts `body` at `path`, or asks for an action.
    pub fn put<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: Option<&(impl Serialize + ?Sized)>,
    ) -> Result<T, ClientError> {
        self.call(Method::Put, path, body)
    }

    /// As [`Client::put`], with descriptors that go along (at most 16, and only over a unix
    /// socket): the file of a disk, or those of a tap.
    pub fn put_with<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &(impl Serialize + ?Sized),
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Body)?;
        let response = self.send(Method::Put, path, &body, descriptors)?;
        read(path, &response)
    }

    /// Changes what is at `path`.
    pub fn patch<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: Option<&(impl Serialize + ?Sized)>,
    ) -> Result<T, ClientError> {
        self.call(Method::Patch, path, body)
    }

    /// Asks for something at `path`.
    pub fn post<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: Option<&(impl Serialize + ?Sized)>,
    ) -> Result<T, ClientError> {
        self.call(Method::Post, path, body)
    }

    /// Removes what is at `path`.
    pub fn delete<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ClientError> {
        self.call(Method::Delete, path, None::<&()>)
    }

    /// Any request with a body in JSON, and its answer as a value: `T` may be
    /// `serde_json::Value`, or `()` or an `Option` where the answer has no body. A status of
    /// 400 and above is [`ClientError::Fault`].
    pub fn call<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + ?Sized)>,
    ) -> Result<T, ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Body)?;
        let response = self.send(method, path, body.as_deref().unwrap_or_default(), &[])?;
        read(path, &response)
    }

    /// As [`Client::call`], with the bytes of the body, descriptors to go along (at most 16,
    /// and only over a unix socket), and the answer as it came. A status of 400 and above is
    /// [`ClientError::Fault`].
    pub fn send(
        &mut self,
        method: Method,
        path: &str,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Response, ClientError> {
        let end = Instant::now() + self.patience;
        let mut connection = self.ask(&Outgoing { method, path, fields: JSON, body, descriptors }, end)?;
        let response = connection.body(MAX_BODY, end)?;
        if connection.is_reusable() {
            self.connection = Some(connection);
        }
        if response.status >= 400 {
            return Err(ClientError::fault(&response));
        }
        Ok(response)
    }

    /// Reads a stream of lines, such as that of `/events`. The stream has the connection; the
    /// client can be used meanwhile and connects anew if it can. `patience` limits the wait
    /// for the head, and not that for a line: see [`Lines::patience`].
    pub fn lines(&mut self, path: &str) -> Result<Lines, ClientError> {
        Ok(Lines::new(self.open(path, JSON)?))
    }

    /// Reads an answer of any length in the pieces in which it comes, in the media type `kind` if
    /// the server has it. As with [`Client::lines`], the pieces have the connection.
    pub fn parts(&mut self, path: &str, kind: &str) -> Result<Parts, ClientError> {
        Ok(Parts(Some(self.open(path, &format!("Accept: {kind}\r\n"))?)))
    }

    /// Asks for another protocol. The connection comes back with what was read of it beyond the
    /// answer, which is to be used first; the client connects anew if it can.
    pub fn upgrade(&mut self, path: &str, protocol: &str) -> Result<(Box<dyn Stream>, Vec<u8>), ClientError> {
        let connection = self.open(path, &format!("Connection: Upgrade\r\nUpgrade: {protocol}\r\n"))?;
        match connection.status() {
            101 => Ok(connection.into_stream()),
            _ => Err(ClientError::Upgrade(protocol.to_owned())),
        }
    }

    /// Begins to read what is at `path`.
    fn open(&mut self, path: &str, fields: &str) -> Result<Incoming, ClientError> {
        let end = Instant::now() + self.patience;
        let asked = Outgoing { method: Method::Get, path, fields, body: &[], descriptors: &[] };
        let mut connection = self.ask(&asked, end)?;
        if connection.status() >= 400 {
            return Err(ClientError::fault(&connection.body(MAX_BODY, end)?));
        }
        Ok(connection)
    }

    /// Sends a request and reads the head of its answer.
    fn ask(&mut self, asked: &Outgoing<'_>, end: Instant) -> Result<Incoming, ClientError> {
        let head = head(asked, &self.prefix)?;
        let request = [head.as_bytes(), asked.body].concat();
        let used = self.connection.is_some();
        let first = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        match exchange(first, &request, asked.descriptors, end) {
            // The server closed the connection while it was idle.
            Err((e, written)) if used && e.is_closed() && (!written || asked.method == Method::Get) => {
                let again = match &self.connect {
                    Some(_) => self.connect()?,
                    None => return Err(e),
                };
                exchange(again, &request, asked.descriptors, end).map_err(|(e, _)| e)
            }
            other => other.map_err(|(e, _)| e),
        }
    }

    fn connect(&self) -> Result<Incoming, ClientError> {
        let connect = self.connect.as_ref().ok_or(ClientError::Closed)?;
        let stream =
            connect.connect().map_err(|source| ClientError::Connect { place: connect.place(), source })?;
        Ok(Incoming::new(stream))
    }
}

/// What answers are expected in, unless something else is said.
const JSON: &str = "Accept: application/json\r\n";

/// A request on its way out.
struct Outgoing<'a> {
    method: Method,
    path: &'a str,
    /// Further fields of the head, each with its line end.
    fields: &'a str,
    body: &'a [u8],
    descriptors: &'a [BorrowedFd<'a>],
}

/// The pieces of an answer as they come, until its end.
#[derive(Debug)]
pub struct Parts(Option<Incoming>);

impl Iterator for Parts {
    type Item = Result<Vec<u8>, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let part = self.0.as_mut()?.part(None).transpose();
        if !matches!(part, Some(Ok(_))) {
            self.0 = None;
        }
        part
    }
}

/// Writes a request and reads the head of the answer. With an error: whether it was written.
fn exchange(
    mut connection: Incoming,
    request: &[u8],
    descriptors: &[BorrowedFd<'_>],
    end: Instant,
) -> Result<Incoming, (ClientError, bool)> {
    let written = connection.write(request, descriptors, end);
    // A server that refuses a request early says why although it did not read all of it.
    match (connection.read_head(end), written) {
        (Ok(()), _) => Ok(connection),
        (Err(_), Err(e)) => Err((e, false)),
        (Err(e), Ok(())) => Err((e, true)),
    }
}

/// The value of an answer; no body is `null`.
fn read<T: DeserializeOwned>(path: &str, response: &Response) -> Result<T, ClientError> {
    let bytes = if response.body.is_empty() { b"null" } else { response.body.as_slice() };
    serde_json::from_slice(bytes).map_err(|source| ClientError::Answer { path: path.to_owned(), source })
}

fn head(asked: &Outgoing<'_>, prefix: &str) -> Result<String, ClientError> {
    let Outgoing { method, path, fields, body, .. } = asked;
    let target = format!("{prefix}{path}");
    if !target.starts_with('/') || target.bytes().any(|b| b <= b' ' || b == 0x7f) {
        return Err(ClientError::Path(target));
    }
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{fields}");
    if !body.is_empty() {
        let length = body.len();
        head.push_str(&format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"));
    }
    head.push_str("\r\n");
    Ok(head)
}

/// How long is left, as an error when nothing is.
fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests;
