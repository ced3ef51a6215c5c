//! From what is known of a pod to the one thing that keeps it from running. Pure.

use serde_json::Value;

use crate::commands::local::{ps::since, text};

/// What is known.
pub(crate) struct Facts<'a> {
    pub(crate) pod: &'a Value,
    /// The flight record of its start.
    pub(crate) record: &'a Value,
    /// Events about it, the newest at the end.
    pub(crate) events: &'a [Value],
    /// The last lines of a container's log.
    pub(crate) last_words: &'a dyn Fn(&str) -> Vec<String>,
}

/// One cause, what else is known of it, and what to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cause {
    pub(crate) why: String,
    pub(crate) more: Vec<String>,
    pub(crate) todo: Vec<String>,
}

impl Cause {
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), ..Self::default() }
    }

    fn more(mut self, line: impl Into<String>) -> Self {
        self.more.push(line.into());
        self
    }

    fn todo(mut self, line: impl Into<String>) -> Self {
        self.todo.push(line.into());
        self
    }
}

fn statuses<'a>(pod: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    pod["status"][list].as_array().into_iter().flatten()
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    statuses(pod, "conditions").find(|c| c["type"] == kind)
}

/// The last event of a reason.
fn told(f: &Facts<'_>, reason: &str) -> Option<String> {
    let found = f.events.iter().rev().find(|e| e["reason"] == reason)?;
    Some(text(&found["message"]).to_owned())
}

/// What keeps the pod from running, or that nothing does.
pub(crate) fn of(f: &Facts<'_>) -> Cause {
    let pod = f.pod;
    if pod["metadata"]["deletionTimestamp"].is_string() {
        return ending(f);
    }
    match text(&pod["status"]["phase"]) {
        "Failed" => return failed(f),
        "Succeeded" => return Cause::new("it has done its work: every container ended with exit code 0"),
        _ => {}
    }
    let sidecar = |c: &Value| c["started"] == true && c["ready"] == true;
    let stuck =
        statuses(pod, "initContainerStatuses").find(|c| c["state"]["terminated"]["exitCode"] != 0 && !sidecar(c));
    if let Some(c) = stuck {
        return container(f, c, "init container");
    }
    let waiting = statuses(pod, "containerStatuses").find(|c| !c["state"]["running"].is_object());
    if let Some(c) = waiting {
        return container(f, c, "container");
    }
    if statuses(pod, "containerStatuses").next().is_none() {
        return blocked(f, "its containers have not been created yet");
    }
    let unready = statuses(pod, "containerStatuses").find(|c| c["ready"] != true);
    if let Some(c) = unready {
        return not_ready(f, c);
    }
    match condition(pod, "Ready") {
        Some(c) if c["status"] == "True" => {
            Cause::new(format!("nothing: it has been running and ready for {}", since(&c["lastTransitionTime"])))
        }
        Some(c) => Cause::new(format!("all containers are ready, but the pod is not: {}", text(&c["message"])))
            .todo("a readiness gate is set to True in the pod's status by the controller that owns it"),
        None => blocked(f, "its state is not known yet"),
    }
}

