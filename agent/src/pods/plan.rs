//! What to do next for a pod: a pure function of what is wanted and what is.
//!
//! Worked example: init containers `a`, sidecar `s`, `b`; containers `c`, `d`. First plan: start `a`. When `a` has
//! completed: start `s`; when `s` has started: start `b`; when `b` has completed the pod is initialized: start `c`, `d`.
//! From then on `s`, `c` and `d` are kept running as their restart rules say.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, PodSpec};

use super::state::{Backoff, Ended, Nanos, PodState, Record, SECOND};
use crate::qos::{self, is_sidecar};

/// First wait between restarts.
const BACKOFF_INITIAL: Nanos = 10 * SECOND;

/// What a plan is made from.
pub(crate) struct View<'a> {
    pub(crate) spec: &'a PodSpec,
    /// Ephemeral containers as ordinary ones.
    pub(crate) ephemeral: &'a [Container],
    pub(crate) state: &'a PodState,
    /// Containers with a start in progress.
    pub(crate) starting: &'a BTreeSet<String>,
    /// Containers being stopped.
    pub(crate) stopping: &'a BTreeSet<String>,
    /// Containers whose start failed, and when it may be tried again.
    pub(crate) retry: &'a BTreeMap<String, Nanos>,
    /// The pod is being deleted or has failed as a whole.
    pub(crate) terminating: bool,
    pub(crate) now: Nanos,
    pub(crate) backoff_max: Nanos,
}

/// Why a container is stopped while the pod goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// The pod ends.
    Pod,
    /// Its image changed.
    Changed,
    /// Everything else has completed.
    Sidecar,
    /// A rule restarts all containers; no hook is run.
    All,
}

/// What to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Start these, in this order.
    pub(crate) start: Vec<String>,
    /// Stop these.
    pub(crate) stop: Vec<(String, StopReason)>,
    /// Waiting for its restart, and how long the whole wait is.
    pub(crate) crash_looping: BTreeMap<String, Nanos>,
    /// All init containers are done: remember it.
    pub(crate) initialized: bool,
    /// Nothing will run any more: tear down.
    pub(crate) finish: bool,
    /// The pod is over its active deadline.
    pub(crate) deadline_exceeded: bool,
    /// All have ended because this one's rule restarts all: from the first init container again.
    pub(crate) restart_all: Option<String>,
    /// Plan again at this time.
    pub(crate) wake: Option<Nanos>,
}

impl Plan {
    fn wake_at(&mut self, at: Nanos) {
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }
}

/// The action of the first rule that a container's end matches.
fn rule<'a>(c: &'a Container, ended: &Ended) -> Option<&'a str> {
    let mut rules = c.restart_policy_rules.iter().flatten();
    let hit = rules.find(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|v| *v == ended.code);
            listed == (codes.operator == "In")
        })
    });
    hit.map(|rule| rule.action.as_str())
}

/// The container whose end restarts all of the pod, if one has ended so.
pub(crate) fn restarts_all<'a>(spec: &'a PodSpec, state: &PodState) -> Option<&'a str> {
    let hit = qos::all_containers(spec).find(|c| {
        let ended = state.in_sandbox(&c.name).and_then(|i| i.ended.as_ref());
        ended.is_some_and(|e| rule(c, e) == Some("RestartAllContainers")) && !again(state, c)
    });
    hit.map(|c| c.name.as_str())
}

/// Whether a container that ended so is run again.
pub(crate) fn restarts(spec: &PodSpec, c: &Container, ended: &Ended) -> bool {
    if rule(c, ended).is_some() {
        return true;
    }
    match c.restart_policy.as_deref().or(spec.restart_policy.as_deref()).unwrap_or("Always") {
        "Never" => false,
        "OnFailure" => ended.code != 0,
        _ => true,
    }
}

/// Whether it was stopped only to be started again.
fn again(state: &PodState, c: &Container) -> bool {
    state.containers.get(&c.name).is_some_and(|r| r.again)
}

