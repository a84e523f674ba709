//! What a command failed of: a sentence, the chain of causes under it, and an exit code.

use std::{error::Error, fmt};

/// Exit code of failures that are ours and not the command's (Docker's number).
pub const EXIT_OURS: u8 = 125;

/// Why a command did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit code of the process.
    pub code: u8,
    /// What was wrong and what would be right.
    pub message: String,
    /// What led to it, outermost first.
    pub causes: Vec<String>,
}

/// What commands return.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// A failure of ours, with a message.
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { code: EXIT_OURS, message: message.into(), causes: Vec::new() }
    }

    /// A failure of ours, with a message and the error that caused it.
    pub fn because(message: impl Into<String>, error: &(dyn Error + 'static)) -> Failure {
        let mut failure = Failure::from_error(error);
        failure.causes.insert(0, std::mem::replace(&mut failure.message, message.into()));
        failure
    }

    /// A failure that an error says all about.
    pub fn from_error(error: &(dyn Error + 'static)) -> Failure {
        let mut failure = Failure::new(error.to_string());
        let mut next = error.source();
        while let Some(cause) = next {
            failure.causes.push(cause.to_string());
            next = cause.source();
        }
        failure
    }

    /// The same with another exit code.
    #[must_use]
    pub fn with_code(self, code: u8) -> Failure {
        Failure { code, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.causes.iter().try_for_each(|cause| write!(f, "\n  caused by: {cause}"))
    }
}

/// Turns errors into failures where a message of one's own would add nothing.
macro_rules! from_errors {
    ($($error:ty),* $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                Failure::from_error(&error)
            }
        }
    )*};
}

from_errors!(
    api::client::ClientError,
    sandbox::StoreError,
    sandbox::ReferenceError,
    sandbox::ConfigError,
    sandbox::writable::WritableError,
    guest::modules::ModulesError,
    guest::initrd::InitrdError,
    crate::snapshot::SnapshotError,
);

impl From<guest::client::ClientError> for Failure {
    fn from(error: guest::client::ClientError) -> Failure {
        Failure::from_error(&error).with_code(error.exit_code())
    }
}

/// Names what was being done when a system call failed.
pub fn doing<T>(result: std::io::Result<T>, what: impl FnOnce() -> String) -> Outcome<T> {
    result.map_err(|e| Failure::because(what(), &e))
}
