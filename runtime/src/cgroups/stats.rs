//! A group's use in the shape of runc's `events`.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use super::{
    Cgroup, Hierarchy,
    control::{all_keyed, keyed, read_number},
};
use crate::cpu_list;

impl Cgroup {
    /// The `data` of a `stats` event. What the group has no controller for is empty.
    pub(crate) fn stats(&self) -> Value {
        let mut data = json!({"cpu": {"usage": {}, "throttling": {}}, "cpuset": {}, "memory": {}, "pids": {}, "blkio": {}, "hugetlb": {},
            "intel_rdt": {}, "network_interfaces": null});
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            let (Hierarchy::V1 { controllers, .. } | Hierarchy::V2 { controllers, .. }) = hierarchy;
            let v1 = matches!(hierarchy, Hierarchy::V1 { .. });
            // The CPU time of a v2 group is there without a controller.
            let cpu = if v1 { None } else { Some("cpu") }.filter(|_| !self.joined.iter().any(|h| h.has("cpuacct")));
            for controller in controllers.iter().map(String::as_str).chain(cpu) {
                match controller {
                    "cpuacct" => data["cpu"]["usage"] = cpu_v1(&dir),
                    "cpu" => {
                        data["cpu"]["throttling"] = throttling(&dir);
                        if cpu.is_some() {
                            data["cpu"]["usage"] = cpu_v2(&dir);
                        }
                    }
                    "cpuset" => data["cpuset"] = cpuset(&dir),
                    "memory" => data["memory"] = if v1 { memory_v1(&dir) } else { memory_v2(&dir) },
                    "pids" => {
                        let limit = read_number(&dir.join("pids.max"));
                        data["pids"] = json!({"current": read_number(&dir.join("pids.current")), "limit": limit});
                    }
                    "blkio" => data["blkio"] = block_io_v1(&dir),
                    "io" => data["blkio"] = block_io_v2(&dir),
                    "hugetlb" => data["hugetlb"] = huge_pages(&dir, v1),
                    _ => {}
                }
            }
        }
        data
    }
}

fn cpu_v1(dir: &Path) -> Value {
    let number = |file: &str| read_number(&dir.join(file));
    let each = fs::read_to_string(dir.join("cpuacct.usage_percpu")).unwrap_or_default();
    let each: Vec<u64> = each.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    // `cpu user system`, with a line of titles.
    let all = fs::read_to_string(dir.join("cpuacct.usage_all")).unwrap_or_default();
    let column = |n: usize| -> Vec<u64> {
        all.lines().skip(1).filter_map(|line| line.split(' ').nth(n)?.parse().ok()).collect()
    };
    json!({"total": number("cpuacct.usage"), "kernel": number("cpuacct.usage_sys"), "user": number("cpuacct.usage_user"),
        "percpu": each, "percpu_kernel": column(2), "percpu_user": column(1)})
}

fn cpu_v2(dir: &Path) -> Value {
    let nanos = |key: &str| keyed(&dir.join("cpu.stat"), key) * 1000;
    json!({"total": nanos("usage_usec"), "kernel": nanos("system_usec"), "user": nanos("user_usec")})
}

fn throttling(dir: &Path) -> Value {
    let stat = all_keyed(&dir.join("cpu.stat"));
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    let nanos = get("throttled_time").max(get("throttled_usec") * 1000);
    json!({"periods": get("nr_periods"), "throttledPeriods": get("nr_throttled"), "throttledTime": nanos})
}

fn cpuset(dir: &Path) -> Value {
    let list = |file: &str| {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        cpu_list::parse(&text).unwrap_or_default()
    };
    let mut out = json!({"cpus": list("cpuset.cpus"), "mems": list("cpuset.mems")});
    for name in [
        "cpu_exclusive",
        "mem_hardwall",
        "mem_exclusive",
        "memory_migrate",
        "memory_spread_page",
        "memory_spread_slab",
        "memory_pressure",
        "sched_load_balance",
        "sched_relax_domain_level",
    ] {
        let text = fs::read_to_string(dir.join(format!("cpuset.{name}"))).unwrap_or_default();
        if let Ok(number) = text.trim().parse::<i64>() {
            out[name] = number.into();
        }
    }
    out
}

