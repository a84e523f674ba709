//! What can go wrong between a client and a server.

use std::io;

use crate::http::Response;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves there.
    #[error("Nothing answers at {place}")]
    Connect {
        /// Where the server should be, in words.
        place: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server refused, or failed.
    #[error("{message}")]
    Fault {
        /// The status code, 400 to 599.
        status: u16,
        /// Its `fault_message`, or the body if it has none.
        message: String,
    },
    /// The call took too long.
    #[error("The server did not answer in time")]
    Deadline,
    /// The server closed the connection, perhaps because it ended.
    #[error("The server closed the connection before it answered")]
    Closed,
    /// The connection failed.
    #[error("The connection to the server failed")]
    Connection(#[source] io::Error),
    /// The answer is not HTTP, or larger than any answer of this API.
    #[error("The server's answer cannot be understood: {0}")]
    Protocol(String),
    /// The request's body has no JSON form.
    #[error("The request cannot be written as JSON")]
    Body(#[source] serde_json::Error),
    /// The answer is not what was asked for.
    #[error("The answer to '{path}' has another form than expected")]
    Answer {
        /// What was asked.
        path: String,
        /// Where it differs.
        source: serde_json::Error,
    },
    /// The path cannot be sent.
    #[error("The path '{0}' must start with '/' and have no blanks or control characters")]
    Path(String),
    /// The server goes on in HTTP where another protocol was asked for.
    #[error("The server does not speak '{0}' at this path")]
    Upgrade(String),
    /// Descriptors cannot be sent over this connection.
    #[error("File descriptors can be sent over a unix socket only, at most 16 with a request")]
    Descriptors,
}

impl ClientError {
    /// The fault in an answer with a status of 400 and above.
    pub(super) fn fault(response: &Response) -> ClientError {
        #[derive(serde::Deserialize)]
        struct Fault {
            fault_message: String,
        }
        let message = match serde_json::from_slice::<Fault>(&response.body) {
            Ok(fault) => fault.fault_message,
            Err(_) if response.body.is_empty() => {
                format!("The server answered with status {}", response.status)
            }
            Err(_) => String::from_utf8_lossy(&response.body).into_owned(),
        };
        ClientError::Fault { status: response.status, message }
    }

    /// An input or output error, told apart by what a caller can do about it.
    pub(super) fn io(error: io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Deadline,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof => ClientError::Closed,
            _ => ClientError::Connection(error),
        }
    }

    /// Whether the connection ended, which a new one may help with.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self, ClientError::Closed)
    }
}
