//! A device plugin for tests: `mock-device RESOURCE ID...`; with a word `pre` or `prefer=ID` it asks for those calls.
//!
//! Every device is /dev/null under another name. Devices named in `/var/lib/device/broken` are unhealthy.

#![allow(clippy::unwrap_used, reason = "a test's peer fails by panicking")]

use std::{fs, io::Write, path::Path, pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use isopod_tests::grpc::{
    Channel,
    proto::device::{
        device_plugin_server::{DevicePlugin, DevicePluginServer},
        registration_client::RegistrationClient,
        *,
    },
    serve,
};
use tonic::{Request, Response, Status};

const DIRECTORY: &str = "/var/lib/kubelet/device-plugins";
const DATA: &str = "/var/lib/device";

struct Plugin {
    resource: String,
    ids: Vec<String>,
    pre: bool,
    prefer: Option<String>,
}

fn log(text: String) {
    let mut file = fs::File::options().create(true).append(true).open(format!("{DATA}/log")).unwrap();
    writeln!(file, "{text}").unwrap();
}

fn broken() -> String {
    fs::read_to_string(format!("{DATA}/broken")).unwrap_or_default()
}

impl Plugin {
    fn options(&self) -> DevicePluginOptions {
        DevicePluginOptions { pre_start_required: self.pre, get_preferred_allocation_available: self.prefer.is_some() }
    }

    fn list(&self, broken: &str) -> ListAndWatchResponse {
        let device = |id: &String| Device {
            id: id.clone(),
            health: if broken.split_whitespace().any(|b| b == id) { "Unhealthy" } else { "Healthy" }.into(),
            topology: Some(TopologyInfo { nodes: vec![NumaNode { id: 0 }] }),
        };
        ListAndWatchResponse { devices: self.ids.iter().map(device).collect() }
    }
}

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    async fn get_device_plugin_options(&self, _: Request<Empty>) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(self.options()))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let plugin = Plugin { resource: self.resource.clone(), ids: self.ids.clone(), pre: self.pre, prefer: None };
        let stream = futures::stream::unfold((plugin, None::<String>), |(plugin, said)| async move {
            let mut now = broken();
            while said.as_ref() == Some(&now) {
                tokio::time::sleep(Duration::from_millis(50)).await;
                now = broken();
            }
            Some((Ok(plugin.list(&now)), (plugin, Some(now))))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_preferred_allocation(
        &self,
        r: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let r = r.into_inner();
        log(format!("{r:?}"));
        let ids = self.prefer.iter().cloned().collect();
        let container_responses = vec![ContainerPreferredAllocationResponse { device_i_ds: ids }];
        Ok(Response::new(PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(&self, r: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let r = r.into_inner();
        log(format!("{r:?}"));
        let mut container_responses = Vec::new();
        for c in r.container_requests {
            if Path::new(DATA).join("refuse").exists() {
                return Err(Status::unknown("no devices today"));
            }
            let node = |id: &String| DeviceSpec {
                container_path: format!("/dev/mock-{id}"),
                host_path: "/dev/null".into(),
                permissions: "rw".into(),
            };
            container_responses.push(ContainerAllocateResponse {
                envs: [("MOCK".to_owned(), c.devices_ids.join(","))].into(),
                mounts: vec![Mount { container_path: "/mock".into(), host_path: DATA.into(), read_only: true }],
                devices: c.devices_ids.iter().map(node).collect(),
                annotations: [("mock".to_owned(), "yes".to_owned())].into(),
                cdi_devices: Vec::new(),
            });
        }
        Ok(Response::new(AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        r: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        log(format!("{:?}", r.into_inner()));
        Ok(Response::new(PreStartContainerResponse {}))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let resource = args.remove(0);
    let pre = args.iter().any(|a| a == "pre");
    let prefer = args.iter().find_map(|a| a.strip_prefix("prefer=")).map(str::to_owned);
    let ids = args.iter().filter(|a| *a != "pre" && !a.starts_with("prefer=")).cloned().collect();
    fs::create_dir_all(DATA).unwrap();
    fs::write(format!("{DATA}/pid"), std::process::id().to_string()).unwrap();
    let plugin = Arc::new(Plugin { resource, ids, pre, prefer });
    // As real plugins do: come again whenever the agent has made its socket anew.
    let socket = Path::new(DIRECTORY).join("kubelet.sock");
    let own = Path::new(DIRECTORY).join("mock.sock");
    loop {
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        serve(&own, DevicePluginServer::from_arc(plugin.clone()));
        let request = RegisterRequest {
            version: "v1beta1".into(),
            endpoint: "mock.sock".into(),
            resource_name: plugin.resource.clone(),
            options: Some(plugin.options()),
        };
        let done = RegistrationClient::new(Channel::connect(&socket).await).register(request).await;
        log(format!("registered: {:?}", done.map(|_| ())));
        while own.exists() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