/// Plans.
pub(crate) fn plan(v: &View<'_>) -> Plan {
    let mut p = Plan::default();
    if v.state.finished {
        return p;
    }
    if let Some(seconds) = v.spec.active_deadline_seconds {
        let at = v.state.start_time + seconds * SECOND;
        if v.now >= at {
            p.deadline_exceeded = !v.terminating;
        } else {
            p.wake_at(at);
        }
    }
    if v.terminating || p.deadline_exceeded {
        let init = v.spec.init_containers.iter().flatten();
        for c in v.spec.containers.iter().chain(v.ephemeral).chain(init) {
            if running(v, c) && !v.stopping.contains(&c.name) {
                p.stop.push((c.name.clone(), StopReason::Pod));
            }
        }
        let busy = v.starting.iter().next().is_some() || any_running(v);
        p.finish = !busy && !p.deadline_exceeded;
        return p;
    }
    if let Some(name) = restarts_all(v.spec, v.state) {
        for c in qos::all_containers(v.spec).filter(|c| running(v, c) && !v.stopping.contains(&c.name)) {
            p.stop.push((c.name.clone(), StopReason::All));
        }
        let busy = !v.starting.is_empty() || qos::all_containers(v.spec).any(|c| running(v, c));
        p.restart_all = (!busy).then(|| name.to_owned());
        return p;
    }
    if initialize(v, &mut p) {
        regular(v, &mut p);
    }
    for c in v.ephemeral {
        if v.state.current(&c.name).is_none() && !v.starting.contains(&c.name) && v.state.initialized {
            p.start.push(c.name.clone());
        }
    }
    p
}

fn running(v: &View<'_>, c: &Container) -> bool {
    v.state.current(&c.name).is_some_and(|i| i.running())
}

fn any_running(v: &View<'_>) -> bool {
    v.state.containers.values().any(Record::running)
}

/// Init containers and sidecars; true when the regular containers may run.
fn initialize(v: &View<'_>, p: &mut Plan) -> bool {
    let init = v.spec.init_containers.as_deref().unwrap_or_default();
    let ending = v.state.initialized && all_done(v.spec, v.state);
    for c in init {
        let instance = v.state.in_sandbox(&c.name).filter(|i| i.running() || !again(v.state, c));
        if is_sidecar(c) {
            match instance {
                _ if ending => {}
                Some(i) if i.running() => {
                    if changed(c, &i.image) && !v.stopping.contains(&c.name) {
                        p.stop.push((c.name.clone(), StopReason::Changed));
                    }
                    if !i.started && !v.state.initialized {
                        return false;
                    }
                }
                _ => {
                    want(v, p, c);
                    if !v.state.initialized {
                        return false;
                    }
                }
            }
        } else if !v.state.initialized {
            match instance.and_then(|i| i.ended.as_ref()) {
                Some(e) if e.code == 0 => {}
                Some(e) => {
                    if init_restarts(v.spec, c, e) {
                        want(v, p, c);
                    } else {
                        end(v, p);
                    }
                    return false;
                }
                None => {
                    if !instance.is_some_and(|i| i.running()) {
                        want(v, p, c);
                    }
                    return false;
                }
            }
        }
    }
    p.initialized = !v.state.initialized;
    true
}

/// A failed init container is only left alone when the pod never restarts anything.
pub(crate) fn init_restarts(spec: &PodSpec, c: &Container, ended: &Ended) -> bool {
    if c.restart_policy.is_some() || c.restart_policy_rules.is_some() {
        return restarts(spec, c, ended);
    }
    spec.restart_policy.as_deref() != Some("Never")
}

fn changed(c: &Container, image: &str) -> bool {
    c.image.as_deref().is_some_and(|wanted| !image.is_empty() && wanted != image)
}

fn regular(v: &View<'_>, p: &mut Plan) {
    let mut left = false;
    for c in &v.spec.containers {
        match v.state.current(&c.name) {
            Some(i) if i.running() => {
                left = true;
                if changed(c, &i.image) && !v.stopping.contains(&c.name) {
                    p.stop.push((c.name.clone(), StopReason::Changed));
                }
            }
            Some(i) if i.ended.as_ref().is_some_and(|e| !restarts(v.spec, c, e)) && !again(v.state, c) => {}
            _ => {
                left = true;
                want(v, p, c);
            }
        }
    }
    if !left {
        end(v, p);
    }
}

/// Whether every regular container has ended for good.
pub(crate) fn all_done(spec: &PodSpec, state: &PodState) -> bool {
    spec.containers.iter().all(|c| {
        let ended = state.current(&c.name).and_then(|i| i.ended.as_ref());
        ended.is_some_and(|e| !restarts(spec, c, e)) && !again(state, c)
    })
}

/// Nothing more will start: stop what still runs, then finish.
fn end(v: &View<'_>, p: &mut Plan) {
    let init = v.spec.init_containers.iter().flatten();
    for c in init.chain(v.ephemeral) {
        if running(v, c) && !v.stopping.contains(&c.name) {
            p.stop.push((c.name.clone(), StopReason::Sidecar));
        }
    }
    p.finish = v.starting.is_empty() && !any_running(v);
}

