//! Listens for changes of our tables that are not ours.

use std::{io, sync::Arc, time::Duration};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, watch},
};

use crate::{
    nft::wire,
    sync::{Input, RETRY, Report},
};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// Somebody who changes one thing often changes more: one verification for all of it.
const SETTLE: Duration = Duration::from_millis(100);

/// The socket that hears of every change in this network namespace; shut while much of our own would deafen it.
#[derive(Clone)]
pub(crate) struct Ears(Arc<Socket>);

impl Ears {
    /// Hears nothing more.
    pub(crate) fn shut(&self) -> io::Result<()> {
        self.0.drop_membership(GROUP)
    }

    /// Hears everything from now on.
    pub(crate) fn open(&self) -> io::Result<()> {
        self.0.add_membership(GROUP)
    }
}

/// Opens the socket.
pub(crate) fn open() -> io::Result<Ears> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20));
    let ears = Ears(Arc::new(socket));
    ears.open()?;
    Ok(ears)
}

/// Whether a datagram tells of a foreign change of our table.
fn is_foreign(datagram: &[u8], table: &str, own_port: u32) -> bool {
    wire::messages(datagram).any(|m| {
        let about_us =
            m.kind != wire::nft(wire::MSG_NEWGEN) && wire::attribute(m.body, 1).map(wire::text) == Some(table);
        about_us && m.port != own_port
    })
}

/// Asks for a verification after every foreign change, and a moment after every failure.
pub(crate) async fn run(ears: Ears, table: String, mut report: watch::Receiver<Report>, inputs: mpsc::Sender<Input>) {
    #[allow(deprecated, reason = "its unsafe successor asks that the descriptor stays open: it is the socket's own")]
    let socket = match AsyncFd::new(ears.0) {
        Ok(socket) => socket,
        Err(error) => return tracing::warn!(%error, "changes of nftables by others are not noticed"),
    };
    loop {
        let failing = report.borrow_and_update().failing_since.is_some();
        // Cancel-safe: a receive that is dropped has taken nothing, the others only wait.
        tokio::select! {
            received = receive(&socket) => {
                let ours = report.borrow().netlink_port;
                let foreign = match received {
                    Ok(datagram) => is_foreign(&datagram, &table, ours),
                    // More news than the buffer holds: some may be of others.
                    Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => true,
                    Err(error) => {
                        tracing::warn!(%error, "changes of nftables by others are not noticed any more");
                        return;
                    }
                };
                if foreign {
                    tokio::time::sleep(SETTLE).await;
                    while socket.get_ref().recv_from_full().is_ok() {}
                    if inputs.send(Input::Verify).await.is_err() {
                        return;
                    }
                }
            }
            () = tokio::time::sleep(RETRY), if failing => {
                if inputs.send(Input::Verify).await.is_err() {
                    return;
                }
            }
            changed = report.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

async fn receive(socket: &AsyncFd<Arc<Socket>>) -> io::Result<Vec<u8>> {
    loop {
        let mut ready = socket.readable().await?;
        if let Ok(received) = ready.try_io(|s| s.get_ref().recv_from_full()) {
            return received.map(|(datagram, _)| datagram);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{shadow::Shadow, tests::service},
        nft::{kernel::Kernel, tests as nft},
    };

    #[test]
    fn foreign_changes_are_heard_and_own_ones_are_not() {
        nft::in_own_network(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let socket = open().unwrap();
                let mut kernel = Kernel::open(nft::settings(), Some(socket.clone())).unwrap();
                kernel.reconcile(&|_| {}).unwrap();
                let (inputs, mut heard) = mpsc::channel(8);
                let report = Report { netlink_port: kernel.port(), ..Report::default() };
                let (keep, report) = watch::channel(report);
                tokio::spawn(run(socket, "isopod-test".into(), report, inputs));
                assert!(!kernel.take_doubt(), "loading the rules is no change by others");
                // Ours, and another table: no reason to look.
                let mut shadow = Shadow::default();
                shadow.set_service(service("ns", "web", &["10.96.0.9"], &[("p", 80, 0)]));
                kernel.apply(&shadow.flush()).unwrap();
                let nft = |edit: &str| assert!(std::process::Command::new("nft").arg(edit).status().unwrap().success());
                nft("add table ip other");
                // So much that nobody listens meanwhile.
                for n in 0..600 {
                    let ip = format!("10.96.{}.{}", n / 250 + 1, n % 250);
                    shadow.set_service(service("ns", &format!("s{n}"), &[&ip], &[("p", 80, 0)]));
                }
                kernel.apply(&shadow.flush()).unwrap();
                assert!(!kernel.take_doubt());
                let quiet = tokio::time::timeout(3 * SETTLE, heard.recv()).await;
                assert!(quiet.is_err(), "{quiet:?}");
                nft("flush map ip isopod-test unavailable");
                let told = tokio::time::timeout(Duration::from_secs(1), heard.recv()).await.unwrap();
                assert!(matches!(told, Some(Input::Verify)));
                drop(keep);
            });
        });
    }
}
