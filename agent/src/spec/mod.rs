//! From a pod's container and its image to the OCI `config.json`.
//!
//! Everything here is pure (apart from reading an image's passwd and group files): fetched objects, mounted volumes and
//! addresses come in, the document goes out.

pub(crate) mod env;
pub(crate) mod expand;
pub(crate) mod field;
pub(crate) mod files;
pub(crate) mod resources;
pub(crate) mod security;
pub(crate) mod users;

use std::{collections::HashMap, os::unix::fs::FileTypeExt, os::unix::fs::MetadataExt, path::PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod};
use serde_json::{Value, json};

use crate::{images::ImageHandle, pods::users::Range, qos};

/// One bind mount of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BindMount {
    pub(crate) source: PathBuf,
    pub(crate) destination: String,
    pub(crate) read_only: bool,
    pub(crate) recursive_read_only: bool,
    /// `private`, `rslave` or `rshared`.
    pub(crate) propagation: &'static str,
}

impl BindMount {
    /// A read-write bind of one file.
    pub(crate) fn file(source: PathBuf, destination: impl Into<String>) -> Self {
        Self {
            source,
            destination: destination.into(),
            read_only: false,
            recursive_read_only: false,
            propagation: "rprivate",
        }
    }
}

/// What the document is made from.
pub(crate) struct Inputs<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) image: &'a ImageHandle,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) hostname: &'a str,
    pub(crate) mounts: Vec<BindMount>,
    /// The shared /dev/shm of the pod; `None` gives the container one of its own.
    pub(crate) shm: Option<PathBuf>,
    pub(crate) cgroup: String,
    pub(crate) memory_capacity: i64,
    /// What of the node the kernel's numbers depend on.
    pub(crate) knobs: resources::Knobs,
    /// The pod's own users, when they are not the host's.
    pub(crate) users: Option<Range>,
    pub(crate) seccomp_default: bool,
    pub(crate) seccomp_profiles: PathBuf,
}

/// Builds config.json; an error is the message of a CreateContainerConfigError.
pub(crate) fn build(i: &Inputs<'_>) -> Result<Value, String> {
    let c = i.container;
    let spec = i.pod.spec.as_ref().ok_or("the pod has no spec")?;
    let image = i.image.config.config().clone().unwrap_or_default();
    let users = users::Users::of_layers(&i.image.layers);
    let image_user = image.user().clone().unwrap_or_default();
    let (user, home) = security::user(i.pod, c, &image_user, &users)?;
    let privileged = security::privileged(c);
    let env = environment(i, image.env().as_deref().unwrap_or_default(), home);
    let args = arguments(c, &image, &i.env)?;
    let cwd = c.working_dir.clone().filter(|w| !w.is_empty()).or_else(|| image.working_dir().clone());
    let (masked, read_only) = security::paths(c);
    let host_pid = spec.host_pid == Some(true);
    let pod_pid = spec.share_process_namespace == Some(true);
    let mut namespaces = vec![json!({"type": "mount"})];
    if !host_pid && !pod_pid {
        namespaces.push(json!({"type": "pid"}));
    }
    // A privileged container sees the host's groups.
    if !privileged {
        namespaces.push(json!({"type": "cgroup"}));
    }
    if i.users.is_some() {
        namespaces.push(json!({"type": "user"}));
    }
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": i.cgroup,
        "resources": resources::resources(i.pod, c, &i.knobs, Some(privileged)),
        "maskedPaths": masked,
        "readonlyPaths": read_only,
    });
    if let Some(range) = i.users {
        let map = json!([{"containerID": 0, "hostID": range.host, "size": range.length}]);
        linux["uidMappings"] = map.clone();
        linux["gidMappings"] = map;
    }
    if privileged {
        linux["devices"] = host_devices();
    }
    if let Some(p) = security::seccomp(i.pod, c, i.seccomp_default, &i.seccomp_profiles)? {
        linux["seccomp"] = p;
    }
    if let Some(p) = i.mounts.iter().map(|m| m.propagation).filter(|p| *p != "rprivate").max_by_key(|p| *p == "rshared")
    {
        linux["rootfsPropagation"] = json!(p);
    }
    Ok(json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": security::read_only_root(c)},
        "process": {
            "terminal": c.tty == Some(true),
            "user": user,
            "args": args,
            "env": env,
            "cwd": cwd.filter(|w| !w.is_empty()).unwrap_or_else(|| "/".into()),
            "capabilities": security::capabilities(c),
            "noNewPrivileges": security::no_new_privileges(c),
            "oomScoreAdj": qos::oom_score_adj(i.pod, c, i.memory_capacity),
        },
        "mounts": mounts(i, privileged),
        "linux": linux,
        "annotations": {
            "io.kubernetes.pod.name": i.pod.metadata.name,
            "io.kubernetes.pod.namespace": i.pod.metadata.namespace,
            "io.kubernetes.pod.uid": i.pod.metadata.uid,
            "io.kubernetes.container.name": c.name,
        },
    }))
}

