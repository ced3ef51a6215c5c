//! Making sandboxes and containers over the socket, and taking them away again.

use std::{fs, sync::Arc, time::Duration};

use isopod_runtime::supervisor::protocol::{Op, Rootfs};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::{
    convert,
    store::{self, ContainerNote, Made, MadeContainer, SandboxNote},
    view::{self, Container},
};
use crate::{
    context::Context,
    devices::Injection,
    grpc::proto::cri::{ContainerConfig, PodSandboxConfig},
    pods::{
        exec, new_id,
        sandbox::{self, HANDLERS, Live},
        start,
        state::now,
    },
    runtime::Supervisor,
    spec,
    volumes::mounts,
};

/// How long a killed container may take to be gone.
const KILL: Duration = Duration::from_secs(10);

fn internal(e: impl std::fmt::Display) -> Status {
    Status::internal(e.to_string())
}

/// Only what was made over the socket is changed over it.
fn own(foreign: bool, what: &str, id: &str) -> Result<(), Status> {
    let refused = || Status::failed_precondition(format!("{what} {id} is of a pod that the node agent runs"));
    foreign.then_some(()).ok_or_else(refused)
}

/// Makes a sandbox; its id.
pub(super) async fn run_sandbox(
    ctx: &Arc<Context>,
    config: PodSandboxConfig,
    handler: String,
) -> Result<String, Status> {
    if !handler.is_empty() && !HANDLERS.contains(&handler.as_str()) {
        return Err(Status::invalid_argument(format!("no runtime for {handler:?} is configured")));
    }
    let id = new_id();
    let pod = Arc::new(convert::pod(&id, &config)?);
    ctx.cri.begin(&id, &config).map_err(internal)?;
    let parent = convert::parent(&config).map_or_else(|| format!("{}/cri", ctx.cgroups.root()), str::to_owned);
    let (events, receiver) = mpsc::unbounded_channel();
    if !config.log_directory.is_empty() {
        fs::create_dir_all(&config.log_directory).map_err(internal)?;
    }
    match sandbox::create_in(ctx, &pod, 0, events, Some(&parent)).await {
        Ok(live) => {
            let note = SandboxNote { handler, created_at: now(), ready: true, sandbox: live.sandbox.clone() };
            ctx.cri.insert(&id, Made { config, pod, note, live: Some(live), containers: Default::default() });
            store::follow(ctx, &id, receiver);
            Ok(id)
        }
        Err(error) => {
            clear(ctx, &id, None, Some(&format!("{parent}/{id}"))).await.ok();
            ctx.cri.remove(&id).ok();
            Err(internal(format!("failed to create pod sandbox: {error}")))
        }
    }
}

/// Takes down what a sandbox has of the machine.
pub(super) async fn clear(
    ctx: &Arc<Context>,
    id: &str,
    supervisor: Option<&Supervisor>,
    cgroup: Option<&str>,
) -> Result<(), Status> {
    sandbox::remove(ctx, id, supervisor, cgroup).await.map_err(internal)
}

