//! isopod controllers: they bring what exists in line with what was asked for, by API objects alone.
//!
//! One file or folder per controller. Each subscribes to shared watch caches (one watch per kind), keeps a queue of keys
//! and, per key, observes, plans (pure) and applies (idempotent). Nothing polls; what must happen at a time is a timer.
//! The binary that runs this gives a client; leader election is optional.

mod attach;
mod attributes_classes;
mod autoscaler;
mod certificates;
mod cluster_role;
mod context;
mod cron_job;
mod daemon_set;
mod deployment;
mod discovery;
mod disruption;
mod endpoints;
mod expectations;
mod gc;
mod job;
mod load_balancer;
mod local_volumes;
mod namespace;
mod node;
mod ownership;
mod pod_control;
mod pods;
mod policy_types;
mod quota;
mod replica;
mod revisions;
mod root_ca;
mod service_account;
mod service_cidrs;
mod stateful_set;
mod volumes;
mod written;

use context::Context;
use ipnet::IpNet;
use isopod_client::elect::Election;
use isopod_client::record::Flavor;
use isopod_client::{Objects, Recorder};
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::ReplicationController;
pub use policy_types::TypeWarnings;
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
    /// Where the provisioner of the StorageClass `local` has its directories on every node.
    pub local_volumes: String,
    /// The image of isopod itself that every agent has.
    pub image: String,
    /// What admission policies get wrong about types.
    pub type_warnings: TypeWarnings,
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
    endpoints::start(ctx);
    load_balancer::start(ctx);
    service_account::start(ctx);
    service_cidrs::start(ctx);
    root_ca::start(ctx, root_ca);
    policy_types::start(ctx, ctx.config.type_warnings);
    namespace::start(ctx);
    let collector = gc::start(ctx);
    quota::start(ctx, collector);
    daemon_set::start(ctx);
    job::start(ctx);
    stateful_set::start(ctx);
    cron_job::start(ctx);
    disruption::start(ctx);
    cluster_role::start(ctx);
    certificates::start(ctx);
    volumes::start(ctx);
    attributes_classes::start(ctx);
    local_volumes::start(ctx);
    attach::start(ctx);
    autoscaler::start(ctx);
    node::eviction::start(ctx);
    node::pod_gc::start(ctx);
}

#[cfg(test)]
mod tests {
    use super::*;
    use isopod_client::testing::Fake;
    use serde_json::{Value, json};

    fn config(ca: &std::path::Path) -> Config {
        Config {
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
            node_mask: 24,
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            ca_cert: ca.into(),
            ca_key: ca.into(),
            sa_key: ca.into(),
            root_ca: ca.into(),
            leader_elect: false,
            node_grace: Duration::from_secs(50),
            local_volumes: "/volumes".into(),
            image: "isopod".into(),
            type_warnings: |_, _| Vec::new(),
        }
    }

    fn deployment(image: &str) -> Value {
        json!({
            "metadata": {"name": "web", "namespace": "ns"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}}, "template": {
                "metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image}]}}},
        })
    }

    /// Plays the scheduler and the kubelet: every pod runs and is ready at once.
    fn run_pods(fake: &Fake) {
        for pod in fake.list("/api/v1/pods") {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            if pod["status"]["phase"] != "Running" {
                fake.patch(
                    "/api/v1/pods",
                    "ns",
                    name,
                    &json!({"spec": {"nodeName": "n1"}, "status": {
                    "phase": "Running", "podIP": "10.244.0.9", "podIPs": [{"ip": "10.244.0.9"}], "conditions": [
                    {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}),
                );
            }
        }
    }

    fn images(fake: &Fake) -> Vec<String> {
        let pods = fake.list("/api/v1/pods");
        let image = |p: &Value| p.pointer("/spec/containers/0/image").and_then(Value::as_str).map(str::to_owned);
        pods.iter().filter_map(image).collect()
    }

    #[test]
    fn a_deployment_rolls_out_heals_and_moves_to_a_new_template() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let file = tempfile::NamedTempFile::new().unwrap();
            let fake = Fake::default();
            fake.create("/api/v1/namespaces", json!({"metadata": {"name": "ns"}}));
            fake.create("/api/v1/nodes", json!({"metadata": {"name": "n1"}}));
            fake.create(
                "/api/v1/services",
                json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": {
                "clusterIP": "10.96.0.9", "selector": {"app": "web"}, "ports": [{"port": 80, "protocol": "TCP"}]}}),
            );
            let stop = CancellationToken::new();
            let running = tokio::spawn(run(fake.client(), config(file.path()), stop.clone()));
            fake.create("/apis/apps/v1/deployments", deployment("one"));
            let complete = |f: &Fake, image: &str| {
                run_pods(f);
                let d = f.get("/apis/apps/v1/deployments", "ns", "web")?;
                let status = &d["status"];
                (status["availableReplicas"] == 3
                    && status["updatedReplicas"] == 3
                    && status["replicas"] == 3
                    && images(f) == [image, image, image])
                .then_some(d)
            };
            let d = fake.until(|f| complete(f, "one")).await.expect("first rollout");
            assert_eq!(d["metadata"]["annotations"][deployment::plan::REVISION], "1");
            let endpoints = |f: &Fake| {
                let slices = f.list("/apis/discovery.k8s.io/v1/endpointslices");
                slices.first().and_then(|s| s["endpoints"].as_array().map(Vec::len))
            };
            assert!(fake.until(|f| (endpoints(f) == Some(3)).then_some(())).await.is_some());
            let part = |f: &Fake| f.get("/api/v1/nodes", "", "n1")?["spec"]["podCIDR"].as_str().map(str::to_owned);
            assert_eq!(fake.until(part).await.as_deref(), Some("10.244.0.0/24"));
            assert!(fake.until(|f| f.get("/api/v1/serviceaccounts", "ns", "default")).await.is_some());
            assert!(fake.until(|f| f.get("/api/v1/configmaps", "ns", root_ca::NAME)).await.is_some());

            let victim = fake.list("/api/v1/pods")[0]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            fake.delete("/api/v1/pods", "ns", &victim);
            assert!(fake.until(|f| complete(f, "one")).await.is_some(), "a deleted pod is replaced");

            fake.patch(
                "/apis/apps/v1/deployments",
                "ns",
                "web",
                &json!({"metadata": {"generation": 2}, "spec": {
                "template": {"spec": {"containers": [{"name": "c", "image": "two"}]}}}}),
            );
            let d = fake.until(|f| complete(f, "two")).await.expect("second rollout");
            assert_eq!(d["metadata"]["annotations"][deployment::plan::REVISION], "2");
            assert_eq!(fake.list("/apis/apps/v1/replicasets").len(), 2);
            stop.cancel();
            assert!(running.await.unwrap().is_ok());
        });
    }
}