fn memory_v1(dir: &Path) -> Value {
    let entry = |prefix: &str| {
        let number = |file: &str| read_number(&dir.join(format!("{prefix}.{file}")));
        json!({"limit": number("limit_in_bytes"), "usage": number("usage_in_bytes"), "max": number("max_usage_in_bytes"),
            "failcnt": number("failcnt")})
    };
    let stat = all_keyed(&dir.join("memory.stat"));
    json!({"cache": stat.get("cache"), "usage": entry("memory"), "swap": entry("memory.memsw"),
        "kernel": entry("memory.kmem"), "kernelTCP": entry("memory.kmem.tcp"), "raw": stat})
}

/// As v1's, memory is a part of what is called swap.
fn memory_v2(dir: &Path) -> Value {
    let number = |file: &str| read_number(&dir.join(file));
    let limit = |file: &str| match fs::read_to_string(dir.join(file)) {
        Ok(text) => text.trim().parse().unwrap_or(u64::MAX),
        Err(_) => 0,
    };
    let (memory, swap) = (limit("memory.max"), limit("memory.swap.max"));
    let failures = keyed(&dir.join("memory.events"), "max");
    let stat = all_keyed(&dir.join("memory.stat"));
    json!({"cache": stat.get("file"),
        "usage": {"limit": memory, "usage": number("memory.current"), "max": number("memory.peak"), "failcnt": failures},
        "swap": {"limit": memory.saturating_add(swap), "usage": number("memory.current") + number("memory.swap.current"),
            "max": 0, "failcnt": 0},
        "kernel": {"limit": 0, "failcnt": 0}, "kernelTCP": {"limit": 0, "failcnt": 0}, "raw": stat})
}

fn block_io_v1(dir: &Path) -> Value {
    let files = [("ioServiceBytesRecursive", "io_service_bytes"), ("ioServicedRecursive", "io_serviced")];
    let mut out = Map::new();
    for (name, file) in files {
        // `8:0 Read 4096`, and a total without a device.
        let text = fs::read_to_string(dir.join(format!("blkio.throttle.{file}_recursive"))).unwrap_or_default();
        let entries = text.lines().filter_map(|line| {
            let [device, op, value]: [&str; 3] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
            entry(device, op, value)
        });
        out.insert(name.to_owned(), entries.collect());
    }
    out.into()
}

fn block_io_v2(dir: &Path) -> Value {
    // `8:0 rbytes=4096 wbytes=0 rios=1 ...`
    let text = fs::read_to_string(dir.join("io.stat")).unwrap_or_default();
    let of = |keys: [(&str, &str); 2]| -> Vec<Value> {
        let words = text.lines().filter_map(|line| line.split_once(' '));
        let words = words.flat_map(|(device, rest)| rest.split(' ').map(move |word| (device, word)));
        words
            .filter_map(|(device, word)| {
                let (key, value) = word.split_once('=')?;
                entry(device, keys.iter().find(|(k, _)| *k == key)?.1, value)
            })
            .collect()
    };
    json!({"ioServiceBytesRecursive": of([("rbytes", "Read"), ("wbytes", "Write")]),
        "ioServicedRecursive": of([("rios", "Read"), ("wios", "Write")])})
}

fn entry(device: &str, op: &str, value: &str) -> Option<Value> {
    let (major, minor) = device.split_once(':')?;
    let number = |text: &str| text.parse::<u64>().ok();
    Some(json!({"major": number(major)?, "minor": number(minor)?, "op": op, "value": number(value)?}))
}

fn huge_pages(dir: &Path, v1: bool) -> Value {
    let (usage, max, failures) =
        if v1 { ("usage_in_bytes", "max_usage_in_bytes", "failcnt") } else { ("current", "", "") };
    let names = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let sizes = names.filter_map(|name| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(usage)?.strip_suffix('.')?;
        (!size.contains('.')).then(|| size.to_owned())
    });
    let number = |size: &str, file: &str| read_number(&dir.join(format!("hugetlb.{size}.{file}")));
    let failed = |size: &str| {
        if v1 { number(size, failures) } else { keyed(&dir.join(format!("hugetlb.{size}.events")), "max") }
    };
    let all = sizes.map(|size| {
        let use_of = json!({"usage": number(&size, usage), "max": number(&size, max), "failcnt": failed(&size)});
        (size, use_of)
    });
    all.collect::<Map<_, _>>().into()
}
