//! Giving devices to the containers of a pod that this node takes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::{Devices, Given, Injection, State, plugin::PATIENCE};
use crate::{
    context::Context,
    grpc::{
        Channel,
        proto::device::{
            AllocateRequest, ContainerAllocateRequest, ContainerPreferredAllocationRequest, PreStartContainerRequest,
            PreferredAllocationRequest, device_plugin_client::DevicePluginClient,
        },
        words,
    },
    pods::sandbox,
    qos, quantity,
    topology::{
        hints::{self, Hints, Mask},
        machine::Topology,
    },
};

/// What a container asks of resources that plugins have.
fn wishes(state: &State, c: &Container) -> Vec<(String, usize)> {
    let limits = c.resources.as_ref().and_then(|r| r.limits.as_ref());
    let all = limits.into_iter().flatten();
    let known = all.filter(|(name, _)| state.resources.contains_key(*name));
    let counted = known.map(|(name, q)| (name.clone(), usize::try_from(quantity::value(q)).unwrap_or(0)));
    counted.filter(|(_, n)| *n > 0).collect()
}

/// Devices of a resource that nobody has.
fn free(state: &State, resource: &str) -> BTreeSet<String> {
    let given = state.pods.values().flat_map(|p| p.values()).filter_map(|c| c.get(resource));
    let taken: BTreeSet<&String> = given.flat_map(|g| &g.devices).collect();
    let devices = state.resources.get(resource).into_iter().flat_map(|r| &r.devices);
    devices.filter(|(id, d)| d.healthy && !taken.contains(id)).map(|(id, _)| id.clone()).collect()
}

/// Devices of init containers that have ended are for those after them. Sidecars keep theirs.
fn reusable(state: &State, pod: &Pod, upto: &str, resource: &str) -> BTreeSet<String> {
    let Some(spec) = &pod.spec else { return BTreeSet::new() };
    let Some(given) = state.pods.get(sandbox::uid(pod)) else { return BTreeSet::new() };
    let of = |name: &str| given.get(name).and_then(|c| c.get(resource)).map(|g| g.devices.clone()).unwrap_or_default();
    let mut reusable = BTreeSet::new();
    for c in qos::all_containers(spec).take_while(|c| c.name != upto) {
        let init = spec.init_containers.iter().flatten().any(|i| i.name == c.name) && !qos::is_sidecar(c);
        match init {
            true => reusable.extend(of(&c.name)),
            false => reusable.retain(|id| !of(&c.name).contains(id)),
        }
    }
    reusable
}

/// Whether a pod asks for devices that it has not been given.
fn lacks(state: &State, pod: &Pod) -> bool {
    let given = state.pods.get(sandbox::uid(pod));
    let has = |c: &Container, resource: &String| {
        let of = given.and_then(|p| p.get(&c.name)?.get(resource));
        of.is_some_and(|g| g.injection.is_some())
    };
    let mut containers = pod.spec.iter().flat_map(qos::all_containers);
    containers.any(|c| wishes(state, c).iter().any(|(resource, _)| !has(c, resource)))
}

/// Gives a pod its devices; the error is the message of an UnexpectedAdmissionError. What was given before stays.
pub(crate) async fn allocate(ctx: &Arc<Context>, pod: &Pod) -> Result<(), String> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    for c in qos::all_containers(spec) {
        let wishes = wishes(&ctx.devices.state.lock(), c);
        let mask = ctx.topology.affinity(sandbox::uid(pod), &c.name);
        for (resource, count) in wishes {
            if let Err(error) = ctx.devices.one(pod, c, &resource, count, mask).await {
                // It stays pending: nothing of it starts before it is told to fail.
                ctx.devices.state.lock().pods.remove(sandbox::uid(pod));
                ctx.devices.save();
                return Err(format!("Pod was rejected: Allocate failed due to {error}, which is unexpected"));
            }
        }
    }
    ctx.devices.state.lock().pending.remove(sandbox::uid(pod));
    ctx.devices.save();
    Ok(())
}

impl Devices {
    /// Whether a pod asks for devices that it has not been given.
    pub(crate) fn lacks(&self, pod: &Pod) -> bool {
        lacks(&self.state.lock(), pod)
    }

