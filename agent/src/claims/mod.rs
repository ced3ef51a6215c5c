//! Resource claims (dynamic resource allocation): made ready by their drivers before a pod's first container, undone after
//! its last.
//!
//! In: drivers that register, pods that refer to claims, claims as the API server has them (allocated and reserved by
//! others). Out: calls to drivers, names of the Container Device Interface for containers. A claim that a pod uses is on
//! disk before its driver is asked ([`checkpoint`]), so that it is undone whatever happens meanwhile.

mod checkpoint;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    core::v1::{Container, Pod},
    resource::v1::ResourceClaim,
};
use parking_lot::Mutex;
use tonic::{Response, Status};

use self::checkpoint::{Device, Empty, Info};
use crate::{
    context::Context,
    grpc::{
        Channel,
        proto::dra::{
            Claim, NodePrepareResourcesRequest, NodeUnprepareResourcesRequest, dra_plugin_client::DraPluginClient,
        },
        words,
    },
    pods::sandbox,
};

/// How long a driver may take.
const PATIENCE: Duration = Duration::from_secs(45);
/// What a pod is told whose claims are not ready.
pub(crate) const FAILED: &str = "Failed to prepare dynamic resources";
/// The version of the drivers' interface.
const VERSION: &str = "v1.DRAPlugin";

#[derive(Debug)]
struct Driver {
    /// Its socket in the registry.
    registered: PathBuf,
    endpoint: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    drivers: BTreeMap<String, Driver>,
    claims: BTreeMap<String, Info>,
    /// Those whose drivers have all said yes in this life of the agent.
    ready: BTreeSet<String>,
}

/// All claims of this node's pods.
pub(crate) struct Claims {
    dir: PathBuf,
    state: Mutex<State>,
    /// Drivers are asked for one pod at a time: two may share a claim.
    turn: tokio::sync::Mutex<()>,
}

/// What of a claim a container has, for the pod-resources API.
pub(crate) struct Share {
    pub(crate) claim: String,
    pub(crate) driver: String,
    pub(crate) pool: String,
    pub(crate) device: String,
    pub(crate) cdi: Vec<String>,
}

/// The claims a pod refers to, by the names it has for them; one made from a template that is not there yet is an error.
fn names(pod: &Pod) -> Result<BTreeMap<String, String>, String> {
    let statuses = pod.status.as_ref().and_then(|s| s.resource_claim_statuses.as_ref());
    let mut all = BTreeMap::new();
    for c in pod.spec.iter().flat_map(|s| s.resource_claims.iter().flatten()) {
        let made = || statuses.into_iter().flatten().find(|s| s.name == c.name);
        let name = match &c.resource_claim_name {
            Some(name) => Some(name.clone()),
            // A template may make no claim: then there is nothing to prepare.
            None => made()
                .ok_or_else(|| format!("pod claim {:?}: no ResourceClaim has been made yet", c.name))?
                .resource_claim_name
                .clone(),
        };
        all.extend(name.map(|name| (c.name.clone(), name)));
    }
    Ok(all)
}

/// The drivers of a claim that a pod may use.
fn drivers(claim: &ResourceClaim, pod: &Pod) -> Result<BTreeSet<String>, String> {
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    let status = claim.status.as_ref();
    let uid = sandbox::uid(pod);
    let reserved = status.and_then(|s| s.reserved_for.as_ref()).into_iter().flatten();
    let allocation = status.and_then(|s| s.allocation.as_ref());
    let allocation = allocation.ok_or_else(|| format!("resource claim {name} is not allocated"))?;
    if !reserved.into_iter().any(|r| r.resource == "pods" && r.uid == uid) {
        let pod = sandbox::name(pod);
        return Err(format!("pod {pod} ({uid}) is not allowed to use resource claim {name}"));
    }
    let results = allocation.devices.as_ref().and_then(|d| d.results.as_ref());
    Ok(results.into_iter().flatten().map(|r| r.driver.clone()).collect())
}

impl Claims {
    /// Reads what an earlier life has prepared.
    pub(crate) fn open(dir: PathBuf) -> Self {
        let claims = checkpoint::load(&dir).unwrap_or_else(|error| {
            tracing::error!(error, "resource claims of earlier pods are not known");
            BTreeMap::new()
        });
        let state = State { claims, ..State::default() };
        Self { dir, state: Mutex::new(state), turn: tokio::sync::Mutex::default() }
    }

