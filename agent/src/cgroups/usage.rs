//! What a group has used: read when somebody asks, from either version of cgroups.

use std::{collections::HashMap, fs, path::Path};

use super::Cgroups;

/// Counters and gauges of one group; what the kernel does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) cpu_nanos: Option<u64>,
    pub(crate) cpu_user_nanos: Option<u64>,
    pub(crate) cpu_system_nanos: Option<u64>,
    pub(crate) cpu_periods: Option<u64>,
    pub(crate) cpu_throttled_periods: Option<u64>,
    pub(crate) cpu_throttled_nanos: Option<u64>,
    pub(crate) memory_usage: Option<u64>,
    /// Usage without file pages nobody has touched for long: what eviction and `kubectl top` go by.
    pub(crate) memory_working_set: Option<u64>,
    pub(crate) memory_rss: Option<u64>,
    pub(crate) memory_cache: Option<u64>,
    pub(crate) memory_mapped: Option<u64>,
    pub(crate) memory_kernel: Option<u64>,
    pub(crate) active_file: Option<u64>,
    pub(crate) inactive_file: Option<u64>,
    pub(crate) memory_peak: Option<u64>,
    pub(crate) memory_failures: Option<u64>,
    pub(crate) memory_limit: Option<u64>,
    pub(crate) swap: Option<u64>,
    /// Most of it; `None` is no limit of its own.
    pub(crate) swap_limit: Option<u64>,
    /// What is kept from being reclaimed; zero is nothing.
    pub(crate) memory_reserved: Option<u64>,
    /// As the kernel has it: with memory on v1, without on v2. Zero is no limit.
    pub(crate) memory_swap_limit: Option<u64>,
    pub(crate) page_faults: Option<u64>,
    pub(crate) major_page_faults: Option<u64>,
    pub(crate) processes: Option<u64>,
    pub(crate) oom_kills: Option<u64>,
}

/// What v1 shows where there is no limit: the largest page-aligned number.
const UNLIMITED: u64 = 1 << 62;

fn number(dir: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
}

/// A limit; zero is none.
fn limit(dir: &Path, file: &str) -> Option<u64> {
    let text = fs::read_to_string(dir.join(file)).ok()?;
    Some(text.trim().parse().ok().filter(|l| *l < UNLIMITED).unwrap_or(0))
}

/// `key value` lines.
fn table(dir: &Path, file: &str) -> HashMap<String, u64> {
    let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .filter_map(|(k, v)| Some((k.into(), v.trim().parse().ok()?)))
        .collect()
}

impl Cgroups {
    /// What a group and all below it have used.
    pub(crate) fn usage(&self, group: &str) -> Usage {
        let at = |controller: &str| self.hierarchies.v1.get(controller).map(|m| m.join(group));
        let v2 = self.hierarchies.v2.as_ref().map(|m| m.join(group));
        let mut u = Usage::default();
        match (at("cpuacct"), at("cpu"), &v2) {
            (Some(acct), cpu, _) => cpu_v1(&mut u, &acct, cpu.as_deref()),
            (None, _, Some(dir)) => cpu_v2(&mut u, dir),
            _ => {}
        }
        match (at("memory"), &v2) {
            (Some(dir), _) => memory_v1(&mut u, &dir),
            (None, Some(dir)) => memory_v2(&mut u, dir),
            _ => {}
        }
        u.processes = at("pids").or(v2).and_then(|dir| number(&dir, "pids.current"));
        u.memory_limit = u.memory_limit.filter(|l| *l < UNLIMITED);
        u
    }

    /// A PSI file of a group (`cpu`, `memory` or `io`): v2 has them, also beside v1.
    pub(crate) fn pressure(&self, group: &str, resource: &str) -> Option<String> {
        fs::read_to_string(self.hierarchies.v2.as_ref()?.join(group).join(format!("{resource}.pressure"))).ok()
    }

    /// The instance's own group, which holds every pod's.
    pub(crate) fn root(&self) -> &str {
        &self.root
    }
}

fn cpu_v1(u: &mut Usage, acct: &Path, cpu: Option<&Path>) {
    u.cpu_nanos = number(acct, "cpuacct.usage");
    u.cpu_user_nanos = number(acct, "cpuacct.usage_user");
    u.cpu_system_nanos = number(acct, "cpuacct.usage_sys");
    let stat = cpu.map(|c| table(c, "cpu.stat")).unwrap_or_default();
    throttled(u, &stat);
    u.cpu_throttled_nanos = stat.get("throttled_time").copied();
}

/// What both versions call the same.
fn throttled(u: &mut Usage, stat: &HashMap<String, u64>) {
    u.cpu_periods = stat.get("nr_periods").copied();
    u.cpu_throttled_periods = stat.get("nr_throttled").copied();
}

