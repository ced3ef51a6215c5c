//! Where pods come from: the manifest directory, a URL and the API server.

pub(crate) mod files;
pub(crate) mod mirror;
pub(crate) mod url;

use std::{io, path::Path};

use futures::{Stream, StreamExt};
use inotify::{Inotify, WatchMask};

/// `kubernetes.io/config.source`: `file`, `http` or `api`.
pub(crate) const SOURCE: &str = "kubernetes.io/config.source";
/// `kubernetes.io/config.hash`: what a static pod's UID is.
pub(crate) const HASH: &str = "kubernetes.io/config.hash";
/// `kubernetes.io/config.mirror`: on a mirror pod, the hash of its static pod.
pub(crate) const MIRROR: &str = "kubernetes.io/config.mirror";
/// `kubernetes.io/config.seen`.
pub(crate) const SEEN: &str = "kubernetes.io/config.seen";

/// One item per change of something in a directory.
pub(crate) fn directory_events(dir: &Path) -> io::Result<impl Stream<Item = ()> + Send + use<>> {
    let inotify = Inotify::init()?;
    let mask =
        WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::MOVED_FROM | WatchMask::DELETE | WatchMask::CREATE;
    inotify.watches().add(dir, mask)?;
    let stream = inotify.into_event_stream([0u8; 1024])?;
    Ok(stream.filter_map(|e| async move { e.is_ok().then_some(()) }))
}
