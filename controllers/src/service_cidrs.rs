//! ServiceCIDRs: says that each is ready, and lets none go while addresses of it are in use.
//!
//! An address is in use as long as it has an IPAddress object, unless another range holds it too.

use crate::context::Context;
use ipnet::IpNet;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::{Queue, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::PartialObjectMeta;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "service-cidr-controller";
const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const READY: &str = "Kubernetes Service CIDR is ready";
const IN_USE: &str =
    "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
/// How long allocations that began before the deletion may take, and until what is in use is looked at again.
const GRACE: Duration = Duration::from_secs(10);

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.service_cidrs.subscribe(move |change| {
        q.add(change.object().name().to_owned());
        // A new range may hold what keeps another one.
        let others = c.caches.service_cidrs.list();
        others.iter().filter(|cidr| ends(cidr)).for_each(|cidr| q.add(cidr.name().to_owned()));
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |name| {
        let ctx = context.clone();
        async move { sync(&ctx, &name).await }
    });
}

fn ends(cidr: &ServiceCIDR) -> bool {
    cidr.metadata.deletion_timestamp.is_some()
}

fn ranges(cidr: &ServiceCIDR) -> Vec<IpNet> {
    let cidrs = cidr.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    cidrs.filter_map(|cidr| cidr.parse().ok()).collect()
}

/// What is to be done about a range.
#[derive(Debug, PartialEq)]
enum Plan {
    /// Nothing.
    Leave,
    /// It has to say that it is ready, and to be held.
    Ready,
    /// It has to say that it is still in use.
    InUse,
    /// It may go, after the rest of the grace period.
    Release(Duration),
}

/// Whether one of the addresses is in this range and in no other.
fn in_use(cidr: &ServiceCIDR, others: &[Arc<ServiceCIDR>], addresses: &[IpAddr]) -> bool {
    let own = ranges(cidr);
    let rest: Vec<IpNet> =
        others.iter().filter(|o| o.name() != cidr.name() && !ends(o)).flat_map(|other| ranges(other)).collect();
    let within = |ranges: &[IpNet], ip: &IpAddr| ranges.iter().any(|range| range.contains(ip));
    addresses.iter().any(|ip| within(&own, ip) && !within(&rest, ip))
}

fn condition(cidr: &ServiceCIDR) -> Option<&Condition> {
    cidr.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == "Ready")
}

fn held(cidr: &ServiceCIDR) -> bool {
    cidr.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
}

/// `used` is asked for ranges that are to go.
fn plan(cidr: &ServiceCIDR, used: bool, now: Timestamp) -> Plan {
    let status = condition(cidr).map(|condition| condition.status.as_str());
    let Some(since) = &cidr.metadata.deletion_timestamp else {
        return if held(cidr) && status == Some("True") { Plan::Leave } else { Plan::Ready };
    };
    if !held(cidr) {
        return Plan::Leave;
    }
    if used {
        return Plan::InUse;
    }
    let gone = now.duration_since(since.0);
    Plan::Release(GRACE.saturating_sub(Duration::try_from(gone).unwrap_or_default()))
}

async fn sync(ctx: &Context, name: &str) -> Result<Option<Duration>, kube::Error> {
    let Some(cidr) = ctx.caches.service_cidrs.get("", name) else { return Ok(None) };
    let used = ends(&cidr) && in_use(&cidr, &ctx.caches.service_cidrs.list(), &addresses(ctx).await?);
    match plan(&cidr, used, Timestamp::now()) {
        Plan::Leave => Ok(None),
        Plan::Ready => {
            hold(ctx, &cidr, true).await?;
            say(ctx, &cidr, "True", "", READY).await.map(|()| None)
        }
        Plan::InUse => say(ctx, &cidr, "False", "Terminating", IN_USE).await.map(|()| Some(GRACE)),
        Plan::Release(Duration::ZERO) => hold(ctx, &cidr, false).await.map(|()| None),
        Plan::Release(rest) => Ok(Some(rest)),
    }
}

