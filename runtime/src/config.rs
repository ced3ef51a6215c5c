//! Loading a bundle's config.json and refusing, with one clear sentence, what cannot be run.

use std::{
    collections::HashMap,
    io::Read,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, LinuxNetDevice, Process, Spec};

use crate::{
    cpu_list,
    error::{Context, Error, Result},
    hooks, lsm, memory_policy, net_devices, resctrl, spec,
};

/// Largest config.json accepted.
const MAX_SIZE: u64 = 16 << 20;

/// A validated configuration and where it came from.
#[derive(Debug)]
pub(crate) struct Config {
    /// The parsed document.
    pub(crate) spec: Spec,
    /// Absolute path of the bundle.
    pub(crate) bundle: PathBuf,
    /// The document as it was read.
    pub(crate) raw: Vec<u8>,
    /// What of it is left out.
    pub(crate) warnings: Vec<String>,
}

impl Config {
    /// Reads and validates `bundle/config.json`.
    pub(crate) fn load(bundle: &Path) -> Result<Self> {
        let bundle = std::path::absolute(bundle).context(|| format!("resolve bundle {}", bundle.display()))?;
        let path = bundle.join("config.json");
        Self::read(&path, bundle)
    }

    /// Reads and validates the configuration at `path` for `bundle`.
    pub(crate) fn read(path: &Path, bundle: PathBuf) -> Result<Self> {
        let raw = read_limited(path)?;
        let (spec, warnings): (Spec, _) =
            spec::parse(&raw, "/process").map_err(|e| Error::invalid(format!("parse {}: {e}", path.display())))?;
        let config = Self { spec, bundle, raw, warnings };
        config.validate().map_err(|e| e.within(path.display()))?;
        Ok(config)
    }

    /// `root.path`, absolute.
    pub(crate) fn rootfs(&self) -> PathBuf {
        let path = self.spec.root().as_ref().map_or_else(|| PathBuf::from("rootfs"), |r| r.path().clone());
        if path.is_absolute() { path } else { self.bundle.join(path) }
    }

    /// The process to run.
    pub(crate) fn process(&self) -> Result<&Process> {
        self.spec.process().as_ref().ok_or_else(|| Error::invalid("process is missing"))
    }

    /// The path of a listed namespace: `None` when the type is not listed, `Some(None)` when a new one is asked for.
    pub(crate) fn namespace(&self, kind: LinuxNamespaceType) -> Option<Option<&Path>> {
        let linux = self.spec.linux().as_ref()?;
        let found = linux.namespaces().iter().flatten().find(|n| n.typ() == kind)?;
        Some(found.path().as_deref().filter(|p| !p.as_os_str().is_empty()))
    }

    /// `linux.netDevices`, when there are any.
    pub(crate) fn net_devices(&self) -> Option<&HashMap<String, LinuxNetDevice>> {
        self.spec.linux().as_ref()?.net_devices().as_ref().filter(|devices| !devices.is_empty())
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let spec = &self.spec;
        if !spec.version().starts_with("1.") {
            return Err(Error::invalid(format!("ociVersion {:?} is not 1.x", spec.version())));
        }
        if spec.root().is_none() {
            return Err(Error::invalid("root is missing"));
        }
        if let Some(process) = spec.process() {
            validate_process(process)?;
        }
        for mount in spec.mounts().iter().flatten() {
            let destination = mount.destination();
            if destination.components().any(|c| c == std::path::Component::ParentDir) {
                return Err(Error::invalid(format!("mount destination {} contains ..", destination.display())));
            }
            if destination == Path::new("/") || destination.as_os_str().is_empty() {
                return Err(Error::invalid("a mount's destination may not be the root"));
            }
        }
        if spec.annotations().as_ref().is_some_and(|all| all.contains_key("")) {
            return Err(Error::invalid("an annotation has no name"));
        }
        if let Some(all) = spec.hooks() {
            hooks::validate(all)?;
        }
        self.validate_namespaces()?;
        self.validate_linux()
    }

