//! A pod's status, exactly as upstream writes it: a pure function of spec and memory.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus, VolumeMount, VolumeMountStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    plan::{init_restarts, restarts, restarts_all},
    state::{Instance, Nanos, PodState, Record},
};
use crate::qos::{self, is_sidecar};

/// Why a container waits: reason and message.
pub(crate) type Waiting = (String, String);

/// What a status is made from.
pub(crate) struct View<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) ephemeral: &'a [Container],
    pub(crate) state: &'a PodState,
    pub(crate) waiting: &'a BTreeMap<String, Waiting>,
    pub(crate) host_ips: &'a [IpAddr],
    /// The pod is being torn down.
    pub(crate) terminating: bool,
    pub(crate) now: Nanos,
}

fn time(ns: Nanos) -> Time {
    let seconds = ns.div_euclid(1_000_000_000);
    Time(k8s_openapi::jiff::Timestamp::from_second(seconds).unwrap_or(k8s_openapi::jiff::Timestamp::UNIX_EPOCH))
}

fn container_id(i: &Instance) -> String {
    format!("isopod://{}", i.id)
}

fn terminated(i: &Instance) -> Option<ContainerStateTerminated> {
    let e = i.ended.as_ref()?;
    Some(ContainerStateTerminated {
        container_id: Some(container_id(i)).filter(|_| !i.id.is_empty()),
        exit_code: e.code,
        finished_at: Some(time(e.finished_at)),
        message: Some(e.message.clone()).filter(|m| !m.is_empty()),
        reason: Some(e.reason.clone()),
        signal: None,
        started_at: Some(time(i.started_at.unwrap_or(0))),
    })
}

/// Mounts as they are shown: writable ones say nothing of recursion.
fn mounts(c: &Container) -> Vec<VolumeMountStatus> {
    let one = |m: &VolumeMount| {
        let recursive = match m.recursive_read_only.as_deref() {
            Some("Enabled" | "IfPossible") => "Enabled",
            _ => "Disabled",
        };
        let read_only = m.read_only == Some(true);
        VolumeMountStatus {
            name: m.name.clone(),
            mount_path: m.mount_path.clone(),
            read_only: read_only.then_some(true),
            recursive_read_only: read_only.then(|| recursive.to_string()),
            volume_status: None,
        }
    };
    c.volume_mounts.iter().flatten().map(one).collect()
}

/// Whether an instance has ended and none will follow it.
fn over(v: &View<'_>, c: &Container, i: &Instance, record: &Record, is_init: bool) -> bool {
    let Some(spec) = &v.pod.spec else { return false };
    let again = |e| if is_init && !is_sidecar(c) { init_restarts(spec, c, e) } else { restarts(spec, c, e) };
    !record.again && i.ended.as_ref().is_some_and(|e| !again(e))
}

/// The status of one container.
fn container(v: &View<'_>, c: &Container, default_waiting: &str, is_init: bool) -> ContainerStatus {
    let empty = Record::default();
    let record = v.state.containers.get(&c.name).unwrap_or(&empty);
    let waiting = v.waiting.get(&c.name);
    let mut status = ContainerStatus {
        name: c.name.clone(),
        image: c.image.clone().unwrap_or_default(),
        restart_count: i32::try_from(record.restarts).unwrap_or(i32::MAX),
        ..ContainerStatus::default()
    };
    let wait = |reason: &str, message: Option<String>| ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.into()), message }),
        ..ContainerState::default()
    };
    let last = |i: Option<&Instance>| {
        Some(ContainerState { terminated: i.and_then(terminated), ..ContainerState::default() })
            .filter(|s| s.terminated.is_some())
    };
    if let Some(i) = &record.current {
        status.volume_mounts = Some(mounts(c)).filter(|m| !m.is_empty());
        status.image_id = i.image_id.clone();
        if !i.image.is_empty() {
            status.image = i.image.clone();
        }
        status.container_id = Some(container_id(i)).filter(|_| !i.id.is_empty());
        status.last_state = last(record.last.as_ref());
        if i.running() {
            status.ready = i.ready && i.started;
            status.started = Some(i.started);
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning { started_at: i.started_at.map(time) }),
                ..ContainerState::default()
            });
            status.resources = i.resources.clone().and_then(|r| serde_json::from_value(r).ok());
            status.allocated_resources = c.resources.as_ref().and_then(|r| r.requests.clone());
            status.user = i.user.clone().and_then(|u| serde_json::from_value(u).ok());
        } else if let (Some((reason, message)), false) = (waiting, v.terminating || over(v, c, i, record, is_init)) {
            status.state = Some(wait(reason, Some(message.clone()).filter(|m| !m.is_empty())));
            if i.ended.is_some() {
                status.last_state = last(Some(i));
            }
            status.started = Some(false);
        } else if let Some(t) = terminated(i) {
            let completed = is_init && t.exit_code == 0;
            status.state = Some(ContainerState { terminated: Some(t), ..ContainerState::default() });
            status.ready = completed && !is_sidecar(c);
            status.started = Some(false);
        } else {
            status.state = Some(wait(default_waiting, None));
            status.started = Some(false);
        }
    } else {
        status.started = Some(false);
        status.state = Some(match waiting {
            Some((reason, message)) => wait(reason, Some(message.clone()).filter(|m| !m.is_empty())),
            None => wait(default_waiting, None),
        });
    }
    if is_init && !is_sidecar(c) && status.started == Some(true) {
        status.ready = false;
    }
    status
}