fn ending(f: &Facts<'_>) -> Cause {
    let running: Vec<&str> = ["initContainerStatuses", "containerStatuses"]
        .iter()
        .flat_map(|l| statuses(f.pod, l))
        .filter(|c| c["state"]["running"].is_object())
        .map(|c| text(&c["name"]))
        .collect();
    let grace = f.pod["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(30);
    let finalizers: Vec<&str> = f.pod["metadata"]["finalizers"].as_array().into_iter().flatten().map(text).collect();
    if let Some(error) = told(f, "FailedKillPod") {
        return Cause::new(format!("it is being deleted, but cannot be taken down: {error}"));
    }
    if !running.is_empty() {
        return Cause::new(format!("it is being deleted and waits for {} to end", running.join(", ")))
            .more(format!("containers get {grace} seconds after their stop signal, then they are killed"))
            .todo("a program that ignores its stop signal (PID 1 without a handler) always takes the whole time");
    }
    if !finalizers.is_empty() {
        return Cause::new(format!("it has ended, but finalizers hold the object: {}", finalizers.join(", ")))
            .todo("the controller that owns a finalizer takes it off; is it running?");
    }
    Cause::new("it is being deleted; its containers have ended")
}

fn failed(f: &Facts<'_>) -> Cause {
    let (reason, message) = (text(&f.pod["status"]["reason"]), text(&f.pod["status"]["message"]));
    let cause = Cause::new(format!("the pod failed: {reason}: {message}"));
    match reason {
        "" => match statuses(f.pod, "containerStatuses").find(|c| c["state"]["terminated"]["exitCode"] != 0) {
            Some(c) => ended(f, c, "container", &c["state"]["terminated"]),
            None => Cause::new("the pod failed"),
        },
        "Evicted" => cause.todo("free what the node is short of, or request what the pod uses, then delete the pod"),
        "DeadlineExceeded" => cause.todo("spec.activeDeadlineSeconds is how long it may run"),
        r if r.starts_with("OutOf") => cause.todo("the node has no room: lower the pod's requests or end another pod"),
        "NodeShutdown" | "Terminated" => cause.todo("the node was shut down; the pod is not started again by itself"),
        _ => cause,
    }
}

/// A container that does not run.
fn container(f: &Facts<'_>, c: &Value, kind: &str) -> Cause {
    let name = text(&c["name"]);
    let state = &c["state"];
    if state["running"].is_object() {
        let began = since(&state["running"]["startedAt"]);
        let mut cause =
            Cause::new(format!("{kind} {name} has been running for {began}, and the pod waits for it to end"));
        if c["started"] == false {
            cause =
                Cause::new(format!("{kind} {name} has been running for {began}, but has not passed its startup probe"));
        }
        return words(f, name, cause).todo(format!("see what it waits for: isopod logs {} -c {name}", pod_name(f)));
    }
    if state["terminated"].is_object() {
        return ended(f, c, kind, &state["terminated"]);
    }
    let (reason, message) = (text(&state["waiting"]["reason"]), text(&state["waiting"]["message"]));
    match reason {
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName" => {
            image(f, c, kind, reason, message)
        }
        "PostStartHookError" => hook(kind, name).more(message),
        "CrashLoopBackOff" => {
            let of_it = format!("{{{name}}}");
            let hooked = f.events.iter().any(|e| {
                e["reason"] == "FailedPostStartHook" && text(&e["involvedObject"]["fieldPath"]).ends_with(&of_it)
            });
            let mut cause = if hooked { hook(kind, name) } else { ended(f, c, kind, &c["lastState"]["terminated"]) };
            let again = message.split_whitespace().nth(1).unwrap_or("a while");
            cause.more.push(format!(
                "it has been started {} times; the pause before the next try is {again}",
                c["restartCount"].as_u64().unwrap_or(0) + 1
            ));
            cause
        }
        "CreateContainerConfigError" => config(f, c, kind, message),
        "ContainerCreating" | "PodInitializing" | "" => blocked(f, &format!("{kind} {name} is being created")),
        _ => Cause::new(format!("{kind} {name} cannot be started: {reason}: {message}"))
            .todo("the container's command, user or working directory may not exist in its image"),
    }
}

/// A container that is killed although it may well be able to run.
fn hook(kind: &str, name: &str) -> Cause {
    Cause::new(format!("{kind} {name} does not stay up: its postStart hook fails, and it is killed for that"))
        .todo("the command or path under lifecycle.postStart has to succeed in the running container")
}

fn pod_name(f: &Facts<'_>) -> String {
    format!("{}/{}", text(&f.pod["metadata"]["namespace"]), text(&f.pod["metadata"]["name"]))
}

fn words(f: &Facts<'_>, container: &str, mut cause: Cause) -> Cause {
    let lines = (f.last_words)(container);
    if !lines.is_empty() {
        cause.more.push("its last words:".into());
        cause.more.extend(lines.iter().map(|l| format!("  {l}")));
    }
    cause
}

/// How a container ended, and what that usually means.
fn ended(f: &Facts<'_>, c: &Value, kind: &str, how: &Value) -> Cause {
    let (name, reason) = (text(&c["name"]), text(&how["reason"]));
    let code = how["exitCode"].as_i64().unwrap_or(0);
    let said = text(&how["message"]).trim();
    if reason == "OOMKilled" {
        let limit = f.pod["spec"]["containers"]
            .as_array()
            .and_then(|l| l.iter().find(|s| s["name"] == name))
            .map(|s| text(&s["resources"]["limits"]["memory"]).to_owned())
            .filter(|l| !l.is_empty());
        let with =
            limit.map_or_else(|| "there was no memory left on the node".to_owned(), |l| format!("its limit is {l}"));
        return words(f, name, Cause::new(format!("{kind} {name} was killed for its use of memory: {with}")))
            .todo("raise resources.limits.memory, or make it use less");
    }
    if reason == "StartError" {
        return Cause::new(format!("{kind} {name} could not be started: {said}"))
            .todo("look at command, args, workingDir and user of the container, and whether the file is in the image");
    }
    let meaning = match code {
        0 => "it ended by itself with exit code 0, but it should go on running",
        126 => "its command is not executable (exit code 126)",
        127 => "its command was not found (exit code 127)",
        137 => "it was killed (exit code 137, SIGKILL)",
        139 => "it crashed (exit code 139, SIGSEGV)",
        143 => "it was told to stop (exit code 143, SIGTERM)",
        _ => "",
    };
    let how = if meaning.is_empty() { format!("it ended with exit code {code}") } else { meaning.to_owned() };
    let mut cause = Cause::new(format!("{kind} {name} does not stay up: {how}"));
    if !said.is_empty() {
        cause = cause.more(format!("it said: {}", said.lines().last().unwrap_or(said)));
    }
    let probe = told(f, "Unhealthy").filter(|m| m.starts_with("Liveness") || m.starts_with("Startup"));
    if let (Some(message), 137 | 143) = (probe, code) {
        cause = cause.more(format!("it was stopped because of a probe: {message}"));
        return words(f, name, cause)
            .todo("give the probe more time (failureThreshold, timeoutSeconds) or mend what it asks");
    }
    words(f, name, cause).todo(format!("read all it wrote: isopod logs {} -c {name} --previous", pod_name(f)))
}

