//! NFS volumes, mounted by the machine's own `mount` and its helper, as the kubelet does it.
//!
//! A server may be away for as long as it likes. What would wait for it is done by processes and threads that nobody
//! needs back: a thread of the runtime that hangs in the kernel would be missing, and the agent could not end.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, mpsc},
    time::Duration,
};

use k8s_openapi::api::core::v1::{NFSVolumeSource, Pod};
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::UnmountFlags,
    process::{Pid, Signal, kill_process_group},
};
use tokio::{process::Command, sync::watch, time::Instant};

use super::mounts;

/// How long a server may take to answer a mount; then the pod is told and it is tried again.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// How long one that is only asked whether it is there may take.
const PROBE: Duration = Duration::from_secs(10);
/// What processes get to end after they were killed, before their server is suspected.
const MOMENT: Duration = Duration::from_secs(5);

/// Mounts an export at `target`; one that is mounted there stays. Given up when the pod is deleted.
pub(super) async fn mount(
    target: &Path,
    source: &NFSVolumeSource,
    options: &[String],
    mut pods: watch::Receiver<Arc<Pod>>,
) -> Result<(), String> {
    let deleted = pods.wait_for(|pod| pod.metadata.deletion_timestamp.is_some());
    // Both only wait; a mount that is given up is killed.
    tokio::select! {
        mounted = mount_by("mount", target, source, options, ANSWER) => mounted,
        Ok(_) = deleted => Err("the pod is being deleted".into()),
    }
}

/// What `mount` is told.
fn arguments(target: &Path, source: &NFSVolumeSource, options: &[String]) -> Vec<String> {
    let read_only = source.read_only == Some(true);
    let mut options: Vec<&str> = options.iter().map(String::as_str).collect();
    if read_only && !options.contains(&"ro") {
        options.push("ro");
    }
    let server = if source.server.contains(':') { format!("[{}]", source.server) } else { source.server.clone() };
    let mut all = vec!["-t".to_owned(), "nfs".to_owned()];
    if !options.is_empty() {
        all.extend(["-o".to_owned(), options.join(",")]);
    }
    all.extend([format!("{server}:{}", source.path), target.display().to_string()]);
    all
}

/// A process and those it started, killed unless it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

async fn mount_by(
    program: &str,
    target: &Path,
    source: &NFSVolumeSource,
    options: &[String],
    patience: Duration,
) -> Result<(), String> {
    if mounts::is_mount(target) {
        return Ok(());
    }
    std::fs::create_dir_all(target).map_err(|e| format!("{}: {e}", target.display()))?;
    let arguments = arguments(target, source, options);
    let failed = |status: &str, output: &str| {
        let arguments = arguments.join(" ");
        format!("mount failed: {status}\nMounting command: mount\nMounting arguments: {arguments}\nOutput: {output}")
    };
    let mut command = Command::new(program);
    command.args(&arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn().map_err(|e| format!("mount failed: {program}: {e}"))?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let Ok(ran) = tokio::time::timeout(patience, child.wait_with_output()).await else {
        let text = format!("the server {} does not answer", source.server);
        return Err(failed(&format!("timed out after {}s", patience.as_secs()), &text));
    };
    group.0 = None;
    let ran = ran.map_err(|e| format!("mount failed: {program}: {e}"))?;
    if ran.status.success() {
        return Ok(());
    }
    let status = ran.status.code().map_or_else(|| ran.status.to_string(), |code| format!("exit status {code}"));
    Err(failed(&status, &String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat())))
}

/// Unmounts at once; what still has to be written is the kernel's business and is not waited for for long.
pub(super) fn detach(place: &Path) -> io::Result<()> {
    let mut command = std::process::Command::new("umount");
    command.args(["-i", "-c", "-l"]).arg(place).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = match command.spawn() {
        Err(_) => return Ok(rustix::mount::unmount(place, UnmountFlags::DETACH)?),
        Ok(child) => child,
    };
    let (done, ended) = mpsc::channel();
    std::thread::Builder::new().name("umount".into()).stack_size(64 << 10).spawn(move || {
        // Nobody may be waiting any more.
        let _ = done.send(child.wait());
    })?;
    match ended.recv_timeout(PROBE) {
        Ok(Ok(status)) if !status.success() => Ok(rustix::mount::unmount(place, UnmountFlags::DETACH)?),
        _ => Ok(()),
    }
}

/// Runs what may wait for a server that is away on a thread that is not missed.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    patience: Duration,
) -> Option<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    let work = move || {
        // Nobody may be waiting any more.
        let _ = done.send(work());
    };
    std::thread::Builder::new().name("volume".into()).stack_size(128 << 10).spawn(work).ok()?;
    tokio::time::timeout(patience, result).await.ok()?.ok()
}

