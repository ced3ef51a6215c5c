//! The specification's document: how it is read, and the one `isopod-runtime spec` writes.

use std::collections::BTreeSet;

use oci_spec::runtime::{Capability, Spec};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// The version of the specification this runtime is made for.
pub const VERSION: &str = "1.3.0";

/// Flags of `process.scheduler` whose names the parser has otherwise than the specification.
const SCHEDULER_FLAGS: &[(&str, &str)] =
    &[("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"), ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN")];

/// Parses a document that has a process at this JSON pointer, and says what of the process had to be left out.
pub(crate) fn parse<T: DeserializeOwned>(raw: &[u8], process: &str) -> serde_json::Result<(T, Vec<String>)> {
    let error = match serde_json::from_slice(raw) {
        Ok(parsed) => return Ok((parsed, vec![])),
        Err(error) => error,
    };
    let Ok(mut document) = serde_json::from_slice::<Value>(raw) else { return Err(error) };
    let Some(process) = document.pointer_mut(process) else { return Err(error) };
    let before = process.clone();
    let unknown = translate(process);
    if *process == before {
        // This one knows its line.
        return Err(error);
    }
    serde_json::from_value(document).map(|parsed| (parsed, unknown))
}

/// Puts the parser's names in, and takes capabilities out that nobody knows: the specification wants them logged.
fn translate(process: &mut Value) -> Vec<String> {
    for flag in process.pointer_mut("/scheduler/flags").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some((_, known)) = SCHEDULER_FLAGS.iter().find(|(name, _)| flag == name) {
            *flag = (*known).into();
        }
    }
    let mut unknown = BTreeSet::new();
    for set in process.get_mut("capabilities").and_then(Value::as_object_mut).into_iter().flat_map(|s| s.values_mut()) {
        if let Some(names) = set.as_array_mut() {
            names.retain(|name| {
                let known = !name.is_string() || Capability::deserialize(name).is_ok();
                if !known {
                    unknown.insert(format!("process.capabilities: {name} is unknown and left out"));
                }
                known
            });
        }
    }
    unknown.into_iter().collect()
}

/// The template.
///
/// # Panics
/// Never: the document is constant and tested.
#[must_use]
pub fn template() -> Spec {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let value = serde_json::json!({
        "ociVersion": VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "isopod",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    });
    match serde_json::from_value(value) {
        Ok(spec) => spec,
        Err(e) => unreachable!("the template is a valid document: {e}"),
    }
}