/// Starts a container unless something is under way or it has to wait.
fn want(v: &View<'_>, p: &mut Plan, c: &Container) {
    if v.starting.contains(&c.name) {
        return;
    }
    if let Some(at) = v.retry.get(&c.name).filter(|at| **at > v.now) {
        p.wake_at(*at);
        return;
    }
    let record = v.state.containers.get(&c.name);
    let ended = record.and_then(|r| r.current.as_ref()).and_then(|i| i.ended.as_ref());
    if let (Some(backoff), Some(ended)) = (record.and_then(|r| r.backoff), ended) {
        let fresh = ended.finished_at - backoff.updated <= 2 * v.backoff_max;
        let until = ended.finished_at + backoff.delay;
        if fresh && until > v.now {
            p.crash_looping.insert(c.name.clone(), backoff.delay);
            p.wake_at(until);
            return;
        }
    }
    p.start.push(c.name.clone());
}

/// The back-off a restart at `now` leaves for the next one.
pub(crate) fn next_backoff(previous: Option<Backoff>, finished_at: Nanos, now: Nanos, max: Nanos) -> Backoff {
    let delay = match previous {
        Some(b) if finished_at - b.updated <= 2 * max => (b.delay * 2).min(max),
        _ => BACKOFF_INITIAL.min(max),
    };
    Backoff { delay, updated: now }
}

#[cfg(test)]
mod tests {
    use super::{
        super::state::{Instance, Sandbox},
        *,
    };

    struct World {
        spec: PodSpec,
        state: PodState,
        starting: BTreeSet<String>,
        terminating: bool,
        now: Nanos,
    }

    fn world(spec: serde_json::Value) -> World {
        let mut state = PodState::new(0);
        state.sandbox = Some(Sandbox { attempt: 0, netns: None, ips: vec![], cgroup: String::new() });
        World {
            spec: serde_json::from_value(spec).unwrap(),
            state,
            starting: BTreeSet::new(),
            terminating: false,
            now: 1000 * SECOND,
        }
    }

    impl World {
        fn runs(mut self, name: &str) -> Self {
            let i = Instance { id: name.into(), started_at: Some(1), started: true, ..Instance::default() };
            self.state.containers.insert(name.into(), Record { current: Some(i), ..Record::default() });
            self
        }

        fn ended(mut self, name: &str, code: i32) -> Self {
            let ended = Some(Ended { code, finished_at: 999 * SECOND, ..Ended::default() });
            let i = Instance { id: name.into(), started_at: Some(1), ended, ..Instance::default() };
            self.state.containers.insert(name.into(), Record { current: Some(i), ..Record::default() });
            self
        }

        fn initialized(mut self) -> Self {
            self.state.initialized = true;
            self
        }

        fn plan(&self) -> Plan {
            plan(&View {
                spec: &self.spec,
                ephemeral: &[],
                state: &self.state,
                starting: &self.starting,
                stopping: &BTreeSet::new(),
                retry: &BTreeMap::new(),
                terminating: self.terminating,
                now: self.now,
                backoff_max: 300 * SECOND,
            })
        }
    }

    fn pod(policy: &str) -> World {
        world(serde_json::json!({"restartPolicy":policy,
            "initContainers":[{"name":"a"},{"name":"s","restartPolicy":"Always"},{"name":"b"}],
            "containers":[{"name":"c"},{"name":"d"}]}))
    }

    fn starts(p: &Plan) -> Vec<&str> {
        p.start.iter().map(String::as_str).collect()
    }

    #[test]
    fn init_containers_one_by_one_then_all_regular_ones() {
        assert_eq!(starts(&pod("Always").plan()), ["a"]);
        assert_eq!(starts(&pod("Always").runs("a").plan()), [""; 0]);
        assert_eq!(starts(&pod("Always").ended("a", 0).plan()), ["s"]);
        assert_eq!(starts(&pod("Always").ended("a", 0).runs("s").plan()), ["b"]);
        let p = pod("Always").ended("a", 0).runs("s").ended("b", 0).plan();
        assert_eq!(starts(&p), ["c", "d"]);
        assert!(p.initialized);
    }

    #[test]
    fn a_failed_init_container() {
        assert_eq!(starts(&pod("OnFailure").ended("a", 1).plan()), ["a"]);
        let p = pod("Never").ended("a", 1).plan();
        assert_eq!((starts(&p).len(), p.finish), (0, true));
    }

