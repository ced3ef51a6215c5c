//! Control groups: one [`Cgroup`] over whatever this machine mounts: v1 hierarchies, the v2 hierarchy, or both (hybrid).
//!
//! A container's group lies at the same path in each hierarchy. In v1 a hierarchy is joined only when it has a use:
//! always for memory, pids, cpuacct and devices; otherwise when a limit is asked for or an administrator made the
//! parent group there. Each join costs a directory and a write, and most of a container's start is such small change.

mod devices;
mod layout;
mod v1;
mod v2;

use std::{
    collections::HashMap,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

pub(crate) use layout::unescape;
pub use layout::{Hierarchy, Layout};

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
        Ok(Self { path, joined, layout })
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
            Some(hierarchy) => devices::apply_v2(&self.dir(hierarchy), &rules),
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

    /// Processes of the group and those below it.
    ///
    /// # Errors
    /// When the group cannot be read.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let Some(hierarchy) = self.reference() else { return Ok(vec![]) };
        let mut pids = vec![];
        collect(&self.dir(hierarchy), &mut pids, 0).context(|| format!("list cgroup {}", self.path))?;
        Ok(pids)
    }

    /// Sends `signal` to every process of the group.
    ///
    /// # Errors
    /// When the group cannot be read.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            let unified = self.joined.iter().find(|h| matches!(h, Hierarchy::V2 { .. }));
            if unified.is_some_and(|h| fs::write(self.dir(h).join("cgroup.kill"), "1").is_ok()) {
                return Ok(());
            }
        }
        for pid in self.processes()? {
            match crate::sys::kill(pid, signal) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(Error::system(format!("signal process {pid}"), e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Kills every process and waits until the group is empty.
    ///
    /// # Errors
    /// When processes remain after a few seconds.
    pub fn kill_and_wait(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut pause = Duration::from_micros(200);
        loop {
            match self.processes() {
                Ok(pids) if pids.is_empty() => return Ok(()),
                Err(e) if e.errno() == Some(libc::ENOENT) || e.errno() == Some(libc::ENODEV) => return Ok(()),
                Err(e) => return Err(e),
                Ok(_) => {}
            }
            self.signal_all(libc::SIGKILL)?;
            self.thaw_quietly();
            if Instant::now() > deadline {
                return Err(Error::state(format!("processes of cgroup {} survive SIGKILL", self.path)));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Stops or continues every process of the group.
    ///
    /// # Errors
    /// When there is no freezer or it does not finish.
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        if self.layout.can_freeze_v2() {
            let unified = self.joined.iter().find(|h| matches!(h, Hierarchy::V2 { .. }));
            if let Some(hierarchy) = unified {
                return v2::freeze(&self.dir(hierarchy), frozen);
            }
        }
        if !self.joined.iter().any(|h| h.has("freezer")) {
            let Some(h) = self.layout.hierarchies.iter().find(|h| h.has("freezer")).cloned() else {
                return Err(Error::invalid("this machine mounts no freezer"));
            };
            self.join_late(h)?;
        }
        match self.joined.iter().find(|h| h.has("freezer")) {
            Some(hierarchy) => v1::freeze(&self.dir(hierarchy), frozen),
            None => Ok(()),
        }
    }

    fn thaw_quietly(&self) {
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            match hierarchy {
                Hierarchy::V2 { .. } => drop(fs::write(dir.join("cgroup.freeze"), "0")),
                Hierarchy::V1 { .. } if hierarchy.has("freezer") => {
                    drop(fs::write(dir.join("freezer.state"), "THAWED"))
                }
                Hierarchy::V1 { .. } => {}
            }
        }
    }

    /// Whether the group is frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.joined.iter().any(|h| {
            let dir = self.dir(h);
            match h {
                Hierarchy::V2 { .. } => {
                    fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|t| t.contains("frozen 1"))
                }
                Hierarchy::V1 { .. } => {
                    h.has("freezer")
                        && fs::read_to_string(dir.join("freezer.state")).is_ok_and(|t| t.trim() != "THAWED")
                }
            }
        })
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
        let mut first = Ok(());
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

fn below(mount_point: &Path, path: &Path) -> PathBuf {
    mount_point.join(path.strip_prefix("/").unwrap_or(path))
}

/// mkdir -p below a mount point, telling `made` of each new level.
fn make(mount_point: &Path, path: &Path, mut made: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let whole = below(mount_point, path);
    match fs::create_dir(&whole) {
        Ok(()) => return made(&whole),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut level = mount_point.to_path_buf();
    for part in path.strip_prefix("/").unwrap_or(path) {
        level.push(part);
        match fs::create_dir(&level) {
            Ok(()) => made(&level)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes a control file in one write.
fn write(file: &Path, value: &str) -> Result<()> {
    rustix::fs::open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|fd| rustix::io::write(fd, value.as_bytes()))
        .map(drop)
        .context(|| format!("write {value:?} to {}", file.display()))
}

fn read_number(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// The value after `key` in a file of `key value` lines.
fn keyed(file: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .find(|(k, _)| *k == key)
        .and_then(|(_, v)| v.trim().parse().ok())
        .unwrap_or(0)
}

fn all_keyed(file: &Path) -> HashMap<String, u64> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .filter_map(|(k, v)| Some((k.to_owned(), v.trim().parse().ok()?)))
        .collect()
}

fn collect(dir: &Path, pids: &mut Vec<i32>, depth: usize) -> io::Result<()> {
    let text = fs::read_to_string(dir.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
    if depth < 32 {
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                match collect(&entry.path(), pids, depth + 1) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// Removes a group; those below it first. A process just reaped may keep it busy for a moment.
fn remove_dir(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut pause = Duration::from_micros(100);
    loop {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                    if entry.file_type().is_ok_and(|t| t.is_dir()) {
                        remove_dir(&entry.path())?;
                    }
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            other => return other,
        }
    }
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
