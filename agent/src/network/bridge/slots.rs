//! Namespaces with link, address and routes, made ahead of the pods that will have them.

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
};

use super::{Inner, Ranges};
use crate::network::{NetworkError, addresses, links, namespace};

/// Prepared namespaces.
const POOL: usize = 4;
/// File names of prepared namespaces; no UID begins so.
pub(super) const SLOT: &str = ".slot-";

/// A namespace made ahead.
pub(super) struct Slot {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) link: String,
    pub(super) ips: Vec<IpAddr>,
}

impl Inner {
    /// Makes one namespace ready for a pod.
    pub(super) async fn prepare(self: &Arc<Self>) -> Result<Slot, NetworkError> {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let id = format!("{SLOT}{number}");
        let prefix = self.config.paths.link_prefix();
        // A name is at most 15 bytes: `isov` and 8 digits, or `isoXXXXXXv` and 5.
        let digits = 15 - prefix.len() - 1;
        let random = format!("{:016x}", rand::random::<u64>());
        let link = format!("{prefix}v{}", &random[..digits.min(8)]);
        let ips = {
            let mut state = self.state.lock();
            state.making.insert(link.clone());
            state.addresses.allocate(&id)
        };
        let slot = Slot { path: self.netns(&id), id, link, ips: ips.clone().unwrap_or_default() };
        let refused = self.state.lock().gone.remove(&slot.ips);
        if refused {
            self.write_gone().await;
        }
        let made = match ips {
            Ok(_) => self.build(&slot).await,
            Err(error) => Err(error.into()),
        };
        match made {
            Ok(()) => Ok(slot),
            Err(error) => {
                self.discard(slot).await;
                Err(error)
            }
        }
    }

    async fn build(&self, slot: &Slot) -> Result<(), NetworkError> {
        let inside = namespace::create(slot.path.clone()).await?;
        let ns =
            std::fs::File::open(&slot.path).map_err(|e| NetworkError(format!("open {}: {e}", slot.path.display())))?;
        let fd = std::os::fd::AsFd::as_fd(&ns);
        links::add_veth(&self.handle, &slot.link, self.bridge, fd, self.mtu).await?;
        let ranges = self.state.lock().addresses.ranges().to_vec();
        let gateway = |a: &IpAddr| ranges.iter().find(|r| r.contains(a)).map(|r| (*a, addresses::gateway(r)));
        let pairs: Vec<_> = slot.ips.iter().filter_map(gateway).collect();
        links::configure_pod(&inside, &pairs).await?;
        Ok(())
    }

    /// Removes a prepared namespace; a failure leaves a stray for the next start.
    pub(super) async fn discard(&self, slot: Slot) {
        if let Err(error) = self.remove(&slot.path, &slot.link).await {
            tracing::warn!(%error, link = slot.link, "prepared pod network not removed");
        }
        let mut state = self.state.lock();
        state.making.remove(&slot.link);
        state.addresses.release(&slot.id);
    }

    pub(super) async fn remove(&self, path: &std::path::Path, link: &str) -> Result<(), NetworkError> {
        let deleted = self.leaving.delete(&self.handle, link).await;
        namespace::unpin(path)?;
        Ok(deleted?)
    }

    /// Puts a prepared namespace into the pool; gives it back when the ranges changed meanwhile.
    fn shelve(&self, slot: Slot) -> Option<Slot> {
        let mut state = self.state.lock();
        state.making.remove(&slot.link);
        let ranges = state.addresses.ranges();
        if slot.ips.iter().all(|a| ranges.iter().any(|r| r.contains(a))) {
            state.pool.push(slot);
            return None;
        }
        Some(slot)
    }

    /// Whether the pool is full and stays so.
    #[cfg(test)]
    pub(super) fn filled(&self) -> bool {
        !self.filling.load(Ordering::Acquire) && self.state.lock().pool.len() >= POOL
    }

    /// Fills the pool in the background.
    pub(super) fn refill(self: &Arc<Self>) {
        if *self.ranges.borrow() != Ranges::Ready || self.filling.swap(true, Ordering::AcqRel) {
            return;
        }
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            // Nobody else holds it: the network is not used any more.
            while let Some(inner) = weak.upgrade().filter(|i| i.state.lock().pool.len() < POOL) {
                match inner.prepare().await {
                    Ok(slot) => {
                        if let Some(outdated) = inner.shelve(slot) {
                            inner.discard(outdated).await;
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "no pod network prepared ahead");
                        break;
                    }
                }
            }
            if let Some(inner) = weak.upgrade() {
                inner.filling.store(false, Ordering::Release);
            }
        });
    }
}
