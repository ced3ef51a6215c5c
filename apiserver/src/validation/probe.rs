//! Probes, lifecycle hooks and the handlers they share.

use isopod_api::names;

use super::{At, Errs};

/// The three probes of a container.
pub(crate) fn probes(e: &mut Errs, container: &At<'_>, grace: i64) {
    let liveness = container.get("livenessProbe");
    probe(e, &liveness, grace);
    must_succeed_once(e, &liveness);
    let readiness = container.get("readinessProbe");
    probe(e, &readiness, grace);
    let seconds = readiness.get("terminationGracePeriodSeconds");
    if seconds.is_set() {
        e.invalid(&seconds, "must not be set for readinessProbes");
    }
    let startup = container.get("startupProbe");
    probe(e, &startup, grace);
    must_succeed_once(e, &startup);
}

fn must_succeed_once(e: &mut Errs, probe: &At<'_>) {
    let threshold = probe.get("successThreshold");
    if probe.is_set() && threshold.is_set() && threshold.int0() != 1 {
        e.invalid(&threshold, "must be 1");
    }
}

fn probe(e: &mut Errs, at: &At<'_>, grace: i64) {
    if !at.is_set() {
        return;
    }
    handler(e, at, grace);
    for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        e.non_negative(&at.get(field));
    }
    let seconds = at.get("terminationGracePeriodSeconds");
    if seconds.int().is_some_and(|n| n <= 0) {
        e.invalid(&seconds, "must be greater than 0");
    }
}

/// `postStart`, `preStop` and the stop signal.
pub(crate) fn lifecycle(e: &mut Errs, at: &At<'_>, grace: i64) {
    for hook in ["postStart", "preStop"] {
        let hook = at.get(hook);
        if hook.is_set() {
            handler(e, &hook, grace);
        }
    }
}

fn handler(e: &mut Errs, at: &At<'_>, grace: i64) {
    let mut handlers = 0;
    for kind in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let action = at.get(kind);
        if !action.is_set() {
            continue;
        }
        handlers += 1;
        if handlers > 1 {
            e.forbidden(&action, "may not specify more than 1 handler type");
            continue;
        }
        match kind {
            "exec" => {
                if action.get("command").len() == 0 {
                    e.required(&action.get("command"), "");
                }
            }
            "httpGet" => http_get(e, &action),
            "tcpSocket" | "grpc" => e.port_or_name(&action.get("port")),
            _ => sleep(e, &action, grace),
        }
    }
    if handlers == 0 {
        e.required(at, "must specify a handler type");
    }
}

fn http_get(e: &mut Errs, at: &At<'_>) {
    if at.get("path").s().is_empty() {
        e.required(&at.get("path"), "");
    }
    e.port_or_name(&at.get("port"));
    e.one_of(&at.get("scheme"), &["HTTP", "HTTPS"]);
    for header in at.get("httpHeaders").items() {
        let name = header.get("name");
        let list = at.get("httpHeaders");
        for message in names::http_header_name(name.s()) {
            e.invalid_as(&list, name.s(), &message);
        }
    }
}

fn sleep(e: &mut Errs, at: &At<'_>, grace: i64) {
    let seconds = at.get("seconds").int0();
    if seconds < 0 || seconds > grace {
        let detail = format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
        e.invalid_as(at, seconds, &detail);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_handler_only() {
        let obj = json!({"c": {"livenessProbe": {"httpGet": {"port": 0, "path": "/", "scheme": "HTTP"}, "tcpSocket": {"port": "x"}},
            "readinessProbe": {}, "lifecycle": {"postStart": {"sleep": {"seconds": -1}}}}});
        let mut e = Errs::new();
        let container = At::field(&obj, "c");
        probes(&mut e, &container, 30);
        lifecycle(&mut e, &container.get("lifecycle"), 30);
        let text: Vec<String> = e.0.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "c.livenessProbe.httpGet.port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "c.livenessProbe.tcpSocket: Forbidden: may not specify more than 1 handler type",
                "c.readinessProbe: Required value: must specify a handler type",
                "c.lifecycle.postStart.sleep: Invalid value: -1: must be non-negative and less than terminationGracePeriodSeconds (30)",
            ]
        );
    }
}
