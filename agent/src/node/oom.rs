//! The kernel's word that the machine had no memory left and killed a process: SystemOOM events of the node.
//!
//! What is killed for its own group's limit is told by its pod.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    sync::Arc,
};

use tokio::io::{Interest, unix::AsyncFd};
use tokio_util::sync::CancellationToken;

use crate::{context::Context, events::Kind};

/// The kernel's log.
const LOG: &str = "/dev/kmsg";

/// Follows the kernel's log until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut log = match open() {
        Ok(log) => log,
        Err(error) => {
            tracing::info!(%error, "{LOG} cannot be read: nobody is told when the machine is out of memory");
            return;
        }
    };
    let mut record = vec![0; 8192];
    loop {
        // Both arms are cancel-safe: what is not read stays in the log.
        let read = tokio::select! {
            () = stop.cancelled() => return,
            read = next(&mut log, &mut record) => read,
        };
        match read {
            Ok(n) => {
                if let Some((process, pid)) = victim(&String::from_utf8_lossy(&record[..n])) {
                    let text = format!("System OOM encountered, victim process: {process}, pid: {pid}");
                    tracing::warn!("{text}");
                    ctx.events.node(&ctx.node_name, Kind::Warning, "SystemOOM", text);
                }
            }
            // The kernel was faster and wrote over what was next: it goes on with what is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) => {
                tracing::warn!(%error, "{LOG}");
                return;
            }
        }
    }
}

/// The log from its end on.
fn open() -> io::Result<AsyncFd<File>> {
    let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(LOG)?;
    file.seek(SeekFrom::End(0))?;
    // `register` is unsafe for types that may give another descriptor each time; an open file has one.
    #[allow(deprecated)]
    AsyncFd::with_interest(file, Interest::READABLE)
}

/// The next record: each read gives one.
async fn next(log: &mut AsyncFd<File>, record: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = log.readable().await?;
        match ready.try_io(|fd| fd.get_ref().read(record)) {
            Ok(read) => return read,
            Err(_not_yet) => {}
        }
    }
}

/// Name and PID of the process in a record of a machine's (not a group's) lack of memory:
/// `3,1,2,-;oom-kill:constraint=CONSTRAINT_NONE,...,global_oom,task_memcg=/,task=stress,pid=42,uid=0`.
fn victim(record: &str) -> Option<(&str, &str)> {
    let (head, text) = record.split_once(";oom-kill:")?;
    // The first number is priority and facility: the kernel's own words have the lowest eight.
    head.split(',').next()?.parse::<u32>().ok().filter(|priority| *priority < 8)?;
    let line = text.lines().next()?;
    let of = |key: &str| line.split(',').find_map(|part| part.strip_prefix(key));
    line.split(',').any(|part| part == "global_oom").then(|| of("task=").zip(of("pid="))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_machine_lacks_is_told() {
        let record = |kind: &str| {
            format!(
                "3,1421,98,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,{kind},task_memcg=/x,task=hog,pid=4711,uid=0\n SUBSYSTEM=x\n"
            )
        };
        assert_eq!(victim(&record("global_oom")), Some(("hog", "4711")));
        assert_eq!(victim(&record("oom_memcg=/pods/a")), None);
        let written_by_somebody = record("global_oom").replacen("3,", "12,", 1);
        assert_eq!(victim(&written_by_somebody), None);
        assert_eq!(victim("6,1,2,-;eth0: link up, global_oom,task=x,pid=1"), None);
    }
}
