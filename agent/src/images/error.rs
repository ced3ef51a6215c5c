//! Why an image is not available.

use std::path::{Path, PathBuf};

use super::ImageError;

/// Why an image is not available; [`Error::reason`] is the container's waiting reason.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The name cannot be parsed.
    #[error("Failed to apply default image tag \"{name}\": couldn't parse image name \"{name}\": {why}")]
    InvalidName {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// `imagePullPolicy: Never` and it is not there.
    #[error("Container image \"{0}\" is not present with pull policy of Never")]
    NeverPull(String),
    /// More pulls in a moment than the configuration allows.
    #[error("pull QPS exceeded")]
    Rate,
    /// The registry does not have it.
    #[error("failed to pull image \"{name}\": {name}: not found")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The registry wants (other) credentials.
    #[error(
        "failed to pull image \"{name}\": pull access denied, repository does not exist or may require authorization: {why}"
    )]
    Denied {
        /// The name.
        name: String,
        /// The registry's answer.
        why: String,
    },
    /// A download failed.
    #[error("failed to pull image \"{name}\": {why}")]
    Pull {
        /// The name.
        name: String,
        /// The whole chain of causes.
        why: String,
    },
    /// Content does not match its digest.
    #[error("{what}: digest mismatch: expected {expected}, got {actual}")]
    Digest {
        /// What was read.
        what: String,
        /// Digest it should have.
        expected: String,
        /// Digest it has.
        actual: String,
    },
    /// A layer cannot be unpacked.
    #[error("layer {digest}: {why}")]
    Layer {
        /// The layer.
        digest: String,
        /// What is wrong and where in the layer.
        why: String,
    },
    /// An archive in the image directory is unusable.
    #[error("image archive {path}: {why}")]
    Archive {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A configuration file of the node is unusable.
    #[error("{path}: {why}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The store's disk failed.
    #[error("image store: {what} {path}")]
    Store {
        /// Operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl From<Error> for ImageError {
    fn from(error: Error) -> Self {
        let text = chain(&error);
        match error {
            Error::InvalidName { .. } => ImageError::InvalidImageName(text),
            Error::NeverPull(_) => ImageError::ErrImageNeverPull(text),
            _ => ImageError::ErrImagePull(text),
        }
    }
}

pub(super) fn store_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Store { what, path: path.to_owned(), source }
}

/// An error with all its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
