//! Liveness, readiness and startup probes: one task per probe, its own timer, results only when they turn.
//!
//! In: a running container. Out: [`Verdict`]s to the pod's worker, Unhealthy events. The counting is pure ([`Counter`]).

mod grpc;
pub(crate) mod http;

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction, Pod, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use tokio::time::Instant;

use crate::{context::Context, events::Kind as EventKind, pods::exec, runtime::Supervisor};

/// Which probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// A probe's result has turned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) container: String,
    pub(crate) id: String,
    pub(crate) kind: Kind,
    pub(crate) good: bool,
}

/// What a probe is pointed at.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) ctx: Arc<Context>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) id: String,
    pub(crate) supervisor: Supervisor,
    pub(crate) bundle: PathBuf,
    pub(crate) ip: Option<IpAddr>,
    /// How long the container has been running.
    pub(crate) age: Duration,
}

/// Threshold counting: a result turns when as many in a row as its threshold say so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counter {
    pub(crate) result: Option<bool>,
    last: Option<bool>,
    run: u32,
    success: u32,
    failure: u32,
}

impl Counter {
    /// Starts from a known result (after a restart of the agent) or none.
    pub(crate) fn new(result: Option<bool>, success: u32, failure: u32) -> Self {
        Self { result, last: None, run: 0, success: success.max(1), failure: failure.max(1) }
    }

    /// Counts one answer; the new result when it turned.
    pub(crate) fn count(&mut self, good: bool) -> Option<bool> {
        self.run = if self.last == Some(good) { self.run + 1 } else { 1 };
        self.last = Some(good);
        let threshold = if good { self.success } else { self.failure };
        if self.run < threshold || self.result == Some(good) {
            return None;
        }
        self.result = Some(good);
        self.result
    }
}

/// The probe of a kind, if the container has one.
pub(crate) fn of(c: &Container, kind: Kind) -> Option<&Probe> {
    match kind {
        Kind::Startup => c.startup_probe.as_ref(),
        Kind::Liveness => c.liveness_probe.as_ref(),
        Kind::Readiness => c.readiness_probe.as_ref(),
    }
}

/// Starts a probe. `known` is its result before a restart of the agent.
pub(crate) fn spawn(
    target: Target,
    kind: Kind,
    known: Option<bool>,
    report: impl Fn(Verdict) + Send + 'static,
) -> Option<tokio::task::AbortHandle> {
    let probe = of(&target.container, kind)?.clone();
    Some(tokio::spawn(run(target, kind, probe, known, report)).abort_handle())
}

async fn run(target: Target, kind: Kind, probe: Probe, known: Option<bool>, report: impl Fn(Verdict)) {
    let seconds =
        |v: Option<i32>, default: u64| Duration::from_secs(v.and_then(|v| u64::try_from(v).ok()).unwrap_or(default));
    let at_least = |v: Option<i32>, default: u32| v.and_then(|v| u32::try_from(v).ok()).unwrap_or(default).max(1);
    let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
    let timeout = seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1));
    let delay = seconds(probe.initial_delay_seconds, 0).saturating_sub(target.age);
    // Before its first word a liveness probe is good and a readiness probe is bad; a startup probe has to speak.
    let start = known.or(match kind {
        Kind::Startup => None,
        Kind::Liveness => Some(true),
        Kind::Readiness => Some(false),
    });
    let mut counter = Counter::new(start, at_least(probe.success_threshold, 1), at_least(probe.failure_threshold, 3));
    let first = Instant::now() + delay;
    let mut timer = tokio::time::interval_at(first, period);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let asked = Instant::now();
        let answer = once(&target, kind, &probe, timeout).await;
        measure(&target, kind, answer.is_ok(), asked.elapsed());
        if let Err(text) = &answer {
            let message = format!("{} probe failed: {text}", kind.name());
            target.ctx.events.container(&target.pod, &target.container.name, EventKind::Warning, "Unhealthy", message);
        }
        if let Some(good) = counter.count(answer.is_ok()) {
            let verdict = Verdict { container: target.container.name.clone(), id: target.id.clone(), kind, good };
            report(verdict);
            if kind == Kind::Startup || (kind == Kind::Liveness && !good) {
                return;
            }
        }
    }
}

fn measure(t: &Target, kind: Kind, good: bool, took: Duration) {
    let (m, meta) = (&t.ctx.metrics, &t.pod.metadata);
    let (namespace, pod) = (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default());
    let uid = meta.uid.as_deref().unwrap_or_default();
    let result = if good { "successful" } else { "failed" };
    let own = [("container", t.container.name.as_str()), ("namespace", namespace), ("pod", pod)];
    let [c, n, p] = own;
    m.count("prober_probe_total", [c, n, p, ("pod_uid", uid), ("probe_type", kind.name()), ("result", result)]);
    m.observe("prober_probe_duration_seconds", [c, n, p, ("probe_type", kind.name())], took);
}

