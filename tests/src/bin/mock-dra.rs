//! A driver of dynamic resources for tests: `mock-dra DRIVER`.
//!
//! Prepares whatever it is asked for: a device with a variable, as a spec of the Container Device Interface in /etc/cdi.

#![allow(clippy::unwrap_used, reason = "a test's peer fails by panicking")]

use std::{fs, io::Write, path::Path};

use isopod_tests::grpc::{
    proto::{
        dra::{
            dra_plugin_server::{DraPlugin, DraPluginServer},
            *,
        },
        registration::{
            InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
            registration_server::{Registration, RegistrationServer},
        },
    },
    serve,
};
use tonic::{Request, Response, Status};

const DATA: &str = "/var/lib/dra";
const SOCKET: &str = "/var/lib/kubelet/plugins/mock-dra/dra.sock";

fn log(text: String) {
    let mut file = fs::File::options().create(true).append(true).open(format!("{DATA}/log")).unwrap();
    writeln!(file, "{text}").unwrap();
}

struct Plugin(String);

#[tonic::async_trait]
impl DraPlugin for Plugin {
    async fn node_prepare_resources(
        &self,
        r: Request<NodePrepareResourcesRequest>,
    ) -> Result<Response<NodePrepareResourcesResponse>, Status> {
        let mut claims = std::collections::HashMap::new();
        for c in r.into_inner().claims {
            log(format!("prepare {}/{}", c.namespace, c.name));
            let error = fs::read_to_string(format!("{DATA}/refuse")).unwrap_or_default();
            let spec = format!(
                r#"{{"cdiVersion":"0.6.0","kind":"mock.test/claim","devices":[{{"name":"{}","containerEdits":{{"env":["CLAIM={}"]}}}}]}}"#,
                c.uid, c.name
            );
            fs::create_dir_all("/etc/cdi").unwrap();
            fs::write(format!("/etc/cdi/mock-{}.json", c.uid), spec).unwrap();
            let device = Device {
                pool_name: "pool".into(),
                device_name: "first".into(),
                cdi_device_ids: vec![format!("mock.test/claim={}", c.uid)],
                ..Device::default()
            };
            let devices = if error.is_empty() { vec![device] } else { Vec::new() };
            claims.insert(c.uid, NodePrepareResourceResponse { devices, error });
        }
        Ok(Response::new(NodePrepareResourcesResponse { claims }))
    }

    async fn node_unprepare_resources(
        &self,
        r: Request<NodeUnprepareResourcesRequest>,
    ) -> Result<Response<NodeUnprepareResourcesResponse>, Status> {
        let mut claims = std::collections::HashMap::new();
        for c in r.into_inner().claims {
            log(format!("unprepare {}/{}", c.namespace, c.name));
            fs::remove_file(format!("/etc/cdi/mock-{}.json", c.uid)).ok();
            claims.insert(c.uid, NodeUnprepareResourceResponse::default());
        }
        Ok(Response::new(NodeUnprepareResourcesResponse { claims }))
    }
}

#[tonic::async_trait]
impl Registration for Plugin {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        let info = PluginInfo {
            r#type: "DRAPlugin".into(),
            name: self.0.clone(),
            endpoint: SOCKET.into(),
            supported_versions: vec!["v1.DRAPlugin".into()],
        };
        Ok(Response::new(info))
    }

    async fn notify_registration_status(
        &self,
        r: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        log(format!("registered {}", r.into_inner().plugin_registered));
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let driver = std::env::args().nth(1).unwrap();
    fs::create_dir_all(DATA).unwrap();
    serve(Path::new(SOCKET), DraPluginServer::new(Plugin(driver.clone())));
    serve(Path::new("/var/lib/kubelet/plugins_registry/mock-dra.sock"), RegistrationServer::new(Plugin(driver)));
    std::future::pending::<()>().await;
}
