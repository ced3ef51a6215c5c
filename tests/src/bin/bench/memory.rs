//! Proportional set size and CPU time of isopod's processes, read from the host's /proc.

use std::{collections::BTreeMap, time::Duration};

use isopod_tests::Cluster;

use crate::row;

/// PSS in KiB by process: `isopod up`, `isopod apiserver`, ..., `supervise`.
fn pss(cluster: &Cluster) -> BTreeMap<String, Vec<u64>> {
    let text = cluster.host.must(
        "for p in /proc/[0-9]*; do e=$(tr '\\0' '\\n' < $p/cmdline 2>/dev/null | head -n1); case $e in */isopod|*/isopod-runtime) ;; *) continue ;; esac; \
         echo \"$(tr '\\0' ' ' < $p/cmdline | awk '{n=split($1,a,\"/\"); print a[n] \"-\" $2}') $(awk '/^Pss:/{print $2}' $p/smaps_rollup)\"; done",
    );
    let mut all: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, kib)) = line.rsplit_once(' ') {
            all.entry(name.to_owned()).or_default().push(kib.parse().unwrap_or_default());
        }
    }
    all
}

fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}

/// One row per component and one for all, at `when`.
pub(crate) fn all(cluster: &Cluster, when: &str) {
    let all = pss(cluster);
    for (name, sizes) in &all {
        row(&format!("memory {when} (PSS): {name} x{}", sizes.len()), &mib(sizes.iter().sum()));
    }
    row(&format!("memory {when} (PSS): everything"), &mib(all.values().flatten().sum()));
}

/// The agent beside so many pods, and their supervisors.
pub(crate) fn at(cluster: &Cluster, pods: usize) {
    let all = pss(cluster);
    let of = |part: &str| -> Vec<u64> {
        all.iter().filter(|(name, _)| name.contains(part)).flat_map(|(_, sizes)| sizes.clone()).collect()
    };
    row(&format!("memory at {pods} pods (PSS): agent"), &mib(of("isopod-up").iter().sum()));
    let supervisors = of("supervise");
    let (sum, count) = (supervisors.iter().sum::<u64>(), supervisors.len());
    let each = sum / u64::try_from(count).unwrap().max(1);
    row(&format!("memory at {pods} pods (PSS): {count} supervisors"), &format!("{}, {each} KiB each", mib(sum)));
}

/// CPU ticks of all isopod processes.
fn ticks(cluster: &Cluster) -> u64 {
    let text = cluster.host.must(
        "for p in /proc/[0-9]*; do e=$(tr '\\0' '\\n' < $p/cmdline 2>/dev/null | head -n1); case $e in */isopod|*/isopod-runtime) awk '{print $14+$15}' $p/stat 2>/dev/null ;; esac; done",
    );
    text.lines().filter_map(|line| line.parse::<u64>().ok()).sum()
}

/// CPU of everything of isopod's over a while, when nothing is asked of it.
pub(crate) fn cpu(cluster: &Cluster, when: &str, span: Duration) {
    let before = ticks(cluster);
    std::thread::sleep(span);
    let used = ticks(cluster) - before;
    // USER_HZ is 100 on every Linux.
    let percent = used as f64 / 100.0 / span.as_secs_f64() * 100.0;
    row(&format!("CPU {when} over {} s, all processes", span.as_secs()), &format!("{percent:.2} % of a core"));
}