    /// A driver announces itself.
    pub(crate) fn register(
        &self,
        path: &Path,
        name: &str,
        endpoint: PathBuf,
        versions: &[String],
    ) -> Result<(), String> {
        if !versions.iter().any(|v| v == VERSION) {
            return Err(format!("DRA driver {name:?} does not speak {VERSION}: {versions:?}"));
        }
        self.state.lock().drivers.insert(name.into(), Driver { registered: path.into(), endpoint });
        Ok(())
    }

    /// The driver that announced itself at `path` has gone.
    pub(crate) fn deregister(&self, path: &Path) {
        self.state.lock().drivers.retain(|_, d| d.registered != path);
    }

    /// UIDs of all pods that use claims.
    fn pods(&self) -> BTreeSet<String> {
        self.state.lock().claims.values().flat_map(|c| c.pods.keys().cloned()).collect()
    }

    /// How many claims are in use: of each driver, and of all.
    pub(crate) fn in_use(&self) -> BTreeMap<String, usize> {
        let state = self.state.lock();
        let mut all = BTreeMap::from([("<any>".to_owned(), state.claims.len())]);
        for driver in state.claims.values().flat_map(|c| c.drivers.keys()) {
            *all.entry(driver.clone()).or_default() += 1;
        }
        all
    }

    fn save(&self) -> Result<(), String> {
        let state = self.state.lock();
        checkpoint::save(&self.dir, state.claims.values()).map_err(|e| format!("{}: {e}", self.dir.display()))
    }