    /// Which NUMA nodes the devices of a container, or of the whole pod, could come from: one entry per resource.
    pub(crate) fn hints(&self, pod: &Pod, c: Option<&Container>, t: &Topology) -> Vec<Hints> {
        let state = self.state.lock();
        let Some(spec) = &pod.spec else { return Vec::new() };
        let mut wanted: BTreeMap<String, usize> = BTreeMap::new();
        for c in qos::all_containers(spec).filter(|one| c.is_none_or(|c| c.name == one.name)) {
            let init = spec.init_containers.iter().flatten().any(|i| i.name == c.name) && !qos::is_sidecar(c);
            for (resource, count) in wishes(&state, c) {
                let sum = wanted.entry(resource).or_default();
                // Init containers leave theirs to those after them.
                *sum = if init { (*sum).max(count) } else { *sum + count };
            }
        }
        let given = |resource: &str| {
            let of = state.pods.get(sandbox::uid(pod))?.get(&c?.name)?.get(resource)?;
            Some(of.devices.clone())
        };
        let hints = wanted.into_iter().map(|(resource, count)| {
            let again = c.map(|c| reusable(&state, pod, &c.name, &resource)).unwrap_or_default();
            let free = given(&resource).unwrap_or_else(|| free(&state, &resource));
            resource_hints(&state, &resource, count, &again, &free, t)
        });
        hints.collect()
    }

    /// Whether a pod is to be given devices by [`allocate`]; its containers wait from now on until that is done.
    pub(crate) fn wants(&self, pod: &Pod) -> bool {
        let mut state = self.state.lock();
        let wants = lacks(&state, pod);
        if wants {
            state.pending.insert(sandbox::uid(pod).into());
        }
        wants
    }

    /// What a container was given, once that is settled.
    pub(crate) async fn given(&self, pod: &Pod, container: &str) -> Injection {
        let mut changes = self.changed.subscribe();
        while self.state.lock().pending.contains(sandbox::uid(pod)) {
            // For a pod that is refused this never ends; its start is cancelled.
            if changes.changed().await.is_err() {
                break;
            }
        }
        let state = self.state.lock();
        let all = state.pods.get(sandbox::uid(pod)).and_then(|p| p.get(container));
        let parts = all.into_iter().flat_map(|c| c.values()).filter_map(|g| g.injection.clone());
        parts.fold(Injection::default(), Injection::with)
    }

    fn note(&self, pod: &Pod, container: &str, resource: &str, given: Given) {
        let mut state = self.state.lock();
        let of_pod = state.pods.entry(sandbox::uid(pod).into()).or_default();
        of_pod.entry(container.into()).or_default().insert(resource.into(), given);
    }

    fn client(&self, resource: &str) -> Result<std::path::PathBuf, String> {
        let state = self.state.lock();
        let endpoint = state.resources.get(resource).and_then(|r| r.endpoint.clone());
        endpoint.ok_or_else(|| format!("no healthy plugin for resource {resource}"))
    }

    async fn one(
        &self,
        pod: &Pod,
        c: &Container,
        resource: &str,
        count: usize,
        mask: Option<Mask>,
    ) -> Result<(), String> {
        let (reserved, preferred) = {
            let state = self.state.lock();
            let own = state.pods.get(sandbox::uid(pod)).and_then(|p| p.get(&c.name)?.get(resource));
            if own.is_some_and(|g| g.injection.is_some()) {
                return Ok(());
            }
            let again = reusable(&state, pod, &c.name, resource);
            let mut free = free(&state, resource);
            if again.len().min(count) + free.len() < count {
                let text = "requested number of devices unavailable for";
                return Err(format!("{text} {resource}. Requested: {count}, Available: {}", again.len() + free.len()));
            }
            let near: BTreeSet<String> =
                free.iter().filter(|id| is_near(&state, resource, id, mask)).cloned().collect();
            if again.len().min(count) + near.len() >= count {
                free = near;
            }
            let preferred = state.resources.get(resource).is_some_and(|r| r.preferred);
            (choice(&again, &free, count), preferred.then_some((again, free)))
        };
        // Held while the plugin is asked, so that nobody else is given them.
        self.note(pod, &c.name, resource, Given { devices: reserved.clone(), injection: None });
        let mut client = DevicePluginClient::new(
            Channel::unix(&self.client(resource)?).await.map_err(|e| format!("device plugin of {resource}: {e}"))?,
        );
        let mut ids = reserved;
        if let Some((again, free)) = preferred {
            ids = self.prefer(&mut client, &again, &free, count).await?.unwrap_or(ids);
            self.note(pod, &c.name, resource, Given { devices: ids.clone(), injection: None });
        }
        let one = ContainerAllocateRequest { devices_ids: ids.iter().cloned().collect() };
        let request = AllocateRequest { container_requests: vec![one] };
        let asked = tokio::time::timeout(PATIENCE, client.allocate(request)).await;
        let answer = asked.map_err(|_| format!("the device plugin of {resource} does not answer"))?;
        let answer = answer.map_err(|s| words(&s))?.into_inner().container_responses.into_iter().next();
        let answer = answer.ok_or_else(|| format!("the device plugin of {resource} answered nothing"))?;
        let injection = Injection::from_plugin(answer)?;
        self.note(pod, &c.name, resource, Given { devices: ids, injection: Some(injection) });
        Ok(())
    }