    fn validate_namespaces(&self) -> Result<()> {
        let linux = self.spec.linux().as_ref().ok_or_else(|| Error::invalid("linux is missing"))?;
        let list = linux.namespaces().as_deref().unwrap_or_default();
        for (i, namespace) in list.iter().enumerate() {
            if list[..i].iter().any(|n| n.typ() == namespace.typ()) {
                return Err(Error::invalid(format!("namespace {:?} is listed twice", namespace.typ())));
            }
            if let Some(path) = self.namespace(namespace.typ()).flatten().filter(|path| !path.is_absolute()) {
                return Err(Error::invalid(format!("the path {path:?} of a namespace is not absolute")));
            }
        }
        if self.namespace(LinuxNamespaceType::Mount).is_none() {
            return Err(Error::invalid("a container needs a mount namespace"));
        }
        let hostname = self.spec.hostname().as_ref().is_some_and(|h| !h.is_empty());
        let domain = self.spec.domainname().as_ref().is_some_and(|h| !h.is_empty());
        if (hostname || domain) && self.namespace(LinuxNamespaceType::Uts).is_none() {
            return Err(Error::invalid("hostname and domainname need a UTS namespace"));
        }
        let mapped = linux.uid_mappings().as_ref().is_some_and(|m| !m.is_empty());
        if mapped && self.namespace(LinuxNamespaceType::User).is_none() {
            return Err(Error::invalid("uidMappings need a user namespace"));
        }
        if self.namespace(LinuxNamespaceType::User) == Some(None) && !mapped {
            return Err(Error::invalid("a new user namespace needs uidMappings and gidMappings"));
        }
        if linux.time_offsets().as_ref().is_some_and(|t| !t.is_empty())
            && self.namespace(LinuxNamespaceType::Time).is_none()
        {
            return Err(Error::invalid("timeOffsets need a time namespace"));
        }
        if self.net_devices().is_some() && self.namespace(LinuxNamespaceType::Network).is_none() {
            return Err(Error::invalid("linux.netDevices need a network namespace"));
        }
        Ok(())
    }

    fn validate_linux(&self) -> Result<()> {
        let Some(linux) = self.spec.linux() else { return Ok(()) };
        for path in linux.masked_paths().iter().chain(linux.readonly_paths()).flatten() {
            if !path.starts_with('/') {
                return Err(Error::invalid(format!("masked or read-only path {path:?} is not absolute")));
            }
        }
        for name in linux.sysctl().iter().flat_map(|s| s.keys()) {
            self.validate_sysctl(name)?;
        }
        for page in linux.resources().iter().filter_map(|r| r.hugepage_limits().as_ref()).flatten() {
            let size = page.page_size();
            if size.is_empty() || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(Error::invalid(format!("linux.resources.hugepageLimits: malformed pageSize {size:?}")));
            }
        }
        if let Some(policy) = linux.memory_policy() {
            memory_policy::validate(policy)?;
        }
        if let Some(devices) = self.net_devices() {
            net_devices::validate(devices)?;
        }
        lsm::validate_mount_label(linux.mount_label().as_deref().unwrap_or_default())?;
        if let Some(rdt) = linux.intel_rdt() {
            resctrl::validate(rdt)?;
        }
        // The specification defines no flag.
        match linux.personality().as_ref().and_then(|p| p.flags().as_ref()) {
            Some(flags) if !flags.is_empty() => Err(Error::invalid("linux.personality.flags is not supported")),
            _ => Ok(()),
        }
    }

    /// Only values that belong to one of the container's own namespaces; others would change the host.
    fn validate_sysctl(&self, name: &str) -> Result<()> {
        let dotted = name.replace('/', ".");
        if dotted.split('.').any(|part| part.is_empty()) {
            return Err(Error::invalid(format!("sysctl {name:?} is malformed")));
        }
        let own = |kind| self.namespace(kind).is_some();
        let ipc = ["kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax"];
        let ipc_more = ["kernel.shmmni", "kernel.shm_rmid_forced"];
        let allowed = if ipc.contains(&dotted.as_str())
            || ipc_more.contains(&dotted.as_str())
            || dotted.starts_with("fs.mqueue.")
        {
            own(LinuxNamespaceType::Ipc)
        } else if dotted.starts_with("net.") {
            own(LinuxNamespaceType::Network)
        } else if dotted == "kernel.domainname" || dotted == "kernel.hostname" {
            own(LinuxNamespaceType::Uts)
        } else if dotted.starts_with("user.") {
            own(LinuxNamespaceType::User)
        } else {
            false
        };
        if allowed { Ok(()) } else { Err(Error::invalid(format!("sysctl {name} is not in a separate namespace"))) }
    }
}

/// What also holds for the process of an exec.
pub(crate) fn validate_process(process: &Process) -> Result<()> {
    if !process.cwd().is_absolute() {
        return Err(Error::invalid(format!("process.cwd {:?} is not absolute", process.cwd())));
    }
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("process.args is empty"));
    }
    let env = process.env().as_deref().unwrap_or_default();
    if args.iter().chain(env).any(|s| s.contains('\0')) {
        return Err(Error::invalid("process.args or process.env contains a NUL byte"));
    }
    lsm::validate(process)?;
    let limits = process.rlimits().as_deref().unwrap_or_default();
    if let Some(twice) = limits.iter().enumerate().find(|(i, l)| limits[..*i].iter().any(|o| o.typ() == l.typ())) {
        return Err(Error::invalid(format!("process.rlimits: {} is listed twice", twice.1.typ())));
    }
    let adj = process.oom_score_adj().unwrap_or(0);
    if !(-1000..=1000).contains(&adj) {
        return Err(Error::invalid(format!("process.oomScoreAdj {adj} is not between -1000 and 1000")));
    }
    let affinity = process.exec_cpu_affinity().as_ref();
    for list in affinity.into_iter().flat_map(|a| [a.initial(), a.cpu_affinity_final()]).flatten() {
        cpu_list::parse(list).map_err(|e| e.within("process.execCPUAffinity"))?;
    }
    Ok(())
}