    async fn call<T>(
        &self,
        driver: &str,
        what: impl AsyncFnOnce(DraPluginClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, String> {
        let endpoint = self.state.lock().drivers.get(driver).map(|d| d.endpoint.clone());
        let endpoint = endpoint.ok_or_else(|| format!("DRA driver {driver} is not registered"))?;
        let work = async {
            let channel = Channel::unix(&endpoint).await.map_err(|e| format!("DRA driver {driver}: {e}"))?;
            what(DraPluginClient::new(channel)).await.map(Response::into_inner).map_err(|s| words(&s))
        };
        let late = |_| format!("DRA driver {driver} does not answer");
        tokio::time::timeout(PATIENCE, work).await.map_err(late)?
    }

    /// Names of the Container Device Interface that a container gets.
    pub(crate) fn devices(&self, pod: &Pod, c: &Container) -> Vec<String> {
        self.shares(pod, c).into_iter().flat_map(|s| s.cdi).collect()
    }

    /// What a container has of the pod's claims.
    pub(crate) fn shares(&self, pod: &Pod, c: &Container) -> Vec<Share> {
        let wanted: Vec<_> = c.resources.iter().flat_map(|r| r.claims.iter().flatten()).collect();
        if wanted.is_empty() {
            return Vec::new();
        }
        let names = names(pod).unwrap_or_default();
        let state = self.state.lock();
        let mut all = Vec::new();
        for w in wanted {
            let Some(name) = names.get(&w.name) else { continue };
            let ours = |i: &&Info| i.name == *name && i.pods.contains_key(sandbox::uid(pod));
            for (driver, d) in state.claims.values().filter(ours).flat_map(|i| &i.drivers) {
                let fits = d.devices.iter().filter(|d| is_for(d, w.request.as_deref().unwrap_or_default()));
                all.extend(fits.map(|d| Share {
                    claim: name.clone(),
                    driver: driver.clone(),
                    pool: d.pool_name.clone(),
                    device: d.device_name.clone(),
                    cdi: d.cdi.clone(),
                }));
            }
        }
        all
    }
}

/// Whether a device is for a request; one of a request's alternatives is named `request/alternative`.
fn is_for(d: &Device, request: &str) -> bool {
    let of = |name: &String| name.split('/').next() == Some(request) || name == request;
    request.is_empty() || d.request_names.is_empty() || d.request_names.iter().any(of)
}

/// Makes a pod's claims ready; what is ready stays so.
pub(crate) async fn prepare(ctx: &Context, pod: &Pod) -> Result<(), String> {
    let names = names(pod)?;
    if names.is_empty() {
        return Ok(());
    }
    timed(ctx, "PrepareResources", prepare_all(ctx, pod, names)).await
}

/// Notes how long an operation took.
async fn timed(ctx: &Context, name: &str, work: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let begun = Instant::now();
    let done = work.await;
    let failed = if done.is_err() { "true" } else { "false" };
    let labels = [("is_error", failed), ("operation_name", name)];
    ctx.metrics.observe("dra_operations_duration_seconds", labels, begun.elapsed());
    done
}

async fn prepare_all(ctx: &Context, pod: &Pod, names: BTreeMap<String, String>) -> Result<(), String> {
    let claims = &ctx.claims;
    let client = ctx.api.get().ok_or("there is no API server")?;
    let api: kube::Api<ResourceClaim> = kube::Api::namespaced(client, sandbox::namespace(pod));
    let _turn = claims.turn.lock().await;
    let mut by_driver: BTreeMap<String, Vec<Claim>> = BTreeMap::new();
    for name in names.values() {
        let claim = api.get(name).await.map_err(|e| format!("failed to fetch ResourceClaim {name}: {e}"))?;
        let drivers = drivers(&claim, pod)?;
        let uid = claim.metadata.uid.clone().unwrap_or_default();
        let mut state = claims.state.lock();
        let ready = state.ready.contains(&uid);
        let info = state.claims.entry(uid.clone()).or_default();
        info.uid.clone_from(&uid);
        info.name.clone_from(name);
        info.namespace = sandbox::namespace(pod).into();
        info.pods.insert(sandbox::uid(pod).into(), Empty {});
        for driver in drivers.into_iter().filter(|_| !ready) {
            info.drivers.entry(driver.clone()).or_default();
            let claim = Claim { namespace: info.namespace.clone(), uid: uid.clone(), name: name.clone() };
            by_driver.entry(driver).or_default().push(claim);
        }
    }
    claims.save()?;
    let asked: BTreeSet<String> = by_driver.values().flatten().map(|c| c.uid.clone()).collect();
    for (driver, list) in by_driver {
        ask(claims, &driver, list).await?;
    }
    claims.state.lock().ready.extend(asked);
    claims.save()
}

/// Has a driver prepare some claims and notes what it says.
async fn ask(claims: &Claims, driver: &str, list: Vec<Claim>) -> Result<(), String> {
    let request = NodePrepareResourcesRequest { claims: list.clone() };
    let answer = claims.call(driver, async |mut c| c.node_prepare_resources(request).await).await;
    let mut answer = answer.map_err(|why| format!("NodePrepareResources: {why}"))?.claims;
    for c in list {
        let name = format!("{}/{}", c.namespace, c.name);
        let said = answer.remove(&c.uid).ok_or_else(|| format!("NodePrepareResources skipped claim {name}"))?;
        if !said.error.is_empty() {
            return Err(format!("NodePrepareResources failed for claim {name}: {}", said.error));
        }
        let device = |d: crate::grpc::proto::dra::Device| Device {
            pool_name: d.pool_name,
            device_name: d.device_name,
            request_names: d.request_names,
            cdi: d.cdi_device_ids,
        };
        let mut state = claims.state.lock();
        if let Some(d) = state.claims.get_mut(&c.uid).and_then(|i| i.drivers.get_mut(driver)) {
            d.devices = said.devices.into_iter().map(device).collect();
        }
    }
    Ok(())
}

/// A pod is over: claims that nobody else here uses are undone. What cannot be is tried again with the pod's end.
pub(crate) async fn release(ctx: &Context, uid: &str) -> Result<(), String> {
    let claims = &ctx.claims;
    if !claims.pods().contains(uid) {
        return Ok(());
    }
    timed(ctx, "UnprepareResources", release_all(claims, uid)).await
}

async fn release_all(claims: &Claims, uid: &str) -> Result<(), String> {
    let _turn = claims.turn.lock().await;
    let used: Vec<Info> = claims.state.lock().claims.values().filter(|i| i.pods.contains_key(uid)).cloned().collect();
    for info in used {
        if info.pods.len() == 1 {
            claims.state.lock().ready.remove(&info.uid);
            for driver in info.drivers.keys() {
                undo(claims, driver, &info).await?;
            }
        }
        let mut state = claims.state.lock();
        if let Some(i) = state.claims.get_mut(&info.uid) {
            i.pods.remove(uid);
        }
        state.claims.retain(|_, i| !i.pods.is_empty());
    }
    claims.save()
}

async fn undo(claims: &Claims, driver: &str, info: &Info) -> Result<(), String> {
    let failed =
        |why: String| format!("failed to unprepare dynamic resources: claim {}/{}: {why}", info.namespace, info.name);
    let claim = Claim { namespace: info.namespace.clone(), uid: info.uid.clone(), name: info.name.clone() };
    let request = NodeUnprepareResourcesRequest { claims: vec![claim] };
    let answer = claims.call(driver, async |mut c| c.node_unprepare_resources(request).await).await;
    match answer.map_err(failed)?.claims.remove(&info.uid) {
        None => Err(failed(format!("DRA driver {driver} skipped it"))),
        Some(said) if !said.error.is_empty() => Err(failed(said.error)),
        Some(_) => Ok(()),
    }
}

/// Undoes what pods left that this node no longer knows; whenever a driver comes.
pub(crate) async fn sweep(ctx: &Context) {
    let gone = |uid: &String| !ctx.config.paths.pod(uid).join("pod.json").exists();
    for uid in ctx.claims.pods().into_iter().filter(gone) {
        if let Err(error) = release(ctx, &uid).await {
            tracing::warn!(uid, error, "resource claims of a pod that is gone");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"},
            "spec": {"resourceClaims": [{"name": "a", "resourceClaimName": "shared"}, {"name": "b", "resourceClaimTemplateName": "t"},
                {"name": "none", "resourceClaimTemplateName": "t"}],
                "containers": [{"name": "c", "resources": {"claims": [{"name": "a", "request": "fast"}, {"name": "none"}]}},
                    {"name": "d", "resources": {"claims": [{"name": "a"}]}}, {"name": "e"}]},
            "status": {"resourceClaimStatuses": [{"name": "b", "resourceClaimName": "p-b-x"}, {"name": "none"}]}}))
        .unwrap()
    }

