//! Control groups: one [`Cgroup`] over whatever this machine mounts: v1 hierarchies, the v2 hierarchy, or both (hybrid).
//!
//! A container's group lies at the same path in each hierarchy. In v1 a hierarchy is joined only when it has a use:
//! always for memory, pids, cpuacct and devices; otherwise when a limit is asked for or an administrator made the
//! parent group there. Each join costs a directory and a write, and most of a container's start is such small change.

mod control;
mod devices;
mod layout;
mod processes;
pub mod slice;
mod stats;
mod systemd;
mod v1;
mod v2;

use std::{
    collections::HashMap,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

pub(crate) use layout::unescape;
pub use layout::{Hierarchy, Layout};
use systemd::in_user_namespace;
pub(crate) use systemd::{Placeholder, Scope};

use self::control::{below, keyed, make, remove_dir, write};
use crate::error::{Context, Error, Result};

/// Where a container's group appears inside it, for mounts of type cgroup.
#[derive(Debug, Default)]
pub(crate) struct CgroupView {
    /// On a pure v2 machine: the group's directory.
    pub(crate) unified_only: Option<PathBuf>,
    /// Otherwise: name and directory of each hierarchy.
    pub(crate) directories: Vec<(String, PathBuf)>,
    /// Names that are links to combined hierarchies (`cpu` -> `cpu,cpuacct`).
    pub(crate) links: Vec<(String, String)>,
}

/// A container's control group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cgroup {
    /// Path below each hierarchy's mount point, with a leading slash.
    path: String,
    /// The hierarchies it exists in.
    joined: Vec<Hierarchy>,
    /// All hierarchies of the machine.
    layout: Layout,
    /// The unit it is, with the systemd driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scope: Option<Scope>,
}

/// What a process needs to join a group after it was cloned.
#[derive(Debug)]
pub(crate) struct Join {
    /// `tasks` (v1) files to write "0" to.
    pub(crate) tasks: Vec<OwnedFd>,
    /// The v2 directory for CLONE_INTO_CGROUP.
    pub(crate) into: Option<OwnedFd>,
}

impl Join {
    /// Moves the calling, single-threaded process.
    ///
    /// A thread that moves itself spares the kernel its system-wide lock (and an RCU grace period), which makes v1 joins
    /// cheap; the descriptors were opened by the parent, so its permissions count.
    pub(crate) fn enter(&self) -> Result<()> {
        for fd in &self.tasks {
            rustix::io::write(fd, b"0").context(|| "join cgroup".into())?;
        }
        Ok(())
    }
}

/// Resource use of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Nanoseconds of CPU.
    pub cpu_ns: u64,
    /// Of these in user mode.
    pub cpu_user_ns: u64,
    /// Of these in the kernel.
    pub cpu_system_ns: u64,
    /// Times throttled.
    pub throttled_periods: u64,
    /// Bytes in use.
    pub memory_bytes: u64,
    /// Limit, 0 for none.
    pub memory_limit: u64,
    /// `memory.stat`.
    pub memory_stat: HashMap<String, u64>,
    /// Processes and threads.
    pub pids: u64,
    /// Limit, 0 for none.
    pub pids_limit: u64,
    /// Processes killed by the OOM killer.
    pub oom_kills: u64,
}

impl Cgroup {
    /// Plans the group at `path`; nothing is created yet.
    ///
    /// # Errors
    /// When the path leads out of the hierarchy or no hierarchy is mounted.
    pub fn plan(path: &str, resources: Option<&LinuxResources>) -> Result<Self> {
        Self::plan_on(Layout::detect()?, path, resources)
    }

    /// As [`Cgroup::plan`] on a layout already known.
    ///
    /// # Errors
    /// As [`Cgroup::plan`].
    pub fn plan_on(layout: Layout, path: &str, resources: Option<&LinuxResources>) -> Result<Self> {
        let path = clean(path)?;
        let parent = Path::new(&path).parent().map(Path::to_path_buf).unwrap_or_default();
        let parent_is_root = parent == Path::new("/");
        let joined = layout
            .hierarchies
            .iter()
            .filter(|h| match h {
                Hierarchy::V2 { .. } => true,
                Hierarchy::V1 { controllers, .. } => {
                    controllers.iter().any(|c| v1::always(c) || v1::wanted(c, resources, layout.can_freeze_v2()))
                        || !parent_is_root && below(h.mount_point(), &parent).is_dir()
                }
            })
            .filter(|h| !matches!(h, Hierarchy::V1 { controllers, .. } if controllers.is_empty()))
            .cloned()
            .collect();
        Ok(Self { path, joined, layout, scope: None })
    }

