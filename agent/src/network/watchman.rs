//! Hears when somebody removes the pod network's table (`nft flush ruleset`, a firewall that reloads) and has it written
//! again. Chains and elements are never edited by anyone else: only a table that is gone is looked for.

use std::sync::Weak;

use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_NETFILTER};

use super::bridge::Inner;

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// `NFT_MSG_DELTABLE` of the nftables subsystem.
const DELETED: u16 = 10 << 8 | 2;

/// Opens the socket that hears of every change in this network namespace.
pub(crate) fn open() -> std::io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_mut().add_membership(GROUP)?;
    Ok(socket)
}

/// Whether a datagram tells of the end of a table.
fn tells_of_the_end(mut datagram: &[u8], table: &str) -> bool {
    let half =
        |bytes: &[u8], at: usize| bytes.get(at..at + 2).and_then(|b| Some(u16::from_ne_bytes(b.try_into().ok()?)));
    while let Some(len) = datagram.get(..4).and_then(|b| Some(u32::from_ne_bytes(b.try_into().ok()?))) {
        let len = usize::try_from(len).unwrap_or(0);
        let Some(message) = datagram.get(..len).filter(|m| m.len() >= 16) else { return false };
        // Netlink's header, nfnetlink's, then the first attribute: the table's name and a zero.
        let name = half(message, 20).and_then(|n| message.get(24..20 + usize::from(n)));
        if half(message, 4) == Some(DELETED) && name.is_some_and(|n| n.strip_suffix(&[0]) == Some(table.as_bytes())) {
            return true;
        }
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// Runs as long as the network is used.
pub(crate) async fn run(socket: TokioSocket, network: Weak<Inner>, table: String) {
    loop {
        let gone = match socket.recv_from_full().await {
            Ok((datagram, _)) => tells_of_the_end(&datagram, &table),
            // More news than the buffer holds: ours may be among them.
            Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => true,
            Err(error) => {
                tracing::warn!(%error, "it will not be noticed when somebody removes the pod network's rules");
                return;
            }
        };
        let Some(network) = network.upgrade() else { return };
        if gone {
            network.restore_rules().await;
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
    fn only_the_end_of_our_table_counts() {
        let ends = |parts: &[(u16, &str)]| {
            let datagram: Vec<u8> = parts.iter().flat_map(|(kind, table)| message(*kind, table)).collect();
            tells_of_the_end(&datagram, "isopod-hostports")
        };
        assert!(ends(&[(DELETED, "isopod-hostports")]));
        assert!(ends(&[(DELETED, "isopod"), (DELETED - 1, "other"), (DELETED, "isopod-hostports")]));
        assert!(!ends(&[(DELETED, "isopod"), (DELETED + 10, "isopod-hostports")]));
        assert!(!tells_of_the_end(&[40, 0, 0, 0, 1], "isopod-hostports"));
    }
}
