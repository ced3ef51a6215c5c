//! What a host has in its kernel: mounts, links, namespaces, cgroups, nft tables, routes, processes. Two snapshots are
//! compared line by line, and how often each line comes, to show that nothing was left behind. Addresses that pods have given
//! up are no leftovers: the pod network refuses packets to them until it gives them out again.

use std::collections::BTreeMap;

use crate::{Host, eventually};

/// The lines of one look at a host, and how many there are of each.
pub struct Snapshot(BTreeMap<String, usize>);

const SCRIPT: &str = r#"
awk '{print "mount " $5 " " $(NF-2)}' /proc/self/mountinfo
ip -o link | awk '{print "link " $2}'
ip -o route | sed 's/^/route /'
ip -o addr | awk '{print "address " $2 " " $4}'
find /sys/fs/cgroup -mindepth 2 -type d | sed 's/^/cgroup /'
nft list ruleset | awk '/set gone [{]/ {g = 1} g && /elements =/ {s = 1} s {if (/[}]/) {s = 0; g = 0} next} {print "nft " $0}'
for p in /proc/[0-9]*; do
    [ "${p#/proc/}" = $$ ] || { [ -r $p/comm ] && echo "process $(cat $p/comm)"; }
done
ls /run | sed 's/^/run /'
"#;

impl Snapshot {
    /// Looks at the host. The look's own processes are not in it.
    pub fn take(host: &Host) -> Self {
        let own = ["process sh", "process cat", "process find", "process awk", "process sed", "process ls"];
        Self::count(host.must(SCRIPT).lines().filter(|line| !own.contains(line)).map(str::to_owned))
    }

    /// The host at rest, with its pool of pod networks filled: two looks in a row see the same.
    #[track_caller]
    pub fn settled(host: &Host) -> Self {
        let mut last = Self::take(host).pooled();
        eventually("the host is at rest", || {
            let now = Self::take(host).pooled();
            let diff = std::mem::replace(&mut last, now).diff(&last);
            if diff.is_empty() { Ok(()) } else { Err(diff) }
        });
        last
    }

    /// The same with all pre-made pod networks alike, and all containers of a pod: the pool always holds as many, and what is
    /// started again does so under a new name.
    pub fn pooled(&self) -> Self {
        let alike = |line: &str| {
            let cut = |line: String, mark: &str| match line.split_once(mark) {
                Some((before, after)) => {
                    let rest = after.trim_start_matches(|c: char| c.is_ascii_hexdigit() || c == ':');
                    format!("{before}{mark}*{rest}")
                }
                None => line,
            };
            let line = match line.rsplit_once('/') {
                Some((group, id)) if id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()) => {
                    format!("{group}/*")
                }
                _ => line.to_owned(),
            };
            ["isov", ".slot-", "fe80::"].into_iter().fold(line, cut)
        };
        Self::count(self.0.iter().flat_map(|(line, n)| std::iter::repeat_n(alike(line), *n)))
    }

    fn count(lines: impl Iterator<Item = String>) -> Self {
        let mut counted = BTreeMap::new();
        lines.for_each(|line| *counted.entry(line).or_default() += 1);
        Self(counted)
    }

    /// What there is more or less of later, marked `+` (new) and `-` (gone).
    pub fn diff(&self, later: &Snapshot) -> Vec<String> {
        let times = |snapshot: &Snapshot, line: &String| snapshot.0.get(line).copied().unwrap_or(0);
        let more = |of: &Snapshot, than: &Snapshot, sign: char| {
            let lines = of.0.iter().filter(|(line, n)| times(than, line) < **n);
            lines.map(|(line, n)| format!("{sign} {line} ({})", n - times(than, line))).collect::<Vec<_>>()
        };
        [more(later, self, '+'), more(self, later, '-')].concat()
    }
}

/// Files and records that pods have beside what the kernel knows of them, without those of the control plane.
pub fn records(host: &Host) -> String {
    host.must(
        "ls /var/lib/isopod/network/pods; \
         for d in /var/lib/isopod/pods/* /run/isopod/pods/*; do \
             grep -qs '\"kubernetes.io/config.source\":\"file\"' /var/lib/isopod/pods/${d##*/}/pod.json || echo $d; done; \
         ls /var/log/pods | grep -v ^kube-system_ || true",
    )
}

/// Waits until a host is as it was: nothing of the pods since is left.
#[track_caller]
pub fn converges(host: &Host, before: &Snapshot) {
    eventually("nothing of the pods is left", || {
        let diff = before.diff(&Snapshot::take(host).pooled());
        let records = records(host);
        if diff.is_empty() && records.is_empty() { Ok(()) } else { Err((diff, records)) }
    });
}

#[cfg(test)]
mod tests {
    use super::Snapshot;

    fn snapshot(lines: &[&str]) -> Snapshot {
        Snapshot::count(lines.iter().map(|line| (*line).to_owned()))
    }

    #[test]
    fn counts_and_pools() {
        let before =
            snapshot(&["process a", "link isov12ab@if2:", "address isov12ab fe80::1:2/64", "mount x/.slot-1 nsfs"]);
        let after = snapshot(&[
            "process a",
            "process a",
            "link isovffff@if2:",
            "address isovffff fe80::3/64",
            "mount x/.slot-17 nsfs",
        ]);
        assert_eq!(before.diff(&after).len(), 7);
        assert_eq!(before.pooled().diff(&after.pooled()), ["+ process a (1)"]);
        assert_eq!(after.pooled().diff(&before.pooled()), ["- process a (1)"]);
    }
}
