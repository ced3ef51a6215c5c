//! What a person sees when something fails, and the exit code a script sees.

use std::process::ExitCode;

/// The command line or a file given by the user is wrong: exit code 64 (`EX_USAGE`).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// 64 for bad input, 1 for everything else.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(|cause| cause.is::<Usage>()) { ExitCode::from(64) } else { ExitCode::FAILURE }
}
