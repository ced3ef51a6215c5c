//! Which pods use which claims, on disk in the kubelet's own format: `dra_manager_state`.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::pods::state::write_atomically;

/// Name of the file.
const FILE: &str = "dra_manager_state";

/// A device that a driver has prepared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Device {
    pub(super) pool_name: String,
    pub(super) device_name: String,
    pub(super) request_names: Vec<String>,
    #[serde(rename = "CDIDeviceIDs")]
    pub(super) cdi: Vec<String>,
}

/// What one driver has prepared for a claim.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct DriverState {
    #[serde(deserialize_with = "or_none")]
    pub(super) devices: Vec<Device>,
}

fn or_none<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Device>, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Empty {}

/// A claim in use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Info {
    #[serde(rename = "ClaimUID")]
    pub(super) uid: String,
    #[serde(rename = "ClaimName")]
    pub(super) name: String,
    pub(super) namespace: String,
    #[serde(rename = "PodUIDs")]
    pub(super) pods: BTreeMap<String, Empty>,
    #[serde(rename = "DriverState")]
    pub(super) drivers: BTreeMap<String, DriverState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Data {
    kind: String,
    #[serde(rename = "apiVersion")]
    api_version: String,
    #[serde(rename = "ClaimInfoStateList", deserialize_with = "or_empty")]
    claims: Vec<Info>,
}

fn or_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Info>, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: String,
    checksum: u32,
}

fn checksum(data: &str) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(data.as_bytes());
    crc.sum()
}

/// Claims by UID; none without a file. One that is damaged is told and left alone.
pub(super) fn load(dir: &Path) -> Result<BTreeMap<String, Info>, String> {
    let path = dir.join(FILE);
    let Ok(text) = fs::read(&path) else { return Ok(BTreeMap::new()) };
    let failed = |why: String| format!("{}: {why}", path.display());
    let file: File = serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))?;
    if checksum(&file.data) != file.checksum {
        return Err(failed("checkpoint is corrupted".into()));
    }
    let data: Data = serde_json::from_str(&file.data).map_err(|e| failed(e.to_string()))?;
    Ok(data.claims.into_iter().map(|c| (c.uid.clone(), c)).collect())
}

/// Writes them all.
pub(super) fn save<'a>(dir: &Path, claims: impl Iterator<Item = &'a Info>) -> io::Result<()> {
    let data = serde_json::to_string(&Data {
        kind: "DRACheckpoint".into(),
        api_version: "checkpoint.dra.kubelet.k8s.io/v1".into(),
        claims: claims.cloned().collect(),
    })?;
    let file = File { checksum: checksum(&data), data };
    fs::create_dir_all(dir)?;
    write_atomically(&dir.join(FILE), &serde_json::to_vec(&file)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kubelet_wrote_is_read_and_written_alike() {
        let text = r#"{"Data":"{\"kind\":\"DRACheckpoint\",\"apiVersion\":\"checkpoint.dra.kubelet.k8s.io/v1\",\"ClaimInfoStateList\":[{\"ClaimUID\":\"067798be-454e-4be4-9047-1aa06aea63f7\",\"ClaimName\":\"example\",\"Namespace\":\"default\",\"PodUIDs\":{\"139cdb46-f989-4f17-9561-ca10cfb509a6\":{}},\"DriverState\":{\"test-driver.cdi.k8s.io\":{\"Devices\":[{\"PoolName\":\"worker-1\",\"DeviceName\":\"dev-1\",\"RequestNames\":[\"test request\"],\"CDIDeviceIDs\":[\"example.com/example=cdi-example\"]}]}}}]}","Checksum":1656016162}"#;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        fs::write(&path, text).unwrap();
        let claims = load(dir.path()).unwrap();
        let claim = &claims["067798be-454e-4be4-9047-1aa06aea63f7"];
        assert_eq!(claim.drivers["test-driver.cdi.k8s.io"].devices[0].cdi, ["example.com/example=cdi-example"]);
        save(dir.path(), claims.values()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        fs::write(&path, text.replace("worker-1", "worker-2")).unwrap();
        assert!(load(dir.path()).unwrap_err().ends_with("checkpoint is corrupted"));
        fs::remove_file(&path).unwrap();
        assert!(load(dir.path()).unwrap().is_empty());
    }
}
