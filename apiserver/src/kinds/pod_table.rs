//! The row of a pod in `kubectl get pods`.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::registry::table;

/// Name, Ready, Status, Restarts, Age, IP, Node, Nominated Node, Readiness Gates.
pub(crate) fn cells(obj: &Value, now: Timestamp) -> Vec<Value> {
    let row = Row::new(obj, now);
    vec![
        table::name(obj),
        json!(format!("{}/{}", row.ready, row.total)),
        json!(row.reason),
        json!(row.restarts),
        table::age(obj, now),
        table::or(&obj["status"]["podIPs"][0]["ip"], "<none>"),
        table::or(&obj["spec"]["nodeName"], "<none>"),
        table::or(&obj["status"]["nominatedNodeName"], "<none>"),
        json!(readiness_gates(obj)),
    ]
}

struct Row {
    ready: usize,
    total: usize,
    reason: String,
    restarts: String,
}

#[derive(Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, status: &Value) {
        self.count += status["restartCount"].as_i64().unwrap_or_default();
        let finished = table::timestamp(&status["lastState"]["terminated"]["finishedAt"]);
        self.last = self.last.max(finished);
    }

    fn text(&self, now: Timestamp) -> String {
        match self.last {
            Some(last) if self.count > 0 => {
                format!("{} ({} ago)", self.count, table::human_duration(now.duration_since(last).as_secs()))
            }
            _ => self.count.to_string(),
        }
    }
}

fn list(v: &Value) -> &[Value] {
    v.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(v: &'a Value, field: &str) -> &'a str {
    v[field].as_str().unwrap_or_default()
}

impl Row {
    fn new(obj: &Value, now: Timestamp) -> Self {
        let (spec, status) = (&obj["spec"], &obj["status"]);
        let sidecar = |name: &str| {
            list(&spec["initContainers"])
                .iter()
                .any(|c| text(c, "name") == name && text(c, "restartPolicy") == "Always")
        };
        let sidecars = list(&spec["initContainers"]).iter().filter(|c| text(c, "restartPolicy") == "Always").count();
        let mut row = Row {
            ready: 0,
            total: list(&spec["containers"]).len() + sidecars,
            reason: first(&[text(status, "reason"), text(status, "phase")]).to_owned(),
            restarts: String::new(),
        };
        let gated = list(&status["conditions"])
            .iter()
            .any(|c| text(c, "type") == "PodScheduled" && text(c, "reason") == "SchedulingGated");
        if gated {
            row.reason = "SchedulingGated".to_owned();
        }
        let (mut all, mut sidecar_restarts) = (Restarts::default(), Restarts::default());
        let initializing = row.init(status, list(&spec["initContainers"]), &sidecar, &mut all, &mut sidecar_restarts);
        let initialized =
            list(&status["conditions"]).iter().any(|c| text(c, "type") == "Initialized" && text(c, "status") == "True");
        if !initializing || initialized {
            row.main(status, &mut sidecar_restarts);
            all = sidecar_restarts;
        }
        row.restarts = all.text(now);
        if obj["metadata"].get("deletionTimestamp").is_some_and(|t| !t.is_null()) {
            if text(status, "reason") == "NodeLost" {
                row.reason = "Unknown".to_owned();
            } else if !matches!(text(status, "phase"), "Succeeded" | "Failed") {
                row.reason = "Terminating".to_owned();
            }
        }
        row
    }

    /// Looks at the init containers; true while they are not done.
    fn init(
        &mut self,
        status: &Value,
        specs: &[Value],
        sidecar: &dyn Fn(&str) -> bool,
        all: &mut Restarts,
        sidecars: &mut Restarts,
    ) -> bool {
        for (i, own) in list(&status["initContainerStatuses"]).iter().enumerate() {
            all.add(own);
            let is_sidecar = sidecar(text(own, "name"));
            if is_sidecar {
                sidecars.add(own);
            }
            let terminated = &own["state"]["terminated"];
            if !terminated.is_null() && terminated["exitCode"].as_i64() == Some(0) {
                continue;
            }
            if is_sidecar && own["started"] == true {
                if own["ready"] == true {
                    self.ready += 1;
                }
                continue;
            }
            let waiting = text(&own["state"]["waiting"], "reason");
            self.reason = if !terminated.is_null() {
                format!("Init:{}", exit_text(terminated))
            } else if !waiting.is_empty() && waiting != "PodInitializing" {
                format!("Init:{waiting}")
            } else {
                format!("Init:{i}/{}", specs.len())
            };
            return true;
        }
        false
    }

    fn main(&mut self, status: &Value, restarts: &mut Restarts) {
        let mut running = false;
        for own in list(&status["containerStatuses"]).iter().rev() {
            restarts.add(own);
            let (waiting, terminated) = (text(&own["state"]["waiting"], "reason"), &own["state"]["terminated"]);
            if !waiting.is_empty() {
                self.reason = waiting.to_owned();
            } else if !terminated.is_null() {
                self.reason = exit_text(terminated);
            } else if own["ready"] == true && !own["state"]["running"].is_null() {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" && running {
            let ready =
                list(&status["conditions"]).iter().any(|c| text(c, "type") == "Ready" && text(c, "status") == "True");
            self.reason = if ready { "Running" } else { "NotReady" }.to_owned();
        }
    }
}

/// The reason of a terminated container, else its signal or exit code.
fn exit_text(terminated: &Value) -> String {
    let reason = text(terminated, "reason");
    if !reason.is_empty() {
        return reason.to_owned();
    }
    match terminated["signal"].as_i64().unwrap_or_default() {
        0 => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or_default()),
        signal => format!("Signal:{signal}"),
    }
}

fn first<'a>(texts: &[&'a str]) -> &'a str {
    texts.iter().find(|t| !t.is_empty()).copied().unwrap_or_default()
}

