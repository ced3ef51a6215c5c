//! What is in a group, and what it has moved to and from block devices: dearer to read than [`super::Usage`], so only
//! for /metrics/cadvisor.

use std::{collections::BTreeMap, fs, path::Path};

use super::{Cgroups, pids_below};

/// Processes and what they hold open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Processes {
    pub(crate) count: u64,
    pub(crate) threads: Option<u64>,
    /// Most threads; zero is no limit.
    pub(crate) threads_max: Option<u64>,
    pub(crate) descriptors: u64,
    pub(crate) sockets: u64,
    pub(crate) tasks: Tasks,
    /// How many files the first process may open; `None` is no limit.
    pub(crate) files_max: Option<u64>,
}

/// Threads by what they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tasks {
    pub(crate) sleeping: u64,
    pub(crate) running: u64,
    pub(crate) stopped: u64,
    /// Asleep where no signal reaches them: mostly waiting for a disk.
    pub(crate) uninterruptible: u64,
}

impl Tasks {
    /// One more, by the letter of its /proc/PID/stat.
    fn count(&mut self, stat: &str) {
        match stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next()) {
            Some('R') => self.running += 1,
            Some('D') => self.uninterruptible += 1,
            Some('T' | 't') => self.stopped += 1,
            Some('S' | 'I') => self.sleeping += 1,
            _ => {}
        }
    }
}

/// The soft limit of open files in the text of /proc/PID/limits.
fn files_max(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|l| l.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// By device: bytes read, reads, bytes written, writes.
pub(crate) type Moved = BTreeMap<String, [f64; 4]>;

impl Cgroups {
    /// The processes of a group and those below it.
    pub(crate) fn processes(&self, group: &str) -> Processes {
        let counted = self.hierarchies.v1.get("pids").or(self.hierarchies.v2.as_ref()).map(|m| m.join(group));
        let read = |file: &str| fs::read_to_string(counted.as_ref()?.join(file)).ok();
        let mut all = Processes {
            threads: read("pids.current").and_then(|t| t.trim().parse().ok()),
            threads_max: read("pids.max").map(|t| t.trim().parse().unwrap_or(0)),
            ..Processes::default()
        };
        let mut first = None;
        for pid in counted.iter().flat_map(|dir| pids_below(dir)) {
            all.count += 1;
            first = Some(first.map_or(pid, |first: i32| first.min(pid)));
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                all.tasks.count(&fs::read_to_string(task.path().join("stat")).unwrap_or_default());
            }
            for fd in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                all.descriptors += 1;
                let to = fs::read_link(fd.path()).unwrap_or_default();
                all.sockets += u64::from(to.as_os_str().as_encoded_bytes().starts_with(b"socket"));
            }
        }
        let limits = first.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/limits")).ok());
        all.files_max = limits.and_then(|text| files_max(&text));
        all
    }

    /// What a group and those below it have moved.
    pub(crate) fn moved(&self, group: &str) -> Moved {
        let read = |mount: &Path, file: &str| fs::read_to_string(mount.join(group).join(file)).unwrap_or_default();
        let numbers = match (self.hierarchies.v1.get("blkio"), &self.hierarchies.v2) {
            (Some(v1), _) => {
                let of = |what: &str| read(v1, &format!("blkio.throttle.{what}_recursive"));
                io_v1(&of("io_service_bytes"), &of("io_serviced"))
            }
            (None, Some(v2)) => io_v2(&read(v2, "io.stat")),
            _ => BTreeMap::new(),
        };
        let worked = numbers.into_iter().filter(|(_, n)| n.iter().any(|n| *n > 0.0));
        worked.map(|(id, n)| (device(&id), n)).collect()
    }
}

/// A device's file by its numbers.
fn device(id: &str) -> String {
    let link = fs::read_link(format!("/sys/dev/block/{id}")).unwrap_or_default();
    link.file_name().map_or_else(|| id.to_owned(), |name| format!("/dev/{}", name.to_string_lossy()))
}

/// `8:0 Read 4096` lines; a total without a device stands at the end.
fn io_v1(bytes: &str, operations: &str) -> Moved {
    let mut all = Moved::new();
    for (text, column) in [(bytes, 0), (operations, 1)] {
        for line in text.lines() {
            let mut words = line.split(' ');
            let (Some(id), Some(what), Some(n)) = (words.next(), words.next(), words.next()) else { continue };
            let column = match what {
                "Read" => column,
                "Write" => column + 2,
                _ => continue,
            };
            all.entry(id.to_owned()).or_default()[column] = n.parse().unwrap_or(0.0);
        }
    }
    all
}

/// `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 ...` lines.
fn io_v2(text: &str) -> Moved {
    let one = |line: &str| {
        let (id, rest) = line.split_once(' ')?;
        let of = |key: &str| {
            let mut values = rest.split(' ').filter_map(|w| w.split_once('='));
            values.find(|(k, _)| *k == key).and_then(|(_, v)| v.parse().ok()).unwrap_or(0.0)
        };
        Some((id.to_owned(), ["rbytes", "rios", "wbytes", "wios"].map(of)))
    };
    text.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_counted_by_what_they_do() {
        let mut tasks = Tasks::default();
        for stat in ["1 (a) S 0", "2 (b) R) R 1", "3 (c d) D 1", "4 (e) t 1", "5 (f) Z 1", "6 (g) I 1"] {
            tasks.count(stat);
        }
        assert_eq!(tasks, Tasks { sleeping: 2, running: 1, stopped: 1, uninterruptible: 1 });
        let limits =
            |soft: &str| format!("Limit  Soft Limit  Hard Limit  Units\nMax open files   {soft}   4096   files\n");
        assert_eq!((files_max(&limits("1024")), files_max(&limits("unlimited"))), (Some(1024), None));
    }

    #[test]
    fn both_versions_tell_the_same() {
        let v1 =
            io_v1("8:0 Read 4096\n8:0 Write 512\n8:0 Sync 1\nTotal 4608\n", "8:0 Read 2\n8:0 Write 1\n8:0 Total 3\n");
        let v2 = io_v2("8:0 rbytes=4096 wbytes=512 rios=2 wios=1 dbytes=0 dios=0\n");
        assert_eq!(v1, v2);
        assert_eq!(v2, [("8:0".to_owned(), [4096.0, 2.0, 512.0, 1.0])].into());
    }
}