/// Phase from the containers' records.
fn phase(v: &View<'_>) -> &'static str {
    let Some(spec) = &v.pod.spec else { return "Pending" };
    // A pod is over when nothing of it runs any more, not before.
    if v.state.failure.is_some() && !v.state.containers.values().any(Record::running) {
        return "Failed";
    }
    let current = |c: &Container| v.state.current(&c.name);
    for c in spec.init_containers.iter().flatten().filter(|c| !is_sidecar(c)) {
        if v.state.initialized {
            break;
        }
        match current(c).and_then(|i| i.ended.as_ref()) {
            Some(_) if v.state.containers.get(&c.name).is_some_and(|r| r.again) => return "Pending",
            Some(e) if e.code == 0 => {}
            Some(e) if !init_restarts(spec, c, e) => return "Failed",
            _ => return "Pending",
        }
    }
    let sidecar_pending = spec.init_containers.iter().flatten().filter(|c| is_sidecar(c)).any(|c| current(c).is_none());
    if sidecar_pending && !v.state.initialized {
        return "Pending";
    }
    let (mut running, mut succeeded, mut failed, mut waiting, mut restarting) = (0, 0, 0, 0, 0);
    for c in &spec.containers {
        match current(c) {
            None => waiting += 1,
            Some(i) => match &i.ended {
                None if i.started_at.is_some() => running += 1,
                None => waiting += 1,
                Some(e) if e.code == 0 => succeeded += 1,
                Some(_) => failed += 1,
            },
        }
        let ended = current(c).and_then(|i| i.ended.as_ref());
        let again = v.state.containers.get(&c.name).is_some_and(|r| r.again);
        if ended.is_some_and(|e| again || restarts(spec, c, e)) {
            restarting += 1;
        }
    }
    let total = spec.containers.len();
    if waiting > 0 && !v.state.finished {
        return "Pending";
    }
    if running > 0 {
        return "Running";
    }
    if restarting > 0 && !v.terminating && !v.state.finished {
        return "Running";
    }
    if v.state.finished || v.terminating || restarting == 0 {
        // While sidecars still stop, the pod is running.
        let sidecars = spec.init_containers.iter().flatten().any(|c| current(c).is_some_and(Instance::running));
        if sidecars && restarting == 0 && !v.state.finished {
            return "Running";
        }
        return match () {
            () if failed > 0 => "Failed",
            () if succeeded == total && total > 0 => "Succeeded",
            () => "Failed",
        };
    }
    "Running"
}

/// Builds the status; `transitions` in the state gives each condition's last turn (see [`remember`]).
pub(crate) fn generate(v: &View<'_>) -> PodStatus {
    let Some(spec) = &v.pod.spec else { return PodStatus::default() };
    let has_init = spec.init_containers.as_ref().is_some_and(|i| !i.is_empty());
    let default = if has_init && !v.state.initialized { "PodInitializing" } else { "ContainerCreating" };
    let init: Vec<ContainerStatus> =
        spec.init_containers.iter().flatten().map(|c| container(v, c, "PodInitializing", true)).collect();
    let regular: Vec<ContainerStatus> = spec.containers.iter().map(|c| container(v, c, default, false)).collect();
    let ephemeral: Vec<ContainerStatus> =
        v.ephemeral.iter().map(|c| container(v, c, "ContainerCreating", false)).collect();
    let phase = phase(v);
    let conditions = conditions(v, spec, phase, &init, &regular);
    let ips: Vec<IpAddr> = if spec.host_network == Some(true) { v.host_ips.to_vec() } else { v.state.ips.clone() };
    let own = spec.resources.clone().filter(|r| r.requests.is_some() || r.limits.is_some());
    let own = own.filter(|_| v.state.sandbox.is_some());
    let failure = v.state.failure.as_ref().filter(|_| phase == "Failed");
    // Nothing was ever tried of a pod that this node has turned away.
    let rejected = failure.is_some() && v.state.containers.is_empty() && v.state.sandbox.is_none();
    PodStatus {
        phase: Some(phase.into()),
        conditions: Some(conditions),
        reason: failure.map(|f| f.reason.clone()),
        message: failure.map(|f| f.message.clone()),
        host_ip: v.host_ips.first().map(ToString::to_string),
        host_ips: Some(v.host_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: ips.first().map(ToString::to_string),
        pod_ips: Some(ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()).filter(|l: &Vec<_>| !l.is_empty()),
        start_time: Some(time(v.state.start_time)),
        init_container_statuses: Some(init).filter(|l| !l.is_empty() && !rejected),
        container_statuses: Some(regular).filter(|_| !rejected),
        ephemeral_container_statuses: Some(ephemeral).filter(|l| !l.is_empty()),
        qos_class: Some(qos::class(spec).name().into()),
        observed_generation: v.pod.metadata.generation,
        allocated_resources: own.as_ref().and_then(|r| r.requests.clone()),
        resources: own,
        // Written by others; what the pod's claims are called is asked of its snapshot.
        resource_claim_statuses: v.pod.status.as_ref().and_then(|s| s.resource_claim_statuses.clone()),
        ..PodStatus::default()
    }
}

fn conditions(
    v: &View<'_>,
    spec: &k8s_openapi::api::core::v1::PodSpec,
    phase: &str,
    init: &[ContainerStatus],
    regular: &[ContainerStatus],
) -> Vec<PodCondition> {
    let over = matches!(phase, "Succeeded" | "Failed");
    let sidecar = |name: &str| spec.init_containers.iter().flatten().any(|c| c.name == name && is_sidecar(c));
    let list = |names: Vec<&str>| format!("[{}]", names.join(" "));
    // Initialized.
    let uninitialized: Vec<&str> = init
        .iter()
        .filter(|s| if sidecar(&s.name) { s.started != Some(true) } else { !s.ready })
        .map(|s| s.name.as_str())
        .collect();
    let initialized = if phase == "Succeeded" {
        (true, Some("PodCompleted"), None)
    } else if v.state.initialized || uninitialized.is_empty() {
        (true, None, None)
    } else {
        let text = format!("containers with incomplete status: {}", list(uninitialized));
        (false, Some("ContainersNotInitialized"), Some(text))
    };
    // ContainersReady.
    let unready: Vec<&str> =
        init.iter().filter(|s| sidecar(&s.name)).chain(regular).filter(|s| !s.ready).map(|s| s.name.as_str()).collect();
    let containers_ready = match phase {
        "Succeeded" => (false, Some("PodCompleted"), None),
        "Failed" => (false, Some("PodFailed"), None),
        _ if unready.is_empty() => (true, None, None),
        _ => (false, Some("ContainersNotReady"), Some(format!("containers with unready status: {}", list(unready)))),
    };
    // Ready: containers and gates.
    let given = v.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let gates: Vec<String> = spec
        .readiness_gates
        .iter()
        .flatten()
        .filter_map(|g| {
            let found = given.into_iter().flatten().find(|c| c.type_ == g.condition_type);
            match found {
                None => Some(format!(
                    "corresponding condition of pod readiness gate \"{}\" does not exist.",
                    g.condition_type
                )),
                Some(c) if c.status != "True" => Some(format!(
                    "the status of pod readiness gate \"{}\" is not \"True\", but {}",
                    g.condition_type, c.status
                )),
                Some(_) => None,
            }
        })
        .collect();
    let ready = if containers_ready.0 && !gates.is_empty() {
        (false, Some("ReadinessGatesNotReady"), Some(gates.join(", ")))
    } else {
        containers_ready.clone()
    };
    let sandbox = v.state.sandbox.is_some() && !v.state.lost && !over;
    let scheduled = (true, None, None);
    let restarting = qos::all_containers(spec)
        .flat_map(|c| c.restart_policy_rules.iter().flatten())
        .any(|rule| rule.action == "RestartAllContainers")
        .then(|| match phase {
            "Succeeded" => (false, Some("PodCompleted"), None),
            "Failed" => (false, Some("PodFailed"), None),
            _ => (restarts_all(spec, v.state).is_some(), None, None),
        });
    let all = [
        ("PodReadyToStartContainers", (sandbox, None, None)),
        ("Initialized", initialized),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", scheduled),
    ];
    let mut out: Vec<PodCondition> = all
        .into_iter()
        .chain(restarting.map(|r| ("AllContainersRestarting", r)))
        .map(|(type_, (status, reason, message))| {
            let status = if status { "True" } else { "False" };
            let since = match v.state.transitions.get(type_) {
                Some((s, at)) if s == status => *at,
                _ => {
                    let earlier = given.into_iter().flatten().find(|c| c.type_ == type_ && c.status == status);
                    earlier
                        .and_then(|c| c.last_transition_time.as_ref())
                        .map_or(v.now, |t| t.0.as_second().saturating_mul(1_000_000_000))
                }
            };
            PodCondition {
                type_: type_.into(),
                status: status.into(),
                reason: reason.map(Into::into),
                message,
                last_transition_time: Some(time(since)),
                observed_generation: v.pod.metadata.generation,
                ..PodCondition::default()
            }
        })
        .collect();
    if v.state.failure.as_ref().is_some_and(|f| ["Evicted", super::TERMINATED.0].contains(&f.reason.as_str())) {
        out.push(PodCondition {
            type_: "DisruptionTarget".into(),
            status: "True".into(),
            reason: Some("TerminationByKubelet".into()),
            message: v.state.failure.as_ref().map(|f| f.message.clone()),
            last_transition_time: Some(time(v.now)),
            observed_generation: v.pod.metadata.generation,
            ..PodCondition::default()
        });
    }
    let resize = &v.state.resize;
    let pending = resize.pending.clone().map(|(reason, message)| ("PodResizePending", Some(reason), Some(message)));
    let progress = resize
        .in_progress
        .then(|| ("PodResizeInProgress", resize.error.as_ref().map(|_| "Error".to_string()), resize.error.clone()));
    for (type_, reason, message) in pending.into_iter().chain(progress).filter(|_| !over) {
        let since = v.state.transitions.get(type_).filter(|t| t.0 == "True").map_or(v.now, |t| t.1);
        out.push(PodCondition {
            type_: type_.into(),
            status: "True".into(),
            reason,
            message,
            last_transition_time: Some(time(since)),
            observed_generation: v.pod.metadata.generation,
            ..PodCondition::default()
        });
    }
    out
}

/// Remembers when conditions turned, so that times survive a restart of the agent.
pub(crate) fn remember(state: &mut PodState, status: &PodStatus) {
    for c in status.conditions.iter().flatten() {
        let at = c.last_transition_time.as_ref().map_or(0, |t| t.0.as_second().saturating_mul(1_000_000_000));
        let entry = state.transitions.entry(c.type_.clone()).or_default();
        if entry.0 != c.status {
            *entry = (c.status.clone(), at);
        }
    }
    let told = |t: &str| status.conditions.iter().flatten().any(|c| c.type_ == t);
    state.transitions.retain(|t, _| told(t));
}

#[cfg(test)]
mod tests {
    use super::{
        super::state::{Ended, Sandbox},
        *,
    };
    use serde_json::json;

    fn generated(spec: serde_json::Value, state: PodState, waiting: &[(&str, &str)]) -> PodStatus {
        let pod: Pod =
            serde_json::from_value(json!({"metadata":{"name":"p","namespace":"n","generation":2},"spec":spec}))
                .unwrap();
        let waiting = waiting.iter().map(|(n, r)| (n.to_string(), (r.to_string(), "m".to_string()))).collect();
        generate(&View {
            pod: &pod,
            ephemeral: &[],
            state: &state,
            waiting: &waiting,
            host_ips: &["192.0.2.1".parse().unwrap()],
            terminating: false,
            now: 5_000_000_000,
        })
    }

    fn instance(started: bool, ended: Option<i32>) -> Record {
        let ended = ended.map(|code| Ended { code, reason: "Error".into(), ..Ended::default() });
        let current =
            Instance { id: "x".into(), started_at: Some(1), started, ready: started, ended, ..Instance::default() };
        Record { current: Some(current), ..Record::default() }
    }

    fn state(containers: &[(&str, Record)], initialized: bool) -> PodState {
        let mut s = PodState::new(1_000_000_000);
        s.ips = vec!["10.0.0.2".parse().unwrap()];
        s.sandbox = Some(Sandbox { attempt: 0, netns: None, ips: s.ips.clone(), cgroup: String::new() });
        s.initialized = initialized;
        s.containers = containers.iter().map(|(n, r)| (n.to_string(), r.clone())).collect();
        s
    }

    fn condition<'a>(s: &'a PodStatus, t: &str) -> (&'a str, Option<&'a str>, Option<&'a str>) {
        let c = s.conditions.as_ref().unwrap().iter().find(|c| c.type_ == t).unwrap();
        (&c.status, c.reason.as_deref(), c.message.as_deref())
    }

    #[test]
    fn a_new_pod_is_pending() {
        let s = generated(json!({"initContainers":[{"name":"i"}],"containers":[{"name":"c"}]}), PodState::new(0), &[]);
        assert_eq!(s.phase.as_deref(), Some("Pending"));
        assert_eq!(
            condition(&s, "Initialized"),
            ("False", Some("ContainersNotInitialized"), Some("containers with incomplete status: [i]"))
        );
        assert_eq!(
            condition(&s, "Ready"),
            ("False", Some("ContainersNotReady"), Some("containers with unready status: [c]"))
        );
        let waiting = s.container_statuses.unwrap()[0].state.clone().unwrap().waiting.unwrap();
        assert_eq!(waiting.reason.as_deref(), Some("PodInitializing"));
    }

    #[test]
    fn running_and_ready() {
        let s = generated(
            json!({"containers":[{"name":"c","image":"i"}]}),
            state(&[("c", instance(true, None))], true),
            &[],
        );
        assert_eq!(s.phase.as_deref(), Some("Running"));
        assert_eq!(condition(&s, "Ready").0, "True");
        assert_eq!(s.pod_ip.as_deref(), Some("10.0.0.2"));
        let c = &s.container_statuses.unwrap()[0];
        assert_eq!((c.ready, c.started, c.container_id.as_deref()), (true, Some(true), Some("isopod://x")));
        assert_eq!(s.observed_generation, Some(2));
    }

    #[test]
    fn crash_loop_shows_last_state() {
        let s = generated(
            json!({"containers":[{"name":"c"}]}),
            state(&[("c", instance(false, Some(1)))], true),
            &[("c", "CrashLoopBackOff")],
        );
        assert_eq!(s.phase.as_deref(), Some("Running"));
        let c = &s.container_statuses.unwrap()[0];
        assert_eq!(c.state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(c.last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 1);
    }

    #[test]
    fn phases_at_the_end() {
        for (policy, codes, want) in [
            ("Never", [0, 0], "Succeeded"),
            ("Never", [0, 1], "Failed"),
            ("OnFailure", [0, 1], "Running"),
            ("Always", [0, 0], "Running"),
        ] {
            let st = state(&[("c", instance(false, Some(codes[0]))), ("d", instance(false, Some(codes[1])))], true);
            let s = generated(json!({"restartPolicy":policy,"containers":[{"name":"c"},{"name":"d"}]}), st, &[]);
            assert_eq!(s.phase.as_deref(), Some(want), "{policy} {codes:?}");
        }
        let mut st = state(&[("c", instance(false, Some(0)))], true);
        st.failure = Some(super::super::state::PodFailure { reason: "DeadlineExceeded".into(), message: "m".into() });
        let s = generated(json!({"restartPolicy":"Never","containers":[{"name":"c"}]}), st, &[]);
        assert_eq!((s.phase.as_deref(), s.reason.as_deref()), (Some("Failed"), Some("DeadlineExceeded")));
        // An ended pod keeps its address; a failing one is not over before its containers are.
        assert_eq!(s.pod_ip.as_deref(), Some("10.0.0.2"));
        let mut st = state(&[("c", instance(true, None))], true);
        st.failure = Some(super::super::state::PodFailure { reason: "DeadlineExceeded".into(), message: "m".into() });
        st.sandbox = None;
        let s = generated(json!({"containers":[{"name":"c"}]}), st, &[]);
        assert_eq!((s.phase.as_deref(), s.reason, s.pod_ip.as_deref()), (Some("Running"), None, Some("10.0.0.2")));
    }

    #[test]
    fn readiness_gates() {
        let s = generated(
            json!({"readinessGates":[{"conditionType":"x"}],"containers":[{"name":"c"}]}),
            state(&[("c", instance(true, None))], true),
            &[],
        );
        assert_eq!(condition(&s, "ContainersReady").0, "True");
        assert_eq!(condition(&s, "Ready").1, Some("ReadinessGatesNotReady"));
    }
}
