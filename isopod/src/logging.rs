//! Where log lines go: standard error, or a file while a person watches the progress of `up`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

fn filter() -> EnvFilter {
    EnvFilter::try_from_env("ISOPOD_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,kube_client::client::builder=off,kube_runtime=error"))
}

/// Lines to standard error.
pub(crate) fn to_stderr() {
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter()).with_ansi(ansi).with_writer(std::io::stderr).init();
}

/// Lines to a file, appended.
pub(crate) fn to_file(path: &Path) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let file =
        fs::File::options().create(true).append(true).open(path).with_context(|| format!("open {}", path.display()))?;
    tracing_subscriber::fmt().with_env_filter(filter()).with_ansi(false).with_writer(file).init();
    Ok(())
}
