//! A stream of lines, such as that of the events.

use std::time::{Duration, Instant};

use super::{ClientError, incoming::Incoming};

/// The longest line, in bytes.
const MAX_LINE: usize = 1 << 20;

/// Lines as they come, until the server ends the stream. A line is whatever ends with a line
/// feed; empty lines are left out.
#[derive(Debug)]
pub struct Lines {
    incoming: Incoming,
    buffer: Vec<u8>,
    /// How much of the buffer is known to have no line end.
    searched: usize,
    patience: Option<Duration>,
    ended: bool,
}

impl Lines {
    pub(super) fn new(incoming: Incoming) -> Lines {
        Lines { incoming, buffer: Vec::new(), searched: 0, patience: None, ended: false }
    }

    /// These lines with a limit for the wait for each; a wait that is over is
    /// [`ClientError::Deadline`], after which the next line can be waited for again.
    #[must_use]
    pub fn patience(mut self, patience: Option<Duration>) -> Lines {
        self.patience = patience;
        self
    }

    fn line(&mut self) -> Result<Option<String>, ClientError> {
        let end = self.patience.map(|patience| Instant::now() + patience);
        loop {
            let unseen = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = unseen.iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(self.searched.saturating_add(at).saturating_add(1));
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                let line = line.trim_ascii();
                if !line.is_empty() {
                    return Ok(Some(String::from_utf8_lossy(line).into_owned()));
                }
                continue;
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > MAX_LINE {
                return Err(ClientError::Protocol(format!("a line has more than {MAX_LINE} bytes")));
            }
            match self.incoming.part(end)? {
                Some(part) => self.buffer.extend_from_slice(&part),
                None => return Ok(None),
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Result<String, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let line = self.line().transpose();
        self.ended = !matches!(line, Some(Ok(_) | Err(ClientError::Deadline)));
        line
    }
}
