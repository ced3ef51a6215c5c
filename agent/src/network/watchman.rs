//! Hears when somebody changes the node's firewall: removes the pod network's table (`nft flush ruleset`, a firewall that
//! reloads), or makes chains of their own that pods' packets have to pass.
//!
//! The kernel writes news of every element that changes as long as anybody listens: while the service proxy loads
//! thousands of them, nobody does, and afterwards everything is looked at.

use std::{sync::Weak, time::Duration};

use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_NETFILTER};
use tokio::{sync::watch, time::Instant};

use super::bridge::Inner;

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// Messages of the nftables subsystem.
const NEW_CHAIN: u16 = 10 << 8 | 3;
const DELETED_RULE: u16 = 10 << 8 | 8;
const DELETED_TABLE: u16 = 10 << 8 | 2;
/// Who changes a firewall changes more than one thing.
const SETTLE: Duration = Duration::from_millis(50);

/// Opens the socket that hears of every change in this network namespace.
pub(crate) fn open() -> std::io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_mut().add_membership(GROUP)?;
    Ok(socket)
}

/// Whether a datagram tells of something that pods' packets may meet: the end of our table, other people's chains and the
/// end of rules in them.
fn matters(mut datagram: &[u8], own: &str) -> bool {
    let half =
        |bytes: &[u8], at: usize| bytes.get(at..at + 2).and_then(|b| Some(u16::from_ne_bytes(b.try_into().ok()?)));
    while let Some(len) = datagram.get(..4).and_then(|b| Some(u32::from_ne_bytes(b.try_into().ok()?))) {
        let len = usize::try_from(len).unwrap_or(0);
        let Some(message) = datagram.get(..len).filter(|m| m.len() >= 16) else { return false };
        // Netlink's header, nfnetlink's, then the first attribute: the table's name and a zero.
        let name = half(message, 20).and_then(|n| message.get(24..20 + usize::from(n)));
        let ours = name.is_some_and(|n| n.strip_suffix(&[0]) == Some(own.as_bytes()));
        match half(message, 4) {
            Some(DELETED_TABLE) if ours => return true,
            Some(NEW_CHAIN | DELETED_RULE) if !ours => return true,
            _ => {}
        }
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// Runs as long as the network is used. `loading` tells while the service proxy loads much.
pub(crate) async fn run(
    mut socket: TokioSocket,
    network: Weak<Inner>,
    table: String,
    mut loading: watch::Receiver<bool>,
) {
    let mut due = None;
    loop {
        // Cancel-safe: a receive that is dropped has taken nothing, the others only wait.
        tokio::select! {
            received = socket.recv_from_full() => match received {
                Ok((datagram, _)) if !matters(&datagram, &table) => {}
                // Or more news than the buffer holds: any of it may matter.
                Ok(_) => due = due.or(Some(Instant::now() + SETTLE)),
                Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => due = due.or(Some(Instant::now() + SETTLE)),
                Err(error) => {
                    tracing::warn!(%error, "changes of the firewall by others are not noticed any more");
                    return;
                }
            },
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                due = None;
                let Some(network) = network.upgrade() else { return };
                network.look_after_rules().await;
            }
            Ok(()) = loading.changed() => {
                let outcome = if *loading.borrow_and_update() {
                    socket.socket_mut().drop_membership(GROUP)
                } else {
                    due = Some(Instant::now());
                    socket.socket_mut().add_membership(GROUP)
                };
                if let Err(error) = outcome {
                    tracing::warn!(%error, "changes of the firewall by others may not be noticed");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, table: &str) -> Vec<u8> {
        let mut attribute = table.as_bytes().to_vec();
        attribute.push(0);
        let mut out = vec![0; 20];
        out.extend_from_slice(&u16::try_from(attribute.len() + 4).unwrap().to_ne_bytes());
        out.extend_from_slice(&1u16.to_ne_bytes());
        out.extend_from_slice(&attribute);
        let len = u32::try_from(out.len()).unwrap();
        out[..4].copy_from_slice(&len.to_ne_bytes());
        out[4..6].copy_from_slice(&kind.to_ne_bytes());
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    #[test]
    fn only_what_packets_may_meet_counts() {
        let counts = |parts: &[(u16, &str)]| {
            let datagram: Vec<u8> = parts.iter().flat_map(|(kind, table)| message(*kind, table)).collect();
            matters(&datagram, "isopod-hostports")
        };
        const NEW_ELEMENT: u16 = 10 << 8 | 12;
        assert!(counts(&[(DELETED_TABLE, "isopod-hostports")]));
        assert!(counts(&[(NEW_ELEMENT, "isopod"), (DELETED_TABLE - 1, "other"), (DELETED_TABLE, "isopod-hostports")]));
        assert!(counts(&[(NEW_CHAIN, "filter")]) && counts(&[(DELETED_RULE, "filter")]));
        assert!(!counts(&[(DELETED_TABLE, "isopod"), (NEW_ELEMENT, "isopod-hostports")]));
        assert!(!counts(&[(NEW_CHAIN, "isopod-hostports"), (DELETED_RULE, "isopod-hostports")]), "our own");
        assert!(!matters(&[40, 0, 0, 0, 1], "isopod-hostports"));
    }
}