    /// The plugin's own choice, if it is one of what was offered and still free.
    async fn prefer(
        &self,
        client: &mut DevicePluginClient<Channel>,
        again: &BTreeSet<String>,
        free: &BTreeSet<String>,
        count: usize,
    ) -> Result<Option<BTreeSet<String>>, String> {
        let offered: BTreeSet<&String> = again.union(free).collect();
        let must: Vec<String> = again.iter().take(count).cloned().collect();
        let request = PreferredAllocationRequest {
            container_requests: vec![ContainerPreferredAllocationRequest {
                available_device_i_ds: offered.iter().map(|id| (*id).clone()).collect(),
                must_include_device_i_ds: must.clone(),
                allocation_size: i32::try_from(count).unwrap_or(i32::MAX),
            }],
        };
        let answer = client.get_preferred_allocation(request).await.map_err(|s| words(&s))?.into_inner();
        let wish = answer.container_responses.into_iter().next().map(|r| r.device_i_ds).unwrap_or_default();
        let ids: BTreeSet<String> = wish.into_iter().filter(|id| offered.contains(id)).collect();
        let fits = ids.len() == count && must.iter().all(|id| ids.contains(id));
        Ok(fits.then_some(ids))
    }

    /// Tells plugins that want to know that a container starts.
    pub(crate) async fn pre_start(&self, pod: &Pod, container: &str) -> Result<(), String> {
        let wanting: Vec<(String, Vec<String>)> = {
            let state = self.state.lock();
            let given = state.pods.get(sandbox::uid(pod)).and_then(|p| p.get(container));
            let wants = |name: &str| state.resources.get(name).is_some_and(|r| r.pre_start);
            let all = given.into_iter().flatten().filter(|(name, _)| wants(name));
            all.map(|(name, g)| (name.clone(), g.devices.iter().cloned().collect())).collect()
        };
        for (resource, devices_ids) in wanting {
            let channel = Channel::unix(&self.client(&resource)?).await.map_err(|e| format!("{resource}: {e}"))?;
            let mut client = DevicePluginClient::new(channel);
            let call = client.pre_start_container(PreStartContainerRequest { devices_ids });
            let failed = |why: String| format!("device plugin PreStartContainer rpc failed with err: {why}");
            // Longer than other calls, as upstream: a plugin may reset a device here.
            match tokio::time::timeout(3 * PATIENCE, call).await {
                Ok(Ok(_)) => {}
                Ok(Err(s)) => return Err(failed(words(&s))),
                Err(_) => return Err(failed("context deadline exceeded".into())),
            }
        }
        Ok(())
    }
}

/// Whether a device is near one of these NUMA nodes; without any said every one is.
fn is_near(state: &State, resource: &str, id: &str, mask: Option<Mask>) -> bool {
    let Some(mask) = mask else { return true };
    let device = state.resources.get(resource).and_then(|r| r.devices.get(id));
    device.is_some_and(|d| d.nodes.iter().any(|n| u32::try_from(*n).is_ok_and(|n| mask.has(n))))
}

/// Hints for some devices of a resource; nothing can be said when none tells where it is.
fn resource_hints(
    state: &State,
    resource: &str,
    count: usize,
    again: &BTreeSet<String>,
    free: &BTreeSet<String>,
    t: &Topology,
) -> Hints {
    let devices = &state.resources.get(resource)?.devices;
    if devices.values().all(|d| d.nodes.is_empty()) {
        return None;
    }
    if again.union(free).count() < count {
        return Some(Vec::new());
    }
    let near = |id: &&String, mask: Mask| is_near(state, resource, id, Some(mask));
    let whole = |mask: Mask| devices.keys().filter(|id| near(id, mask)).count() as u64;
    let can = |mask: Mask| {
        let all_again = again.iter().all(|id| near(&id, mask));
        all_again.then(|| again.union(free).filter(|id| near(id, mask)).count() as u64)
    };
    Some(hints::generate(t, count as u64, whole, can))
}

