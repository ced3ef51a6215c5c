//! One start of one container: image, configuration, create, start, postStart hook.
//!
//! Runs as a task of its own; tells the worker by [`Progress`]. Starts of one batch prepare side by side and run in
//! order: each waits for the one before it to have finished its postStart hook.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use isopod_runtime::supervisor::protocol::{Op, Rootfs};
use k8s_openapi::api::core::v1::{Container, Pod, ServiceAccount};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{
    exec, hooks,
    sandbox::{self, Live},
    state::{Ended, Instance, now},
};
use crate::{
    config::format_duration,
    context::Context,
    events::Kind,
    images::{Account, DockerConfig, ImageError, ImageHandle, Owner, PullPolicy},
    objects::{ObjectKind, ObjectRef},
    probes,
    spec::{self, BindMount, env, field::Addresses},
    tokens::{self, Wish},
    volumes::{self, Mounted},
};

/// What a container can be started in.
#[derive(Clone)]
pub(crate) struct Prepared {
    pub(crate) live: Live,
    pub(crate) mounted: Arc<Mounted>,
}

/// What a start tells.
#[derive(Debug)]
pub(crate) enum Progress {
    /// The image is there.
    Image { took: Duration },
    /// The process runs; hooks are still to come.
    Running { name: String, instance: Box<Instance>, took: Duration },
    /// The postStart hook is done (or there is none).
    Started { name: String, id: String },
    /// The postStart hook failed: the container is to be stopped.
    HookFailed { name: String, id: String, message: String },
    /// It did not come to a process.
    Failed { name: String, reason: &'static str, message: String, ended: Option<Box<Instance>> },
    /// The pod ends.
    Cancelled { name: String },
}

/// A start to be done.
pub(crate) struct Job {
    pub(crate) ctx: Arc<Context>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) attempt: u32,
    /// Id of the container whose processes an ephemeral one is to see.
    pub(crate) target: Option<String>,
    pub(crate) prepared: watch::Receiver<Option<Prepared>>,
    /// Resolves (either way) when the start before this one is done.
    pub(crate) turn: Option<oneshot::Receiver<()>>,
    /// Dropped when this start is done.
    pub(crate) _done: oneshot::Sender<()>,
    pub(crate) cancel: CancellationToken,
}

struct Failure {
    reason: &'static str,
    message: String,
    ended: Option<Box<Instance>>,
}

impl Failure {
    fn config(message: String) -> Self {
        Self { reason: "CreateContainerConfigError", message, ended: None }
    }
}

enum Stop {
    Failure(Failure),
    Cancelled,
}

impl From<Failure> for Stop {
    fn from(f: Failure) -> Self {
        Self::Failure(f)
    }
}

/// Does it.
pub(crate) async fn run(mut job: Job, report: impl Fn(Progress) + Send + Sync) {
    let name = job.container.name.clone();
    match attempt(&mut job, &report).await {
        Ok(()) => {}
        Err(Stop::Cancelled) => report(Progress::Cancelled { name }),
        Err(Stop::Failure(f)) => {
            report(Progress::Failed { name, reason: f.reason, message: f.message, ended: f.ended });
        }
    }
}

