//! `isopod remove-volume`.

use std::{fs, io, path::PathBuf};

use anyhow::{Context, Result};

/// What to remove.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume's directory.
    directory: PathBuf,
}

/// Removes the directory; no symlink in it is followed, and one that is gone already is fine.
pub(crate) fn run(args: &Args) -> Result<()> {
    match fs::remove_dir_all(&args.directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", args.directory.display()))
        }
        _ => Ok(()),
    }
}