/// The first that fit: those of init containers before fresh ones.
fn choice(again: &BTreeSet<String>, free: &BTreeSet<String>, count: usize) -> BTreeSet<String> {
    again.iter().chain(free.difference(again)).take(count).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Device, Resource};
    use serde_json::json;

    fn state() -> State {
        let device = |healthy| Device { healthy, nodes: vec![] };
        let devices = [("a", true), ("b", true), ("c", false), ("d", true)].map(|(id, h)| (id.to_string(), device(h)));
        let mut state = State::default();
        state.resources.insert("x/y".into(), Resource { devices: devices.into(), ..Resource::default() });
        state
    }

    fn give(state: &mut State, pod: &str, container: &str, ids: &[&str]) {
        let devices = ids.iter().map(|i| (*i).to_string()).collect();
        let given = Given { devices, injection: Some(Injection::default()) };
        state.pods.entry(pod.into()).or_default().entry(container.into()).or_default().insert("x/y".into(), given);
    }

    #[test]
    fn devices_tell_which_nodes_they_are_near() {
        let t = crate::topology::machine::tests::machine(2, 1, 2, 1);
        let mut s = state();
        let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": {"containers": [
            {"name": "c", "resources": {"limits": {"x/y": 2}}}]}}))
        .unwrap();
        let hints = |s: &State| {
            let none = BTreeSet::new();
            resource_hints(s, "x/y", 2, &none, &free(s, "x/y"), &t)
        };
        assert_eq!(hints(&s), None);
        // a and d on the first node, b on the second.
        for (id, node) in [("a", 0), ("b", 1), ("d", 0)] {
            s.resources.get_mut("x/y").unwrap().devices.get_mut(id).unwrap().nodes = vec![node];
        }
        let hint = |mask, preferred| hints::Hint { mask: Some(Mask(mask)), preferred };
        assert_eq!(hints(&s), Some(vec![hint(1, true), hint(3, false)]));
        give(&mut s, "other", "c", &["d"]);
        assert_eq!(hints(&s), Some(vec![hint(3, false)]));
        give(&mut s, "another", "c", &["b"]);
        assert_eq!(hints(&s), Some(vec![]));
        assert!(is_near(&s, "x/y", "b", Some(Mask(2))) && !is_near(&s, "x/y", "b", Some(Mask(1))));
        assert!(lacks(&s, &pod));
    }

    #[test]
    fn devices_are_given_once_and_reused_after_init_containers() {
        let set = |ids: &[&str]| ids.iter().map(|i| (*i).to_string()).collect::<BTreeSet<_>>();
        let c = |name: &str, n: u32| json!({"name": name, "resources": {"limits": {"x/y": n, "cpu": 1}}});
        let mut sidecar = c("side", 1);
        sidecar["restartPolicy"] = "Always".into();
        let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": {
            "initContainers": [c("init", 2), sidecar], "containers": [c("main", 1), c("more", 1)]}}))
        .unwrap();
        let mut s = state();
        assert_eq!(wishes(&s, &pod.spec.as_ref().unwrap().containers[0]), [("x/y".to_string(), 1)]);
        assert!(lacks(&s, &pod));
        give(&mut s, "other", "c", &["d"]);
        assert_eq!(free(&s, "x/y"), set(&["a", "b"]));
        give(&mut s, "u", "init", &["a", "b"]);
        assert_eq!(free(&s, "x/y"), set(&[]));
        assert_eq!(reusable(&s, &pod, "side", "x/y"), set(&["a", "b"]));
        give(&mut s, "u", "side", &["a"]);
        assert_eq!(reusable(&s, &pod, "main", "x/y"), set(&["b"]));
        give(&mut s, "u", "main", &["b"]);
        assert_eq!(reusable(&s, &pod, "more", "x/y"), set(&[]));
        assert!(lacks(&s, &pod));
        give(&mut s, "u", "more", &["b"]);
        assert!(!lacks(&s, &pod));
        assert_eq!(choice(&set(&["z"]), &set(&["a", "b"]), 2), set(&["z", "a"]));
    }
}