/// PATH, HOSTNAME and HOME first, then the image's, then the pod's; a later one of a name replaces an earlier one.
fn environment(i: &Inputs<'_>, image: &[String], home: Option<String>) -> Vec<String> {
    let mut out: Vec<(String, String)> =
        vec![("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into())];
    let mut index: HashMap<String, usize> = HashMap::from([("PATH".into(), 0)]);
    let mut set = |name: String, value: String| match index.get(&name) {
        Some(at) => out[*at].1 = value,
        None => {
            index.insert(name.clone(), out.len());
            out.push((name, value));
        }
    };
    set("HOSTNAME".into(), i.hostname.into());
    if i.container.tty == Some(true) {
        set("TERM".into(), "xterm".into());
    }
    for (k, v) in image.iter().filter_map(|e| e.split_once('=')) {
        set(k.into(), v.into());
    }
    for (k, v) in &i.env {
        set(k.clone(), v.clone());
    }
    if !out.iter().any(|(k, _)| k == "HOME") {
        out.push(("HOME".into(), home.filter(|h| !h.is_empty()).unwrap_or_else(|| "/".into())));
    }
    out.into_iter().map(|(k, v)| format!("{k}={v}")).collect()
}

/// The pod's command replaces entrypoint and cmd; its args alone replace cmd.
fn arguments(c: &Container, image: &oci_spec::image::Config, env: &[(String, String)]) -> Result<Vec<String>, String> {
    let lookup = |n: &str| env.iter().find(|(k, _)| k == n).map(|(_, v)| v.clone());
    let expanded = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|a| expand::expand(a, lookup)).collect()
    };
    let (command, args) = (expanded(&c.command), expanded(&c.args));
    let entrypoint = image.entrypoint().clone().unwrap_or_default();
    let cmd = image.cmd().clone().unwrap_or_default();
    let all: Vec<String> = match (command.is_empty(), args.is_empty()) {
        (false, _) => [command, args].concat(),
        (true, false) => [entrypoint, args].concat(),
        (true, true) => [entrypoint, cmd].concat(),
    };
    if all.is_empty() { Err("no command specified".into()) } else { Ok(all) }
}

