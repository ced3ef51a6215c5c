//! Why the store refused.

use std::path::PathBuf;

/// A failed store operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the file open.
    #[error("{path} is in use by another process{holder}: stop it first")]
    Locked {
        /// The store's file.
        path: PathBuf,
        /// ` (pid N)` when known.
        holder: String,
    },
    /// The file is not one of ours, or damaged.
    #[error("{path} is not a usable isopod store: {reason}; move it away or restore a backup")]
    Foreign {
        /// The store's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file operation failed.
    #[error("cannot {operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// SQLite reported an error.
    #[error("cannot {operation} the store")]
    Sqlite {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The linked SQLite is too old to be trusted with our data.
    #[error("SQLite {found} is linked, {needed} or later is needed")]
    Version {
        /// The linked version.
        found: String,
        /// The oldest good one.
        needed: &'static str,
    },
    /// An address of etcd is bad, or what is behind it.
    #[error("etcd at \"{endpoint}\": {reason}")]
    Endpoint {
        /// The address as it was given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A compare of a commit did not hold.
    #[error("the key changed: expected revision {expected}, found {found}")]
    Conflict {
        /// Index of the operation in the batch.
        index: usize,
        /// Expected modification revision, 0 for absent.
        expected: u64,
        /// The stored one, 0 for absent.
        found: u64,
    },
    /// The batch could not be written; nothing of it was.
    #[error("cannot write to the store: {reason}")]
    Write {
        /// The whole chain of what went wrong.
        reason: String,
    },
    /// The store is shut down or its writer failed.
    #[error("the store is closed")]
    Closed,
}