async fn attempt(job: &mut Job, report: &(impl Fn(Progress) + Send + Sync)) -> Result<(), Stop> {
    let begun = Instant::now();
    let image = unless(&job.cancel, image(job)).await??;
    report(Progress::Image { took: begun.elapsed() });
    let prepared = unless(&job.cancel, async {
        let ready = job.prepared.wait_for(Option::is_some).await;
        ready.ok().and_then(|p| p.clone())
    });
    let Some(prepared) = prepared.await? else { return Err(Stop::Cancelled) };
    let created = Instant::now();
    let made = unless(&job.cancel, create(job, &image, &prepared)).await?;
    job.ctx.metrics.operation("create_container", created, made.is_ok());
    let mut instance = made?;
    if let Some(turn) = job.turn.take() {
        let _ = unless(&job.cancel, turn).await?;
    }
    let supervisor = &prepared.live.supervisor;
    let name = job.container.name.clone();
    if let Err(message) = job.ctx.devices.pre_start(&job.pod, &name).await {
        job.ctx.events.container(&job.pod, &name, Kind::Warning, "Failed", format!("Error: {message}"));
        supervisor.done(Op::Delete { container: instance.id.clone() }).await.ok();
        return Err(start_error(instance, message).into());
    }
    let begun = Instant::now();
    let started = supervisor.start(&instance.id).await;
    job.ctx.metrics.operation("start_container", begun, started.is_ok());
    match started {
        Ok((_, started_at)) => instance.started_at = Some(started_at),
        Err(e) => {
            let message = e.to_string();
            job.ctx.events.container(&job.pod, &name, Kind::Warning, "Failed", format!("Error: {message}"));
            supervisor.done(Op::Delete { container: instance.id.clone() }).await.ok();
            return Err(start_error(instance, message).into());
        }
    }
    job.ctx.events.container(&job.pod, &name, Kind::Normal, "Started", "Container started");
    let id = instance.id.clone();
    let took = created.elapsed();
    report(Progress::Running { name: name.clone(), instance: Box::new(instance), took });
    if let Some(hook) = job.container.lifecycle.as_ref().and_then(|l| l.post_start.clone()) {
        let bundle = exec::bundle(&job.ctx.config.paths, sandbox::uid(&job.pod), &name, job.attempt);
        let ip = prepared.live.ips.first().copied();
        let limit = Duration::from_secs(24 * 3600);
        let ran = unless(&job.cancel, hooks::run(&hook, &job.container, &id, supervisor, &bundle, ip, limit)).await?;
        if let Err(message) = ran {
            tracing::info!(container = name, message, "postStart hook failed");
            job.ctx.events.container(&job.pod, &name, Kind::Warning, "FailedPostStartHook", "PostStartHook failed");
            let (pod, namespace) = (sandbox::name(&job.pod), sandbox::namespace(&job.pod));
            let what = hooks::name(&hook);
            let uid = sandbox::uid(&job.pod);
            let message =
                format!("{what} for Container {name:?} in Pod \"{pod}_{namespace}({uid})\" failed - error: {message}");
            report(Progress::HookFailed { name, id, message });
            return Ok(());
        }
    }
    report(Progress::Started { name, id });
    Ok(())
}

/// A container that could not be run counts as ended, so that it is retried with back-off.
fn start_error(mut instance: Instance, message: String) -> Failure {
    instance.started_at = Some(0);
    instance.ended = Some(Ended {
        code: 128,
        signal: None,
        reason: "StartError".into(),
        message: message.clone(),
        finished_at: now(),
    });
    Failure { reason: "RunContainerError", message, ended: Some(Box::new(instance)) }
}

async fn unless<T>(cancel: &CancellationToken, work: impl Future<Output = T>) -> Result<T, Stop> {
    tokio::select! {
        () = cancel.cancelled() => Err(Stop::Cancelled),
        done = work => Ok(done),
    }
}

/// When a registry is asked for an image: as said, else always for `latest` and once for anything else.
pub(crate) fn pull_policy(image: &str, said: Option<&str>) -> PullPolicy {
    match said {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        _ => {
            let last = image.rsplit('/').next().unwrap_or("");
            let latest = !image.contains('@') && (!last.contains(':') || last.ends_with(":latest"));
            if latest { PullPolicy::Always } else { PullPolicy::IfNotPresent }
        }
    }
}

async fn image(job: &Job) -> Result<ImageHandle, Failure> {
    let (ctx, c) = (&job.ctx, &job.container);
    let image = c.image.clone().unwrap_or_default();
    let secrets = pull_secrets(ctx, &job.pod, &image).await;
    let event = |kind, reason: &str, text: String| ctx.events.container(&job.pod, &c.name, kind, reason, text);
    let (events, pod, name, what) = (ctx.events.clone(), job.pod.clone(), c.name.clone(), image.clone());
    let begun = Arc::new(move || {
        events.container(&pod, &name, Kind::Normal, "Pulling", format!("Pulling image {what:?}"));
    });
    let policy = pull_policy(&image, c.image_pull_policy.as_deref());
    let asked = Instant::now();
    let pulled = ctx.images.ensure(&image, policy, secrets, begun).await;
    count_pull(ctx, policy, asked, &pulled);
    match pulled {
        Ok(handle) => {
            let text = match handle.pulled {
                Some(p) => format!(
                    "Successfully pulled image {image:?} in {} ({} including waiting). Image size: {} bytes.",
                    format_duration(p.took),
                    format_duration(p.including_waiting),
                    p.size
                ),
                None => format!("Container image {image:?} already present on machine"),
            };
            event(Kind::Normal, "Pulled", text);
            Ok(handle)
        }
        Err(e) => {
            let (reason, message) = (e.reason(), e.to_string());
            match reason {
                "ErrImageNeverPull" => event(Kind::Warning, "ErrImageNeverPull", message.clone()),
                "InvalidImageName" => event(Kind::Warning, "InspectFailed", message.clone()),
                _ => {
                    // What failed is said once.
                    let why = message.strip_prefix(&format!("failed to pull image {image:?}: ")).unwrap_or(&message);
                    event(Kind::Warning, "Failed", format!("Failed to pull image {image:?}: {why}"));
                }
            }
            event(Kind::Warning, "Failed", format!("Error: {reason}"));
            Err(Failure { reason, message, ended: None })
        }
    }
}

