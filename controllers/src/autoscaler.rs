//! HorizontalPodAutoscaler: follows resource metrics when something serves them, and says so when nothing does.
//!
//! In: autoscalers, the scale of their targets, `metrics.k8s.io`. Out: the scale, conditions. Only resource metrics.

use crate::context::Context;
use crate::pods;
use isopod_client::objects::{HasMeta, is_not_found, message};
use isopod_client::quantity::milli;
use isopod_client::select::Selector;
use isopod_client::{Change, Queue, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::{HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "horizontal-pod-autoscaler-controller";
/// Metrics have no watch: this is upstream's own period.
const PERIOD: Duration = Duration::from_secs(15);
const TOLERANCE: f64 = 0.1;

type Key = (String, String);

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.autoscalers.subscribe(move |change| {
        let status_only = matches!(change, Change::Updated(old, new) if old.spec == new.spec);
        if !status_only {
            let hpa = change.object();
            q.add((hpa.namespace().to_owned(), hpa.name().to_owned()));
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 2, &ctx.stop, move |key| {
        let ctx = context.clone();
        async move { sync(&ctx, &key).await }
    });
}

fn set(hpa: &mut HorizontalPodAutoscaler, kind: &str, status: &str, reason: &str, text: &str) {
    let conditions = hpa.status.get_or_insert_default().conditions.get_or_insert_default();
    let old = conditions.iter().find(|c| c.type_ == kind && c.status == status);
    let since = old.and_then(|c| c.last_transition_time.clone()).or_else(|| Some(Time(Timestamp::now())));
    let new = HorizontalPodAutoscalerCondition {
        type_: kind.into(),
        status: status.into(),
        reason: Some(reason.into()),
        message: Some(text.into()),
        last_transition_time: since,
    };
    match conditions.iter_mut().find(|c| c.type_ == kind) {
        Some(slot) => *slot = new,
        None => conditions.push(new),
    }
}

fn scale_path(hpa: &HorizontalPodAutoscaler) -> String {
    let target = &hpa.spec.scale_target_ref;
    let version = target.api_version.as_deref().unwrap_or("v1");
    let root = if version.contains('/') { "/apis" } else { "/api" };
    // Every scalable built-in kind has the regular plural.
    let plural = format!("{}s", target.kind.to_ascii_lowercase());
    format!("{root}/{version}/namespaces/{}/{plural}/{}/scale", hpa.namespace(), target.name)
}

async fn sync(ctx: &Context, key: &Key) -> Result<Option<Duration>, kube::Error> {
    let Some(hpa) = ctx.caches.autoscalers.get(&key.0, &key.1).filter(|h| !h.deleting()) else { return Ok(None) };
    let recorder = ctx.recorder.component("horizontal-pod-autoscaler");
    let mut new = (*hpa).clone();
    new.status.get_or_insert_default().observed_generation = hpa.metadata.generation;
    let path = scale_path(&hpa);
    match ctx.objects.get_path::<Value>(&path).await {
        Err(error) => {
            let text = format!("the HPA controller was unable to get the target's current scale: {}", message(&error));
            recorder.warning(&*hpa, "FailedGetScale", message(&error));
            set(&mut new, "AbleToScale", "False", "FailedGetScale", &text);
        }
        Ok(scale) => {
            let text = "the HPA controller was able to get the target's current scale";
            set(&mut new, "AbleToScale", "True", "SucceededGetScale", text);
            let current = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
            let status = new.status.get_or_insert_default();
            status.current_replicas =
                scale.pointer("/status/replicas").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
            status.desired_replicas = i32::try_from(current).unwrap_or(i32::MAX);
            if current == 0 {
                set(
                    &mut new,
                    "ScalingActive",
                    "False",
                    "ScalingDisabled",
                    "scaling is disabled since the replica count of the target is zero",
                );
            } else {
                follow(ctx, &hpa, &mut new, &scale, current, &path).await?;
            }
        }
    }
    match ctx.objects.update(&*hpa, &new, "status").await {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(Some(PERIOD)),
    }
}

async fn follow(
    ctx: &Context,
    hpa: &HorizontalPodAutoscaler,
    new: &mut HorizontalPodAutoscaler,
    scale: &Value,
    current: i64,
    path: &str,
) -> Result<(), kube::Error> {
    let recorder = ctx.recorder.component("horizontal-pod-autoscaler");
    let selector = scale.pointer("/status/selector").and_then(Value::as_str).unwrap_or_default();
    let spec = hpa.spec.clone();
    let mut wanted: Option<i64> = None;
    let mut failure = None;
    for metric in spec.metrics.iter().flatten() {
        let Some(resource) = metric.resource.as_ref() else {
            failure = Some(("FailedGetResourceMetric", format!("unable to serve metrics of type {}", metric.type_)));
            continue;
        };
        match proposal(
            ctx,
            hpa,
            &resource.name,
            resource.target.average_utilization,
            resource.target.average_value.as_ref(),
            selector,
            current,
        )
        .await
        {
            Ok(count) => wanted = Some(wanted.map_or(count, |w| w.max(count))),
            Err(text) => failure = Some(("FailedGetResourceMetric", text)),
        }
    }
    let Some(wanted) = wanted else {
        let (reason, text) = failure.unwrap_or(("FailedGetResourceMetric", "no metrics to follow".to_owned()));
        let full = format!("the HPA was unable to compute the replica count: {text}");
        recorder.warning(hpa, reason, text);
        recorder.warning(hpa, "FailedComputeMetricsReplicas", full.clone());
        set(new, "ScalingActive", "False", reason, &full);
        return Ok(());
    };
    set(
        new,
        "ScalingActive",
        "True",
        "ValidMetricFound",
        "the HPA was able to successfully calculate a replica count from cpu resource utilization (percentage of request)",
    );
    let (least, most) = (i64::from(spec.min_replicas.unwrap_or(1)), i64::from(spec.max_replicas));
    let bounded = wanted.clamp(least, most.max(least));
    match bounded.cmp(&wanted) {
        std::cmp::Ordering::Equal => set(
            new,
            "ScalingLimited",
            "False",
            "DesiredWithinRange",
            "the desired count is within the acceptable range",
        ),
        std::cmp::Ordering::Less => set(
            new,
            "ScalingLimited",
            "True",
            "TooManyReplicas",
            "the desired replica count is more than the maximum replica count",
        ),
        std::cmp::Ordering::Greater => set(
            new,
            "ScalingLimited",
            "True",
            "TooFewReplicas",
            "the desired replica count is less than the minimum replica count",
        ),
    }
    new.status.get_or_insert_default().desired_replicas = i32::try_from(bounded).unwrap_or(i32::MAX);
    if bounded == current {
        return Ok(());
    }
    ctx.objects.merge_path::<Value>(path, &json!({"spec": {"replicas": bounded}})).await?;
    let text = format!("New size: {bounded}; reason: cpu resource utilization (percentage of request) changed");
    recorder.normal(hpa, "SuccessfulRescale", text);
    set(
        new,
        "AbleToScale",
        "True",
        "SucceededRescale",
        &format!("the HPA controller was able to update the target scale to {bounded}"),
    );
    new.status.get_or_insert_default().last_scale_time = Some(Time(Timestamp::now()));
    Ok(())
}

/// How many replicas would bring the average to its target.
async fn proposal(
    ctx: &Context,
    hpa: &HorizontalPodAutoscaler,
    resource: &str,
    utilization: Option<i32>,
    average: Option<&Quantity>,
    selector: &str,
    current: i64,
) -> Result<i64, String> {
    let query = isopod_client::reflect::percent(selector);
    let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{}/pods?labelSelector={query}", hpa.namespace());
    let metrics: Value = ctx.objects.get_path(&path).await.map_err(|error| {
        format!(
            "failed to get {resource} utilization: unable to get metrics for resource {resource}: unable to fetch \
            metrics from resource metrics API: {}",
            message(&error)
        )
    })?;
    let mut used: BTreeMap<String, i64> = BTreeMap::new();
    for item in metrics["items"].as_array().into_iter().flatten() {
        let name = item.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        let containers = item["containers"].as_array();
        let amounts = containers.into_iter().flatten().filter_map(|c| c["usage"][resource].as_str());
        used.insert(name.to_owned(), amounts.map(|text| milli(&Quantity(text.to_owned()))).sum());
    }
    let label_selector: LabelSelector = parse_selector(selector);
    let labels = Selector::new(&label_selector);
    let pods: Vec<Arc<Pod>> = ctx
        .caches
        .pods
        .in_namespace(hpa.namespace())
        .into_iter()
        .filter(|p| pods::is_active(p) && labels.matches_optional(p.metadata.labels.as_ref()))
        .collect();
    let measured: Vec<&Arc<Pod>> = pods.iter().filter(|p| used.contains_key(p.name())).collect();
    if measured.is_empty() {
        return Err(format!("failed to get {resource} utilization: no metrics returned from resource metrics API"));
    }
    let total: i64 = measured.iter().filter_map(|p| used.get(p.name())).sum();
    let ratio = match (utilization, average) {
        (Some(percent), _) => {
            let request = |pod: &Arc<Pod>| -> i64 {
                let containers = pod.spec.as_ref().map(|s| s.containers.as_slice()).unwrap_or_default();
                containers
                    .iter()
                    .filter_map(|c| c.resources.as_ref()?.requests.as_ref()?.get(resource))
                    .map(milli)
                    .sum()
            };
            let requested: i64 = measured.iter().map(|p| request(p)).sum();
            if requested == 0 {
                return Err(format!("failed to get {resource} utilization: missing request for {resource}"));
            }
            total as f64 * 100.0 / requested as f64 / f64::from(percent.max(1))
        }
        (None, Some(target)) => total as f64 / measured.len() as f64 / milli(target).max(1) as f64,
        (None, None) => return Err("no target".to_owned()),
    };
    Ok(if (ratio - 1.0).abs() <= TOLERANCE { current } else { (ratio * measured.len() as f64).ceil() as i64 })
}

/// Reads the plain form `a=b,c=d` of scale's selector.
fn parse_selector(text: &str) -> LabelSelector {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let labels = pairs.map(|(k, v)| (k.trim().to_owned(), v.trim_start_matches('=').trim().to_owned())).collect();
    LabelSelector { match_labels: Some(labels), match_expressions: None }
}
