//! What goes wrong with a snapshot directory, in the words of the person who owns it.

use std::{io, path::PathBuf};

/// Why a snapshot was not written, read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done, as a sentence: `X cannot be written`.
        what: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file of the directory does not say what it must.
    #[error("Snapshot {} is damaged: {file}: {reason}", path.display())]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// The file in it.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The format is too old or too new.
    #[error(
        "Snapshot {} has format {found}; this build reads {oldest} to {newest}, so use a nacelle that \
         reads it", path.display()
    )]
    Version {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// Oldest format read here.
        oldest: u32,
        /// Newest format read here.
        newest: u32,
    },
    /// The snapshot uses something that this build does not know.
    #[error("Snapshot {} needs {name:?}, which this build does not have; a newer nacelle may", path.display())]
    Lacks {
        /// The directory.
        path: PathBuf,
        /// Name of what is lacking.
        name: String,
    },
    /// The destination is taken.
    #[error("{} exists already; choose another directory or ask to replace it", path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// A directory holds no snapshot.
    #[error("{} is no snapshot: it has no file {}", path.display(), super::manifest::FILE)]
    NotASnapshot {
        /// The directory.
        path: PathBuf,
    },
    /// The destination is what the machine runs from.
    #[error("{} is what the machine runs from and cannot be replaced; choose another directory", path.display())]
    InUse {
        /// The destination.
        path: PathBuf,
    },
    /// A parent of a diff, or a store, is not where it should be, or is another one.
    #[error("Snapshot {} needs {needed}, which {reason}", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
        /// What it needs, for example `its parent 0123...`.
        needed: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Two snapshots do not fit together.
    #[error("Snapshots {} and {} do not fit: {reason}", one.display(), other.display())]
    Unlike {
        /// One directory.
        one: PathBuf,
        /// The other.
        other: PathBuf,
        /// What differs.
        reason: String,
    },
    /// The caller asked for what cannot be.
    #[error("{0}")]
    Request(String),
    /// The watcher said stop.
    #[error("Stopped as asked; nothing was written")]
    Cancelled,
}

/// Names what was being done when a system call failed.
pub(crate) fn doing<T, E: Into<io::Error>>(
    result: Result<T, E>,
    what: impl FnOnce() -> String,
) -> Result<T, SnapshotError> {
    result.map_err(|e| SnapshotError::Io { what: what(), source: e.into() })
}
