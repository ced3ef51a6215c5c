//! Network namespaces pinned by bind mounts, made on threads of their own: this process never forks and never changes the
//! namespace of a thread that others use.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::Handle;

/// Settings of a pod's namespace: it listens to no redirects (its gateway is its only way), may use low ports and ping
/// without privileges.
const SYSCTLS: [(&str, &str); 6] = [
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
];

/// Why a namespace could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("create {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("start a thread for a network namespace")]
    Thread(#[source] io::Error),
    #[error("make a network namespace")]
    Unshare(#[source] nix::Error),
    #[error("mount a network namespace on {path}")]
    Mount { path: PathBuf, source: nix::Error },
    #[error("unmount {path}")]
    Unmount { path: PathBuf, source: nix::Error },
    #[error("open a route socket")]
    Socket(#[source] io::Error),
}

/// Writes a setting of the calling thread's network namespace; one that this kernel does not have is left out.
pub(crate) fn sysctl(name: &str, value: &str) {
    let path = Path::new("/proc/sys").join(name);
    match fs::write(&path, value) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), value, %error, "setting not written"),
    }
}

/// A route socket that lives in a pinned namespace.
pub(crate) async fn enter(path: PathBuf) -> Result<Handle, Error> {
    let runtime = tokio::runtime::Handle::current();
    let entered = tokio::task::spawn_blocking(move || {
        // A thread of its own: no other may find itself in a pod's namespace afterwards.
        let thread = std::thread::Builder::new().name("netns".into()).spawn(move || {
            let file = File::open(&path).map_err(|source| Error::File { path: path.clone(), source })?;
            setns(&file, CloneFlags::CLONE_NEWNET).map_err(Error::Unshare)?;
            route_socket(&runtime)
        });
        thread.map_err(Error::Thread)?.join().unwrap_or_else(|_| Err(Error::Thread(io::ErrorKind::BrokenPipe.into())))
    });
    entered.await.unwrap_or_else(|_| Err(Error::Thread(io::ErrorKind::BrokenPipe.into())))
}

/// Makes a namespace, pins it on `path`, and returns a route socket that lives in it.
pub(crate) async fn create(path: PathBuf) -> Result<Handle, Error> {
    let runtime = tokio::runtime::Handle::current();
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".into())
        .stack_size(128 << 10)
        .spawn(move || {
            let made = create_here(&path, &runtime);
            if made.is_err() {
                // Whatever was half made; the error is told below.
                let _ = unpin(&path);
            }
            // Nobody waits any more: the namespace is found and removed at the next start.
            let _ = done.send(made);
        })
        .map_err(Error::Thread)?;
    result.await.unwrap_or_else(|_| Err(Error::Thread(io::ErrorKind::BrokenPipe.into())))
}

fn create_here(path: &Path, runtime: &tokio::runtime::Handle) -> Result<Handle, Error> {
    File::create(path).map_err(|source| Error::File { path: path.into(), source })?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(Error::Unshare)?;
    pin(Path::new("/proc/thread-self/ns/net"), path)?;
    for (name, value) in SYSCTLS {
        sysctl(name, value);
    }
    route_socket(runtime)
}

/// The socket belongs to the namespace it is opened in, whoever uses it later.
fn route_socket(runtime: &tokio::runtime::Handle) -> Result<Handle, Error> {
    let _entered = runtime.enter();
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    runtime.spawn(connection);
    Ok(handle)
}

fn pin(from: &Path, path: &Path) -> Result<(), Error> {
    mount(Some(from), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|source| Error::Mount { path: path.into(), source })
}

/// Gives a pinned namespace another place.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    File::create(to).map_err(|source| Error::File { path: to.into(), source })?;
    pin(from, to)?;
    unpin(from)
}

/// Lets a namespace go: it lives on only while processes are in it.
pub(crate) fn unpin(path: &Path) -> Result<(), Error> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Not a mount (any more), or not there.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(source) => return Err(Error::Unmount { path: path.into(), source }),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::File { path: path.into(), source: e }),
        _ => Ok(()),
    }
}

/// Whether a namespace is pinned there.
pub(crate) fn is_pinned(path: &Path) -> bool {
    const NSFS: i64 = 0x6e73_6673;
    nix::sys::statfs::statfs(path).is_ok_and(|s| s.filesystem_type().0 == NSFS)
}