/// Whether a registry was asked, and how that went.
fn count_pull(ctx: &Context, policy: PullPolicy, asked: Instant, got: &Result<ImageHandle, ImageError>) {
    let required = match got {
        Ok(handle) => handle.pulled.is_some(),
        Err(e) => !matches!(e.reason(), "ErrImageNeverPull" | "InvalidImageName"),
    };
    if required {
        ctx.metrics.operation("pull_image", asked, got.is_ok());
    }
    let policy = match policy {
        PullPolicy::Always => "always",
        PullPolicy::IfNotPresent => "ifnotpresent",
        PullPolicy::Never => "never",
    };
    let here = if got.is_ok() && !required { "true" } else { "false" };
    let required = if required { "true" } else { "false" };
    let labels = [("present_locally", here), ("pull_policy", policy), ("pull_required", required)];
    ctx.metrics.count("kubelet_image_manager_ensure_image_requests_total", labels);
}

/// Credentials of the pod's imagePullSecrets; one that is not there is told.
pub(crate) async fn pull_secrets(ctx: &Context, pod: &Pod, image: &str) -> Vec<DockerConfig> {
    let references = pod.spec.as_ref().and_then(|s| s.image_pull_secrets.clone()).unwrap_or_default();
    let mut out = Vec::new();
    for r in references {
        let key = ObjectRef { kind: ObjectKind::Secret, namespace: sandbox::namespace(pod).into(), name: r.name };
        let held = ctx.objects.hold(&key);
        let Ok(Ok(Some(o))) = tokio::time::timeout(Duration::from_secs(10), held.get()).await else {
            let text = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                key.name
            );
            ctx.events.pod(pod, Kind::Warning, "FailedToRetrieveImagePullSecret", text);
            continue;
        };
        let new = o.keys.get(".dockerconfigjson").and_then(|t| DockerConfig::parse(t).ok());
        let old = || o.keys.get(".dockercfg").and_then(|t| DockerConfig::parse_legacy(t).ok());
        out.extend(new.or_else(old));
    }
    out.extend(ctx.providers.of_pod(image, &ForPod { ctx, pod }).await);
    out
}

/// The pod that credentials are asked for.
struct ForPod<'a> {
    ctx: &'a Context,
    pod: &'a Pod,
}

impl Owner for ForPod<'_> {
    fn account(&self) -> BoxFuture<'_, Result<Option<Account>, String>> {
        Box::pin(async {
            let name = self.pod.spec.as_ref().and_then(|s| s.service_account_name.as_deref()).unwrap_or_default();
            let Some(client) = self.ctx.api.get().filter(|_| !name.is_empty()) else { return Ok(None) };
            let namespace = sandbox::namespace(self.pod);
            let accounts: kube::Api<ServiceAccount> = kube::Api::namespaced(client, namespace);
            let found = accounts.get(name).await.map_err(|e| format!("service account {namespace}/{name}: {e}"))?;
            let id = format!("{namespace}/{name}/{}", found.metadata.uid.unwrap_or_default());
            let annotations = found.metadata.annotations.unwrap_or_default();
            Ok(Some(Account { id, pod: sandbox::uid(self.pod).into(), annotations }))
        })
    }

    fn token<'a>(&'a self, audience: &'a str) -> BoxFuture<'a, Result<String, String>> {
        let wish = Wish { audience: Some(audience.to_owned()), seconds: 3600 };
        Box::pin(async move { tokens::request(&self.ctx.api, self.pod, &wish).await.map(|t| t.text) })
    }
}

