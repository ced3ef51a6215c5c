//! `linux.intelRdt`: the container's group in the resctrl file system, which shares out caches and memory bandwidth.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxIntelRdt;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    cgroups::unescape,
    error::{Context, Error, Result},
};

/// Names the file system has uses of its own for.
const RESERVED: [&str; 5] = [".", "..", "info", "mon_data", "mon_groups"];

/// Where a container lies in the resctrl file system, and what of that goes with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resctrl {
    /// Its class of service.
    group: PathBuf,
    /// Whether the class is made for it.
    own: bool,
    /// Its monitoring group.
    monitor: Option<PathBuf>,
}

/// Where resctrl is mounted.
pub(crate) fn root() -> Result<PathBuf> {
    const USUAL: &str = "/sys/fs/resctrl";
    let table = fs::read_to_string("/proc/self/mountinfo").context(|| "read /proc/self/mountinfo".into())?;
    let mounted = table.lines().find(|line| line.split_once(" - ").is_some_and(|(_, fs)| fs.starts_with("resctrl ")));
    match mounted.and_then(|line| line.split(' ').nth(4)) {
        Some(point) => Ok(PathBuf::from(unescape(point))),
        None if Path::new(USUAL).join("schemata").exists() => Ok(USUAL.into()),
        None => Err(Error::invalid(format!("linux.intelRdt: no resctrl file system is mounted on {USUAL}"))),
    }
}

/// The lines for `schemata`, in the order the specification wants them written.
fn lines(rdt: &LinuxIntelRdt) -> Vec<&str> {
    let schemata = rdt.schemata().iter().flatten();
    [rdt.l3_cache_schema(), rdt.mem_bw_schema()].into_iter().flatten().chain(schemata).map(String::as_str).collect()
}

/// Refuses what cannot be, and every use without the file system.
pub(crate) fn validate(rdt: &LinuxIntelRdt) -> Result<()> {
    if let Some(class) = rdt.clos_id().as_deref()
        && class != "/"
        && (class.is_empty() || class.contains('/') || RESERVED.contains(&class))
    {
        return Err(Error::invalid(format!("linux.intelRdt.closID: {class:?} is no name of a class")));
    }
    if let Some(schema) = rdt.mem_bw_schema().as_deref().filter(|schema| !schema.starts_with("MB:")) {
        return Err(Error::invalid(format!("linux.intelRdt.memBwSchema: {schema:?} does not start with MB:")));
    }
    if let Some(line) = lines(rdt).into_iter().find(|line| line.contains('\n')) {
        return Err(Error::invalid(format!("linux.intelRdt: the schema {line:?} has more than one line")));
    }
    root().map(drop)
}

/// What of it has no effect, in words.
pub(crate) fn without_effect(configuration: &[u8]) -> Vec<String> {
    // The parser does not know these names.
    let document: Value = serde_json::from_slice(configuration).unwrap_or_default();
    let asked = ["enableCMT", "enableMBM"].into_iter().filter(|name| document["linux"]["intelRdt"][*name] == true);
    asked.map(|name| format!("linux.intelRdt.{name} has no effect: enableMonitoring has taken its place")).collect()
}

impl Resctrl {
    /// The groups of a container; nothing is made yet.
    pub(crate) fn plan(root: &Path, rdt: &LinuxIntelRdt, id: &str) -> Result<Self> {
        let class = rdt.clos_id().as_deref().unwrap_or(id);
        if RESERVED.contains(&id) {
            return Err(Error::invalid(format!("linux.intelRdt: {id} cannot be the name of a group")));
        }
        let group = if class == "/" { root.to_owned() } else { root.join(class) };
        if rdt.clos_id().is_some() && lines(rdt).is_empty() && !group.is_dir() {
            return Err(Error::invalid(format!("linux.intelRdt.closID: there is no class {}", group.display())));
        }
        let own = rdt.clos_id().is_none() && !group.exists();
        let monitor = (*rdt.enable_monitoring() == Some(true)).then(|| group.join("mon_groups").join(id));
        if let Some(taken) = monitor.as_ref().filter(|dir| dir.exists()) {
            return Err(Error::state(format!("linux.intelRdt: {} exists already", taken.display())));
        }
        Ok(Self { group, own, monitor })
    }

