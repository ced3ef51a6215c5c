//! One driver: what it can do, and the calls it is asked. Each call has a connection of its own: a driver restarts behind
//! its registration without a word.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use tonic::{Response, Status};

use crate::grpc::{
    Channel,
    proto::csi::{
        NodeExpandVolumeRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeGetVolumeStatsRequest,
        NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
        NodeUnstageVolumeRequest,
        node_client::NodeClient,
        node_service_capability::{Type, rpc},
    },
    words,
};

/// How long a driver may take, as upstream.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) use rpc::Type as Can;

/// A registered driver.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Driver {
    pub(super) name: String,
    /// The socket it was announced by.
    pub(super) registered: PathBuf,
    endpoint: PathBuf,
    pub(super) node_id: String,
    /// Most volumes on this node, 0 is no limit.
    pub(super) max_volumes: i64,
    pub(super) topology: BTreeMap<String, String>,
    can: BTreeSet<i32>,
}

impl Driver {
    /// Asks a driver who this node is to it and what it can do.
    pub(super) async fn ask(name: &str, registered: &Path, endpoint: PathBuf) -> Result<Self, String> {
        let mut client = connect(name, &endpoint).await?;
        let info = client.node_get_info(NodeGetInfoRequest {}).await.map_err(|s| words(&s))?.into_inner();
        if info.node_id.is_empty() {
            return Err(format!("CSI driver {name:?} has no node id"));
        }
        let can = client.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.map_err(|s| words(&s))?;
        let types = can.into_inner().capabilities.into_iter().filter_map(|c| c.r#type);
        Ok(Self {
            name: name.into(),
            registered: registered.into(),
            endpoint,
            node_id: info.node_id,
            max_volumes: info.max_volumes_per_node,
            topology: info.accessible_topology.map(|t| t.segments.into_iter().collect()).unwrap_or_default(),
            can: types.map(|Type::Rpc(r)| r.r#type).collect(),
        })
    }

    pub(super) fn can(&self, what: Can) -> bool {
        self.can.contains(&(what as i32))
    }

    async fn call<T>(
        &self,
        what: impl AsyncFnOnce(NodeClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, String> {
        let work = async {
            let client = connect(&self.name, &self.endpoint).await?;
            what(client).await.map(Response::into_inner).map_err(|s| words(&s))
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(done) => done,
            Err(_) => Err("rpc error: code = DeadlineExceeded desc = context deadline exceeded".into()),
        }
    }

    pub(super) async fn stage(&self, r: NodeStageVolumeRequest) -> Result<(), String> {
        self.call(async |mut c| c.node_stage_volume(r).await).await.map(|_| ())
    }

    pub(super) async fn unstage(&self, r: NodeUnstageVolumeRequest) -> Result<(), String> {
        self.call(async |mut c| c.node_unstage_volume(r).await).await.map(|_| ())
    }

    pub(super) async fn publish(&self, r: NodePublishVolumeRequest) -> Result<(), String> {
        self.call(async |mut c| c.node_publish_volume(r).await).await.map(|_| ())
    }

    pub(super) async fn unpublish(&self, r: NodeUnpublishVolumeRequest) -> Result<(), String> {
        self.call(async |mut c| c.node_unpublish_volume(r).await).await.map(|_| ())
    }

    /// What a volume has used.
    pub(super) async fn usage(&self, r: NodeGetVolumeStatsRequest) -> Result<NodeGetVolumeStatsResponse, String> {
        self.call(async |mut c| c.node_get_volume_stats(r).await).await
    }

    /// The size it has afterwards; 0 when the driver does not say.
    pub(super) async fn expand(&self, r: NodeExpandVolumeRequest) -> Result<i64, String> {
        self.call(async |mut c| c.node_expand_volume(r).await).await.map(|a| a.capacity_bytes)
    }
}

async fn connect(name: &str, endpoint: &Path) -> Result<NodeClient<Channel>, String> {
    let channel = Channel::unix(endpoint).await;
    let channel = channel.map_err(|e| format!("CSI driver {name:?} at {}: {e}", endpoint.display()))?;
    Ok(NodeClient::new(channel))
}
