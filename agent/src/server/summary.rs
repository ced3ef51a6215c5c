//! /metrics/resource, made from the Summary object under upstream's names.

use serde_json::Value;

use super::exposition::Exposition;

fn cpu_seconds(stats: &Value) -> Option<f64> {
    Some(stats["cpu"]["usageCoreNanoSeconds"].as_f64()? / 1e9)
}

fn working_set(stats: &Value) -> Option<f64> {
    stats["memory"]["workingSetBytes"].as_f64()
}

fn swap(stats: &Value) -> Option<f64> {
    stats["swap"]["swapUsageBytes"].as_f64()
}

fn swap_limit(stats: &Value) -> Option<f64> {
    Some(swap(stats)? + stats["swap"]["swapAvailableBytes"].as_f64()?)
}

fn start_seconds(stats: &Value) -> Option<f64> {
    let time: jiff::Timestamp = stats["startTime"].as_str()?.parse().ok()?;
    Some(time.as_second() as f64)
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// Calls `sample` for each container with its labels: container, namespace, pod.
fn each_container(summary: &Value, mut sample: impl FnMut(&[(&str, &str)], &Value)) {
    for pod in list(summary, "pods") {
        let reference = &pod["podRef"];
        let namespace = reference["namespace"].as_str().unwrap_or_default();
        let name = reference["name"].as_str().unwrap_or_default();
        for container in list(pod, "containers") {
            let container_name = container["name"].as_str().unwrap_or_default();
            sample(&[("container", container_name), ("namespace", namespace), ("pod", name)], container);
        }
    }
}

/// /metrics/resource: what metrics-server reads.
pub(crate) fn resource_metrics(summary: &Value) -> String {
    let mut family = Exposition::default();
    type Get = fn(&Value) -> Option<f64>;
    let containers: [(&str, &str, &str, Get); 5] = [
        ("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the container.", cpu_seconds),
        ("container_memory_working_set_bytes", "gauge", "Current working set of the container.", working_set),
        ("container_start_time_seconds", "gauge", "Start time of the container since unix epoch.", start_seconds),
        ("container_swap_limit_bytes", "gauge", "Current amount of the container swap limit in bytes.", swap_limit),
        ("container_swap_usage_bytes", "gauge", "Current amount of the container swap usage in bytes.", swap),
    ];
    for (name, kind, help, get) in containers {
        family.begin(name, kind, help);
        each_container(summary, |labels, stats| family.sample(name, labels, get(stats)));
    }
    let node: [(&str, &str, &str, Get); 3] = [
        ("node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node.", cpu_seconds),
        ("node_memory_working_set_bytes", "gauge", "Current working set of the node.", working_set),
        ("node_swap_usage_bytes", "gauge", "Current swap usage of the node in bytes.", swap),
    ];
    for (name, kind, help, get) in node {
        family.begin(name, kind, help);
        family.sample(name, &[], get(&summary["node"]));
    }
    let pods: [(&str, &str, &str, Get); 3] = [
        ("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod.", cpu_seconds),
        ("pod_memory_working_set_bytes", "gauge", "Current working set of the pod.", working_set),
        ("pod_swap_usage_bytes", "gauge", "Current amount of the pod swap usage in bytes.", swap),
    ];
    for (name, kind, help, get) in pods {
        family.begin(name, kind, help);
        for pod in list(summary, "pods") {
            let namespace = pod["podRef"]["namespace"].as_str().unwrap_or_default();
            let pod_name = pod["podRef"]["name"].as_str().unwrap_or_default();
            family.sample(name, &[("namespace", namespace), ("pod", pod_name)], get(pod));
        }
    }
    let help = "1 if there was an error while getting container metrics, 0 otherwise.";
    family.single("resource_scrape_error", "gauge", help, Some(0.0));
    family.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn samples_carry_upstreams_names_and_labels() {
        let summary = json!({
            "node": {"cpu": {"usageCoreNanoSeconds": 2_500_000_000_u64}, "memory": {"workingSetBytes": 1000}},
            "pods": [{"podRef": {"name": "p", "namespace": "n"},
                "containers": [{"name": "c", "memory": {"workingSetBytes": 7},
                    "swap": {"swapUsageBytes": 5, "swapAvailableBytes": 15}, "startTime": "1970-01-01T00:00:09Z"}]}],
        });
        let text = resource_metrics(&summary);
        for line in [
            "node_cpu_usage_seconds_total 2.5",
            "container_memory_working_set_bytes{container=\"c\",namespace=\"n\",pod=\"p\"} 7",
            "container_swap_limit_bytes{container=\"c\",namespace=\"n\",pod=\"p\"} 20",
            "container_start_time_seconds{container=\"c\",namespace=\"n\",pod=\"p\"} 9",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} not in\n{text}");
        }
        assert!(!text.contains("container_cpu_usage_seconds_total{"));
    }
}