/// Whether there are such volumes below a pod's directory.
pub(crate) fn has(pod_dir: &Path) -> bool {
    pod_dir.join("volumes/kubernetes.io~nfs").exists()
}

/// Sees to it that a pod ends whose processes wait for a server that is away: they cannot even be killed before what they
/// wrote is written, or given up. Ends when nothing of the pod is mounted any more.
pub(crate) async fn let_go(pod_dir: PathBuf, mut deadline: watch::Receiver<Instant>, tell: impl Fn(String) + Send) {
    let dir = pod_dir.join("volumes/kubernetes.io~nfs");
    let mut told = false;
    loop {
        let at = (*deadline.borrow_and_update() + MOMENT).max(Instant::now() + Duration::from_secs(1));
        // Both only wait.
        tokio::select! {
            () = tokio::time::sleep_until(at) => {}
            changed = deadline.changed() => {
                if changed.is_err() {
                    return;
                }
                continue;
            }
        }
        let left = mounts::below(&dir);
        if left.is_empty() {
            return;
        }
        for place in left {
            let asked = place.clone();
            // Its thread comes back when what it waits for is given up below.
            if aside(move || rustix::fs::statfs(&asked).is_ok(), PROBE).await.is_some() {
                continue;
            }
            if !told {
                let volume = place.file_name().unwrap_or_default();
                tell(format!("the server of volume {volume:?} does not answer: what is not written is given up"));
                told = true;
            }
            abandon(&place);
        }
    }
}

/// Has everything that waits for a mount's server fail. The mount stays.
fn abandon(place: &Path) {
    // In use, it is not unmounted; opening it as a place asks the server nothing.
    let held = rustix::fs::openat(CWD, place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    if held.is_ok()
        && let Err(error) = rustix::mount::unmount(place, UnmountFlags::FORCE)
    {
        tracing::debug!(place = %place.display(), %error, "requests to a server were given up");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[tokio::test]
    async fn mount_is_asked_and_its_words_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (program, told, target) = (dir.path().join("mount"), dir.path().join("told"), dir.path().join("v/n"));
        let script = format!(
            "#!/bin/sh\necho \"$@\" > {}\ntest ! -e {0}.no || {{ echo no helper >&2; exit 32; }}\n",
            told.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let source = NFSVolumeSource { server: "fd00::1".into(), path: "/x".into(), read_only: Some(true) };
        let options = ["nfsvers=4.2".to_owned()];
        let program = program.to_str().unwrap();
        mount_by(program, &target, &source, &options, ANSWER).await.unwrap();
        let want = format!("-t nfs -o nfsvers=4.2,ro [fd00::1]:/x {}\n", target.display());
        assert_eq!(fs::read_to_string(&told).unwrap(), want);
        assert!(target.is_dir());
        fs::write(dir.path().join("told.no"), "").unwrap();
        let plain = NFSVolumeSource { server: "10.0.0.1".into(), path: "/x".into(), read_only: None };
        let error = mount_by(program, &target, &plain, &[], ANSWER).await.unwrap_err();
        let want = format!(
            "mount failed: exit status 32\nMounting command: mount\nMounting arguments: -t nfs 10.0.0.1:/x {}\nOutput: no \
             helper\n",
            target.display()
        );
        assert_eq!(error, want);
        let error = mount_by("/nowhere/mount", &target, &plain, &[], ANSWER).await.unwrap_err();
        assert!(error.starts_with("mount failed: /nowhere"), "{error}");
    }

    /// The helper that `mount` starts is gone with it.
    #[tokio::test]
    async fn a_mount_that_takes_too_long_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let (program, helper) = (dir.path().join("mount"), dir.path().join("helper"));
        fs::write(&program, format!("#!/bin/sh\nsleep 1000 &\necho $! > {}\nwait\n", helper.display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let source = NFSVolumeSource { server: "10.0.0.1".into(), path: "/x".into(), read_only: None };
        let wait_for_helper = async {
            while fs::read_to_string(&helper).unwrap_or_default().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let target = dir.path().join("v");
        // As when the pod is deleted meanwhile.
        tokio::select! {
            _ = mount_by(program.to_str().unwrap(), &target, &source, &[], ANSWER) => panic!("it ended"),
            () = wait_for_helper => {}
        }
        let pid: i32 = fs::read_to_string(&helper).unwrap().trim().parse().unwrap();
        let process = Pid::from_raw(pid).unwrap();
        if let Ok(pidfd) = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()) {
            let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut polled, Some(&limit)).unwrap(), 1);
        }
        let error =
            mount_by(program.to_str().unwrap(), &target, &source, &[], Duration::from_secs(1)).await.unwrap_err();
        assert!(error.starts_with("mount failed: timed out after 1s\n"), "{error}");
        assert!(error.ends_with("Output: the server 10.0.0.1 does not answer"), "{error}");
    }
}
