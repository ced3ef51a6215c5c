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
