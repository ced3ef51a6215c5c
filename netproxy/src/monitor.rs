//! Listens for changes of our tables that are not ours.

use std::time::Duration;

use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::{mpsc, watch};

use crate::{
    nft::wire,
    sync::{Input, RETRY, Report},
};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// Somebody who changes one thing often changes more: one verification for all of it.
const SETTLE: Duration = Duration::from_millis(100);

/// Opens the socket that hears of every change in this network namespace.
pub(crate) fn open() -> std::io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    let _ = setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &(8 << 20));
    socket.socket_mut().add_membership(GROUP)?;
    Ok(socket)
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
pub(crate) async fn run(
    mut socket: TokioSocket,
    table: String,
    mut report: watch::Receiver<Report>,
    inputs: mpsc::Sender<Input>,
) {
    loop {
        let failing = report.borrow_and_update().failing_since.is_some();
        // Cancel-safe: a receive that is dropped has taken nothing, the others only wait.
        tokio::select! {
            received = socket.recv_from_full() => {
                let ours = report.borrow().netlink_port;
                let foreign = match received {
                    Ok((datagram, _)) => is_foreign(&datagram, &table, ours),
                    // More news than the buffer holds: some may be of others.
                    Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => true,
                    Err(error) => {
                        tracing::warn!(%error, "changes of nftables by others are not noticed any more");
                        return;
                    }
                };
                if foreign {
                    tokio::time::sleep(SETTLE).await;
                    drain(&mut socket).await;
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

async fn drain(socket: &mut TokioSocket) {
    while let Ok(Ok(_)) = tokio::time::timeout(Duration::ZERO, socket.recv_from_full()).await {}
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
                let mut kernel = Kernel::open(nft::settings()).unwrap();
                kernel.reconcile(&[]).unwrap();
                let socket = open().unwrap();
                let (inputs, mut heard) = mpsc::channel(8);
                let report = Report { netlink_port: kernel.port(), ..Report::default() };
                let (keep, report) = watch::channel(report);
                tokio::spawn(run(socket, "isopod-test".into(), report, inputs));
                // Ours, and another table: no reason to look.
                let mut shadow = Shadow::default();
                shadow.set_service(service("ns", "web", &["10.96.0.9"], &[("p", 80, 0)]));
                kernel.apply(&shadow.flush()).unwrap();
                let nft = |edit: &str| assert!(std::process::Command::new("nft").arg(edit).status().unwrap().success());
                nft("add table ip other");
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