/// The id of a sandbox made here; `None` when there is none (any more).
fn find(ctx: &Context, id: &str) -> Result<Option<String>, Status> {
    let found = match view::sandbox(ctx, id) {
        Ok(group) => group.sandbox.id,
        Err(e) if e.code() == tonic::Code::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let foreign = ctx.cri.with(&found, |_| ()).is_some();
    own(foreign, "pod sandbox", &found).map(|()| Some(found))
}

/// Ends all that runs in a sandbox and gives its network back.
pub(super) async fn stop_sandbox(ctx: &Arc<Context>, id: &str) -> Result<(), Status> {
    let Some(id) = find(ctx, id)? else { return Ok(()) };
    let group = view::sandbox(ctx, &id)?;
    for c in group.containers.iter().filter(|c| c.running().is_ok()) {
        stop(ctx, c, Duration::ZERO).await?;
    }
    let taken = ctx.cri.with(&id, |m| (m.live.take(), m.note.ready, m.note.sandbox.cgroup.clone()));
    let Some((live, ready, cgroup)) = taken else { return Ok(()) };
    if !ready && live.is_none() {
        return Ok(());
    }
    let done = clear(ctx, &id, live.as_ref().map(|l| &l.supervisor), Some(&cgroup)).await;
    ctx.cri.with(&id, |m| m.note.ready = false);
    ctx.cri.save_sandbox(&id);
    done
}

/// Forgets a sandbox, stopping it first.
pub(super) async fn remove_sandbox(ctx: &Arc<Context>, id: &str) -> Result<(), Status> {
    let Some(id) = find(ctx, id)? else { return Ok(()) };
    stop_sandbox(ctx, &id).await?;
    sandbox::remove_data(&ctx.config.paths.pod(&id), true).map_err(internal)?;
    ctx.cri.remove(&id).map_err(internal)
}

/// Makes a container in a sandbox; its id.
pub(super) async fn create_container(
    ctx: &Arc<Context>,
    sandbox: &str,
    config: ContainerConfig,
) -> Result<String, Status> {
    let gone = || Status::not_found(format!("pod sandbox {sandbox:?} not found"));
    let sandbox = find(ctx, sandbox)?.ok_or_else(gone)?;
    let found = ctx.cri.with(&sandbox, |m| {
        let meta = config.metadata.clone().unwrap_or_default();
        let taken = m.containers.values().any(|c| c.config.metadata.as_ref() == Some(&meta));
        (m.live.clone(), m.pod.clone(), m.config.log_directory.clone(), meta, taken)
    });
    let (live, pod, logs, meta, taken) = found.ok_or_else(gone)?;
    let live = live.ok_or_else(|| Status::failed_precondition(format!("pod sandbox {sandbox} is not ready")))?;
    if taken {
        return Err(Status::already_exists(format!("container {} of attempt {}", meta.name, meta.attempt)));
    }
    let id = new_id();
    let bundle = exec::bundle(&ctx.config.paths, &sandbox, &meta.name, meta.attempt);
    mounts::remove_tree(&bundle).map_err(internal)?;
    for dir in ["upper", "work", "bundle"] {
        fs::create_dir_all(bundle.join(dir)).map_err(internal)?;
    }
    let log_path = match (logs.as_str(), config.log_path.as_str()) {
        ("", _) | (_, "") => None,
        (dir, file) => Some(std::path::Path::new(dir).join(file)),
    };
    if let Some(parent) = log_path.as_ref().and_then(|p| p.parent()) {
        fs::create_dir_all(parent).map_err(internal)?;
    }
    let (op, mut note) = prepare(ctx, &live, &pod, &config, &id, &bundle, log_path.clone())?;
    note.log_path = log_path.unwrap_or_default();
    if let Err(e) = live.supervisor.done(op).await {
        live.supervisor.done(Op::Delete { container: id }).await.ok();
        mounts::remove_tree(&bundle).ok();
        return Err(internal(format!("failed to create container: {e}")));
    }
    ctx.cri.insert_container(&sandbox, &id, MadeContainer::new(config, note)).map_err(internal)?;
    Ok(id)
}

/// The container's document, written, and what the supervisor is asked.
fn prepare(
    ctx: &Arc<Context>,
    live: &Live,
    pod: &k8s_openapi::api::core::v1::Pod,
    config: &ContainerConfig,
    id: &str,
    bundle: &std::path::Path,
    log_path: Option<std::path::PathBuf>,
) -> Result<(Op, ContainerNote), Status> {
    let wanted = config.image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
    let image = ctx.images.find(&wanted).map_err(internal)?;
    let image = image.ok_or_else(|| Status::not_found(format!("image {wanted:?} not found")))?;
    let (pod, container) = convert::container(pod, config)?;
    let devices = Injection::from_cri(config).resolved().map_err(Status::invalid_argument)?;
    let mut mounts = convert::mounts(config)?;
    start::bind_names(ctx, &pod, &mut mounts);
    mounts.extend(devices.binds());
    let mut document = spec::build(&spec::Inputs {
        env: devices.variables().chain(convert::variables(config)).collect(),
        mounts,
        ..start::inputs(ctx, live, &pod, &container, &image, id)
    })
    .map_err(Status::invalid_argument)?;
    if let Some(r) = config.linux.as_ref().and_then(|l| l.resources.as_ref()) {
        let devices = document["linux"]["resources"]["devices"].take();
        document["linux"]["resources"] = convert::resources(r);
        document["linux"]["resources"]["devices"] = devices;
        document["process"]["oomScoreAdj"] = r.oom_score_adj.into();
    }
    devices.apply(&mut document).map_err(Status::invalid_argument)?;
    let text = serde_json::to_vec(&document).map_err(internal)?;
    fs::write(bundle.join("bundle/config.json"), text).map_err(internal)?;
    let image_signal = image.config.config().as_ref().and_then(|c| c.stop_signal().clone());
    let signal = convert::signal(config.stop_signal).map(str::to_owned).or(image_signal);
    let user = &document["process"]["user"];
    let number = |key: &str| user[key].as_i64().unwrap_or(0);
    let groups = user["additionalGids"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_i64);
    let note = ContainerNote {
        image_id: image.id.clone(),
        image_ref: image.digest_reference.clone(),
        created_at: now(),
        bundle: bundle.into(),
        stop_signal: signal.and_then(|s| spec::signal_number(&s)).unwrap_or(libc::SIGTERM),
        user: (number("uid"), number("gid"), groups.collect()),
        ..ContainerNote::default()
    };
    let op = Op::Create {
        container: id.into(),
        bundle: bundle.join("bundle"),
        rootfs: Rootfs::Overlay { lower: image.layers.clone(), upper: bundle.join("upper"), work: bundle.join("work") },
        log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        pid_of: target(config),
    };
    Ok((op, note))
}

/// The container whose processes this one shall see.
fn target(config: &ContainerConfig) -> Option<String> {
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    let options = security.namespace_options.as_ref()?;
    let wanted = options.pid() == crate::grpc::proto::cri::NamespaceMode::Target;
    wanted.then(|| options.target_id.clone())
}

/// Runs a container that was made.
pub(super) async fn start_container(ctx: &Arc<Context>, id: &str) -> Result<(), Status> {
    let c = view::container(ctx, id)?;
    own(c.foreign, "container", &c.id)?;
    let supervisor = c.supervisor.as_ref();
    let supervisor = supervisor.ok_or_else(|| Status::failed_precondition("the container's sandbox is not ready"))?;
    let (_, started_at) = supervisor.start(&c.id).await.map_err(internal)?;
    ctx.cri.with_container(&c.sandbox, &c.id, |made| made.note.started_at = made.note.started_at.max(started_at));
    Ok(())
}

async fn gone(mut ended: watch::Receiver<Option<i32>>, within: Duration) -> bool {
    tokio::time::timeout(within, ended.wait_for(Option::is_some)).await.is_ok()
}

/// Asks a container to end and kills it when it has not in time. Also one of the agent's: it counts as a death of its own.
pub(super) async fn stop(ctx: &Context, c: &Container, grace: Duration) -> Result<(), Status> {
    let Ok(supervisor) = c.running() else { return Ok(()) };
    let signal = ctx.cri.with_container(&c.sandbox, &c.id, |made| made.note.stop_signal).unwrap_or(libc::SIGTERM);
    if !grace.is_zero() {
        supervisor.kill(&c.id, signal, false).await.map_err(internal)?;
        if gone(c.ended.clone(), grace).await {
            return Ok(());
        }
    }
    supervisor.kill(&c.id, libc::SIGKILL, true).await.map_err(internal)?;
    match gone(c.ended.clone(), KILL).await {
        true => Ok(()),
        false => Err(Status::deadline_exceeded(format!("container {} does not die", c.id))),
    }
}

/// Forgets a container, killing it first.
pub(super) async fn remove_container(ctx: &Arc<Context>, id: &str) -> Result<(), Status> {
    let c = match view::container(ctx, id) {
        Err(e) if e.code() == tonic::Code::NotFound => return Ok(()),
        other => other?,
    };
    own(c.foreign, "container", &c.id)?;
    stop(ctx, &c, Duration::ZERO).await?;
    if let Some(supervisor) = &c.supervisor {
        supervisor.done(Op::Delete { container: c.id.clone() }).await.map_err(internal)?;
    }
    mounts::remove_tree(&c.bundle).map_err(internal)?;
    ctx.cri.remove_container(&c.sandbox, &c.id);
    Ok(())
}
