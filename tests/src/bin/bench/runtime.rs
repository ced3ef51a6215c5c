//! `isopod-runtime run` of /bin/true against crun and runc, in turn.

use std::{
    fs,
    time::{Duration, Instant},
};

use isopod_tests::{Host, host::binaries};

use crate::{row, times};

const RUNS: usize = 30;

pub(crate) fn compare(host: &Host) {
    host.must(
        "mkdir -p /opt/cni/bundle/rootfs/bin && cp /bin/busybox /opt/cni/bundle/rootfs/bin/ && ln -sf busybox /opt/cni/bundle/rootfs/bin/true && \
         cd /opt/cni/bundle && rm -f config.json && crun spec && \
         jq '.process.terminal=false | .process.args=[\"/bin/true\"] | .root.readonly=false' config.json > c && mv c config.json",
    );
    let isopod = binaries().join("isopod-runtime");
    let runtimes = [isopod.to_str().unwrap(), "crun", "runc"];
    // One shell on the host does all runs, so that entering the host is not measured. crun refuses a v2 hierarchy beside
    // v1 ones, so the unified one is unmounted (in a mount namespace of these runs alone) for all of them.
    let script = format!(
        "cd /opt/cni/bundle; for i in $(seq {RUNS}); do for r in {}; do s=$(date +%s%N); $r run bench-$i > /dev/null 2>&1 || echo fail; \
         e=$(date +%s%N); echo $(basename $r) $((e-s)); done; done",
        runtimes.join(" ")
    );
    let started = Instant::now();
    let script = format!("umount /sys/fs/cgroup/unified; {script}");
    let ran = host.run("unshare", &["-m", "sh", "-c", &script]);
    let text = ran.ok().unwrap_or_else(|ran| panic!("runs of /bin/true: {ran:?}"));
    fs::write(host.disk().join("runtime.txt"), &text).unwrap();
    let mut medians = Vec::new();
    for runtime in ["isopod-runtime", "crun", "runc"] {
        let all: Vec<Duration> = text
            .lines()
            .filter_map(|line| line.strip_prefix(runtime)?.trim().parse().ok())
            .map(Duration::from_nanos)
            .collect();
        if all.is_empty() {
            row(&format!("{runtime} run /bin/true"), "failed");
            continue;
        }
        let mut sorted = all.clone();
        sorted.sort();
        medians.push((runtime, sorted[sorted.len() / 2]));
        row(&format!("{runtime} run /bin/true"), &times(all));
    }
    if let Some((_, own)) = medians.first() {
        for (peer, time) in &medians[1..] {
            row(&format!("  ratio {peer} / isopod-runtime"), &format!("{:.2}", time.as_secs_f64() / own.as_secs_f64()));
        }
    }
    assert!(started.elapsed() < Duration::from_secs(600));
}
