//! Who makes the pods' groups: this agent by directories, or systemd by slices.
//!
//! systemd's are named as everywhere: `kubepods-burstable-podUID.slice` in `kubepods-burstable.slice` in `kubepods.slice`.
//! Limits are the slices' properties. In a pod's slice lies one scope whose group is delegated to the pod's supervisor,
//! which makes that scope around itself and its containers' groups below it.

use std::path::Path;

use isopod_runtime::cgroups::slice;
use oci_spec::runtime::LinuxResources;
use serde_json::json;

use crate::qos::{Limits, Qos};

/// `cgroupDriver` of KubeletConfiguration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    /// Directories of the agent's own.
    Cgroupfs,
    /// systemd's slices.
    Systemd,
}

impl Driver {
    /// By its name in the configuration.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [("cgroupfs", Self::Cgroupfs), ("systemd", Self::Systemd)].into_iter().find(|(n, _)| *n == name).map(|(_, d)| d)
    }
}

/// The slice of all pods of an instance, without its ending; a dash would nest it in another one.
pub(super) fn root(instance: &str) -> String {
    match instance.strip_prefix("isopod-") {
        Some(suffix) => format!("kubepods_{}", suffix.replace('-', "_")),
        None => "kubepods".to_owned(),
    }
}

/// Path of a slice by its name without ending: `a-b` lies in `a`.
pub(super) fn path(name: &str) -> String {
    let dashes = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    dashes.map(|end| format!("{}.slice", &name[..end])).collect::<Vec<_>>().join("/")
}

/// The group of a pod: its scope in its slice.
pub(super) fn pod_group(root: &str, qos: Qos, uid: &str) -> String {
    let class = match qos {
        Qos::Guaranteed => "",
        Qos::Burstable => "-burstable",
        Qos::BestEffort => "-besteffort",
    };
    format!("{}/{}", path(&format!("{root}{class}-pod{}", uid.replace('-', "_"))), scope(uid))
}

/// The scope in a pod's slice.
pub(super) fn scope(uid: &str) -> String {
    format!("isopod-{}.scope", uid.replace('-', "_"))
}

/// The unit that limits a group: the slice it is or lies in.
pub(super) fn unit(group: &str) -> Option<&str> {
    group.rsplit('/').find(|part| part.ends_with(".slice"))
}

/// The pod of a directory below `root` or one of its classes.
pub(super) fn pod_of(root: &str, directory: &str) -> Option<String> {
    let name = directory.strip_suffix(".slice")?.strip_prefix(root)?;
    let name = name.strip_prefix("-burstable").or(name.strip_prefix("-besteffort")).unwrap_or(name);
    Some(name.strip_prefix("-pod")?.replace('_', "-"))
}

/// Makes a slice, or gives one that exists other limits.
pub(super) fn make(unit: &str, limits: &Limits) -> Result<(), String> {
    slice::make(unit, &resources(limits)?).map_err(|e| e.to_string())
}

/// Changes a slice's limits.
pub(super) fn limit(unit: &str, limits: &Limits) -> Result<(), String> {
    slice::limit(unit, &resources(limits)?).map_err(|e| e.to_string())
}

/// Stops a slice; systemd removes its group.
pub(super) fn stop(unit: &str) -> Result<(), String> {
    slice::stop(unit).map_err(|e| e.to_string())
}

/// Whether systemd can group pods on this machine.
pub(super) fn possible() -> bool {
    Path::new("/run/systemd/system").is_dir() && Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn resources(limits: &Limits) -> Result<LinuxResources, String> {
    let resources = json!({
        "cpu": {"shares": limits.cpu_shares, "quota": limits.cpu_quota.unwrap_or(-1), "period": limits.cpu_period},
        "memory": {"limit": limits.memory.unwrap_or(-1)},
        "pids": {"limit": limits.pids.unwrap_or(-1)},
    });
    serde_json::from_value(resources).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_named_as_upstream() {
        let uid = "1f2e-3d4c";
        assert_eq!(
            pod_group("kubepods", Qos::Burstable, uid),
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1f2e_3d4c.slice/isopod-1f2e_3d4c.scope"
        );
        let guaranteed = pod_group(&root("isopod-ab"), Qos::Guaranteed, uid);
        assert_eq!(guaranteed, "kubepods_ab.slice/kubepods_ab-pod1f2e_3d4c.slice/isopod-1f2e_3d4c.scope");
        assert_eq!(unit(&guaranteed), Some("kubepods_ab-pod1f2e_3d4c.slice"));
        assert_eq!(unit("kubepods.slice/kubepods-besteffort.slice"), Some("kubepods-besteffort.slice"));
        for class in ["", "-burstable", "-besteffort"] {
            assert_eq!(pod_of("kubepods", &format!("kubepods{class}-pod1f2e_3d4c.slice")).as_deref(), Some(uid));
        }
        assert_eq!(pod_of("kubepods", "kubepods-burstable.slice"), None);
    }
}
