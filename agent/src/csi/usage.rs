//! What volumes of drivers that tell have used: asked when somebody asks for the node's statistics.

use std::{collections::HashMap, fs, path::PathBuf, time::Duration};

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{driver::Can, pod_volumes, record::Record};
use crate::{
    context::Context,
    grpc::proto::csi::{NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, volume_usage::Unit},
    pods::sandbox,
};

/// How long a driver may take: others wait for the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The volumes of one pod, as the Summary of /stats/summary has them.
async fn of_pod(ctx: &Context, pod: &Pod) -> Vec<Value> {
    let dirs = fs::read_dir(pod_volumes(ctx, sandbox::uid(pod))).into_iter().flatten().flatten();
    let all = dirs.map(|dir| async move {
        let record = Record::read(&dir.path()).filter(Record::is_done)?;
        let told = ask(ctx, &record, dir.path().join("mount")).await?;
        Some(volume(pod, &record, &told))
    });
    join_all(all).await.into_iter().flatten().collect()
}

/// The volumes of many pods, by the pod's UID.
pub(crate) async fn of_pods(ctx: &Context, pods: &[&Pod]) -> HashMap<String, Vec<Value>> {
    let all = pods.iter().map(|pod| async { (sandbox::uid(pod).to_owned(), of_pod(ctx, pod).await) });
    join_all(all).await.into_iter().filter(|(_, volumes)| !volumes.is_empty()).collect()
}

async fn ask(ctx: &Context, record: &Record, path: PathBuf) -> Option<NodeGetVolumeStatsResponse> {
    let driver = ctx.csi.driver(&record.driver_name).ok().filter(|d| d.can(Can::GetVolumeStats))?;
    let staged = record.volume_lifecycle_mode != "Ephemeral" && driver.can(Can::StageUnstageVolume);
    let staging = super::staging(ctx, &record.driver_name, &record.volume_handle);
    let request = NodeGetVolumeStatsRequest {
        volume_id: record.volume_handle.clone(),
        volume_path: path.display().to_string(),
        staging_target_path: if staged { staging.display().to_string() } else { String::new() },
    };
    match tokio::time::timeout(PATIENCE, driver.usage(request)).await {
        Ok(Ok(told)) => Some(told),
        Ok(Err(error)) => {
            tracing::debug!(driver = record.driver_name, volume = record.volume_handle, error, "no usage of a volume");
            None
        }
        Err(_) => {
            tracing::warn!(driver = record.driver_name, volume = record.volume_handle, "the driver does not answer");
            None
        }
    }
}

/// The volume's name in its pod: the directory has the PersistentVolume's.
fn name(pod: &Pod, record: &Record) -> String {
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_ref()).into_iter().flatten();
    let own = |v: &&k8s_openapi::api::core::v1::Volume| {
        let generated = v.ephemeral.is_some().then(|| format!("{}-{}", sandbox::name(pod), v.name));
        v.persistent_volume_claim.as_ref().map(|c| c.claim_name.clone()).or(generated).as_ref() == Some(&record.claim)
    };
    volumes.filter(|_| !record.claim.is_empty()).find(own).map_or(&record.name, |v| &v.name).clone()
}

fn volume(pod: &Pod, record: &Record, told: &NodeGetVolumeStatsResponse) -> Value {
    let mut out = json!({"name": name(pod, record), "time": k8s_openapi::jiff::Timestamp::now().to_string()});
    for usage in &told.usage {
        let keys = match usage.unit() {
            Unit::Bytes => ["capacityBytes", "availableBytes", "usedBytes"],
            Unit::Inodes => ["inodes", "inodesFree", "inodesUsed"],
            Unit::Unknown => continue,
        };
        for (key, n) in keys.into_iter().zip([usage.total, usage.available, usage.used]) {
            out[key] = n.max(0).into();
        }
    }
    if let Some(condition) = &told.volume_condition {
        out["volumeHealthStats"] = json!({"abnormal": condition.abnormal});
    }
    if !record.claim.is_empty() {
        out["pvcRef"] = json!({"name": record.claim, "namespace": sandbox::namespace(pod)});
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::proto::csi::{VolumeCondition, VolumeUsage};

    #[test]
    fn a_volume_is_told_under_its_name_in_the_pod() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [],
            "volumes": [{"name": "a", "persistentVolumeClaim": {"claimName": "c"}}, {"name": "e", "ephemeral": {}}]}}))
            .unwrap();
        let usage = |unit: Unit| VolumeUsage { total: 9, available: 7, used: 2, unit: unit.into() };
        let told = NodeGetVolumeStatsResponse {
            usage: vec![usage(Unit::Bytes), usage(Unit::Inodes)],
            volume_condition: Some(VolumeCondition { abnormal: true, message: String::new() }),
        };
        let record = |claim: &str| Record { name: "pv".into(), claim: claim.into(), ..Record::default() };
        let of = |claim: &str| {
            let mut v = volume(&pod, &record(claim), &told);
            v.as_object_mut().unwrap().remove("time");
            v
        };
        let mut want = json!({"name": "a", "capacityBytes": 9, "availableBytes": 7, "usedBytes": 2, "inodes": 9,
            "inodesFree": 7, "inodesUsed": 2, "volumeHealthStats": {"abnormal": true},
            "pvcRef": {"name": "c", "namespace": "n"}});
        assert_eq!(of("c"), want);
        assert_eq!(of("p-e")["name"], "e");
        want["name"] = json!("pv");
        want.as_object_mut().unwrap().remove("pvcRef");
        assert_eq!(of(""), want);
    }
}
