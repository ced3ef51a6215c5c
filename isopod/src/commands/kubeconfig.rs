//! `isopod kubeconfig`: prints the administrator's kubeconfig.

use std::fs;

use anyhow::{Context, Result};
use isopod_agent::Paths;

pub(crate) fn run(paths: &Paths) -> Result<()> {
    let path = paths.kubeconfig("admin");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("no administrator's kubeconfig at {}: is there a control plane here? (`isopod up`)", path.display())
    })?;
    print!("{text}");
    Ok(())
}