    /// Plans the group of a scope that systemd is to make.
    ///
    /// # Errors
    /// When this is not a v2 machine.
    pub(crate) fn plan_scope(scope: Scope) -> Result<Self> {
        let layout = Layout::detect()?;
        if layout.hierarchies.iter().any(|h| matches!(h, Hierarchy::V1 { .. })) {
            return Err(Error::invalid("--systemd-cgroup needs cgroup v2 alone; leave it out on this machine"));
        }
        let mut cgroup = Self::plan_on(layout, &scope.expected_path(), None)?;
        cgroup.scope = Some(scope);
        Ok(cgroup)
    }

    /// Has systemd make the group, when it manages it; what comes back keeps it alive until a process is in it.
    ///
    /// # Errors
    /// When systemd refuses.
    pub(crate) fn start_scope(&mut self, resources: Option<&LinuxResources>) -> Result<Option<Placeholder>> {
        let Some(scope) = &self.scope else { return Ok(None) };
        let (path, placeholder) = scope.start(resources)?;
        self.path = clean(&path)?;
        Ok(Some(placeholder))
    }

    /// A group below this one, which a process of the container or an administrator made.
    ///
    /// # Errors
    /// When the path climbs.
    pub(crate) fn below(&self, path: &str) -> Result<Self> {
        let mut child = self.clone();
        if path != "/" {
            child.path.push_str(&clean(path)?);
        }
        Ok(child)
    }

    /// Path below each mount point.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The group's directories.
    pub fn directories(&self) -> impl Iterator<Item = PathBuf> {
        self.joined.iter().map(|h| below(h.mount_point(), Path::new(&self.path)))
    }

