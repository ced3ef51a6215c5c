//! Listens for changes of our tables that are not ours.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, watch},
};

use crate::{
    nft::{element::Map, wire},
    sync::{Input, RETRY, Report},
};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// Somebody who changes one thing often changes more: one verification for all of it.
const SETTLE: Duration = Duration::from_millis(25);
/// News that may wait: somebody who flushes a map of a hundred thousand elements makes as many.
const ROOM: usize = 32 << 20;
/// Datagrams taken at once.
const LOT: usize = 100_000;

/// The socket that hears of every change in this network namespace; shut while much of our own would deafen it.
#[derive(Clone)]
pub(crate) struct Ears {
    socket: Arc<Socket>,
    /// Tells others of this process.
    loading: watch::Sender<bool>,
}

impl Ears {
    fn tell(&self, loading: bool) {
        self.loading.send_if_modified(|before| std::mem::replace(before, loading) != loading);
    }

    /// Hears nothing more.
    pub(crate) fn shut(&self) -> io::Result<()> {
        self.tell(true);
        self.socket.drop_membership(GROUP)
    }

    /// Hears everything from now on.
    pub(crate) fn open(&self) -> io::Result<()> {
        self.tell(false);
        self.socket.add_membership(GROUP)
    }
}

/// Opens the socket. While it is shut `loading` is true.
pub(crate) fn open(loading: watch::Sender<bool>) -> io::Result<Ears> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &ROOM);
    let ears = Ears { socket: Arc::new(socket), loading };
    ears.open()?;
    Ok(ears)
}

/// What is to be compared with the model: rules always, and these maps.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    something: bool,
    everything: bool,
    maps: BTreeSet<Map>,
}

impl Heard {
    pub(crate) fn everything() -> Self {
        Self { something: true, everything: true, ..Self::default() }
    }

    #[cfg(test)]
    pub(crate) fn of(maps: &[Map]) -> Self {
        Self { something: true, maps: maps.iter().copied().collect(), ..Self::default() }
    }

    pub(crate) fn is_nothing(&self) -> bool {
        !self.something
    }

    pub(crate) fn is_about(&self, map: Map) -> bool {
        self.everything || self.maps.contains(&map)
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.something |= other.something;
        self.everything |= other.everything;
        self.maps.extend(other.maps);
    }

    /// Takes in a datagram, or that some were lost: those may have told of anything.
    fn take(&mut self, received: io::Result<Vec<u8>>, table: &str, own_port: u32) -> io::Result<()> {
        match received {
            Ok(datagram) => self.read(&datagram, table, own_port),
            Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => self.join(Self::everything()),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Takes in what a datagram tells of foreign changes of our table.
    fn read(&mut self, datagram: &[u8], table: &str, own_port: u32) {
        let about_us = |m: &wire::Received<'_>| {
            m.kind != wire::nft(wire::MSG_NEWGEN) && wire::attribute(m.body, 1).map(wire::text) == Some(table)
        };
        for message in wire::messages(datagram).filter(|m| m.port != own_port && about_us(m)) {
            self.something = true;
            let set = || wire::attribute(message.body, 2).map(wire::text).and_then(Map::named);
            match message.kind & 0xff {
                wire::MSG_NEWSETELEM | wire::MSG_DELSETELEM => self.maps.extend(set()),
                wire::MSG_DELSET => self.everything = true,
                _ => {}
            }
        }
    }
}

/// Asks for a verification after every foreign change, and a moment after every failure.
pub(crate) async fn run(ears: Ears, table: String, mut report: watch::Receiver<Report>, inputs: mpsc::Sender<Input>) {
    #[allow(deprecated, reason = "its unsafe successor asks that the descriptor stays open: it is the socket's own")]
    let socket = match AsyncFd::new(ears.socket) {
        Ok(socket) => socket,
        Err(error) => return tracing::warn!(%error, "changes of nftables by others are not noticed"),
    };
    loop {
        let failing = report.borrow_and_update().failing_since.is_some();
        // Cancel-safe: a receive that is dropped has taken nothing, the others only wait.
        tokio::select! {
            received = receive(&socket) => {
                let ours = report.borrow().netlink_port;
                let mut heard = Heard::default();
                if let Err(error) = heard.take(received, &table, ours) {
                    tracing::warn!(%error, "changes of nftables by others are not noticed any more");
                    return;
                }
                if heard.is_nothing() {
                    continue;
                }
                tokio::time::sleep(SETTLE).await;
                // Until there is nothing more, or for now; a trouble that lasts shows the next time.
                for _ in 0..LOT {
                    if heard.take(socket.get_ref().recv_from_full().map(|(d, _)| d), &table, ours).is_err() {
                        break;
                    }
                }
                if inputs.send(Input::Verify(heard)).await.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep(RETRY), if failing => {
                if inputs.send(Input::Verify(Heard::default())).await.is_err() {
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
                let socket = open(watch::Sender::new(false)).unwrap();
                let mut kernel = Kernel::open(nft::settings(), Some(socket.clone())).unwrap();
                kernel.reconcile(&|_| {}).unwrap();
                let (inputs, mut told) = mpsc::channel(8);
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
                let quiet = tokio::time::timeout(3 * SETTLE, told.recv()).await;
                assert!(quiet.is_err(), "{quiet:?}");
                nft("flush map ip isopod-test unavailable");
                let mut about = async || {
                    let told = tokio::time::timeout(Duration::from_secs(1), told.recv()).await.unwrap();
                    let Some(Input::Verify(heard)) = told else { panic!("{told:?}") };
                    Map::ALL.iter().copied().filter(|m| heard.is_about(*m)).collect::<Vec<_>>()
                };
                assert_eq!(about().await, [Map::Unavailable], "only what was touched is looked at");
                nft("flush chain ip isopod-test nat");
                assert_eq!(about().await, [], "rules alone");
                nft("delete table ip isopod-test");
                assert_eq!(about().await, Map::ALL, "everything is gone");
                drop(keep);
            });
        });
    }
}