    /// Makes what there is not yet, and writes or compares the schemata.
    pub(crate) fn make(&self, rdt: &LinuxIntelRdt) -> Result<()> {
        let there = self.group.is_dir();
        if !there {
            fs::create_dir(&self.group).context(|| format!("create {}", self.group.display()))?;
        } else if rdt.clos_id().is_some() {
            for schema in [rdt.l3_cache_schema(), rdt.mem_bw_schema()].into_iter().flatten() {
                self.compare(schema)?;
            }
        }
        let written = self.write(&lines(rdt));
        if written.is_err() && !there {
            // A class of the name in the configuration stays; not one that could not be made whole.
            drop(remove_dir(&self.group));
        }
        written?;
        match &self.monitor {
            Some(dir) => fs::create_dir(dir).context(|| format!("linux.intelRdt: create {}", dir.display())),
            None => Ok(()),
        }
    }

    /// Puts a process, and what it starts from now on, into the groups.
    pub(crate) fn enter(&self, pid: i32) -> Result<()> {
        for dir in [Some(&self.group), self.monitor.as_ref()].into_iter().flatten() {
            let file = dir.join("tasks");
            fs::write(&file, pid.to_string()).context(|| format!("write {pid} to {}", file.display()))?;
        }
        Ok(())
    }

    /// Writes lines of the schemata.
    pub(crate) fn write(&self, lines: &[&str]) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let file = self.group.join("schemata");
        fs::write(&file, lines.join("\n") + "\n").map_err(|e| {
            let root = self.group.ancestors().find_map(|dir| fs::read_to_string(dir.join("info/last_cmd_status")).ok());
            let told = root.map(|text| format!(" ({})", text.trim())).unwrap_or_default();
            Error::system(format!("linux.intelRdt: write {lines:?} to {}{told}", file.display()), e)
        })
    }

    /// Removes what was made for the container alone.
    pub(crate) fn remove(&self) -> Result<()> {
        let own = self.own.then_some(&self.group);
        for dir in self.monitor.iter().chain(own) {
            remove_dir(dir).context(|| format!("remove {}", dir.display()))?;
        }
        Ok(())
    }

    /// A class that is there must have the schema already: other containers are in it.
    fn compare(&self, schema: &str) -> Result<()> {
        let file = self.group.join("schemata");
        let text = fs::read_to_string(&file).context(|| format!("read {}", file.display()))?;
        let has = |(resource, domain, value): (&str, &str, &str)| {
            text.lines().flat_map(shares).any(|(r, d, v)| r == resource && d == domain && same(v, value))
        };
        if shares(schema).all(has) {
            return Ok(());
        }
        Err(Error::invalid(format!("linux.intelRdt: {} does not have the schema {schema:?}", file.display())))
    }
}

/// The shares of a line: `L3:0=7f0;1=1f` is 7f0 of cache 0 and 1f of cache 1.
fn shares(line: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    let (resource, all) = line.split_once(':').unwrap_or((line, ""));
    let all = all.split(';').filter(|share| !share.trim().is_empty());
    all.map(move |share| {
        let (domain, value) = share.split_once('=').unwrap_or((share, ""));
        (resource.trim(), domain.trim(), value.trim())
    })
}