async fn environment(job: &Job, addresses: &Addresses) -> Result<Vec<(String, String)>, Failure> {
    let ctx = &job.ctx;
    let namespace = sandbox::namespace(&job.pod);
    let mut objects = env::Fetched::new();
    for key in env::references(namespace, &job.container) {
        let got = ctx.objects.hold(&key).get().await.map_err(Failure::config)?;
        objects.insert(key, got);
    }
    // Services have to have been read; a static pod cannot wait for that, it may be the API server.
    let is_static = job.pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(crate::sources::SOURCE));
    if !is_static && tokio::time::timeout(Duration::from_secs(5), ctx.services.synced()).await.is_err() {
        let text = "services have not yet been read at least once, cannot construct envvars";
        return Err(Failure::config(text.into()));
    }
    let links = job.pod.spec.as_ref().is_none_or(|s| s.enable_service_links != Some(false));
    let services = ctx.services.variables(namespace, links);
    env::make(&env::Sources {
        pod: &job.pod,
        container: &job.container,
        objects: &objects,
        services: &services,
        addresses,
        allocatable: ctx.machine.allocatable,
    })
    .map_err(Failure::config)
}

async fn create(job: &Job, image: &ImageHandle, prepared: &Prepared) -> Result<Instance, Failure> {
    let (ctx, pod, c, live) = (&job.ctx, &job.pod, &job.container, &prepared.live);
    let event = |reason: &str, text: String| ctx.events.container(pod, &c.name, Kind::Warning, reason, text);
    let config = async {
        let devices = ctx.devices.given(pod, &c.name).await.with_names(ctx.claims.devices(pod, c));
        let devices = devices.resolved().map_err(Failure::config)?;
        let volumes = volumes::container_devices(c, &prepared.mounted).map_err(Failure::config)?;
        let devices = devices.with_volumes(volumes);
        let addresses = Addresses { pod: live.ips.clone(), host: ctx.machine.ips.clone() };
        let env: Vec<_> = devices.variables().chain(environment(job, &addresses).await?).collect();
        let id = super::new_id();
        let bundle = exec::bundle(&ctx.config.paths, sandbox::uid(pod), &c.name, job.attempt);
        // What an earlier try of this attempt left.
        volumes::mounts::remove_tree(&bundle).ok();
        let disk = |path: &Path| {
            let path = path.display().to_string();
            move |e: std::io::Error| Failure {
                reason: "CreateContainerError",
                message: format!("{path}: {e}"),
                ended: None,
            }
        };
        for dir in ["upper", "work", "bundle"] {
            fs::create_dir_all(bundle.join(dir)).map_err(disk(&bundle))?;
        }
        let mut mounts = mounts(job, &bundle, prepared, &env).await?;
        mounts.extend(devices.binds());
        let own_users = sandbox::own_users(pod);
        let users = own_users.then(|| ctx.users.of(sandbox::uid(pod))).transpose();
        let users = users.map_err(|e| Failure::config(e.to_string()))?;
        let mut document = spec::build(&spec::Inputs {
            env,
            mounts,
            knobs: ctx.knobs_of(sandbox::uid(pod), &c.name),
            users,
            seccomp_default: ctx.config.kubelet.seccomp_default,
            ..inputs(ctx, live, pod, c, image, &id)
        })
        .map_err(Failure::config)?;
        devices.apply(&mut document).map_err(Failure::config)?;
        let text = serde_json::to_vec(&document).map_err(|e| Failure::config(e.to_string()))?;
        fs::write(bundle.join("bundle/config.json"), text).map_err(disk(&bundle))?;
        Ok((id, bundle, document))
    };
    let (id, bundle, document) =
        config.await.inspect_err(|f: &Failure| event("Failed", format!("Error: {}", f.message)))?;
    let image_stop = image.config.config().as_ref().and_then(|c| c.stop_signal().clone());
    let user = &document["process"]["user"];
    let instance = Instance {
        id: id.clone(),
        attempt: job.attempt,
        image: c.image.clone().unwrap_or_default(),
        image_id: image.digest_reference.clone(),
        sandbox: live.sandbox.attempt,
        stop_signal: spec::stop_signal(c, image_stop.as_deref()),
        ready: c.readiness_probe.is_none(),
        started: false,
        resources: c.resources.as_ref().and_then(|r| serde_json::to_value(r).ok()),
        user: Some(
            serde_json::json!({"linux": {"uid": user["uid"], "gid": user["gid"], "supplementalGroups": user["additionalGids"]}}),
        ),
        ..Instance::default()
    };
    // Found again by id when the agent dies before its worker has written this down.
    let note = serde_json::to_vec(&instance).unwrap_or_default();
    fs::write(bundle.join("instance.json"), note).map_err(|e| Failure {
        reason: "CreateContainerError",
        message: e.to_string(),
        ended: None,
    })?;
    let log = log_path(ctx, pod, &c.name, job.attempt);
    if let Some(parent) = log.parent() {
        fs::create_dir_all(parent).ok();
    }
    let op = Op::Create {
        container: id.clone(),
        bundle: bundle.join("bundle"),
        rootfs: Rootfs::Overlay { lower: image.layers.clone(), upper: bundle.join("upper"), work: bundle.join("work") },
        log_path: Some(log),
        stdin: c.stdin == Some(true),
        stdin_once: c.stdin_once == Some(true),
        pid_of: job.target.clone(),
    };
    if let Err(e) = live.supervisor.done(op).await {
        let message = e.to_string();
        event("Failed", format!("Error: {message}"));
        live.supervisor.done(Op::Delete { container: id }).await.ok();
        return Err(start_error(instance, message));
    }
    ctx.events.container(pod, &c.name, Kind::Normal, "Created", "Container created");
    Ok(instance)
}

