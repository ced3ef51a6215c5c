//! Which cgroup hierarchies are mounted where, from /proc/self/mountinfo.
//!
//! Mount points are taken as they are: a caller in a cgroup namespace or with a bind-mounted subtree sees its own part
//! of the hierarchy there, and its containers' groups go below it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hierarchy {
    /// A v1 hierarchy.
    V1 {
        /// Where it is mounted.
        mount_point: PathBuf,
        /// Its controllers; empty for a named one.
        controllers: Vec<String>,
    },
    /// The v2 hierarchy.
    V2 {
        /// Where it is mounted.
        mount_point: PathBuf,
        /// Controllers available at the mount point.
        controllers: Vec<String>,
    },
}

impl Hierarchy {
    /// Where it is mounted.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        match self {
            Self::V1 { mount_point, .. } | Self::V2 { mount_point, .. } => mount_point,
        }
    }

    /// Whether its mount point is seen as such: the table also has mounts that others cover.
    fn visible(&self) -> bool {
        let expected = match self {
            Self::V1 { .. } => 0x0027_e0eb,
            Self::V2 { .. } => 0x6367_7270,
        };
        rustix::fs::statfs(self.mount_point()).is_ok_and(|s| s.f_type == expected)
    }

    /// Whether it has this controller.
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        match self {
            Self::V1 { controllers, .. } | Self::V2 { controllers, .. } => controllers.iter().any(|c| c == controller),
        }
    }
}

/// All mounted hierarchies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// v1 in mount order, then v2.
    pub hierarchies: Vec<Hierarchy>,
}

const V1_CONTROLLERS: &[&str] = &[
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
    "misc",
];

impl Layout {
    /// Reads the mount table.
    ///
    /// # Errors
    /// When it cannot be read or no hierarchy is mounted.
    pub fn detect() -> Result<Self> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").context(|| "read /proc/self/mountinfo".into())?;
        let mut layout = Self::parse(&table);
        layout.hierarchies.retain(Hierarchy::visible);
        for hierarchy in &mut layout.hierarchies {
            if let Hierarchy::V2 { mount_point, controllers } = hierarchy {
                let text = std::fs::read_to_string(mount_point.join("cgroup.controllers")).unwrap_or_default();
                *controllers = text.split_whitespace().map(str::to_owned).collect();
            }
        }
        if layout.hierarchies.is_empty() {
            return Err(Error::invalid("no cgroup hierarchy is mounted; mount cgroup2 on /sys/fs/cgroup"));
        }
        Ok(layout)
    }

    /// Whether the v2 freezer can be used.
    #[must_use]
    pub fn can_freeze_v2(&self) -> bool {
        self.hierarchies.iter().any(|h| matches!(h, Hierarchy::V2 { .. }))
    }

    fn parse(table: &str) -> Self {
        let mut v1: Vec<Hierarchy> = vec![];
        let mut v2 = None;
        for line in table.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let mut after = after.split(' ');
            let (kind, options) = (after.next().unwrap_or_default(), after.nth(1).unwrap_or_default());
            let Some(point) = before.split(' ').nth(4) else { continue };
            let mount_point = PathBuf::from(unescape(point));
            match kind {
                "cgroup2" if v2.is_none() => v2 = Some(Hierarchy::V2 { mount_point, controllers: vec![] }),
                "cgroup" => {
                    let controllers: Vec<String> =
                        options.split(',').filter(|o| V1_CONTROLLERS.contains(o)).map(str::to_owned).collect();
                    let known = v1.iter().any(|h| controllers.iter().any(|c| h.has(c)));
                    if !controllers.is_empty() && !known {
                        v1.push(Hierarchy::V1 { mount_point, controllers });
                    }
                }
                _ => {}
            }
        }
        v1.extend(v2);
        Self { hierarchies: v1 }
    }
}

/// Undoes the octal escapes of mountinfo (`\040` is a space).
pub(crate) fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let octal = bytes.get(i + 1..i + 4).filter(|_| bytes[i] == b'\\');
        match octal.and_then(|o| std::str::from_utf8(o).ok()).and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_layout_with_combined_controllers() {
        let table = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:4 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/a\\040b rw,relatime - cgroup2 cgroup2 rw
";
        let layout = Layout::parse(table);
        assert_eq!(layout.hierarchies.len(), 2);
        assert!(layout.hierarchies[0].has("cpu") && layout.hierarchies[0].has("cpuacct"));
        assert_eq!(layout.hierarchies[1].mount_point(), Path::new("/sys/fs/cgroup/a b"));
    }
}
