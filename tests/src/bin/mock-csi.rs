//! A CSI driver for tests: volumes are directories below `data`; every request is a line of `data/log`.
//!
//! `mock-csi NAME DATA [stage] [expand] [group] [stats]`

#![allow(clippy::unwrap_used, reason = "a test's peer fails by panicking")]

use std::{
    fmt::Debug,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use isopod_tests::grpc::{
    proto::{
        csi::{
            node_server::{Node, NodeServer},
            node_service_capability::{Rpc, Type, rpc},
            volume_capability::AccessType,
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

struct Driver {
    name: String,
    data: PathBuf,
    words: Vec<String>,
}

/// Runs a program; its complaint as a gRPC error.
fn run(program: &str, args: &[&str]) -> Result<(), Status> {
    let output = Command::new(program).args(args).output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(Status::internal(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

fn is_mounted(path: &str) -> bool {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().any(|l| l.split(' ').nth(4).map(Path::new) == Some(&path))
}

fn unmount(path: &str) -> Result<(), Status> {
    if is_mounted(path) {
        run("umount", &[path])?;
    }
    fs::remove_dir(path).or_else(|_| fs::remove_file(path)).ok();
    Ok(())
}

impl Driver {
    fn socket(&self) -> PathBuf {
        Path::new("/var/lib/kubelet/plugins").join(&self.name).join("csi.sock")
    }

    fn can(&self, word: &str) -> bool {
        self.words.iter().any(|w| w == word)
    }

    fn log(&self, request: &impl Debug) {
        let mut file = fs::File::options().create(true).append(true).open(self.data.join("log")).unwrap();
        writeln!(file, "{request:?}").unwrap();
    }

    /// The directory that is a volume.
    fn volume(&self, id: &str) -> String {
        let dir = self.data.join("volumes").join(id);
        fs::create_dir_all(&dir).unwrap();
        dir.to_str().unwrap().to_owned()
    }
}

#[tonic::async_trait]
impl Registration for Driver {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: self.name.clone(),
            endpoint: self.socket().to_str().unwrap().into(),
            supported_versions: vec!["1.0.0".into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        r: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        self.log(r.get_ref());
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_stage_volume(
        &self,
        r: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let r = r.into_inner();
        self.log(&r);
        run("mount", &["--bind", &self.volume(&r.volume_id), &r.staging_target_path])?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        r: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let r = r.into_inner();
        self.log(&r);
        unmount(&r.staging_target_path)?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        r: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let r = r.into_inner();
        self.log(&r);
        if let Some(error) = r.volume_context.get("fail") {
            return Err(Status::internal(error));
        }
        if matches!(&r.volume_capability, Some(VolumeCapability { access_type: Some(AccessType::Block(_)), .. })) {
            // The first loop device stands for a disk; nobody opens it.
            run("mknod", &[&r.target_path, "b", "7", "0"])?;
            return Ok(Response::new(NodePublishVolumeResponse {}));
        }
        let source =
            if r.staging_target_path.is_empty() { self.volume(&r.volume_id) } else { r.staging_target_path.clone() };
        if let Some(content) = r.volume_context.get("content") {
            fs::write(Path::new(&source).join("content"), content).unwrap();
        }
        fs::create_dir_all(&r.target_path).unwrap();
        if !is_mounted(&r.target_path) {
            run("mount", &["--bind", &source, &r.target_path])?;
        }
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        r: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let r = r.into_inner();
        self.log(&r);
        unmount(&r.target_path)?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_expand_volume(
        &self,
        r: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let r = r.into_inner();
        self.log(&r);
        let capacity_bytes = r.capacity_range.unwrap_or_default().required_bytes;
        Ok(Response::new(NodeExpandVolumeResponse { capacity_bytes }))
    }

    async fn node_get_volume_stats(
        &self,
        r: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        self.log(r.get_ref());
        let bytes = VolumeUsage { available: 700, total: 1000, used: 300, unit: volume_usage::Unit::Bytes.into() };
        Ok(Response::new(NodeGetVolumeStatsResponse { usage: vec![bytes], volume_condition: None }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let all = [
            ("stage", rpc::Type::StageUnstageVolume),
            ("expand", rpc::Type::ExpandVolume),
            ("group", rpc::Type::VolumeMountGroup),
            ("stats", rpc::Type::GetVolumeStats),
        ];
        let own = all.into_iter().filter(|(word, _)| self.can(word));
        let capabilities =
            own.map(|(_, t)| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: t.into() })) }).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let key = format!("topology.{}/zone", self.name);
        Ok(Response::new(NodeGetInfoResponse {
            node_id: format!("{}-of-one", self.name),
            max_volumes_per_node: 7,
            accessible_topology: Some(Topology { segments: [(key, "here".to_owned())].into() }),
        }))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let (name, data) = (args.next().unwrap(), PathBuf::from(args.next().unwrap()));
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("pid"), std::process::id().to_string()).unwrap();
    let driver = Arc::new(Driver { name, data, words: args.collect() });
    serve(&driver.socket(), NodeServer::from_arc(driver.clone()));
    let registry = Path::new("/var/lib/kubelet/plugins_registry");
    serve(&registry.join(format!("{}-reg.sock", driver.name)), RegistrationServer::from_arc(driver));
    std::future::pending::<()>().await;
}
