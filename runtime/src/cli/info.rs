//! `events`, `features`, `spec`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use serde_json::json;

use crate::{
    cgroups::{Cgroup, Usage},
    error::{Error, Result},
    state::{StateDir, Status},
};

/// Arguments of `events`.
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Print once and end
    #[arg(long)]
    stats: bool,
    /// Time between two: 5s, 500ms, 1m
    #[arg(long, default_value = "5s")]
    interval: String,
    /// Container id
    id: String,
}

/// Arguments of `spec`.
#[derive(Debug, Args)]
pub(super) struct SpecArgs {
    /// Where to write config.json
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
    /// For an ordinary user
    #[arg(long)]
    rootless: bool,
}

pub(super) fn events(root: &Path, args: &EventsArgs) -> Result<()> {
    let interval = interval(&args.interval)?;
    let mut oom_kills = None;
    loop {
        let dir = StateDir::open(root, &args.id)?;
        let state = dir.read()?;
        if dir.status(&state) == Status::Stopped {
            return if args.stats { Err(Error::state("container is not running")) } else { Ok(()) };
        }
        drop(dir);
        let usage = state.cgroup.as_ref().map(Cgroup::usage).unwrap_or_default();
        if oom_kills.is_some_and(|before| usage.oom_kills > before) {
            println!("{}", json!({"type": "oom", "id": args.id}));
        }
        oom_kills = Some(usage.oom_kills);
        println!("{}", stats(&args.id, &usage));
        if args.stats {
            return Ok(());
        }
        std::thread::sleep(interval);
    }
}

fn stats(id: &str, usage: &Usage) -> serde_json::Value {
    json!({
        "type": "stats",
        "id": id,
        "data": {
            "cpu": {
                "usage": {"total": usage.cpu_ns, "kernel": usage.cpu_system_ns, "user": usage.cpu_user_ns},
                "throttling": {"throttledPeriods": usage.throttled_periods},
            },
            "memory": {
                "usage": {"limit": usage.memory_limit, "usage": usage.memory_bytes},
                "raw": usage.memory_stat,
            },
            "pids": {"current": usage.pids, "limit": usage.pids_limit},
        },
    })
}

/// A Go duration: `5s`, `500ms`, `1m30s`; a plain number is seconds.
fn interval(text: &str) -> Result<Duration> {
    let malformed = || Error::invalid(format!("malformed interval {text:?}"));
    let (mut rest, mut total) = (text, 0u64);
    while !rest.is_empty() {
        let unit = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let next = unit.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let number: u64 = rest[..rest.len() - unit.len()].parse().map_err(|_| malformed())?;
        let millis = match &unit[..unit.len() - next.len()] {
            "ms" => 1,
            "s" => 1000,
            "" if rest == text => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(malformed()),
        };
        total = number.checked_mul(millis).and_then(|n| n.checked_add(total)).ok_or_else(malformed)?;
        rest = next;
    }
    if total == 0 { Err(malformed()) } else { Ok(Duration::from_millis(total)) }
}

pub(super) fn features() -> Result<()> {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": crate::spec::VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "exec", "idmap", "noatime", "nodev", "nodiratime",
            "noexec", "norelatime", "nostrictatime", "nosuid", "nosymfollow", "private", "ratime", "rbind", "rdev",
            "rdiratime", "relatime", "rexec", "ridmap", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnorelatime",
            "rnostrictatime", "rnosuid", "rnosymfollow", "ro", "rprivate", "rrelatime", "rro", "rrw", "rshared",
            "rslave", "rstrictatime", "rsuid", "rsymfollow", "runbindable", "rw", "shared", "slave", "strictatime",
            "suid", "symfollow", "tmpcopyup", "unbindable",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": caps::all().iter().map(ToString::to_string).collect::<std::collections::BTreeSet<_>>(),
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": false},
            "netDevices": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
        "annotations": {},
    });
    println!("{}", serde_json::to_string_pretty(&features).map_err(|e| Error::invalid(e.to_string()))?);
    Ok(())
}

pub(super) fn spec(args: &SpecArgs) -> Result<()> {
    let path = args.bundle.join("config.json");
    if path.exists() {
        return Err(Error::state(format!("{} exists already; remove it first", path.display())));
    }
    let mut value = serde_json::to_value(crate::spec::template()).map_err(|e| Error::invalid(e.to_string()))?;
    if args.rootless {
        for_ordinary_user(&mut value);
    }
    let text = serde_json::to_string_pretty(&value).map_err(|e| Error::invalid(e.to_string()))?;
    std::fs::write(&path, text + "\n").map_err(|e| Error::system(format!("write {}", path.display()), e))
}

/// A user namespace with the caller as root; no network namespace's sysfs, no limits.
fn for_ordinary_user(value: &mut serde_json::Value) {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let linux = &mut value["linux"];
    linux["uidMappings"] = json!([{"containerID": 0, "hostID": uid, "size": 1}]);
    linux["gidMappings"] = json!([{"containerID": 0, "hostID": gid, "size": 1}]);
    if let Some(object) = linux.as_object_mut() {
        object.remove("resources");
    }
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    if let Some(mounts) = value["mounts"].as_array_mut() {
        mounts.retain(|m| m["destination"] != "/sys/fs/cgroup");
        for mount in mounts {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|o| o != "gid=5");
            }
        }
    }
}
