//! The kernel's word that tasks wait for memory: a PSI trigger, where the kernel has it.

use std::{fs::File, io::Write, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Some tasks waiting for 100 ms within two seconds; a window of two seconds needs no privilege.
const TRIGGER: &[u8] = b"some 100000 2000000\0";

/// The trigger; `None` where the kernel keeps no account of pressure.
pub(super) type Stalls = Option<AsyncFd<OwnedFd>>;

/// Sets the trigger for the whole machine.
pub(super) fn memory() -> Stalls {
    let set = || -> std::io::Result<AsyncFd<OwnedFd>> {
        let mut file = File::options().read(true).write(true).open("/proc/pressure/memory")?;
        file.write_all(TRIGGER)?;
        // `register` is unsafe for types that may give another descriptor each time; an open file has one.
        #[allow(deprecated)]
        AsyncFd::with_interest(OwnedFd::from(file), Interest::PRIORITY)
    };
    set()
        .inspect_err(|error| tracing::info!(%error, "no word of memory pressure from the kernel: looking every 10 s"))
        .ok()
}

/// Resolves at the next stall; never without a trigger.
pub(super) async fn next(stalls: &mut Stalls) {
    match stalls {
        Some(fd) => match fd.ready(Interest::PRIORITY).await {
            Ok(mut guard) => guard.clear_ready(),
            Err(error) => {
                tracing::warn!(%error, "memory pressure is not told any more");
                *stalls = None;
            }
        },
        None => std::future::pending().await,
    }
}