    #[test]
    fn claims_are_found_by_name() {
        let mut pod = pod();
        let want = [("a", "shared"), ("b", "p-b-x")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(names(&pod).unwrap(), want.into());
        pod.status = None;
        assert_eq!(names(&pod).unwrap_err(), "pod claim \"b\": no ResourceClaim has been made yet");
    }

    #[test]
    fn only_who_has_reserved_a_claim_may_use_it() {
        let claim = |status: serde_json::Value| -> ResourceClaim {
            serde_json::from_value(json!({"metadata": {"name": "shared"}, "spec": {}, "status": status})).unwrap()
        };
        let result = |driver: &str| json!({"driver": driver, "pool": "p", "device": "d", "request": "r"});
        let allocation = json!({"devices": {"results": [result("x"), result("y"), result("x")]}});
        let reserved = |uid: &str| json!([{"resource": "pods", "name": "p", "uid": uid}]);
        let of = |status| drivers(&claim(status), &pod());
        assert_eq!(of(json!({})).unwrap_err(), "resource claim shared is not allocated");
        let other = of(json!({"allocation": allocation, "reservedFor": reserved("other")}));
        assert_eq!(other.unwrap_err(), "pod p (u) is not allowed to use resource claim shared");
        let all = of(json!({"allocation": allocation, "reservedFor": reserved("u")})).unwrap();
        assert_eq!(all, ["x".to_owned(), "y".to_owned()].into());
    }

    #[test]
    fn containers_get_the_devices_of_their_requests() {
        let dir = tempfile::tempdir().unwrap();
        let claims = Claims::open(dir.path().into());
        let device = |requests: &[&str], id: &str| Device {
            request_names: requests.iter().map(|r| (*r).to_owned()).collect(),
            cdi: vec![format!("v/c={id}")],
            ..Device::default()
        };
        let devices = vec![device(&["fast/small"], "1"), device(&["slow"], "2"), device(&[], "3")];
        let info = Info {
            uid: "claim".into(),
            name: "shared".into(),
            pods: [("u".to_owned(), Empty {})].into(),
            drivers: [("x".to_owned(), checkpoint::DriverState { devices })].into(),
            ..Info::default()
        };
        claims.state.lock().claims.insert("claim".into(), info);
        claims.save().unwrap();
        let again = Claims::open(dir.path().into());
        let pod = pod();
        let of = |at: usize| again.devices(&pod, &pod.spec.as_ref().unwrap().containers[at]);
        assert_eq!(of(0), ["v/c=1", "v/c=3"]);
        assert_eq!(of(1), ["v/c=1", "v/c=2", "v/c=3"]);
        assert!(of(2).is_empty());
        assert!(again.register(Path::new("/s"), "x", "/e".into(), &["v1beta1.DRAPlugin".into()]).is_err());
    }
}