    #[test]
    fn restart_policies() {
        let both = |w: World| w.ended("a", 0).runs("s").ended("b", 0).initialized();
        let p = both(pod("Always")).ended("c", 0).runs("d").plan();
        assert_eq!(starts(&p), ["c"]);
        let p = both(pod("OnFailure")).ended("c", 0).ended("d", 2).plan();
        assert_eq!(starts(&p), ["d"]);
        let p = both(pod("Never")).ended("c", 0).runs("d").plan();
        assert_eq!((starts(&p).len(), p.finish), (0, false));
        let p = both(pod("Never")).ended("c", 0).ended("d", 1).plan();
        assert_eq!(p.stop, [("s".to_string(), StopReason::Sidecar)]);
        let p = both(pod("Never")).ended("s", 0).ended("c", 0).ended("d", 1).plan();
        assert!(p.finish && p.start.is_empty());
    }

    #[test]
    fn a_dead_sidecar_comes_back() {
        let p = pod("Never").ended("a", 0).ended("s", 0).ended("b", 0).initialized().runs("c").runs("d").plan();
        assert_eq!(starts(&p), ["s"]);
    }

    #[test]
    fn crash_loop_waits_and_wakes() {
        let mut w = world(serde_json::json!({"containers":[{"name":"c"}]})).ended("c", 1);
        w.state.containers.get_mut("c").unwrap().backoff = Some(Backoff { delay: 20 * SECOND, updated: 950 * SECOND });
        let p = w.plan();
        assert_eq!(p.crash_looping.get("c"), Some(&(20 * SECOND)));
        assert_eq!(p.wake, Some(1019 * SECOND));
        w.now = 1019 * SECOND;
        assert_eq!(starts(&w.plan()), ["c"]);
    }

    #[test]
    fn backoff_numbers() {
        let (max, s) = (300 * SECOND, SECOND);
        let mut b = None;
        let mut seen = vec![];
        let mut t = 0;
        for _ in 0..7 {
            let next = next_backoff(b, t, t, max);
            seen.push(next.delay / s);
            t += next.delay;
            b = Some(next);
        }
        assert_eq!(seen, [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(next_backoff(b, t + 700 * s, t + 700 * s, max).delay, 10 * s);
    }

    #[test]
    fn termination_stops_everything_once() {
        let mut w = pod("Always").ended("a", 0).runs("s").ended("b", 0).runs("c").ended("d", 0);
        w.terminating = true;
        let p = w.plan();
        assert_eq!(p.stop.iter().map(|s| s.0.as_str()).collect::<Vec<_>>(), ["c", "s"]);
        assert!(!p.finish && p.start.is_empty());
        let mut w = pod("Always").ended("a", 0);
        w.terminating = true;
        assert!(w.plan().finish);
        w.starting.insert("s".into());
        assert!(!w.plan().finish);
    }

    #[test]
    fn active_deadline() {
        let mut w = world(serde_json::json!({"activeDeadlineSeconds":5,"containers":[{"name":"c"}]})).runs("c");
        assert!(w.plan().deadline_exceeded);
        w.now = 3 * SECOND;
        assert_eq!(w.plan().wake, Some(5 * SECOND));
    }

    #[test]
    fn a_rule_restarts_all_containers_from_the_first() {
        let rules = serde_json::json!([{"action":"RestartAllContainers","exitCodes":{"operator":"In","values":[88]}}]);
        let w = world(serde_json::json!({"restartPolicy":"Never","initContainers":[{"name":"a"}],
            "containers":[{"name":"c","restartPolicyRules":rules},{"name":"d"}]}));
        let mut w = w.ended("a", 0).ended("c", 88).runs("d").initialized();
        let p = w.plan();
        assert_eq!((p.stop, p.restart_all), (vec![("d".to_string(), StopReason::All)], None));
        w = w.ended("d", 137);
        assert_eq!(w.plan().restart_all.as_deref(), Some("c"));
        w.state.begin_again("c");
        for step in ["a", "c"] {
            assert_eq!(w.plan().start[0], step);
            w = w.ended(step, 0);
            w.state.initialized = true;
        }
        // Another code is no match.
        assert_eq!(w.ended("c", 1).plan().restart_all, None);
    }

    #[test]
    fn restart_rules_of_one_container() {
        let w = world(serde_json::json!({"restartPolicy":"Never","containers":[{"name":"c","restartPolicy":"Never",
            "restartPolicyRules":[{"action":"Restart","exitCodes":{"operator":"In","values":[42]}}]}]}));
        let mut again = w.ended("c", 42);
        assert_eq!(starts(&again.plan()), ["c"]);
        again = again.ended("c", 1);
        assert!(again.plan().finish);
    }
}
