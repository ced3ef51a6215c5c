//! `isopod up`: from nothing to a Ready node, in the foreground or as the system's service.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use isopod_agent::Paths;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::{
    Api,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use tokio_util::sync::CancellationToken;

use super::agent::Node;
use crate::{
    bootstrap, lock,
    node::{Options, Settings},
    preflight,
    progress::{Progress, seconds},
    service,
};

/// How long a start may take before it is called failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// Options of `up`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Let systemd run the node (now and at every boot) and return once it is Ready.
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    node: Options,
}

pub(crate) fn run(paths: &Paths, args: Args) -> Result<()> {
    let mut progress = Progress::new();
    progress.begin("preflight");
    if args.detach {
        service::check(paths)?;
    }
    let cluster = paths.etc().join("cluster.yaml");
    let settings = Settings::resolve(&cluster, args.node)?;
    // A file of the administrator's that is wrong is told before anything is made.
    super::agent::configuration(&paths.config())?;
    let lock = lock::take(&paths.run())?;
    let mut ports = vec![("the agent", "--agent-port", settings.agent_port)];
    if !control_plane_runs(paths) {
        ports.push(("the API server", "--api-port", settings.api_port));
    }
    let runtime = preflight::check(paths, &ports)?;
    settings.remember(&cluster)?;
    let log = paths.root().join("var/log/isopod/agent.log");
    crate::logging::to_file(&log)?;
    progress.done("preflight");
    progress.begin("certificates, kubeconfigs, manifests");
    bootstrap::identities(paths, &settings)?;
    bootstrap::agent_configuration(paths, &settings)?;
    bootstrap::manifests(paths, &settings)?;
    progress.done("certificates, kubeconfigs, manifests");
    if args.detach {
        drop(lock);
        service::enable()?;
        let paths = paths.clone();
        return super::serve(1, |stop| report(progress, paths, settings, stop, Shown::Service));
    }
    let node = Node::new(paths, &settings, runtime, None, None, &[])?;
    let reported = paths.clone();
    let result = super::serve(2, |stop| async move {
        let watch = tokio::spawn(report(progress, reported, settings, stop.clone(), Shown::Foreground(log)));
        let result = node.run(stop.clone()).await;
        stop.cancel();
        watch.await.context("progress task")?.and(result)
    });
    if result.is_ok() {
        eprintln!(
            "\nisopod: the agent has stopped; pods keep running. `isopod up` takes them over again, `isopod down` stops them."
        );
    }
    drop(lock);
    result
}

/// Whether pods of an earlier run are still there, the API server among them.
fn control_plane_runs(paths: &Paths) -> bool {
    std::fs::read_dir(paths.run_pods()).is_ok_and(|mut pods| pods.next().is_some())
}

/// How the node runs, for people.
enum Shown {
    /// In this process, which logs here.
    Foreground(PathBuf),
    /// Under systemd.
    Service,
}

impl Shown {
    fn logs(&self) -> String {
        match self {
            Self::Foreground(log) => log.display().to_string(),
            Self::Service => format!("journalctl -u {}", service::UNIT),
        }
    }

    fn how_it_ends(&self, isopod: &str) -> String {
        match self {
            Self::Foreground(_) => {
                format!("Ctrl-C stops the agent and leaves pods running; `{isopod} down` stops everything.")
            }
            Self::Service => format!(
                "`systemctl restart {}` restarts the agent and leaves pods running; `{isopod} down` stops everything.",
                service::UNIT
            ),
        }
    }
}

/// Tells how the start goes until the node is Ready, then what to try.
async fn report(
    mut progress: Progress,
    paths: Paths,
    settings: Settings,
    stop: CancellationToken,
    shown: Shown,
) -> Result<()> {
    let ready = async {
        progress.begin("API server");
        let client = super::client(&paths.kubeconfig("admin")).await?;
        isopod_agent::wait_for_server(&client).await;
        progress.done("API server answers");
        progress.begin("node");
        wait_for_node(client.clone(), &settings.node_name).await?;
        label_control_plane(client.clone(), &settings.node_name).await?;
        super::token::let_nodes_renew(client).await?;
        progress.done(&format!("node {} is Ready", settings.node_name));
        let total = progress.finish();
        let isopod = if paths.root() == Path::new("/") {
            "isopod".to_owned()
        } else {
            format!("isopod --root-dir {}", paths.root().display())
        };
        eprintln!(
            "\nReady in {}. Logs: {}\n\n  {isopod} kubeconfig > kubeconfig; export KUBECONFIG=$PWD/kubeconfig\n  \
             kubectl get nodes\n  kubectl get pods -A -o wide\n\nkubeconfig: {}\n{}",
            seconds(total),
            shown.logs(),
            paths.kubeconfig("admin").display(),
            shown.how_it_ends(&isopod)
        );
        Ok(())
    };
    // Cancel-safe: waiting changes nothing.
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        result = tokio::time::timeout(PATIENCE, ready) => match result {
            Ok(result) => result,
            Err(_) => {
                stop.cancel();
                bail!("the node is not Ready after {} s; see {} and {}", PATIENCE.as_secs(), shown.logs(), paths.logs().display())
            }
        },
    }
}

async fn wait_for_node(client: kube::Client, name: &str) -> Result<()> {
    let nodes: Api<NodeObject> = Api::all(client);
    let mut events = watcher::watch_object(nodes, name).default_backoff().boxed();
    loop {
        match events.try_next().await {
            Ok(Some(Some(node))) if is_ready(&node) => return Ok(()),
            Ok(Some(_)) => {}
            Ok(None) => bail!("watch of node {name} ended"),
            Err(error) => tracing::debug!(%error, "watch of the node"),
        }
    }
}

/// Gives the node its role. A node may not do this itself, or any machine could pass for the control plane.
async fn label_control_plane(client: kube::Client, name: &str) -> Result<()> {
    let nodes: Api<NodeObject> = Api::all(client);
    let labels = serde_json::json!({ "metadata": { "labels": { "node-role.kubernetes.io/control-plane": "" } } });
    nodes
        .patch(name, &PatchParams::default(), &Patch::Merge(labels))
        .await
        .with_context(|| format!("label node {name} as control plane"))?;
    Ok(())
}

fn is_ready(node: &NodeObject) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}