    /// Makes the directories.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(&self) -> Result<()> {
        for hierarchy in &self.joined {
            self.create_in(hierarchy)?;
        }
        Ok(())
    }

    fn create_in(&self, hierarchy: &Hierarchy) -> Result<()> {
        let dir = self.dir(hierarchy);
        match hierarchy {
            Hierarchy::V1 { controllers, .. } => {
                let cpuset = controllers.iter().any(|c| c == "cpuset");
                make(hierarchy.mount_point(), Path::new(&self.path), |level| {
                    if cpuset { v1::inherit_cpuset(level) } else { Ok(()) }
                })
            }
            Hierarchy::V2 { mount_point, controllers } => {
                let path = Path::new(&self.path);
                let parent = path.parent().unwrap_or(Path::new("/"));
                let prepared = if controllers.is_empty() {
                    Ok(())
                } else {
                    make(mount_point, parent, |_| Ok(()))
                        .map(|()| v2::enable_controllers(mount_point, path, controllers))
                };
                prepared.and_then(|()| make(mount_point, path, |_| Ok(())))
            }
        }
        .context(|| format!("create cgroup {}", dir.display()))
    }

    /// Writes limits, joining hierarchies that only now have a use.
    ///
    /// # Errors
    /// Names the file and the value the kernel refused.
    pub fn apply(&mut self, resources: &LinuxResources) -> Result<()> {
        let late: Vec<Hierarchy> = self
            .layout
            .hierarchies
            .iter()
            .filter(|h| !self.joined.contains(h))
            .filter(|h| {
                matches!(h, Hierarchy::V1 { controllers, .. }
                    if controllers.iter().any(|c| v1::wanted(c, Some(resources), self.layout.can_freeze_v2())))
            })
            .cloned()
            .collect();
        for hierarchy in late {
            self.join_late(hierarchy)?;
        }
        self.supported(resources)?;
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            match hierarchy {
                Hierarchy::V1 { controllers, .. } => v1::apply(&dir, controllers, resources)?,
                Hierarchy::V2 { controllers, .. } => v2::apply(&dir, controllers, resources)?,
            }
        }
        if let Some(unified) = resources.unified().as_ref().filter(|u| !u.is_empty()) {
            let Some(h) = self.joined.iter().find(|h| matches!(h, Hierarchy::V2 { .. })) else {
                return Err(Error::invalid("linux.resources.unified needs cgroup v2"));
            };
            for (file, value) in unified {
                if file.contains('/') {
                    return Err(Error::invalid(format!("linux.resources.unified: {file:?} is no file name")));
                }
                write(&self.dir(h).join(file), value)?;
            }
        }
        Ok(())
    }

    /// Refuses what none of the joined hierarchies can do: nothing is left out silently.
    fn supported(&self, resources: &LinuxResources) -> Result<()> {
        let has = |controller: &str| self.joined.iter().any(|h| h.has(controller));
        let v1 = |controller: &str| self.joined.iter().any(|h| matches!(h, Hierarchy::V1 { .. }) && h.has(controller));
        let network = resources.network().as_ref();
        let needs: [(&str, bool, bool); 9] = [
            ("memory", resources.memory().as_ref().is_some_and(v2::memory_asked), has("memory")),
            ("cpu", resources.cpu().as_ref().is_some_and(v2::cpu_asked), has("cpu")),
            ("cpu.cpus and mems", resources.cpu().as_ref().is_some_and(v2::cpuset_asked), has("cpuset")),
            ("pids", resources.pids().as_ref().is_some_and(|p| p.limit() > 0), has("pids")),
            ("blockIO", resources.block_io().as_ref().is_some_and(v2::block_io_asked), has("io") || has("blkio")),
            ("hugepageLimits", resources.hugepage_limits().as_ref().is_some_and(|h| !h.is_empty()), has("hugetlb")),
            ("network.classID", network.is_some_and(|n| n.class_id().is_some_and(|c| c != 0)), v1("net_cls")),
            (
                "network.priorities",
                network.is_some_and(|n| n.priorities().as_ref().is_some_and(|p| !p.is_empty())),
                v1("net_prio"),
            ),
            ("rdma", resources.rdma().as_ref().is_some_and(|r| !r.is_empty()), has("rdma")),
        ];
        match needs.iter().find(|(_, asked, there)| *asked && !there) {
            Some((what, ..)) => {
                Err(Error::invalid(format!("linux.resources.{what}: this machine has no cgroup controller for it")))
            }
            None => Ok(()),
        }
    }

    /// Tells systemd, when it manages the group, of limits just written.
    ///
    /// # Errors
    /// When it refuses.
    pub(crate) fn tell_manager(&self, resources: &LinuxResources) -> Result<()> {
        self.scope.as_ref().map_or(Ok(()), |scope| scope.update(resources))
    }

    fn join_late(&mut self, hierarchy: Hierarchy) -> Result<()> {
        self.create_in(&hierarchy)?;
        let procs = self.processes()?;
        let file = self.dir(&hierarchy).join("cgroup.procs");
        self.joined.push(hierarchy);
        for pid in procs {
            match fs::write(&file, pid.to_string()) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                other => other.context(|| format!("move process {pid} into {}", file.display()))?,
            }
        }
        Ok(())
    }

    /// Applies the device rules of a new container: nothing but what is listed and the devices every container has.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn apply_devices(&self, resources: Option<&LinuxResources>) -> Result<()> {
        let rules = devices::rules(resources.and_then(|r| r.devices().as_deref()).unwrap_or_default());
        let v1 = self.joined.iter().find(|h| h.has("devices"));
        if let Some(hierarchy) = v1 {
            return devices::apply_v1(&self.dir(hierarchy), &rules);
        }
        match self.joined.iter().find(|h| matches!(h, Hierarchy::V2 { .. })) {
            Some(hierarchy) => match devices::apply_v2(&self.dir(hierarchy), &rules) {
                // An ordinary user may load no program, and the kernel lets him make no device to use either.
                Err(e) if e.errno() == Some(libc::EPERM) && unprivileged() => Ok(()),
                other => other,
            },
            None => Ok(()),
        }
    }

    /// Opens what a new process needs to join.
    ///
    /// # Errors
    /// When a file cannot be opened.
    pub(crate) fn join(&self) -> Result<Join> {
        let mut join = Join { tasks: vec![], into: None };
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            match hierarchy {
                Hierarchy::V1 { .. } => {
                    let file = dir.join("tasks");
                    let fd = rustix::fs::open(&file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                        .context(|| format!("open {}", file.display()))?;
                    join.tasks.push(fd);
                }
                Hierarchy::V2 { .. } => {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    let fd =
                        rustix::fs::open(&dir, flags, Mode::empty()).context(|| format!("open {}", dir.display()))?;
                    join.into = Some(fd);
                }
            }
        }
        Ok(join)
    }

    /// Moves the calling process into the group in every joined hierarchy.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        for hierarchy in &self.joined {
            let file = match hierarchy {
                Hierarchy::V1 { .. } => "tasks",
                Hierarchy::V2 { .. } => "cgroup.procs",
            };
            write(&self.dir(hierarchy).join(file), "0")?;
        }
        Ok(())
    }

    /// Moves the calling process to the top of every joined hierarchy, so that its group can be removed.
    pub fn leave(&self) {
        for hierarchy in &self.joined {
            let file = if matches!(hierarchy, Hierarchy::V1 { .. }) { "tasks" } else { "cgroup.procs" };
            // Best effort: a group that cannot be left shows in the removal's error.
            drop(fs::write(hierarchy.mount_point().join(file), "0"));
        }
    }

    /// How many processes of the group the OOM killer has killed.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.joined.iter().find(|h| h.has("memory")).map_or(0, |h| match h {
            Hierarchy::V1 { .. } => keyed(&self.dir(h).join("memory.oom_control"), "oom_kill"),
            Hierarchy::V2 { .. } => keyed(&self.dir(h).join("memory.events"), "oom_kill"),
        })
    }

    /// Current use.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            match hierarchy {
                Hierarchy::V1 { controllers, .. } => v1::usage(&dir, controllers, &mut usage),
                Hierarchy::V2 { controllers, .. } => v2::usage(&dir, controllers, &mut usage),
            }
        }
        usage.oom_kills = self.oom_kills();
        usage
    }

    /// Removes the group and any groups its processes made below it. Absent directories are fine.
    ///
    /// # Errors
    /// When a directory stays busy.
    pub fn remove(&self) -> Result<()> {
        let mut first = self.scope.as_ref().map_or(Ok(()), Scope::stop);
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            if let Err(e) = remove_dir(&dir) {
                first = first.and(Err(Error::system(format!("remove cgroup {}", dir.display()), e)));
            }
        }
        first
    }

    /// How the group appears inside the container.
    pub(crate) fn view(&self) -> CgroupView {
        let mut view = CgroupView::default();
        if let [only @ Hierarchy::V2 { .. }] = self.layout.hierarchies.as_slice() {
            view.unified_only = Some(self.dir(only));
            return view;
        }
        for hierarchy in &self.joined {
            let name = hierarchy.mount_point().file_name().map(|n| n.to_string_lossy().into_owned());
            let Some(name) = name else { continue };
            if let Hierarchy::V1 { controllers, .. } = hierarchy
                && controllers.len() > 1
            {
                view.links.extend(controllers.iter().filter(|c| **c != name).map(|c| (c.clone(), name.clone())));
            }
            view.directories.push((name, self.dir(hierarchy)));
        }
        view
    }

    /// The hierarchy whose members count as the container's.
    fn reference(&self) -> Option<&Hierarchy> {
        self.joined
            .iter()
            .find(|h| matches!(h, Hierarchy::V2 { .. }))
            .or_else(|| self.joined.iter().find(|h| h.has("pids") || h.has("memory")))
            .or(self.joined.first())
    }

    fn dir(&self, hierarchy: &Hierarchy) -> PathBuf {
        below(hierarchy.mount_point(), Path::new(&self.path))
    }
}

