//! What the machine must have before a node can run: each miss is one sentence that says what to do.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};
use isopod_agent::Paths;

/// Everything that is missing, together: nobody likes to learn of problems one at a time.
pub(crate) fn check(paths: &Paths, ports: &[(&str, &str, u16)]) -> Result<PathBuf> {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        bail!("isopod needs root (namespaces, mounts, nftables): run it with sudo");
    }
    if find_in_path("nft").is_none() {
        missing.push("the nft program is not installed: apt-get install nftables".to_owned());
    }
    for wanted in ["overlay", "tmpfs", "proc", "mqueue"] {
        if !has_file_system(wanted) {
            // Most kernels have overlay as a module, which a mount would load only later.
            let _ = Command::new("modprobe").arg(wanted).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        if !has_file_system(wanted) {
            missing.push(format!("the kernel has no {wanted} file system: modprobe {wanted}, or CONFIG for it"));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !mounts.contains(" - cgroup2 ") && !mounts.contains(" - cgroup ") {
        missing.push("no cgroup hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup".to_owned());
    }
    let runtime = runtime_binary();
    if runtime.is_none() {
        missing.push("isopod-runtime is neither beside isopod nor in PATH: run `make install`".to_owned());
    }
    for dir in [paths.etc(), paths.state(), paths.run(), paths.logs()] {
        if let Err(error) = writable(&dir) {
            missing.push(format!("{} is not writable: {error}", dir.display()));
        }
    }
    for (what, option, port) in ports {
        if TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, *port))).is_err() {
            missing.push(format!("port {port} ({what}) is taken: free it or choose another with {option}"));
        }
    }
    match (runtime, missing.as_slice()) {
        (Some(runtime), []) => Ok(runtime),
        (_, [one]) => bail!("{one}"),
        (_, many) => bail!("this machine is not ready:\n  - {}", many.join("\n  - ")),
    }
}

fn has_file_system(wanted: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.split_whitespace().next_back() == Some(wanted))
}

fn writable(dir: &Path) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    let probe = dir.join(format!(".writable-{}", std::process::id()));
    fs::write(&probe, b"")?;
    fs::remove_file(&probe)
}

/// `isopod-runtime` beside this executable, else in PATH.
pub(crate) fn runtime_binary() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("isopod-runtime")));
    beside.filter(|path| path.is_file()).or_else(|| find_in_path("isopod-runtime"))
}

fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Daemons are often started with a PATH that lacks the administrator's directories.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(name)).find(|path| path.is_file())
}