fn image(f: &Facts<'_>, c: &Value, kind: &str, reason: &str, message: &str) -> Cause {
    let (name, image) = (text(&c["name"]), text(&c["image"]));
    // Once it reads ImagePullBackOff only the event still has the registry's words.
    let event = f.events.iter().rev().find(|e| text(&e["message"]).starts_with("Failed to pull"));
    let why = event.map_or(message, |e| text(&e["message"])).to_owned();
    let lower = why.to_lowercase();
    let cause = Cause::new(format!("the image of {kind} {name} cannot be had: {image}")).more(why.clone());
    match reason {
        "ErrImageNeverPull" => cause
            .todo("imagePullPolicy is Never: put an archive of it into var/lib/isopod/images, or change the policy"),
        "InvalidImageName" => cause.todo("the name is no image reference: REGISTRY/NAME:TAG in lower case"),
        _ if lower.contains("not found") => {
            cause.todo("there is no such name or tag in the registry: look for a typing error")
        }
        _ if lower.contains("denied") || lower.contains("unauthorized") || lower.contains("authorization") => {
            cause.todo("the registry wants credentials: name a secret of them in spec.imagePullSecrets")
        }
        _ if lower.contains("certificate") || lower.contains("tls") => {
            cause.todo("the registry's certificate is not trusted: put its CA under etc/isopod/certs.d/REGISTRY")
        }
        _ if ["dns", "resolve", "connect", "timed out", "unreachable", "error sending"]
            .iter()
            .any(|w| lower.contains(w)) =>
        {
            cause.todo(
                "the registry cannot be reached from this node: its name, network or a mirror in etc/isopod/certs.d",
            )
        }
        _ => cause.todo("the pull is tried again by itself, with longer pauses"),
    }
}

fn config(f: &Facts<'_>, c: &Value, kind: &str, message: &str) -> Cause {
    let name = text(&c["name"]);
    let cause = Cause::new(format!("{kind} {name} cannot be configured: {message}"));
    let namespace = text(&f.pod["metadata"]["namespace"]);
    let lower = message.to_lowercase();
    if lower.contains("configmap") && lower.contains("not found") {
        return cause.todo(format!(
            "create the ConfigMap in namespace {namespace}: the container starts as soon as it is there"
        ));
    }
    if lower.contains("secret") && lower.contains("not found") {
        return cause
            .todo(format!("create the Secret in namespace {namespace}: the container starts as soon as it is there"));
    }
    if let Some(todo) = file_server(&lower) {
        return cause.todo(todo);
    }
    if lower.contains("runasnonroot") || lower.contains("non-root") {
        return cause.todo("set runAsUser to a number other than 0, or use an image with such a user");
    }
    cause.todo("it starts by itself once that is mended")
}

/// Nothing runs yet: what the agent said last, or that it is at work.
fn blocked(f: &Facts<'_>, otherwise: &str) -> Cause {
    let said = text(&f.record["blocked"]);
    if said.is_empty() {
        let seen = since(&f.pod["status"]["startTime"]);
        return Cause::new(format!("{otherwise}; the node has had the pod for {seen}")).todo("look again in a moment");
    }
    let cause = Cause::new(said);
    let lower = said.to_lowercase();
    if let Some(todo) = file_server(&lower) {
        cause.todo(todo)
    } else if lower.contains("configmap") || lower.contains("secret") {
        cause.todo("create the object, or mark the volume's source as optional: the pod goes on as soon as it is there")
    } else if lower.contains("persistentvolumeclaim") {
        cause.todo("see why the claim is not bound: kubectl describe pvc")
    } else if lower.contains("hostpath") {
        cause.todo("make the path on this node, or choose a type that makes it (DirectoryOrCreate)")
    } else if lower.contains("no space left") {
        cause.todo("the node's disk is full: isopod images, and df of var/lib/isopod")
    } else if lower.contains("network") || lower.contains("address") {
        cause.todo("see the agent's log: var/log/isopod/agent.log, or the journal")
    } else {
        cause.todo("it is tried again by itself, with longer pauses")
    }
}