/// What a container's document is made of, whoever wants the container; without variables, mounts and users.
pub(crate) fn inputs<'a>(
    ctx: &'a Context,
    live: &'a Live,
    pod: &'a Pod,
    container: &'a Container,
    image: &'a ImageHandle,
    id: &str,
) -> spec::Inputs<'a> {
    spec::Inputs {
        pod,
        container,
        image,
        env: Vec::new(),
        hostname: &live.hostname,
        mounts: Vec::new(),
        shm: live.shm.clone(),
        cgroup: format!("/{}/{id}", live.sandbox.cgroup),
        memory_capacity: ctx.machine.memory,
        knobs: ctx.knobs(),
        users: None,
        seccomp_default: false,
        seccomp_profiles: ctx.config.paths.state().join("seccomp"),
    }
}

/// The pod's hosts, hostname and resolv.conf, where nothing else is mounted there.
pub(crate) fn bind_names(ctx: &Context, pod: &Pod, mounts: &mut Vec<BindMount>) {
    let etc = sandbox::files_dir(ctx, pod);
    for file in ["hosts", "hostname", "resolv.conf"] {
        let place = format!("/etc/{file}");
        if !mounts.iter().any(|m| m.destination == place) {
            mounts.push(BindMount::file(etc.join(file), place));
        }
    }
}

/// A container's log file.
pub(crate) fn log_path(ctx: &Context, pod: &Pod, container: &str, attempt: u32) -> PathBuf {
    let dir = ctx.config.paths.pod_logs(sandbox::namespace(pod), sandbox::name(pod), sandbox::uid(pod));
    dir.join(container).join(format!("{attempt}.log"))
}

/// The termination message file of an instance.
pub(crate) fn message_path(bundle: &Path) -> PathBuf {
    bundle.join("termination-log")
}

async fn mounts(
    job: &Job,
    bundle: &Path,
    prepared: &Prepared,
    env: &[(String, String)],
) -> Result<Vec<BindMount>, Failure> {
    let (ctx, pod, c) = (&job.ctx, &job.pod, &job.container);
    let pod_dir = ctx.config.paths.pod(sandbox::uid(pod));
    let made = volumes::container_mounts(pod_dir, c, &prepared.mounted, env).await;
    let mut all = made.map_err(Failure::config)?;
    bind_names(ctx, pod, &mut all);
    let message = message_path(bundle);
    fs::write(&message, b"").map_err(|e| Failure::config(e.to_string()))?;
    // Any user of the container may write its last words.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    fs::set_permissions(&message, mode).map_err(|e| Failure::config(e.to_string()))?;
    let place = c.termination_message_path.clone().filter(|p| !p.is_empty());
    all.push(BindMount::file(message, place.unwrap_or_else(|| "/dev/termination-log".into())));
    Ok(all)
}

/// Whether the container has a startup probe to pass.
pub(crate) fn waits_for_startup(c: &Container) -> bool {
    probes::of(c, probes::Kind::Startup).is_some()
}