async fn once(t: &Target, kind: Kind, p: &Probe, timeout: Duration) -> Result<(), String> {
    if let Some(e) = &p.exec {
        let command = e.command.clone().unwrap_or_default();
        let begun = std::time::Instant::now();
        let ran = exec::capture(&t.supervisor, &t.id, &t.bundle, &command, timeout).await;
        t.ctx.metrics.operation("exec_sync", begun, ran.is_ok());
        return match ran {
            Ok((0, _)) => Ok(()),
            Ok((_, said)) => Err(said),
            Err(e) => Err(e.to_string()),
        };
    }
    let ip = t.ip.ok_or("the pod has no address")?;
    if let Some(h) = &p.http_get {
        let ip = address(h.host.as_deref(), ip).await?;
        let request = http_get(h, ip, &t.container, "kube-probe/1.36")?;
        let answer = http::get(&request, timeout).await?;
        return match answer.status {
            300..400 => {
                let text = format!(
                    "{} probe warning: Probe terminated redirects, Response body: {}",
                    kind.name(),
                    answer.body
                );
                t.ctx.events.container(&t.pod, &t.container.name, EventKind::Warning, "ProbeWarning", text);
                Ok(())
            }
            200..300 => Ok(()),
            status => Err(format!("HTTP probe failed with statuscode: {status}")),
        };
    }
    if let Some(s) = &p.tcp_socket {
        let host = address(s.host.as_deref(), ip).await?;
        let port = port(&s.port, &t.container)?;
        return match tokio::time::timeout(timeout, http::dial(host, port)).await {
            Ok(r) => r.map(|_| ()),
            Err(_) => Err(format!("dial tcp {host}:{port}: i/o timeout")),
        };
    }
    if let Some(g) = &p.grpc {
        let port = u16::try_from(g.port).map_err(|_| format!("invalid port {}", g.port))?;
        return grpc::check(ip, port, g.service.as_deref().unwrap_or(""), timeout).await;
    }
    Err("missing probe handler".into())
}

/// The address a probe or hook goes to: its host's, or the pod's.
pub(crate) async fn address(host: Option<&str>, pod: IpAddr) -> Result<IpAddr, String> {
    match host.filter(|h| !h.is_empty()) {
        None => Ok(pod),
        Some(h) => match h.parse() {
            Ok(ip) => Ok(ip),
            Err(_) => {
                let mut found = tokio::net::lookup_host((h, 0)).await.map_err(|e| e.to_string())?;
                found.next().map(|a| a.ip()).ok_or_else(|| format!("lookup {h}: no such host"))
            }
        },
    }
}

fn port(p: &IntOrString, c: &Container) -> Result<u16, String> {
    let number = match p {
        IntOrString::Int(n) => Some(*n),
        IntOrString::String(s) => s.parse().ok().or_else(|| {
            let named = c.ports.iter().flatten().find(|p| p.name.as_deref() == Some(s));
            named.map(|p| p.container_port)
        }),
    };
    let text = match p {
        IntOrString::Int(n) => n.to_string(),
        IntOrString::String(s) => s.clone(),
    };
    number
        .and_then(|n| u16::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("couldn't find port: {text:?} in container {:?}", c.name))
}

/// A probe's or hook's HTTP request to an address.
pub(crate) fn http_get(h: &HTTPGetAction, ip: IpAddr, c: &Container, agent: &'static str) -> Result<http::Get, String> {
    let host = h.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| ip.to_string());
    let path = h.path.clone().unwrap_or_default();
    Ok(http::Get {
        ip,
        host,
        port: port(&h.port, c)?,
        path: if path.starts_with('/') { path } else { format!("/{path}") },
        https: h.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https")),
        headers: h.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect(),
        agent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let mut c = Counter::new(Some(false), 2, 3);
        let seen: Vec<Option<bool>> =
            [true, true, true, false, false, true, false, false, false].map(|g| c.count(g)).into();
        assert_eq!(seen, [None, Some(true), None, None, None, None, None, None, Some(false)]);
        let mut startup = Counter::new(None, 1, 2);
        assert_eq!([startup.count(false), startup.count(false)], [None, Some(false)]);
    }

    #[test]
    fn ports_by_name_and_number() {
        let c: Container =
            serde_json::from_value(serde_json::json!({"name":"c","ports":[{"name":"web","containerPort":8080}]}))
                .unwrap();
        assert_eq!(port(&IntOrString::String("web".into()), &c), Ok(8080));
        assert_eq!(port(&IntOrString::Int(80), &c), Ok(80));
        assert!(port(&IntOrString::String("none".into()), &c).is_err());
    }
}
