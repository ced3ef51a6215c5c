//! The pod-resources API: which containers have which devices, for monitoring agents of the machine.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::Pod;
use tonic::{Request, Response, Status};

use super::{Given, State};
use crate::{
    claims::Share,
    context::Context,
    grpc::proto::resources::{
        AllocatableResourcesRequest, AllocatableResourcesResponse, CdiDevice, ClaimResource, ContainerDevices,
        ContainerMemory, ContainerResources, DynamicResource, GetPodResourcesRequest, GetPodResourcesResponse,
        ListPodResourcesRequest, ListPodResourcesResponse, NumaNode, PodResources, TopologyInfo,
        pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer},
    },
    pods::{sandbox, table::Snapshot},
    qos,
    topology::Block,
};

/// The service on `pod-resources/kubelet.sock`.
pub(super) fn service(ctx: Arc<Context>) -> PodResourcesListerServer<Lister> {
    PodResourcesListerServer::new(Lister { ctx })
}

pub(super) struct Lister {
    ctx: Arc<Context>,
}

/// One entry per device, with the memory nodes it is near.
fn entry(state: &State, resource: &str, id: &str) -> ContainerDevices {
    let device = state.resources.get(resource).and_then(|r| r.devices.get(id));
    let nodes: Vec<NumaNode> = device.iter().flat_map(|d| &d.nodes).map(|id| NumaNode { id: *id }).collect();
    ContainerDevices {
        resource_name: resource.into(),
        device_ids: vec![id.into()],
        topology: (!nodes.is_empty()).then_some(TopologyInfo { nodes }),
    }
}

fn devices(state: &State, given: Option<&BTreeMap<String, Given>>) -> Vec<ContainerDevices> {
    let all = given.into_iter().flatten();
    all.flat_map(|(resource, g)| g.devices.iter().map(move |id| entry(state, resource, id))).collect()
}

fn table(memory_type: String, size: u64, nodes: impl IntoIterator<Item = u32>) -> ContainerMemory {
    let nodes = nodes.into_iter().map(|n| NumaNode { id: n.into() }).collect();
    ContainerMemory { memory_type, size, topology: Some(TopologyInfo { nodes }) }
}

fn block(b: Block) -> ContainerMemory {
    table(b.resource, b.size, b.numa_affinity)
}

fn dynamic(pod: &Pod, s: Share) -> DynamicResource {
    let resource = ClaimResource {
        cdi_devices: s.cdi.into_iter().map(|name| CdiDevice { name }).collect(),
        driver_name: s.driver,
        pool_name: s.pool,
        device_name: s.device,
    };
    DynamicResource {
        claim_name: s.claim,
        claim_namespace: sandbox::namespace(pod).into(),
        claim_resources: vec![resource],
    }
}

impl Lister {
    fn pod(&self, s: &Snapshot) -> PodResources {
        let state = self.ctx.devices.state.lock();
        let pod = &s.pod;
        let (topology, uid) = (&self.ctx.topology, sandbox::uid(&s.pod));
        let given = state.pods.get(uid);
        // An init container's devices are its own only while it may run.
        let containers = s.pod.spec.iter().flat_map(|spec| {
            let sidecars = spec.init_containers.iter().flatten().filter(|c| qos::is_sidecar(c));
            sidecars.chain(&spec.containers)
        });
        PodResources {
            name: sandbox::name(&s.pod).into(),
            namespace: sandbox::namespace(&s.pod).into(),
            containers: containers
                .map(|c| ContainerResources {
                    name: c.name.clone(),
                    devices: devices(&state, given.and_then(|g| g.get(&c.name))),
                    cpu_ids: topology.exclusive(uid, &c.name).into_iter().map(i64::from).collect(),
                    memory: topology.memory(uid, &c.name).into_iter().map(block).collect(),
                    dynamic_resources: self.ctx.claims.shares(&s.pod, c).into_iter().map(|s| dynamic(pod, s)).collect(),
                })
                .collect(),
        }
    }
}

fn is_over(s: &Snapshot) -> bool {
    let phase = s.pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(&self, _: Request<ListPodResourcesRequest>) -> Result<Response<ListPodResourcesResponse>, Status> {
        let all = self.ctx.table.all();
        let pod_resources = all.iter().filter(|s| !is_over(s)).map(|s| self.pod(s)).collect();
        Ok(Response::new(ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<AllocatableResourcesRequest>,
    ) -> Result<Response<AllocatableResourcesResponse>, Status> {
        let state = self.ctx.devices.state.lock();
        let healthy = state.resources.iter().flat_map(|(name, r)| {
            let ids = r.devices.iter().filter(|(_, d)| d.healthy).map(|(id, _)| id);
            ids.map(|id| entry(&state, name, id)).collect::<Vec<_>>()
        });
        let devices = healthy.collect();
        let (cpus, memory) = self.ctx.topology.allocatable(self.ctx.machine.cpus);
        let cpu_ids = cpus.into_iter().map(i64::from).collect();
        let memory = memory.into_iter().map(|(node, name, size)| table(name, size, [node])).collect();
        Ok(Response::new(AllocatableResourcesResponse { devices, cpu_ids, memory }))
    }

    async fn get(&self, r: Request<GetPodResourcesRequest>) -> Result<Response<GetPodResourcesResponse>, Status> {
        let r = r.into_inner();
        let found = self.ctx.table.find(&r.pod_namespace, &r.pod_name, None);
        let s = found.ok_or_else(|| {
            Status::not_found(format!("pod {} in namespace {} not found", r.pod_name, r.pod_namespace))
        })?;
        Ok(Response::new(GetPodResourcesResponse { pod_resources: Some(self.pod(&s)) }))
    }
}
