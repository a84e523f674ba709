//! Why the agent could not do something, in a form both a program and a person can use.

use serde::{Deserialize, Serialize};

/// A failure as it crosses the wall: a kind to act on and a sentence to print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What sort of failure.
    pub kind: FailureKind,
    /// What was wrong, as a sentence without a final full stop.
    pub message: String,
}

/// The sorts of failure a caller may treat differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The program is not in the container.
    CommandNotFound,
    /// The program is there but cannot be run.
    CommandNotExecutable,
    /// The user or group is not in the container's files.
    NoSuchUser,
    /// No process of that number, or it has ended.
    NoSuchProcess,
    /// Nothing is at that path of the container.
    NoSuchPath,
    /// The request is not one the agent understands, or a value is out of range.
    BadRequest,
    /// Host and agent speak different versions.
    Version,
    /// Not now: the machine is not set up yet, or already is.
    WrongState,
    /// Someone else holds that stream.
    Busy,
    /// A cap on processes, connections or sizes is reached.
    Limit,
    /// A disk is missing or cannot be mounted.
    Disk,
    /// Anything else that the guest's kernel refused.
    #[serde(other)]
    System,
}

impl Failure {
    /// A failure of `kind` that says `message`.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The exit code a command line gives for this failure: 127 when the program was not
    /// found, 126 when it could not be run, 125 for everything else, as `docker run` does.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            FailureKind::CommandNotFound => 127,
            FailureKind::CommandNotExecutable => 126,
            _ => 125,
        }
    }
}