fn mounts(i: &Inputs<'_>, privileged: bool) -> Value {
    let spec = i.pod.spec.as_ref();
    // On disk files keep the ids they have inside.
    let map = if i.users.is_some() { "ridmap" } else { "rw" };
    let sys = if privileged { "rw" } else { "ro" };
    let mut all = vec![
        json!({"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]}),
        json!({"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}),
        json!({"destination":"/dev/pts","type":"devpts","source":"devpts",
            "options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]}),
        json!({"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]}),
        json!({"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev",sys]}),
        json!({"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup",
            "options":["nosuid","noexec","nodev","relatime",sys]}),
    ];
    let bind = |source: &std::path::Path, destination: &str| json!({"destination":destination,"type":"bind","source":source,"options":["rbind","rprivate",map,"rw"]});
    let has = |d: &str| i.mounts.iter().any(|m| m.destination.trim_end_matches('/') == d);
    if !has("/dev/shm") {
        all.push(match &i.shm {
            _ if spec.is_some_and(|s| s.host_ipc == Some(true)) => bind("/dev/shm".as_ref(), "/dev/shm"),
            Some(shm) => bind(shm, "/dev/shm"),
            None => json!({"destination":"/dev/shm","type":"tmpfs","source":"shm",
                "options":["nosuid","noexec","nodev","mode=1777","size=65536k"]}),
        });
    }
    // Parents before what is mounted below them.
    let mut own: Vec<&BindMount> = i.mounts.iter().collect();
    own.sort_by_key(|m| m.destination.split('/').filter(|p| !p.is_empty()).count());
    for m in own {
        let mut options = vec!["rbind", m.propagation, map];
        options.push(if m.recursive_read_only {
            "rro"
        } else if m.read_only {
            "ro"
        } else {
            "rw"
        });
        all.push(json!({"destination":m.destination,"type":"bind","source":m.source,"options":options}));
    }
    Value::Array(all)
}

/// Every device node of the host, for privileged containers.
fn host_devices() -> Value {
    let mut found = Vec::new();
    let mut stack = vec![PathBuf::from("/dev")];
    while let Some(dir) = stack.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(meta) = path.symlink_metadata() else { continue };
            let kind = meta.file_type();
            if kind.is_dir() {
                if !matches!(path.to_str(), Some("/dev/pts" | "/dev/shm" | "/dev/fd" | "/dev/mqueue")) {
                    stack.push(path);
                }
            } else if (kind.is_char_device() || kind.is_block_device())
                && !matches!(path.to_str(), Some("/dev/console" | "/dev/ptmx" | "/dev/tty"))
            {
                let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
                found.push(json!({"path":path,"type":if kind.is_char_device() {"c"} else {"b"},"major":major,
                    "minor":minor,"fileMode":meta.mode() & 0o777,"uid":meta.uid(),"gid":meta.gid()}));
            }
        }
    }
    Value::Array(found)
}

/// The signal that stops a container: the pod's word, the image's, SIGTERM.
pub(crate) fn stop_signal(c: &Container, image: Option<&str>) -> i32 {
    let wanted = c.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()).or(image);
    wanted.and_then(signal_number).unwrap_or(libc::SIGTERM)
}

/// `SIGTERM`, `TERM` or `15`; realtime ones as `SIGRTMIN+n`.
pub(crate) fn signal_number(name: &str) -> Option<i32> {
    if let Ok(n) = name.parse::<i32>() {
        return (1..=64).contains(&n).then_some(n);
    }
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let n = 34 + offset.strip_prefix('+').map_or(Some(0), |o| o.parse().ok())?;
        return (34..=64).contains(&n).then_some(n);
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        let n = 64 - offset.strip_prefix('-').map_or(Some(0), |o| o.parse().ok())?;
        return (34..=64).contains(&n).then_some(n);
    }
    format!("SIG{name}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn image(config: Value) -> ImageHandle {
        ImageHandle {
            id: "sha256:0".into(),
            digest_reference: "r@sha256:0".into(),
            config: Arc::new(
                serde_json::from_value(json!({"architecture":"amd64","os":"linux","config":config,
                    "rootfs":{"type":"layers","diff_ids":[]}}))
                .unwrap(),
            ),
            layers: vec![],
            reference: "r:latest".into(),
            pulled: None,
        }
    }

    fn built(pod: Value, img: Value) -> Result<Value, String> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata":{"name":"p","namespace":"n","uid":"u"},"spec":pod})).unwrap();
        let c = pod.spec.as_ref().unwrap().containers[0].clone();
        build(&Inputs {
            pod: &pod,
            container: &c,
            image: &image(img),
            env: vec![("WHO".into(), "world".into())],
            hostname: "p",
            mounts: vec![BindMount::file("/b".into(), "/data/deep"), BindMount::file("/a".into(), "/data")],
            shm: None,
            cgroup: "/isopod/podu/id".into(),
            memory_capacity: 1 << 30,
            knobs: resources::Knobs { cfs_period: Some(100_000), ..resources::Knobs::default() },
            users: None,
            seccomp_default: false,
            seccomp_profiles: "/none".into(),
        })
    }

    #[test]
    fn entrypoint_rules() {
        let img = json!({"Entrypoint":["/ep"],"Cmd":["a"],"Env":["X=1","PATH=/bin"],"WorkingDir":"/w"});
        for (c, want) in [
            (json!({}), vec!["/ep", "a"]),
            (json!({"args":["$(WHO)"]}), vec!["/ep", "world"]),
            (json!({"command":["/c"]}), vec!["/c"]),
            (json!({"command":["/c"],"args":["$$(WHO)"]}), vec!["/c", "$(WHO)"]),
        ] {
            let mut c = c;
            c["name"] = json!("c");
            let doc = built(json!({"containers":[c]}), img.clone()).unwrap();
            assert_eq!(doc["process"]["args"], json!(want));
            assert_eq!(doc["process"]["cwd"], "/w");
            assert_eq!(doc["process"]["env"], json!(["PATH=/bin", "HOSTNAME=p", "X=1", "WHO=world", "HOME=/"]));
        }
        assert_eq!(built(json!({"containers":[{"name":"c"}]}), json!({})).unwrap_err(), "no command specified");
    }

    #[test]
    fn the_document_is_an_oci_spec() {
        let doc = built(
            json!({"containers":[{"name":"c","command":["x"],"resources":{"limits":{"cpu":"500m","memory":"64Mi"}},
                "securityContext":{"readOnlyRootFilesystem":true,"allowPrivilegeEscalation":false}}]}),
            json!({}),
        )
        .unwrap();
        let spec: oci_spec::runtime::Spec = serde_json::from_value(doc.clone()).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), Some(true));
        assert_eq!(doc["linux"]["resources"]["cpu"], json!({"shares":512,"quota":50000,"period":100000}));
        assert_eq!(doc["linux"]["resources"]["memory"]["limit"], 64 << 20);
        let places: Vec<&str> =
            doc["mounts"].as_array().unwrap().iter().map(|m| m["destination"].as_str().unwrap()).collect();
        assert!(places.ends_with(&["/dev/shm", "/data", "/data/deep"]));
    }

    #[test]
    fn signals() {
        for (name, want) in [("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63)] {
            assert_eq!(signal_number(name), Some(want), "{name}");
        }
        assert_eq!(signal_number("SIGNOPE"), None);
    }
}
