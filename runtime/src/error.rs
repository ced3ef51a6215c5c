//! The runtime's error: what failed and on what, the kernel's reason, and a kind a caller can act on.
//!
//! One type for all modules because it travels whole from a container's init to the process that made it.

use std::{fmt, io};

use serde::{Deserialize, Serialize};

use crate::supervisor::protocol::{Failure, FailureKind};

/// Result with the runtime's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The configuration asks for something that cannot be.
    Invalid,
    /// The container, or a path in it, does not exist.
    NotFound,
    /// The operation does not fit the container's state.
    State,
    /// The kernel refused.
    System,
    /// A hook failed, and the container with it.
    Hook,
    /// The program to run does not exist (exit code 127).
    NoExecutable,
    /// The program may not be run (exit code 126).
    NotExecutable,
}

/// An error of the runtime.
#[derive(Debug, Serialize, Deserialize)]
pub struct Error {
    kind: Kind,
    what: String,
    cause: Option<String>,
    errno: Option<i32>,
}

impl Error {
    /// An error without a cause from the kernel.
    pub(crate) fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), cause: None, errno: None }
    }

    /// The configuration is wrong.
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, what)
    }

    /// The container's state does not allow it.
    pub(crate) fn state(what: impl Into<String>) -> Self {
        Self::new(Kind::State, what)
    }

    /// A call failed.
    pub(crate) fn system(what: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        let cause = cause.into();
        Self { kind: Kind::System, what: what.into(), errno: cause.raw_os_error(), cause: Some(text(&cause)) }
    }

    /// No longer than a message may be: names from a hostile configuration are in it.
    #[must_use]
    pub(crate) fn short(mut self) -> Self {
        const LONGEST: usize = 4096;
        if self.what.len() > LONGEST {
            self.what.truncate(self.what.floor_char_boundary(LONGEST));
            self.what.push_str("...");
        }
        self
    }

    /// The same of a hook.
    #[must_use]
    pub(crate) fn of_hook(self) -> Self {
        Self { kind: Kind::Hook, ..self }
    }

    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The kernel's error number, when there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// Puts what was being done in front.
    #[must_use]
    pub(crate) fn within(mut self, what: impl fmt::Display) -> Self {
        self.what = format!("{what}: {}", self.what);
        self
    }

    /// The exit code of a command line that failed with it.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self.kind {
            Kind::NoExecutable => 127,
            Kind::NotExecutable => 126,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Some(cause) => write!(f, "{}: {cause}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            Kind::Invalid | Kind::NoExecutable | Kind::NotExecutable => FailureKind::Invalid,
            Kind::NotFound => FailureKind::NotFound,
            Kind::State => FailureKind::State,
            Kind::System | Kind::Hook => FailureKind::System,
        };
        Self { kind, message: error.to_string() }
    }
}

/// The kernel's words in the lower case other runtimes use ("no such file or directory").
fn text(error: &io::Error) -> String {
    let full = error.to_string();
    let plain = full.split(" (os error").next().unwrap_or(&full);
    let mut chars = plain.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => full,
    }
}

/// Adds what was being done to a failed call.
pub(crate) trait Context<T> {
    /// Names the operation and its object.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::system(what(), e))
    }
}
