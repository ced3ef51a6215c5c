//! `events`, `spec`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use serde_json::json;

use crate::{
    cgroups::Cgroup,
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
    #[arg(long, default_value = "5s", value_parser = interval)]
    interval: Duration,
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
    if args.interval.is_zero() {
        return Err(Error::invalid("the interval must be greater than 0"));
    }
    let mut oom_kills = None;
    loop {
        let dir = StateDir::open(root, &args.id)?;
        let state = dir.read()?;
        if dir.status(&state) == Status::Stopped {
            return if args.stats { Err(Error::state("container is not running")) } else { Ok(()) };
        }
        drop(dir);
        let killed = state.cgroup.as_ref().map_or(0, Cgroup::oom_kills);
        if oom_kills.is_some_and(|before| killed > before) {
            println!("{}", json!({"type": "oom", "id": args.id}));
        }
        oom_kills = Some(killed);
        let data = state.cgroup.as_ref().map(Cgroup::stats);
        println!("{}", json!({"type": "stats", "id": args.id, "data": data}));
        if args.stats {
            return Ok(());
        }
        std::thread::sleep(args.interval);
    }
}

/// A Go duration: `5s`, `500ms`, `1m30s`; a plain number is seconds.
fn interval(text: &str) -> Result<Duration, String> {
    let malformed = || format!("malformed interval {text:?}");
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
    Ok(Duration::from_millis(total))
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
