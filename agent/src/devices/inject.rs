//! What a container with devices needs: variables, mounts, device nodes, annotations.

use std::{
    collections::BTreeMap,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cdi;
use crate::{
    grpc::proto::{cri::ContainerConfig, device::ContainerAllocateResponse},
    spec::BindMount,
};

/// A device node, by its place on the host and in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Node {
    pub(super) host: PathBuf,
    pub(super) container: String,
    /// Of r, w and m.
    pub(super) permissions: String,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mount {
    pub(super) host: PathBuf,
    pub(super) container: String,
    pub(super) read_only: bool,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Injection {
    pub(super) env: BTreeMap<String, String>,
    pub(super) mounts: Vec<Mount>,
    pub(super) nodes: Vec<Node>,
    pub(super) annotations: BTreeMap<String, String>,
    /// Names of the Container Device Interface, looked up when the container is made.
    pub(super) cdi: Vec<String>,
}

impl Injection {
    /// What a plugin answered; refused where it makes no sense.
    pub(super) fn from_plugin(r: ContainerAllocateResponse) -> Result<Self, String> {
        let permissions = |p: &str| !p.is_empty() && p.chars().all(|c| "rwm".contains(c));
        if let Some(d) = r.devices.iter().find(|d| !permissions(&d.permissions)) {
            return Err(format!("device {} has permissions {:?}", d.host_path, d.permissions));
        }
        Ok(Self {
            env: r.envs.into_iter().collect(),
            mounts: r
                .mounts
                .into_iter()
                .map(|m| Mount { host: m.host_path.into(), container: m.container_path, read_only: m.read_only })
                .collect(),
            nodes: r
                .devices
                .into_iter()
                .map(|d| Node { host: d.host_path.into(), container: d.container_path, permissions: d.permissions })
                .collect(),
            annotations: r.annotations.into_iter().collect(),
            cdi: r.cdi_devices.into_iter().map(|d| d.name).collect(),
        })
    }

    /// What a caller of the CRI asks for.
    pub(crate) fn from_cri(config: &ContainerConfig) -> Self {
        let node = |d: &crate::grpc::proto::cri::Device| Node {
            host: d.host_path.clone().into(),
            container: d.container_path.clone(),
            permissions: d.permissions.clone(),
        };
        Self {
            nodes: config.devices.iter().map(node).collect(),
            annotations: config.annotations.clone().into_iter().collect(),
            cdi: config.cdi_devices.iter().map(|d| d.name.clone()).collect(),
            ..Self::default()
        }
    }

    /// Both together.
    #[must_use]
    pub(super) fn with(mut self, other: Self) -> Self {
        self.env.extend(other.env);
        self.mounts.extend(other.mounts);
        for node in other.nodes {
            if !self.nodes.contains(&node) {
                self.nodes.push(node);
            }
        }
        self.annotations.extend(other.annotations);
        self.cdi.extend(other.cdi);
        self
    }

    /// With devices that are volumes.
    #[must_use]
    pub(crate) fn with_volumes(mut self, volumes: Vec<(PathBuf, String, bool)>) -> Self {
        let node = |(host, container, read_only): (PathBuf, String, bool)| {
            let permissions = if read_only { "r" } else { "rwm" }.into();
            Node { host, container, permissions }
        };
        self.nodes.extend(volumes.into_iter().map(node));
        self
    }

    /// With more names of the Container Device Interface.
    #[must_use]
    pub(crate) fn with_names(mut self, names: Vec<String>) -> Self {
        self.cdi.extend(names);
        self
    }

    /// With what the names of the Container Device Interface stand for.
    pub(crate) fn resolved(mut self) -> Result<Self, String> {
        let names = std::mem::take(&mut self.cdi);
        Ok(self.with(cdi::resolve(&names, &cdi::DIRECTORIES.map(Path::new))?))
    }

    /// Variables; the container's own of the same name win.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.env.iter().map(|(k, v)| (k.clone(), v.clone()))
    }

    /// Its mounts.
    pub(crate) fn binds(&self) -> impl Iterator<Item = BindMount> + '_ {
        self.mounts
            .iter()
            .map(|m| BindMount { read_only: m.read_only, ..BindMount::file(m.host.clone(), m.container.clone()) })
    }

    /// Adds device nodes and annotations to a container's document.
    pub(crate) fn apply(&self, document: &mut Value) -> Result<(), String> {
        for (key, value) in &self.annotations {
            document["annotations"][key] = json!(value);
        }
        for node in &self.nodes {
            let (device, rule) = entries(node)?;
            push(&mut document["linux"]["devices"], device);
            push(&mut document["linux"]["resources"]["devices"], rule);
        }
        Ok(())
    }
}

fn push(list: &mut Value, entry: Value) {
    match list {
        Value::Array(all) => {
            all.retain(|e| entry.get("path").is_none() || e.get("path") != entry.get("path"));
            all.push(entry);
        }
        other => *other = json!([entry]),
    }
}

/// The node for `linux.devices` and the rule that opens it.
fn entries(node: &Node) -> Result<(Value, Value), String> {
    let failed = |e: String| format!("device {}: {e}", node.host.display());
    let meta = std::fs::metadata(&node.host).map_err(|e| failed(e.to_string()))?;
    let kind = match meta.file_type() {
        t if t.is_char_device() => "c",
        t if t.is_block_device() => "b",
        _ => return Err(failed("not a device".into())),
    };
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let device = json!({"path": node.container, "type": kind, "major": major, "minor": minor,
        "fileMode": meta.mode() & 0o777, "uid": meta.uid(), "gid": meta.gid()});
    let rule = json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": node.permissions});
    Ok((device, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_node_and_a_rule() {
        let node = Node { host: "/dev/null".into(), container: "/dev/x".into(), permissions: "rw".into() };
        let injection = Injection {
            nodes: vec![node],
            annotations: [("k".to_string(), "v".to_string())].into(),
            ..Injection::default()
        };
        let mut document =
            json!({"annotations": {}, "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}}});
        injection.apply(&mut document).unwrap();
        injection.apply(&mut document).unwrap();
        assert_eq!(document["linux"]["devices"][0]["path"], "/dev/x");
        assert_eq!(document["linux"]["devices"].as_array().unwrap().len(), 1);
        let rule = json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"});
        assert_eq!(document["linux"]["resources"]["devices"][1], rule);
        assert_eq!(document["annotations"]["k"], "v");
        let gone = Node { host: "/dev/none".into(), container: "/x".into(), permissions: "r".into() };
        let gone = Injection { nodes: vec![gone], ..Injection::default() };
        assert!(gone.apply(&mut document).unwrap_err().starts_with("device /dev/none"));
    }
}
