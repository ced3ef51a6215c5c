//! What a host has in its kernel: mounts, links, namespaces, cgroups, nft tables, routes, processes. Two snapshots are
//! compared line by line to show that nothing was left behind.

use std::collections::BTreeSet;

use crate::Host;

/// The lines of one look at a host.
pub struct Snapshot(BTreeSet<String>);

const SCRIPT: &str = r#"
awk '{print "mount " $5 " " $(NF-2)}' /proc/self/mountinfo
ip -o link | awk '{print "link " $2}'
ip -o route | sed 's/^/route /'
ip -o addr | awk '{print "address " $2 " " $4}'
find /sys/fs/cgroup -mindepth 2 -type d | sed 's/^/cgroup /'
nft list ruleset | sed 's/^/nft /'
for p in /proc/[0-9]*; do
    [ "${p#/proc/}" = $$ ] || { [ -r $p/comm ] && echo "process $(cat $p/comm)"; }
done
ls /run | sed 's/^/run /'
"#;

impl Snapshot {
    /// Looks at the host. The look's own processes are not in it.
    pub fn take(host: &Host) -> Self {
        let own = ["process sh", "process cat", "process find", "process awk", "process sed", "process ls"];
        let text = host.must(SCRIPT);
        Self(text.lines().filter(|line| !own.contains(line)).map(str::to_owned).collect())
    }

    /// What is in one but not in the other, marked `+` (new) and `-` (gone).
    pub fn diff(&self, later: &Snapshot) -> Vec<String> {
        let new = later.0.difference(&self.0).map(|line| format!("+ {line}"));
        let gone = self.0.difference(&later.0).map(|line| format!("- {line}"));
        new.chain(gone).collect()
    }
}