fn cpu_v2(u: &mut Usage, dir: &Path) {
    let stat = table(dir, "cpu.stat");
    let micros = |k: &str| stat.get(k).map(|v| v * 1000);
    u.cpu_nanos = micros("usage_usec");
    u.cpu_user_nanos = micros("user_usec");
    u.cpu_system_nanos = micros("system_usec");
    throttled(u, &stat);
    u.cpu_throttled_nanos = micros("throttled_usec");
}

fn memory_v1(u: &mut Usage, dir: &Path) {
    let stat = table(dir, "memory.stat");
    let of = |k: &str| stat.get(k).copied();
    u.memory_usage = number(dir, "memory.usage_in_bytes");
    u.memory_working_set = working_set(u.memory_usage, of("total_inactive_file"));
    u.memory_rss = of("total_rss");
    u.memory_cache = of("total_cache");
    u.memory_mapped = of("total_mapped_file");
    u.memory_kernel = number(dir, "memory.kmem.usage_in_bytes");
    (u.active_file, u.inactive_file) = (of("total_active_file"), of("total_inactive_file"));
    u.memory_peak = number(dir, "memory.max_usage_in_bytes");
    u.memory_failures = number(dir, "memory.failcnt");
    u.memory_limit = number(dir, "memory.limit_in_bytes");
    u.memory_reserved = limit(dir, "memory.soft_limit_in_bytes");
    u.memory_swap_limit = limit(dir, "memory.memsw.limit_in_bytes");
    u.swap = of("total_swap");
    u.page_faults = of("total_pgfault");
    u.major_page_faults = of("total_pgmajfault");
    u.oom_kills = table(dir, "memory.oom_control").get("oom_kill").copied();
}

fn memory_v2(u: &mut Usage, dir: &Path) {
    let stat = table(dir, "memory.stat");
    let of = |k: &str| stat.get(k).copied();
    u.memory_usage = number(dir, "memory.current");
    u.memory_working_set = working_set(u.memory_usage, of("inactive_file"));
    u.memory_rss = of("anon");
    u.memory_cache = of("file");
    u.memory_mapped = of("file_mapped");
    u.memory_kernel = of("kernel");
    (u.active_file, u.inactive_file) = (of("active_file"), of("inactive_file"));
    u.memory_peak = number(dir, "memory.peak");
    let events = table(dir, "memory.events");
    u.memory_failures = events.get("max").copied();
    u.oom_kills = events.get("oom_kill").copied();
    u.memory_limit = number(dir, "memory.max");
    u.swap = number(dir, "memory.swap.current");
    u.swap_limit = number(dir, "memory.swap.max");
    u.memory_reserved = limit(dir, "memory.min");
    u.memory_swap_limit = limit(dir, "memory.swap.max");
    u.page_faults = of("pgfault");
    u.major_page_faults = of("pgmajfault");
}

fn working_set(usage: Option<u64>, inactive: Option<u64>) -> Option<u64> {
    usage.map(|u| u.saturating_sub(inactive.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::{super::Hierarchies, *};

    fn write(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn both_versions_tell_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let at = |d: &str| dir.path().join(d);
        write(
            &at("cpuacct/g"),
            &[("cpuacct.usage", "5000\n"), ("cpuacct.usage_user", "3000"), ("cpuacct.usage_sys", "2000")],
        );
        write(
            &at("memory/g"),
            &[
                ("memory.usage_in_bytes", "1000\n"),
                ("memory.stat", "rss 1\ntotal_rss 600\ntotal_inactive_file 100\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.soft_limit_in_bytes", "4096\n"),
                ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
            ],
        );
        write(
            &at("v2/g"),
            &[
                ("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\n"),
                ("memory.current", "1000\n"),
                ("memory.stat", "anon 600\ninactive_file 100\n"),
                ("memory.max", "max\n"),
                ("memory.swap.max", "max\n"),
                ("memory.min", "4096\n"),
                ("pids.current", "4\n"),
            ],
        );
        let v1 = ["cpuacct", "memory"].map(|c| (c.to_string(), at(c))).into();
        let tree = |hierarchies| Cgroups {
            hierarchies,
            driver: crate::cgroups::Driver::Cgroupfs,
            root: String::new(),
            slice: String::new(),
        };
        let old = tree(Hierarchies { v1, v2: None });
        let new = tree(Hierarchies { v1: Default::default(), v2: Some(at("v2")) });
        let want = Usage {
            cpu_nanos: Some(5000),
            cpu_user_nanos: Some(3000),
            cpu_system_nanos: Some(2000),
            memory_usage: Some(1000),
            memory_working_set: Some(900),
            memory_rss: Some(600),
            inactive_file: Some(100),
            memory_reserved: Some(4096),
            memory_swap_limit: Some(0),
            ..Usage::default()
        };
        assert_eq!(old.usage("g"), want);
        assert_eq!(new.usage("g"), Usage { processes: Some(4), ..want });
        assert_eq!(new.usage("none"), Usage::default());
    }
}
