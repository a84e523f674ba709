//! The host's side: how a command line, a keeper or the API asks the agent for things.
//!
//! ```text
//!   ReadyListener::bind(uds) ─ before boot ─▶ accept() ─▶ Agent      the first connection
//!   Machine::new(uds) ─▶ control() ─▶ Agent                         any later one
//!                     ─▶ stream(process, Stream::Stdout) ─▶ UnixStream
//!                     ─▶ read_archive(path) ─▶ PathStat, impl Read
//!                     ─▶ write_archive(path, tar)
//!                     ─▶ events() ─▶ Events
//! ```
//!
//! `uds` is the unix socket of the machine's vsock device, by Firecracker's scheme: the host
//! writes `CONNECT <port>` and reads `OK <port>`; what the guest opens towards port N arrives
//! at `<uds>_N`.
//!
//! The machine behind the socket may be hostile. Every answer has a deadline for the whole of
//! it, not for each byte; every message a cap; and text from the guest loses its control
//! characters before it reaches anyone's terminal.

mod agent;
mod archive;
mod connection;
mod ready;

pub use agent::{Agent, Events};
pub use archive::ArchiveReader;
pub use connection::{Machine, connect};
pub use ready::ReadyListener;

use crate::protocol::{Failure, frame::FrameError};
use std::{io, path::PathBuf, time::Duration};

/// Longest wait for an answer that the agent can give at once.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for answers that involve disks: setting up, archives, writing back.
pub const WORK_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The machine's socket could not be reached.
    #[error("Cannot connect to the machine's socket {path}; is the machine running?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket is there but nothing in the machine answers on the port.
    #[error("Nothing inside the machine listens on vsock port {port}")]
    Refused {
        /// The vsock port.
        port: u32,
    },
    /// What answers is no vsock device of a monitor.
    #[error("What answers on {path} is not a machine's vsock socket")]
    Handshake {
        /// The socket.
        path: PathBuf,
    },
    /// The socket for the agent's first connection could not be made.
    #[error("Cannot listen on {path} for the machine's agent")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent did not answer in time.
    #[error("The agent inside the machine did not {what} within {after:?}")]
    Timeout {
        /// What it should have done.
        what: &'static str,
        /// The time it had.
        after: Duration,
    },
    /// The machine went away.
    #[error("The machine closed the connection before it could {what}; it may have stopped")]
    Closed {
        /// What it should have done.
        what: &'static str,
    },
    /// The agent and this program are of different versions.
    #[error("The agent speaks protocol {agent}, this program {ours}; start the machine anew")]
    Version {
        /// What the agent speaks.
        agent: u32,
        /// What we speak.
        ours: u32,
    },
    /// The answer makes no sense.
    #[error("The agent's answer could not be used when it should {what}")]
    Answer {
        /// What it should have done.
        what: &'static str,
        /// Why, when the answer could not even be read.
        #[source]
        source: Option<FrameError>,
    },
    /// The connection failed.
    #[error("The connection to the machine failed")]
    Stream(#[source] io::Error),
    /// What was to be copied into the machine could not be read.
    #[error("Cannot read what is to be copied into the machine")]
    Input(#[source] io::Error),
    /// The agent could not do it and says why.
    #[error(transparent)]
    Agent(#[from] Failure),
}

impl ClientError {
    /// The exit code a command line gives for this error (125, or 126 and 127 for a command
    /// that could not be started).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Agent(failure) => failure.exit_code(),
            _ => 125,
        }
    }

    fn from_frame(what: &'static str, after: Duration, error: FrameError) -> Self {
        match error {
            e if e.is_timeout() => Self::Timeout { what, after },
            FrameError::Closed | FrameError::Truncated => Self::Closed { what },
            FrameError::Stream(e) if e.kind() == io::ErrorKind::ConnectionReset => Self::Closed { what },
            FrameError::Stream(e) if e.kind() == io::ErrorKind::BrokenPipe => Self::Closed { what },
            e => Self::Answer { what, source: Some(e) },
        }
    }
}

/// Text from a guest, fit to be shown: at most 4 KiB, without control characters.
pub(crate) fn printable(text: &str) -> String {
    const MOST: usize = 4096;
    let clean = |c: char| if c.is_control() { '\u{FFFD}' } else { c };
    let mut out: String = text.chars().take(MOST).map(clean).collect();
    if text.chars().nth(MOST).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests;