/// What of these resources the kernel has no use for any more, in words.
pub(crate) fn without_effect(resources: &LinuxResources) -> Vec<String> {
    let Some(memory) = resources.memory() else { return vec![] };
    #[allow(deprecated, reason = "it is still in configurations")]
    let kernel = memory.kernel().is_some_and(|limit| limit > 0);
    let fields = [("kernel", kernel), ("useHierarchy", memory.use_hierarchy() == Some(false))];
    let asked = fields.iter().filter(|(_, asked)| *asked);
    asked.map(|(name, _)| format!("linux.resources.memory.{name} has no effect: the kernel has dropped it")).collect()
}

/// Whether this process lacks root's rights on the machine.
pub(crate) fn unprivileged() -> bool {
    !rustix::process::geteuid().is_root() || in_user_namespace()
}

/// Normalises a cgroup path and refuses one that climbs.
fn clean(path: &str) -> Result<String> {
    let mut out = String::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(Error::invalid(format!("cgroup path {path:?} contains .."))),
            _ if part.contains('\0') || part.len() > 255 => {
                return Err(Error::invalid(format!("cgroup path {path:?} is malformed")));
            }
            _ => {
                out.push('/');
                out.push_str(part);
            }
        }
    }
    if out.is_empty() { Err(Error::invalid("the cgroup path is the root group")) } else { Ok(out) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_and_confined() {
        assert_eq!(clean("a//b/./c/").unwrap(), "/a/b/c");
        assert_eq!(clean("/isopod/pod1").unwrap(), "/isopod/pod1");
        for bad in ["", "/", ".", "../x", "/a/../../b", "a/.."] {
            assert!(clean(bad).is_err(), "{bad}");
        }
    }
}
