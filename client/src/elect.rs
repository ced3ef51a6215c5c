//! Leader election on a Lease: at most one of several processes acts, as upstream's resource lock does it.
//!
//! The clocks of the machines are never compared: a candidate measures, on its own clock, how long it has seen the record
//! unchanged. Who loses the lease stops at once.

use crate::objects::{Objects, is_already_exists, is_conflict};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Which lease, who wants it, and how patient everyone is.
#[derive(Clone, Debug)]
pub struct Election {
    /// The Lease's namespace.
    pub namespace: String,
    /// The Lease's name.
    pub name: String,
    /// This candidate; unique per process.
    pub identity: String,
    /// How long a silent leader is believed.
    pub lease_duration: Duration,
    /// How long a leader tries to renew before it gives up.
    pub renew_deadline: Duration,
    /// The pause between tries.
    pub retry_period: Duration,
}

impl Election {
    /// Upstream's timings for a lease in kube-system.
    pub fn new(name: &str) -> Self {
        Self {
            namespace: "kube-system".into(),
            name: name.into(),
            identity: format!("{}_{:016x}", crate::record::host(), rand::random::<u64>()),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }

    /// Waits until this candidate leads; the token is cancelled when it no longer does. `None` when stopped before.
    pub async fn lead(self, objects: Objects, stop: CancellationToken) -> Option<CancellationToken> {
        let mut seen: Option<(LeaseSpec, Instant)> = None;
        loop {
            match self.attempt(&objects, &mut seen).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => tracing::debug!(lease = self.name, %error, "election attempt failed"),
            }
            tokio::select! {
                // Cancel-safe: only waits.
                () = tokio::time::sleep(self.retry_period) => {}
                () = stop.cancelled() => return None,
            }
        }
        tracing::info!(lease = self.name, identity = self.identity, "leading");
        let leading = stop.child_token();
        let held = leading.clone();
        tokio::spawn(async move { self.hold(objects, seen, stop, held).await });
        Some(leading)
    }

    async fn hold(
        self,
        objects: Objects,
        mut seen: Option<(LeaseSpec, Instant)>,
        stop: CancellationToken,
        held: CancellationToken,
    ) {
        let mut renewed = Instant::now();
        loop {
            tokio::select! {
                // Cancel-safe: only waits.
                () = tokio::time::sleep(self.retry_period) => {}
                () = stop.cancelled() => return self.release(&objects).await,
            }
            match tokio::time::timeout(self.retry_period * 2, self.attempt(&objects, &mut seen)).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => break,
                Ok(Err(_)) | Err(_) if renewed.elapsed() < self.renew_deadline => {}
                Ok(Err(_)) | Err(_) => break,
            }
        }
        tracing::warn!(lease = self.name, "lost the lease");
        held.cancel();
    }

    /// One try to take or renew; `false` when someone else leads.
    async fn attempt(&self, objects: &Objects, seen: &mut Option<(LeaseSpec, Instant)>) -> Result<bool, kube::Error> {
        let Some(old) = objects.get::<Lease>(&self.namespace, &self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    namespace: Some(self.namespace.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(None)),
            };
            return match objects.create(&lease).await {
                Ok(_) => Ok(true),
                Err(error) if is_already_exists(&error) => Ok(false),
                Err(error) => Err(error),
            };
        };
        let spec = old.spec.clone().unwrap_or_default();
        if seen.as_ref().is_none_or(|(before, _)| *before != spec) {
            *seen = Some((spec.clone(), Instant::now()));
        }
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        let fresh = seen.as_ref().is_some_and(|(_, at)| at.elapsed() < self.lease_duration);
        if !holder.is_empty() && holder != self.identity && fresh {
            return Ok(false);
        }
        let mut new = old.clone();
        new.spec = Some(self.spec(Some(&spec)));
        match objects.update(&old, &new, "").await {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let mine = before.filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.lease_duration.as_secs()).ok(),
            acquire_time: mine.and_then(|spec| spec.acquire_time.clone()).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if before.is_some() && mine.is_none() { transitions + 1 } else { transitions }),
            ..LeaseSpec::default()
        }
    }

    async fn release(&self, objects: &Objects) {
        let Ok(Some(old)) = objects.get::<Lease>(&self.namespace, &self.name).await else { return };
        let mut new = old.clone();
        if let Some(spec) = new.spec.as_mut().filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity)) {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            if let Err(error) = objects.update(&old, &new, "").await {
                tracing::debug!(%error, "lease not released");
            }
        }
    }
}