/// Reads a file of bounded size.
pub(crate) fn read_limited(path: &Path) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path).context(|| format!("open {}", path.display()))?;
    let mut raw = vec![];
    file.take(MAX_SIZE + 1).read_to_end(&mut raw).context(|| format!("read {}", path.display()))?;
    if raw.len() as u64 > MAX_SIZE {
        return Err(Error::invalid(format!("{} is larger than {MAX_SIZE} bytes", path.display())));
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut serde_json::Value)) -> Result<(), String> {
        let mut value = serde_json::to_value(crate::spec::template()).unwrap();
        change(&mut value);
        let spec = serde_json::from_value(value).map_err(|e| e.to_string())?;
        Config { spec, bundle: "/b".into(), raw: vec![], warnings: vec![] }.validate().map_err(|e| e.to_string())
    }

    #[test]
    fn the_template_is_valid() {
        assert_eq!(check(|_| ()), Ok(()));
    }

    #[test]
    fn properties_nobody_knows_have_no_effect() {
        let change = |v: &mut serde_json::Value| {
            v["nosuch"] = 1.into();
            v["linux"]["nosuch"] = serde_json::json!({"a": []});
        };
        assert_eq!(check(change), Ok(()));
    }

    #[test]
    fn wrong_configurations_have_clear_errors() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 24] = [
            (
                |v| v["linux"]["namespaces"][0]["path"] = "ns/pid".into(),
                "the path \"ns/pid\" of a namespace is not absolute",
            ),
            (|v| v["annotations"] = serde_json::json!({"": "x"}), "an annotation has no name"),
            (
                |v| v["hooks"] = serde_json::json!({"poststop": [{"path": "bin/true"}]}),
                "poststop hook #0 bin/true: the path is not absolute",
            ),
            (
                |v| v["hooks"] = serde_json::json!({"prestart": [{"path": "/a"}, {"path": "/b", "timeout": 0}]}),
                "prestart hook #1 /b: the timeout 0 is not positive",
            ),
            (
                |v| {
                    let limit = serde_json::json!({"type": "RLIMIT_CORE", "hard": 1, "soft": 1});
                    v["process"]["rlimits"] = serde_json::json!([limit, limit]);
                },
                "RLIMIT_CORE is listed twice",
            ),
            (|v| v["ociVersion"] = "2.0.0".into(), "ociVersion"),
            (|v| v["process"]["cwd"] = "tmp".into(), "not absolute"),
            (|v| v["process"]["args"] = serde_json::json!([]), "process.args is empty"),
            (|v| v["linux"]["namespaces"] = serde_json::json!([]), "needs a mount namespace"),
            (|v| v["linux"]["sysctl"] = serde_json::json!({"vm.swappiness": "1"}), "not in a separate namespace"),
            (|v| v["linux"]["sysctl"] = serde_json::json!({"net..x": "1"}), "malformed"),
            (|v| v["linux"]["maskedPaths"] = serde_json::json!(["proc/x"]), "not absolute"),
            (|v| v["mounts"][0]["destination"] = "/a/../b".into(), "contains .."),
            (|v| v["process"]["oomScoreAdj"] = 2000.into(), "oomScoreAdj"),
            (|v| v["process"]["execCPUAffinity"] = serde_json::json!({"initial": "1-x"}), "execCPUAffinity"),
            (|v| v["process"]["apparmorProfile"] = "p".into(), "apparmorProfile"),
            (|v| v["process"]["selinuxLabel"] = "a:b:c:d".into(), "selinuxLabel"),
            (|v| v["linux"]["intelRdt"] = serde_json::json!({"closID": "x"}), "linux.intelRdt"),
            (
                |v| v["linux"]["memoryPolicy"] = serde_json::json!({"mode": "MPOL_BIND", "nodes": "0-x"}),
                "linux.memoryPolicy.nodes: malformed list",
            ),
            (|v| v["linux"]["netDevices"] = serde_json::json!({"a/b": {}}), "linux.netDevices: \"a/b\" is no name"),
            (
                |v| {
                    v["linux"]["netDevices"] = serde_json::json!({"eth7": {}});
                    v["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}, {"type": "uts"}]);
                },
                "linux.netDevices need a network namespace",
            ),
            (|v| v["linux"]["mountLabel"] = "x".into(), "linux.mountLabel: this kernel has no SELinux"),
            (
                |v| v["linux"]["personality"] = serde_json::json!({"domain": "LINUX", "flags": ["X"]}),
                "linux.personality.flags is not supported",
            ),
            (
                |v| {
                    v["linux"]["resources"] =
                        serde_json::json!({"hugepageLimits": [{"pageSize": "../../x", "limit": 1}]});
                },
                "malformed pageSize",
            ),
        ];
        for (change, words) in cases {
            let error = check(change).unwrap_err();
            assert!(error.contains(words), "{error:?} does not contain {words:?}");
        }
    }
}