/// The kernel writes masks with leading zeros.
fn same(one: &str, other: &str) -> bool {
    let plain = |value: &str| value.trim_start_matches('0').to_ascii_lowercase();
    plain(one) == plain(other)
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // resctrl's own files do not count; where they do this is a directory that stands in for one.
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => fs::remove_dir_all(dir),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A stand-in for the file system, with a class `gold`.
    fn stand_in() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for dir in ["mon_groups", "gold/mon_groups"] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        fs::write(root.path().join("schemata"), "    L3:0=7ff;1=7ff\n    MB:0=100;1=100\n").unwrap();
        fs::write(root.path().join("gold/schemata"), "    L3:0=0f0;1=00f\n    MB:0= 20;1=100\n").unwrap();
        root
    }

    fn container(root: &Path, rdt: serde_json::Value) -> Result<Resctrl, String> {
        let rdt: LinuxIntelRdt = serde_json::from_value(rdt).unwrap();
        let made = Resctrl::plan(root, &rdt, "c1").and_then(|r| r.make(&rdt).and_then(|()| r.enter(77)).map(|()| r));
        made.map_err(|e| e.to_string())
    }

    fn read(root: &tempfile::TempDir, file: &str) -> String {
        fs::read_to_string(root.path().join(file)).unwrap_or_else(|e| e.kind().to_string())
    }

    #[test]
    fn a_container_without_a_class_gets_its_own_and_takes_it_along() {
        let root = stand_in();
        let rdt = json!({"memBwSchema": "MB:0=20", "schemata": ["L2:0=f"], "l3CacheSchema": "L3:0=7f0"});
        let made = container(root.path(), rdt).unwrap();
        assert_eq!(read(&root, "c1/schemata"), "L3:0=7f0\nMB:0=20\nL2:0=f\n");
        assert_eq!(read(&root, "c1/tasks"), "77");
        made.remove().unwrap();
        assert_eq!(read(&root, "c1/tasks"), "entity not found");
        made.remove().unwrap();
        // Somebody else's of the same name is used, and stays.
        fs::create_dir(root.path().join("c1")).unwrap();
        container(root.path(), json!({})).unwrap().remove().unwrap();
        assert_eq!(read(&root, "c1/tasks"), "77");
        assert_eq!(read(&root, "c1/schemata"), "entity not found");
    }

    #[test]
    fn a_named_class_is_never_removed() {
        let root = stand_in();
        container(root.path(), json!({"closID": "gold"})).unwrap().remove().unwrap();
        assert_eq!(read(&root, "gold/tasks"), "77");
        container(root.path(), json!({"closID": "new", "schemata": ["L3:0=1"]})).unwrap().remove().unwrap();
        assert_eq!((read(&root, "new/tasks"), read(&root, "new/schemata")), ("77".into(), "L3:0=1\n".into()));
        container(root.path(), json!({"closID": "/"})).unwrap().remove().unwrap();
        assert_eq!(read(&root, "tasks"), "77");
        let error = container(root.path(), json!({"closID": "none"})).unwrap_err();
        assert!(error.contains("there is no class"), "{error}");
    }

    #[test]
    fn a_class_that_is_there_must_have_the_schema() {
        let root = stand_in();
        let same = json!({"closID": "gold", "l3CacheSchema": "L3:1=f;0=F0", "memBwSchema": "MB:0=20"});
        container(root.path(), same).unwrap();
        for other in [json!("L3:0=f"), json!("L2:0=f0"), json!("L3:2=f0")] {
            let root = stand_in();
            let before = read(&root, "gold/schemata");
            let error = container(root.path(), json!({"closID": "gold", "l3CacheSchema": other})).unwrap_err();
            assert!(error.contains("does not have the schema"), "{error}");
            assert_eq!((read(&root, "gold/schemata"), read(&root, "gold/tasks")), (before, "entity not found".into()));
        }
    }

    #[test]
    fn a_monitoring_group_goes_with_its_container() {
        let root = stand_in();
        let made = container(root.path(), json!({"closID": "gold", "enableMonitoring": true})).unwrap();
        assert_eq!(read(&root, "gold/mon_groups/c1/tasks"), "77");
        let error = container(root.path(), json!({"closID": "gold", "enableMonitoring": true})).unwrap_err();
        assert!(error.contains("exists already"), "{error}");
        made.remove().unwrap();
        assert_eq!(read(&root, "gold/mon_groups/c1/tasks"), "entity not found");
        assert_eq!(read(&root, "gold/tasks"), "77");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let cases = [
            (json!({"closID": ".."}), "closID: \"..\" is no name of a class"),
            (json!({"closID": "a/b"}), "is no name of a class"),
            (json!({"closID": "mon_groups"}), "is no name of a class"),
            (json!({"memBwSchema": "0=20"}), "does not start with MB:"),
            (json!({"schemata": ["L3:0=f\nMB:0=1"]}), "more than one line"),
        ];
        for (rdt, words) in cases {
            let error = validate(&serde_json::from_value(rdt).unwrap()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let old = json!({"linux": {"intelRdt": {"enableCMT": true, "enableMBM": false}}}).to_string();
        assert_eq!(without_effect(old.as_bytes()).len(), 1);
    }
}
