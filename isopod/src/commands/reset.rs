//! `isopod reset`: stops everything and removes all data of this root.

use std::{fs, io, path::Path};

use anyhow::{Context, Result, bail};
use isopod_agent::Paths;

use crate::error::Usage;

/// Options of `reset`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Do it: all cluster data of this root is lost.
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    if !args.yes {
        bail!(Usage(format!("reset removes all data under {}: say --yes to do it", paths.root().display())));
    }
    crate::logging::to_stderr();
    crate::service::disable(paths);
    super::down::stop_everything(paths)?;
    isopod_agent::cleanup(paths).context("remove what the agent left")?;
    let mut failures = Vec::new();
    for dir in [paths.etc(), paths.run(), paths.logs(), paths.root().join("var/log/isopod")] {
        remove(&dir, &mut failures);
    }
    // Archives in the image directory were put there by a person.
    for entry in fs::read_dir(paths.state()).into_iter().flatten().flatten() {
        if entry.path() != paths.images() {
            remove(&entry.path(), &mut failures);
        }
    }
    // Only when no archives are left.
    let _ = fs::remove_dir(paths.images()).and_then(|()| fs::remove_dir(paths.state()));
    if failures.is_empty() {
        eprintln!("isopod: reset");
        return Ok(());
    }
    bail!("some files could not be removed:\n  - {}", failures.join("\n  - "))
}

fn remove(path: &Path, failures: &mut Vec<String>) {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Somebody mounted a file system there: it stays, empty.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy && is_empty(path) => {}
        Err(error) => failures.push(format!("{}: {error}", path.display())),
    }
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}
