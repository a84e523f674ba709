//! A machine of another host, as if its vsock socket were here.
//!
//! The agent's client knows one way to a machine: connect to a unix socket, write `CONNECT <port>`.
//! So there is such a socket, in a directory of this process alone, and each connection to it
//! becomes one to the machine's own, through an upgraded request to the service. Either end of
//! either side may close its half: input ends before output does.

use std::{
    any::Any,
    fs, io,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    thread,
};

use super::{Host, tls::TlsStream};
use crate::cli::{
    failure::{Failure, Outcome, doing},
    state, streams,
};

/// What the service is asked to speak.
const PROTOCOL: &str = "vsock";
/// Bytes carried at once.
const PART: usize = 16 << 10;
/// Most bytes that wait for whoever reads them here.
const WAITING: usize = 256 << 10;

/// The socket, until it is dropped. Connections that were made go on.
#[derive(Debug)]
pub struct Tunnel {
    directory: PathBuf,
}

impl Tunnel {
    /// Makes one to what is at `path` of the service.
    pub fn open(host: Host, path: String) -> Outcome<Tunnel> {
        let word = state::fresh_id()?;
        let word = word.get(..12).unwrap_or_default();
        let directory = std::env::temp_dir().join(format!("nacelle-{}-{word}", std::process::id()));
        let made = fs::DirBuilder::new().mode(0o700).create(&directory);
        doing(made, || format!("{} cannot be made", directory.display()))?;
        let tunnel = Tunnel { directory };
        let listener = UnixListener::bind(tunnel.socket());
        let listener = doing(listener, || format!("{} cannot be made", tunnel.socket().display()))?;
        let accept = move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (host, path) = (host.clone(), path.clone());
                // Without a thread the connection is closed, which is an answer.
                let _ = thread::Builder::new().spawn(move || join(&host, &path, &stream));
            }
        };
        doing(thread::Builder::new().spawn(accept), || "No thread can be had".to_owned())?;
        Ok(tunnel)
    }

    /// The socket's path.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("v")
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Joins a connection here to one of the machine.
fn join(host: &Host, path: &str, here: &UnixStream) {
    let (there, received) = match host.client().upgrade(path, PROTOCOL) {
        Ok(made) => made,
        Err(error) => {
            // The one who connected only sees the end of it; the reason is said here.
            eprintln!("nacelle: {}", Failure::from_error(&error));
            return;
        }
    };
    let there: Box<dyn Any> = there;
    // Either side may break off at any time; the other one then sees its end.
    let _ = match there.downcast::<TlsStream>() {
        Ok(tls) => carry_tls(*tls, here, received),
        Err(there) => match there.downcast::<UnixStream>() {
            Ok(unix) => carry_unix(&unix, here, &received),
            Err(_) => Ok(()),
        },
    };
    let _ = here.shutdown(Shutdown::Both);
}

fn carry_unix(there: &UnixStream, here: &UnixStream, received: &[u8]) -> io::Result<()> {
    there.set_read_timeout(None)?;
    there.set_write_timeout(None)?;
    let mut to_here: &UnixStream = here;
    to_here.write_all(received)?;
    let pass = |mut from: &UnixStream, mut to: &UnixStream| {
        let copied = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        copied
    };
    thread::scope(|scope| {
        scope.spawn(|| pass(here, there));
        pass(there, here).map(drop)
    })
}

/// The same through TLS, whose state is one for both ways, so one thread does both.
fn carry_tls(tls: TlsStream, here: &UnixStream, received: Vec<u8>) -> io::Result<()> {
    let TlsStream { mut socket, mut session } = tls;
    socket.set_nonblocking(true)?;
    here.set_nonblocking(true)?;
    let mut here = here;
    // What is on its way here, and whether more may come from either side.
    let mut waiting = received;
    let (mut here_open, mut there_open, mut told) = (true, true, false);
    let mut part = vec![0; PART];
    loop {
        while session.wants_write() {
            match session.write_tls(&mut socket) {
                Ok(_) => {}
                Err(e) if would_block(&e) => break,
                Err(e) => return Err(e),
            }
        }
        while !waiting.is_empty() {
            match here.write(&waiting) {
                Ok(count) => drop(waiting.drain(..count)),
                Err(e) if would_block(&e) => break,
                Err(e) => return Err(e),
            }
        }
        if !there_open && waiting.is_empty() && !told {
            here.shutdown(Shutdown::Write)?;
            told = true;
        }
        let all_sent = !session.wants_write();
        if told && !here_open && all_sent {
            return Ok(());
        }
        let reads_there = there_open && waiting.len() < WAITING;
        let reads_here = here_open && all_sent;
        let events = |reads: bool, writes: bool| {
            (if reads { libc::POLLIN } else { 0 }) | (if writes { libc::POLLOUT } else { 0 })
        };
        let fd = |fd: i32, events: i16| (if events == 0 { -1 } else { fd }, events);
        streams::wait_for(
            &[
                fd(socket.as_raw_fd(), events(reads_there, !all_sent)),
                fd(here.as_raw_fd(), events(reads_here, !waiting.is_empty())),
            ],
            None,
        );
        if reads_there {
            there_open = take_tls(&mut session, &mut socket, &mut waiting)?;
        }
        if reads_here {
            match here.read(&mut part) {
                Ok(0) => {
                    here_open = false;
                    session.send_close_notify();
                }
                // Less than the session buffers, and everything before it was sent.
                Ok(count) => session.writer().write_all(part.get(..count).unwrap_or_default())?,
                Err(e) if would_block(&e) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Takes what has come through TLS; false at its end.
fn take_tls(
    session: &mut rustls::ClientConnection,
    socket: &mut std::net::TcpStream,
    waiting: &mut Vec<u8>,
) -> io::Result<bool> {
    match session.read_tls(socket) {
        Ok(0) => return Ok(false),
        Ok(_) => {}
        Err(e) if would_block(&e) => {}
        Err(e) => return Err(e),
    }
    let state = session.process_new_packets().map_err(io::Error::other)?;
    let mut plain = vec![0; state.plaintext_bytes_to_read()];
    session.reader().read_exact(&mut plain)?;
    waiting.extend_from_slice(&plain);
    Ok(!state.peer_has_closed())
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