/// What to do about an NFS volume, when it is one that is spoken of.
fn file_server(message: &str) -> Option<&'static str> {
    if !message.contains("mounting arguments: -t nfs ") && !message.contains("the server of volume") {
        return None;
    }
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    Some(match () {
        () if says(&["unknown filesystem type", "helper program"]) => {
            "install the NFS client on this node (nfs-common or nfs-utils)"
        }
        () if says(&["no such file or directory"]) => "mend the volume's path, or have the server export it",
        () if says(&["access denied", "not permitted"]) => "have the server export it to this node",
        () if says(&["does not answer", "timed out", "no route to host", "refused", "unreachable"]) => {
            "see whether the server runs and port 2049 is open to this node: it goes on by itself then"
        }
        () => "it is tried again by itself, with longer pauses",
    })
}

fn not_ready(f: &Facts<'_>, c: &Value) -> Cause {
    let name = text(&c["name"]);
    let began = since(&c["state"]["running"]["startedAt"]);
    let kind = if c["started"] == true { "readiness" } else { "startup" };
    let said = f
        .events
        .iter()
        .rev()
        .find(|e| e["reason"] == "Unhealthy" && text(&e["message"]).to_lowercase().starts_with(kind));
    let cause =
        Cause::new(format!("container {name} has been running for {began}, but does not pass its {kind} probe"));
    let cause = match said {
        Some(e) => cause.more(text(&e["message"])),
        None => cause.more("the probe has not answered yet"),
    };
    words(f, name, cause).todo("ask the same by hand: isopod exec, or mend the probe's port, path or time")
}

/// Why the scheduler has not placed a pod.
pub(crate) fn unscheduled(pod: &Value) -> Cause {
    if let Some(gates) = pod["spec"]["schedulingGates"].as_array().filter(|g| !g.is_empty()) {
        let names: Vec<&str> = gates.iter().map(|g| text(&g["name"])).collect();
        return Cause::new(format!("it is held back by scheduling gates: {}", names.join(", ")))
            .todo("whoever set a gate takes it off");
    }
    let Some(c) = condition(pod, "PodScheduled").filter(|c| c["status"] == "False") else {
        return Cause::new("no scheduler has looked at it yet")
            .todo("does the scheduler run? isopod ps -n kube-system");
    };
    let message = text(&c["message"]);
    let cause = Cause::new(format!("no node can take it: {message}"));
    let lower = message.to_lowercase();
    for (word, todo) in [
        ("insufficient", "lower the pod's requests, end other pods, or add a node"),
        ("too many pods", "the node is full: raise maxPods or add a node"),
        ("untolerated taint", "the nodes are tainted (a node that is not ready is, too): kubectl describe nodes"),
        ("affinity", "its nodeSelector or affinity fits no node: kubectl get nodes --show-labels"),
        ("free ports", "its hostPort is taken on every node"),
        ("persistentvolumeclaim", "a claim is missing or not bound: kubectl get pvc"),
    ] {
        if lower.contains(word) {
            return cause.todo(todo);
        }
    }
    cause
}

/// Why a pod whose name begins so was never made.
pub(crate) fn never_made(name: &str, events: &[Value]) -> Option<Cause> {
    let about = |e: &&Value| {
        let object = text(&e["involvedObject"]["name"]);
        e["reason"] == "FailedCreate" && (object.starts_with(name) || name.starts_with(object))
    };
    let last = events.iter().filter(about).max_by_key(|e| text(&e["lastTimestamp"]).to_owned())?;
    let (kind, object) = (text(&last["involvedObject"]["kind"]), text(&last["involvedObject"]["name"]));
    let cause = Cause::new(format!("{kind} {object} cannot make it: {}", text(&last["message"])));
    let lower = text(&last["message"]).to_lowercase();
    Some(if lower.contains("exceeded quota") {
        cause.todo("raise the ResourceQuota of the namespace or end other pods: kubectl describe quota")
    } else if lower.contains("podsecurity") {
        cause.todo("the namespace's pod security level forbids it")
    } else {
        cause
    })
}

#[cfg(test)]
#[path = "cause_tests.rs"]
mod tests;
