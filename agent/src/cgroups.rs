//! The agent's part of the cgroup tree: `INSTANCE/{,burstable,besteffort}/podUID` with pod-level limits, or slices of
//! systemd's (see [`driver`]).
//!
//! Works on v2, v1 and hybrid. Only groups below the instance's own are ever touched; containers' groups below a pod's
//! are the runtime's.

pub(crate) mod driver;
mod end;
mod inside;
mod usage;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

pub(crate) use self::{
    driver::Driver,
    inside::{Moved, Processes},
    usage::Usage,
};
use crate::qos::{self, Limits, Qos};

/// A file of the tree that could not be made or written.
#[derive(Debug, thiserror::Error)]
#[error("cgroup {path}: {source}")]
pub(crate) struct CgroupError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn fail(path: &Path) -> impl FnOnce(io::Error) -> CgroupError + '_ {
    move |source| CgroupError { path: path.to_path_buf(), source }
}

fn refused(unit: &str) -> impl FnOnce(String) -> CgroupError + '_ {
    move |said| CgroupError { path: unit.into(), source: io::Error::other(said) }
}

/// The mounted hierarchies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hierarchies {
    /// v1: controller to mount point; one mount may hold several.
    pub(crate) v1: BTreeMap<String, PathBuf>,
    /// v2 mount point.
    pub(crate) v2: Option<PathBuf>,
}

const CONTROLLERS: &[&str] =
    &["cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "devices", "freezer", "hugetlb", "net_cls", "net_prio"];

impl Hierarchies {
    /// From the text of /proc/self/mountinfo.
    pub(crate) fn parse(mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(mount) = left.split(' ').nth(4) else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
            match kind {
                "cgroup2" => {
                    found.v2.get_or_insert_with(|| PathBuf::from(mount));
                }
                "cgroup" => {
                    for o in options.split(',').filter(|o| CONTROLLERS.contains(o)) {
                        found.v1.entry(o.to_string()).or_insert_with(|| PathBuf::from(mount));
                    }
                }
                _ => {}
            }
        }
        found
    }

    fn mounts(&self) -> Vec<&Path> {
        let mut all: Vec<&Path> = self.v1.values().map(PathBuf::as_path).chain(self.v2.as_deref()).collect();
        all.sort();
        all.dedup();
        all
    }
}

/// The instance's tree.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    hierarchies: Hierarchies,
    driver: Driver,
    /// Path of the group of all pods.
    root: String,
    /// Name of their slice without its ending.
    slice: String,
}

impl Cgroups {
    /// Finds the hierarchies and makes the instance's groups.
    pub(crate) fn open(instance: &str, driver: Driver) -> Result<Self, CgroupError> {
        let tree = Self::at(instance, driver)?;
        if driver == Driver::Systemd {
            if !driver::possible() {
                let source = io::Error::other("cgroupDriver systemd needs systemd and cgroup v2 alone");
                return Err(CgroupError { path: tree.root.into(), source });
            }
            let classes = [("", 1024), ("-burstable", 2), ("-besteffort", 2)];
            for (class, cpu_shares) in classes {
                let limits = Limits { cpu_shares, cpu_period: 100_000, ..Limits::default() };
                let unit = format!("{}{class}.slice", tree.slice);
                driver::make(&unit, &limits).map_err(refused(&unit))?;
            }
            return Ok(tree);
        }
        for group in [instance.to_string(), format!("{instance}/burstable"), format!("{instance}/besteffort")] {
            tree.make(&group)?;
        }
        tree.write("cpu", &format!("{instance}/besteffort"), "cpu.shares", "2").ok();
        tree.write_v2(&format!("{instance}/besteffort"), "cpu.weight", "1").ok();
        Ok(tree)
    }

    /// What an agent left, by whichever driver; nothing is made.
    pub(crate) fn left(instance: &str) -> Result<Vec<Self>, CgroupError> {
        let all = [Driver::Cgroupfs, Driver::Systemd].map(|driver| Self::at(instance, driver));
        let exists = |tree: &Self| tree.hierarchies.mounts().iter().any(|mount| mount.join(&tree.root).is_dir());
        all.into_iter().filter(|tree| tree.as_ref().map_or(true, exists)).collect()
    }