/// All addresses that have an object. Asked for when a range is to go, which is too rare to watch them.
async fn addresses(ctx: &Context) -> Result<Vec<IpAddr>, kube::Error> {
    let request = http::Request::get("/apis/networking.k8s.io/v1/ipaddresses")
        .header("accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1");
    let request = request.body(Vec::new()).map_err(kube::Error::HttpError)?;
    let list: kube::core::ObjectList<PartialObjectMeta<IPAddress>> = ctx.objects.client().request(request).await?;
    Ok(list.items.iter().filter_map(|address| address.metadata.name.as_ref()?.parse().ok()).collect())
}

/// Adds or removes the finalizer.
async fn hold(ctx: &Context, cidr: &ServiceCIDR, hold: bool) -> Result<(), kube::Error> {
    if held(cidr) == hold {
        return Ok(());
    }
    let mut new = cidr.clone();
    let finalizers = new.metadata.finalizers.get_or_insert_default();
    finalizers.retain(|finalizer| finalizer != FINALIZER);
    if hold {
        finalizers.push(FINALIZER.to_owned());
    }
    written(ctx.objects.update(cidr, &new, "").await)
}

/// Writes the condition when it changes.
async fn say(ctx: &Context, cidr: &ServiceCIDR, status: &str, reason: &str, message: &str) -> Result<(), kube::Error> {
    let same = |c: &Condition| (c.status.as_str(), c.reason.as_str()) == (status, reason);
    if condition(cidr).is_some_and(same) {
        return Ok(());
    }
    let conditions = serde_json::json!([{"type": "Ready", "status": status, "reason": reason, "message": message,
        "lastTransitionTime": Timestamp::now().round(jiff::Unit::Second).unwrap_or_default()}]);
    let patch = serde_json::json!({"status": {"conditions": conditions}});
    written(ctx.objects.merge::<ServiceCIDR>("", cidr.name(), "status", &patch).await)
}

fn written<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn cidr(name: &str, cidr: &str, more: Value) -> Arc<ServiceCIDR> {
        let mut object = json!({"metadata": {"name": name}, "spec": {"cidrs": [cidr]}});
        for (key, value) in more.as_object().unwrap() {
            object["metadata"][key] = value.clone();
        }
        if more["finalizers"].is_array() {
            object["status"] = json!({"conditions": [{"type": "Ready", "status": "True", "reason": "", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        }
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_range_goes_when_nothing_of_it_is_used_elsewhere() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let now = at("2026-01-01T00:00:04Z");
        let held = json!({"finalizers": [FINALIZER]});
        let going = json!({"finalizers": [FINALIZER], "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(plan(&cidr("a", "10.1.0.0/24", json!({})), false, now), Plan::Ready);
        assert_eq!(plan(&cidr("a", "10.1.0.0/24", held.clone()), false, now), Plan::Leave);
        let ending = cidr("a", "10.1.0.0/24", going.clone());
        assert_eq!(plan(&ending, true, now), Plan::InUse);
        assert_eq!(plan(&ending, false, now), Plan::Release(Duration::from_secs(6)));
        assert_eq!(plan(&ending, false, at("2026-01-01T00:01:00Z")), Plan::Release(Duration::ZERO));
        assert_eq!(
            plan(&cidr("a", "10.1.0.0/24", json!({"deletionTimestamp": "2026-01-01T00:00:00Z"})), true, now),
            Plan::Leave
        );

        let used: Vec<IpAddr> = vec!["10.1.0.7".parse().unwrap()];
        assert!(in_use(&ending, std::slice::from_ref(&ending), &used));
        assert!(!in_use(&ending, std::slice::from_ref(&ending), &["10.2.0.7".parse().unwrap()]));
        let wider = cidr("b", "10.1.0.0/16", held);
        assert!(!in_use(&ending, &[ending.clone(), wider], &used), "another range holds it");
        assert!(
            in_use(&ending, &[ending.clone(), cidr("b", "10.1.0.0/16", going)], &used),
            "but not one that goes too"
        );
    }
}
