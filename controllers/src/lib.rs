//! isopod controllers: they bring what exists in line with what was asked for, by API objects alone.
//!
//! One file or folder per controller. Each subscribes to shared watch caches (one watch per kind), keeps a queue of keys
//! and, per key, observes, plans (pure) and applies (idempotent). Nothing polls; what must happen at a time is a timer.
//! The binary that runs this gives a client; leader election is optional.

mod context;
mod daemon_set;
mod deployment;
mod discovery;
mod endpoints;
mod expectations;
mod gc;
mod namespace;
mod node;
mod ownership;
mod pod_control;
mod pods;
mod replica;
mod revisions;
mod root_ca;
mod service_account;
mod written;

use context::Context;
use ipnet::IpNet;
use isopod_client::elect::Election;
use isopod_client::record::Flavor;
use isopod_client::{Objects, Recorder};
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::ReplicationController;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How the controllers run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The network all pods are in; nodes get parts of it.
    pub cluster_cidr: IpNet,
    /// The size of a node's part.
    pub node_mask: u8,
    /// The network of Services' addresses.
    pub service_cidr: IpNet,
    /// The CA that signs certificate requests.
    pub ca_cert: PathBuf,
    /// Its key.
    pub ca_key: PathBuf,
    /// The key that signs service account tokens.
    pub sa_key: PathBuf,
    /// The CA that pods trust, published in every namespace.
    pub root_ca: PathBuf,
    /// Act only while holding the lease `kube-system/kube-controller-manager`.
    pub leader_elect: bool,
    /// How long a silent node counts as healthy.
    pub node_grace: Duration,
}

/// Why the controllers ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process leads now.
    #[error("lost the leader lease kube-system/kube-controller-manager")]
    LeaseLost,
    /// A file named in the configuration cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Runs all controllers until `stop`.
pub async fn run(client: kube::Client, config: Config, stop: CancellationToken) -> Result<(), Error> {
    let read =
        |path: &PathBuf| std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.clone(), source });
    let root_ca = read(&config.root_ca)?;
    let objects = Objects::new(client, "kube-controller-manager");
    let leading = if config.leader_elect {
        let election = Election::new("kube-controller-manager");
        match election.lead(objects.clone(), stop.clone()).await {
            Some(leading) => leading,
            None => return Ok(()),
        }
    } else {
        stop.child_token()
    };
    let recorder = Recorder::start(objects.clone(), Flavor::Core, "kube-controller-manager", leading.clone());
    let ctx = Arc::new(Context::new(objects, recorder, config, leading.clone()));
    ctx.start_caches();
    tokio::select! {
        // Cancel-safe: only waits.
        () = ctx.synced() => {}
        () = leading.cancelled() => return ended(&stop),
    }
    start(&ctx, root_ca);
    leading.cancelled().await;
    ended(&stop)
}

fn ended(stop: &CancellationToken) -> Result<(), Error> {
    if stop.is_cancelled() { Ok(()) } else { Err(Error::LeaseLost) }
}

/// Every controller subscribes once all caches are complete, so none plans from half a picture.
fn start(ctx: &Arc<Context>, root_ca: String) {
    node::ipam::start(ctx);
    node::lifecycle::start(ctx);
    replica::start::<ReplicaSet>(ctx);
    replica::start::<ReplicationController>(ctx);
    deployment::start(ctx);
    endpoints::slices::start(ctx);
    endpoints::legacy::start(ctx);
    endpoints::mirror::start(ctx);
    service_account::start(ctx);
    root_ca::start(ctx, root_ca);
    namespace::start(ctx);
    gc::start(ctx);
    daemon_set::start(ctx);
    node::eviction::start(ctx);
    node::pod_gc::start(ctx);
}
