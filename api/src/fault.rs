//! A refusal or a failure, as a caller gets it.

use std::{error::Error, fmt};

use serde::{Deserialize, Serialize};

/// Whose fault it is, decided where it is found, so that no layer above has to guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// The request itself is wrong: a bad value, an unknown field, a missing file.
    Invalid,
    /// It names something that does not exist.
    NotFound,
    /// It is right, but not in this state of the machine.
    Conflict,
    /// It is right, and larger than what is taken.
    TooLarge,
    /// This build, host or machine cannot do it.
    Unsupported,
    /// Something failed here.
    Internal,
}

/// Why a request did not happen: one sentence, and the chain of causes under it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Whose fault it is.
    pub kind: FaultKind,
    /// What was wrong and what would be right.
    pub message: String,
    /// What led to it, outermost first; may be empty.
    pub causes: Vec<String>,
}

impl Fault {
    /// A fault with a message and no further cause.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Fault {
        Fault { kind, message: message.into(), causes: Vec::new() }
    }

    /// A fault from an error: its text becomes the message, its sources the causes.
    pub fn from_error(kind: FaultKind, error: &(dyn Error + 'static)) -> Fault {
        let mut causes = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        Fault { kind, message: error.to_string(), causes }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.causes.iter().try_for_each(|cause| write!(f, ": {cause}"))
    }
}

impl Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("The disk cannot be opened")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_fault_keeps_the_chain_and_prints_it_once() {
        let error = Outer(std::io::Error::other("No such file"));
        let fault = Fault::from_error(FaultKind::Invalid, &error);
        assert_eq!(fault.to_string(), "The disk cannot be opened: No such file");
    }
}
