//! `update`.

use std::path::{Path, PathBuf};

use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::Global;
use crate::{
    cgroups, config,
    error::{Error, Result},
    state::{StateDir, Status},
};

/// Arguments of `update`.
#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    /// File with resources as in config.json, - for stdin
    #[arg(short, long)]
    resources: Option<PathBuf>,
    /// Bytes, or with b, k, m, g
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    memory: Option<i64>,
    /// Bytes, of memory and swap together
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    memory_swap: Option<i64>,
    /// Bytes
    #[arg(long, value_parser = bytes)]
    memory_reservation: Option<i64>,
    /// Relative weight
    #[arg(long, visible_alias = "cpu-share")]
    cpu_shares: Option<u64>,
    /// Microseconds
    #[arg(long, allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// Microseconds
    #[arg(long, allow_negative_numbers = true)]
    cpu_period: Option<u64>,
    /// Microseconds
    #[arg(long)]
    cpu_burst: Option<u64>,
    /// Microseconds
    #[arg(long)]
    cpu_rt_period: Option<u64>,
    /// Microseconds
    #[arg(long)]
    cpu_rt_runtime: Option<i64>,
    /// Processors
    #[arg(long)]
    cpuset_cpus: Option<String>,
    /// Memory nodes
    #[arg(long)]
    cpuset_mems: Option<String>,
    /// Only when nothing else runs
    #[arg(long)]
    cpu_idle: Option<i64>,
    /// 10 to 1000
    #[arg(long)]
    blkio_weight: Option<u16>,
    /// Processes and threads
    #[arg(long, allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Shares of the L3 cache
    #[arg(long)]
    l3_cache_schema: Option<String>,
    /// Memory bandwidth
    #[arg(long)]
    mem_bw_schema: Option<String>,
    /// No effect
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
    /// No effect
    #[arg(long, hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Container id
    id: String,
}

pub(super) fn update(global: &Global, args: &UpdateArgs) -> Result<()> {
    let resources = resources(args)?;
    let dir = StateDir::open(&global.root(), &args.id)?;
    let mut state = dir.read()?;
    if dir.status(&state) == Status::Stopped {
        return Err(Error::state("cannot update a stopped container"));
    }
    let schemata: Vec<&str> =
        [&args.l3_cache_schema, &args.mem_bw_schema].into_iter().flatten().map(|s| s.as_str()).collect();
    if !schemata.is_empty() {
        let none = || Error::invalid("--l3-cache-schema and --mem-bw-schema: the container has no linux.intelRdt");
        state.resctrl.as_ref().ok_or_else(none)?.write(&schemata)?;
    }
    let cgroup = state.cgroup.as_mut().ok_or_else(|| Error::state("the container has no cgroup"))?;
    let applied = cgroup.apply(&resources).and_then(|()| cgroup.tell_manager(&resources));
    // Also when it failed: the group may be in more hierarchies now, and must leave none behind.
    let written = dir.write(&state);
    applied?;
    global.warn(&cgroups::without_effect(&resources));
    if args.kernel_memory.is_some() || args.kernel_memory_tcp.is_some() {
        global.warn(&["the kernel has no limits of kernel memory any more: no effect".into()]);
    }
    written
}

fn resources(args: &UpdateArgs) -> Result<LinuxResources> {
    let value = match &args.resources {
        Some(path) if path == Path::new("-") => {
            let text = std::io::read_to_string(std::io::stdin()).map_err(|e| Error::system("read stdin", e))?;
            serde_json::from_str(&text)
        }
        Some(path) => serde_json::from_slice(&config::read_limited(path)?),
        None => Ok(from_flags(args)),
    };
    value.and_then(serde_json::from_value).map_err(|e| Error::invalid(format!("malformed resources: {e}")))
}

/// `64m` is 64 MiB; -1 is no limit.
fn bytes(text: &str) -> Result<i64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches('b');
    let (number, shift) = match digits.strip_suffix(['k', 'm', 'g', 't']) {
        Some(number) => (number, 10 * (1 + "kmgt".find(&digits[number.len()..]).unwrap_or(0))),
        None => (digits, 0),
    };
    let number: i64 = number.parse().map_err(|_| format!("{text:?} is no number of bytes"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

fn from_flags(args: &UpdateArgs) -> Value {
    let section = |pairs: &[(&str, Option<Value>)]| -> Option<Value> {
        let map: Map<String, Value> = pairs.iter().filter_map(|(k, v)| Some(((*k).to_owned(), v.clone()?))).collect();
        (!map.is_empty()).then_some(Value::Object(map))
    };
    let memory = section(&[
        ("limit", args.memory.map(Value::from)),
        ("swap", args.memory_swap.map(Value::from)),
        ("reservation", args.memory_reservation.map(Value::from)),
    ]);
    let cpu = section(&[
        ("shares", args.cpu_shares.map(Value::from)),
        ("quota", args.cpu_quota.map(Value::from)),
        ("period", args.cpu_period.map(Value::from)),
        ("burst", args.cpu_burst.map(Value::from)),
        ("realtimePeriod", args.cpu_rt_period.map(Value::from)),
        ("realtimeRuntime", args.cpu_rt_runtime.map(Value::from)),
        ("cpus", args.cpuset_cpus.clone().map(Value::from)),
        ("mems", args.cpuset_mems.clone().map(Value::from)),
        ("idle", args.cpu_idle.map(Value::from)),
    ]);
    let io = section(&[("weight", args.blkio_weight.map(Value::from))]);
    let all = section(&[
        ("memory", memory),
        ("cpu", cpu),
        ("blockIO", io),
        ("pids", args.pids_limit.map(|limit| json!({ "limit": limit }))),
    ]);
    all.unwrap_or_else(|| json!({}))
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, number) in
            [("-1", -1), ("1000", 1000), ("64m", 64 << 20), ("2GiB", 2 << 30), ("3kb", 3 << 10), ("7b", 7)]
        {
            assert_eq!(bytes(text), Ok(number), "{text}");
        }
        for bad in ["", "m", "1.5g", "12x", "9999999999g"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
