//! The label a program gets when it is executed: an AppArmor profile or an SELinux context.

use std::{io, os::fd::BorrowedFd, path::Path};

use oci_spec::runtime::Process;

use crate::{
    error::{Context, Error, Result},
    root,
};

/// Refuses labels this kernel has no use for, rather than run without the confinement that was asked for.
pub(crate) fn validate(process: &Process) -> Result<()> {
    if label(process.apparmor_profile()).is_some() && !Path::new("/sys/kernel/security/apparmor").exists() {
        return Err(Error::invalid("process.apparmorProfile: this kernel has no AppArmor"));
    }
    if label(process.selinux_label()).is_some() && !Path::new("/sys/fs/selinux/enforce").exists() {
        return Err(Error::invalid("process.selinuxLabel: this kernel has no SELinux"));
    }
    Ok(())
}

/// Refuses a label for the container's file systems where the kernel would ignore it.
pub(crate) fn validate_mount_label(label: &str) -> Result<()> {
    if label.is_empty() || Path::new("/sys/fs/selinux/enforce").exists() {
        return Ok(());
    }
    Err(Error::invalid("linux.mountLabel: this kernel has no SELinux"))
}

fn label(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|t| !t.is_empty() && *t != "unconfined")
}

/// Asks the kernel for the labels at the next exec. `proc` is the host's procfs: one that a container could have covered
/// would swallow the word (CVE-2019-16884, CVE-2025-52881).
pub(crate) fn label_next_exec(process: &Process, proc: BorrowedFd<'_>) -> Result<()> {
    if let Some(profile) = label(process.apparmor_profile()) {
        let word = format!("exec {profile}");
        let written = match root::write_below(proc, "self/attr/apparmor/exec", word.as_bytes()) {
            // Before 5.8 there is only the file that all modules share.
            Err(e) if e.kind() == io::ErrorKind::NotFound => root::write_below(proc, "self/attr/exec", word.as_bytes()),
            other => other,
        };
        written.context(|| format!("process.apparmorProfile {profile:?}"))?;
    }
    if let Some(context) = label(process.selinux_label()) {
        root::write_below(proc, "self/attr/exec", context.as_bytes())
            .context(|| format!("process.selinuxLabel {context:?}"))?;
    }
    Ok(())
}
