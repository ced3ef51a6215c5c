//! The node as a service of the machine: the unit that `make install` puts in place, asked for through systemctl.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};
use isopod_agent::Paths;

/// The unit's name.
pub(crate) const UNIT: &str = "isopod";
const FILES: [&str; 3] = ["/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"];

/// Whether systemd can run the node of this root.
pub(crate) fn check(paths: &Paths) -> Result<()> {
    if paths.root() != Path::new("/") {
        bail!("--detach is for the machine's own node, not for one under --root-dir");
    }
    if !booted() {
        bail!("--detach needs systemd, which does not run here: leave it out and `isopod up` stays in the foreground");
    }
    if !FILES.iter().any(|dir| Path::new(dir).join("isopod.service").exists()) {
        bail!("the unit isopod.service is not installed: run `make install`");
    }
    Ok(())
}

/// Starts the unit, now and at every boot.
pub(crate) fn enable() -> Result<()> {
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", UNIT])?;
    // One that runs already takes the new settings.
    systemctl(&["restart", UNIT])
}

/// Stops the unit and forgets it at boot; it may not exist.
pub(crate) fn disable(paths: &Paths) {
    if check(paths).is_ok()
        && let Err(error) = systemctl(&["disable", "--now", UNIT])
    {
        eprintln!("isopod: {error:#}");
    }
}

/// As sd_booted(3).
fn booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn systemctl(args: &[&str]) -> Result<()> {
    let output = Command::new("systemctl").arg("--quiet").args(args).output().context("run systemctl")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("systemctl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())
}