fn readiness_gates(obj: &Value) -> String {
    let gates = list(&obj["spec"]["readinessGates"]);
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let met = gates.iter().filter(|gate| {
        list(&obj["status"]["conditions"])
            .iter()
            .any(|c| c["type"] == gate["conditionType"] && text(c, "status") == "True")
    });
    format!("{}/{}", met.count(), gates.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pod: Value) -> String {
        let now = "2020-01-01T01:00:00Z".parse().expect("time");
        let cells = cells(&pod, now);
        cells[1..4].iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn table() {
        let one = json!([{"name": "c"}]);
        let running = json!({"name": "c", "ready": true, "restartCount": 0, "state": {"running": {}}});
        for (pod, want) in [
            (
                json!({"spec": {"containers": one}, "status": {"phase": "Running", "containerStatuses": [running]}}),
                "1/1 Running 0",
            ),
            (
                json!({"spec": {"containers": one}, "status": {"phase": "Running", "containerStatuses": [
                {"name": "c", "ready": false, "restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                 "lastState": {"terminated": {"finishedAt": "2020-01-01T00:58:00Z"}}}]}}),
                "0/1 CrashLoopBackOff 4 (2m ago)",
            ),
            (
                json!({"spec": {"containers": one}, "status": {"phase": "Succeeded", "containerStatuses": [
                {"name": "c", "restartCount": 0, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}}),
                "0/1 Completed 0",
            ),
            (
                json!({"spec": {"containers": one, "initContainers": [{"name": "i"}, {"name": "j"}]}, "status": {"phase": "Pending",
                "initContainerStatuses": [{"name": "i", "restartCount": 2, "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]}}),
                "0/1 Init:Error 2",
            ),
            (
                json!({"spec": {"containers": one, "initContainers": [{"name": "i"}, {"name": "j"}]}, "status": {"phase": "Pending",
                "initContainerStatuses": [{"name": "i", "restartCount": 0, "state": {"running": {}}}]}}),
                "0/1 Init:0/2 0",
            ),
            (
                json!({"spec": {"containers": one, "initContainers": [{"name": "s", "restartPolicy": "Always"}]}, "status": {"phase": "Running",
                "initContainerStatuses": [{"name": "s", "ready": true, "started": true, "restartCount": 1, "state": {"running": {}}}],
                "containerStatuses": [running]}}),
                "2/2 Running 1",
            ),
            (
                json!({"metadata": {"deletionTimestamp": "2020-01-01T00:00:00Z"}, "spec": {"containers": one}, "status": {"phase": "Running"}}),
                "0/1 Terminating 0",
            ),
            (json!({"spec": {"containers": one}, "status": {"phase": "Failed", "reason": "Evicted"}}), "0/1 Evicted 0"),
        ] {
            assert_eq!(row(pod.clone()), want, "{pod}");
        }
    }
}