    fn at(instance: &str, driver: Driver) -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read_to_string(path).map_err(fail(path))?;
        let slice = driver::root(instance);
        let root = match driver {
            Driver::Cgroupfs => instance.to_string(),
            Driver::Systemd => driver::path(&slice),
        };
        Ok(Self { hierarchies: Hierarchies::parse(&text), driver, root, slice })
    }

    /// Whether memory is accounted by cgroup v2.
    pub(crate) fn memory_is_v2(&self) -> bool {
        self.hierarchies.v2.is_some() && !self.hierarchies.v1.contains_key("memory")
    }

    /// Holds all pods together to what the node has for them: milli-CPUs as a weight, memory as a limit.
    pub(crate) fn enforce(&self, milli: i64, memory: i64) -> Result<(), CgroupError> {
        let limits = Limits { cpu_shares: qos::shares(milli), memory: Some(memory), ..Limits::default() };
        self.limit(&self.root, &Limits { cpu_period: 100_000, ..limits })
    }

    /// The pod's group, relative to each hierarchy's mount point.
    pub(crate) fn pod_group(&self, qos: Qos, uid: &str) -> String {
        if self.driver == Driver::Systemd {
            return driver::pod_group(&self.slice, qos, uid);
        }
        match qos {
            Qos::Guaranteed => format!("{}/pod{uid}", self.root),
            Qos::Burstable => format!("{}/burstable/pod{uid}", self.root),
            Qos::BestEffort => format!("{}/besteffort/pod{uid}", self.root),
        }
    }

    /// Makes a pod's group with its limits; idempotent.
    pub(crate) fn create_pod(&self, group: &str, limits: &Limits) -> Result<(), CgroupError> {
        if let Some(unit) = self.unit(group) {
            return driver::make(unit, limits).map_err(refused(unit));
        }
        self.make(group)?;
        self.limit(group, limits)
    }

    /// Writes limits to a group.
    pub(crate) fn limit(&self, group: &str, l: &Limits) -> Result<(), CgroupError> {
        if let Some(unit) = self.unit(group) {
            return driver::limit(unit, l).map_err(refused(unit));
        }
        let text = |v: Option<i64>, none: &str| v.map_or_else(|| none.to_string(), |v| v.to_string());
        if self.hierarchies.v1.contains_key("cpu") {
            self.write("cpu", group, "cpu.shares", &l.cpu_shares.to_string())?;
            if l.cpu_quota.is_some() {
                self.write("cpu", group, "cpu.cfs_period_us", &l.cpu_period.to_string())?;
                self.write("cpu", group, "cpu.cfs_quota_us", &text(l.cpu_quota, "-1"))?;
            }
        } else {
            self.write_v2(group, "cpu.weight", &qos::weight(l.cpu_shares).to_string())?;
            self.write_v2(group, "cpu.max", &format!("{} {}", text(l.cpu_quota, "max"), l.cpu_period))?;
        }
        if self.hierarchies.v1.contains_key("memory") {
            if l.memory.is_some() {
                self.write("memory", group, "memory.limit_in_bytes", &text(l.memory, "-1"))?;
            }
        } else {
            self.write_v2(group, "memory.max", &text(l.memory, "max"))?;
        }
        if self.hierarchies.v1.contains_key("pids") {
            if l.pids.is_some() {
                self.write("pids", group, "pids.max", &text(l.pids, "max"))?;
            }
        } else {
            self.write_v2(group, "pids.max", &text(l.pids, "max"))?;
        }
        Ok(())
    }

    /// Weight of the burstable class: the sum of its pods' requests.
    pub(crate) fn burstable_shares(&self, milli: i64) {
        let shares = qos::shares(milli);
        if self.driver == Driver::Systemd {
            let limits = Limits { cpu_shares: shares, cpu_period: 100_000, ..Limits::default() };
            driver::limit(&format!("{}-burstable.slice", self.slice), &limits).ok();
            return;
        }
        let group = format!("{}/burstable", self.root);
        self.write("cpu", &group, "cpu.shares", &shares.to_string()).ok();
        self.write_v2(&group, "cpu.weight", &qos::weight(shares).to_string()).ok();
    }

    /// Kills everything in a group and the groups below (what is left of a pod whose supervisor is gone).
    pub(crate) fn kill(&self, group: &str) {
        for mount in self.hierarchies.mounts() {
            let dir = mount.join(group);
            if fs::write(dir.join("cgroup.kill"), "1").is_err() {
                for pid in pids_below(&dir) {
                    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
                    }
                }
            }
        }
    }

    /// Removes a group and those below, in every hierarchy; one that is not there is no error.
    pub(crate) fn remove(&self, group: &str) -> Result<(), CgroupError> {
        let mut result = self.unit(group).map_or(Ok(()), |unit| driver::stop(unit).map_err(refused(unit)));
        for mount in self.hierarchies.mounts() {
            let dir = mount.join(group);
            if let Err(e) = remove_below(&dir) {
                result = Err(CgroupError { path: dir, source: e });
            }
        }
        result
    }

    /// Groups of pods that exist now: UID and group.
    pub(crate) fn pods(&self) -> BTreeMap<String, String> {
        if self.driver == Driver::Systemd {
            return self.pods_of_slices();
        }
        let mut found = BTreeMap::new();
        for mount in self.hierarchies.mounts() {
            for parent in [self.root.clone(), format!("{}/burstable", self.root), format!("{}/besteffort", self.root)] {
                for entry in fs::read_dir(mount.join(&parent)).into_iter().flatten().flatten() {
                    if let Some(uid) = entry.file_name().to_str().and_then(|n| n.strip_prefix("pod")) {
                        found.insert(uid.to_string(), format!("{parent}/pod{uid}"));
                    }
                }
            }
        }
        found
    }

    /// Slices of pods: UID and directory below the v2 mount point.
    fn slices(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let Some(mount) = &self.hierarchies.v2 else { return found };
        for class in ["", "-burstable", "-besteffort"] {
            let parent = driver::path(&format!("{}{class}", self.slice));
            for entry in fs::read_dir(mount.join(&parent)).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let uid = name.to_str().and_then(|name| Some((name, driver::pod_of(&self.slice, name)?)));
                found.extend(uid.map(|(name, uid)| (uid, format!("{parent}/{name}"))));
            }
        }
        found
    }

    /// Those with a scope of ours or with nothing in them: another kubelet names its pods' slices alike.
    fn pods_of_slices(&self) -> BTreeMap<String, String> {
        let Some(mount) = &self.hierarchies.v2 else { return BTreeMap::new() };
        let ours = |slice: &str, scope: &str| {
            let inside = fs::read_dir(mount.join(slice)).into_iter().flatten().flatten();
            let groups: Vec<_> = inside.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).collect();
            groups.is_empty() || groups.iter().any(|e| e.file_name() == scope)
        };
        let scoped = self.slices().into_iter().map(|(uid, slice)| (driver::scope(&uid), uid, slice));
        scoped
            .filter(|(scope, _, slice)| ours(slice, scope))
            .map(|(scope, uid, slice)| (uid, format!("{slice}/{scope}")))
            .collect()
    }

    /// The unit that limits a group, when systemd makes them.
    fn unit<'a>(&self, group: &'a str) -> Option<&'a str> {
        driver::unit(group).filter(|_| self.driver == Driver::Systemd)
    }

    /// Removes the instance's tree; pods' groups must be gone.
    pub(crate) fn remove_root(&self) -> Result<(), CgroupError> {
        if self.driver == Driver::Systemd && !self.slices().is_empty() {
            // Another kubelet's pods.
            return Ok(());
        }
        self.remove(&self.root.clone())
    }

    /// Makes a group and those above it.
    pub(crate) fn make(&self, group: &str) -> Result<(), CgroupError> {
        for mount in self.hierarchies.mounts() {
            let is_v2 = Some(mount) == self.hierarchies.v2.as_deref();
            let is_cpuset = self.hierarchies.v1.get("cpuset").is_some_and(|m| m == mount);
            let mut dir = mount.to_path_buf();
            for part in group.split('/') {
                if is_v2 {
                    delegate(&dir);
                }
                let parent = dir.clone();
                dir.push(part);
                match fs::create_dir(&dir) {
                    Ok(()) if is_cpuset => {
                        for file in ["cpuset.cpus", "cpuset.mems"] {
                            let value = fs::read_to_string(parent.join(file)).map_err(fail(&dir))?;
                            fs::write(dir.join(file), value.trim()).map_err(fail(&dir))?;
                        }
                    }
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(source) => return Err(CgroupError { path: dir, source }),
                }
            }
            if is_v2 {
                delegate(&dir);
            }
        }
        Ok(())
    }

    fn write(&self, controller: &str, group: &str, file: &str, value: &str) -> Result<(), CgroupError> {
        let Some(mount) = self.hierarchies.v1.get(controller) else { return Ok(()) };
        let path = mount.join(group).join(file);
        fs::write(&path, value).map_err(fail(&path))
    }

    fn write_v2(&self, group: &str, file: &str, value: &str) -> Result<(), CgroupError> {
        let Some(mount) = &self.hierarchies.v2 else { return Ok(()) };
        let path = mount.join(group).join(file);
        // A controller that is bound to v1 (hybrid) has no such file.
        if path.exists() { fs::write(&path, value).map_err(fail(&path)) } else { Ok(()) }
    }
}

/// Hands every controller down to the children of a v2 group; controllers that are not there or busy are left out.
fn delegate(dir: &Path) {
    let Ok(available) = fs::read_to_string(dir.join("cgroup.controllers")) else { return };
    for c in available.split_whitespace() {
        fs::write(dir.join("cgroup.subtree_control"), format!("+{c}")).ok();
    }
}

fn pids_below(dir: &Path) -> Vec<i32> {
    let mut found: Vec<i32> = fs::read_to_string(dir.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|l| l.parse().ok())
        .collect();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(pids_below(&entry.path()));
        }
    }
    found
}

fn remove_below(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(e) => e,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_below(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_systemd_its_driver_is_refused() {
        if driver::possible() {
            return;
        }
        let refused = Cgroups::open("isopod-test", Driver::Systemd).map(drop).map_err(|e| e.to_string());
        assert_eq!(
            refused,
            Err("cgroup kubepods_test.slice: cgroupDriver systemd needs systemd and cgroup v2 alone".into())
        );
    }

    #[test]
    fn mountinfo_of_a_hybrid_machine() {
        let text = "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
            31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n\
            32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let h = Hierarchies::parse(text);
        assert_eq!(h.v2.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(h.v1["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(h.mounts().len(), 3);
    }
}
