//! `isopod-runtime` against crun and runc: the same bundle, the same calls, in turn.
//!
//! Every row shows the three medians and, in parentheses, ours divided by the peer's: below 1 we are faster or smaller.

mod limits;
mod peak;
mod peers;
mod speed;

use isopod_tests::Host;

use self::peers::{Bundle, Peer};

/// Makes a mount namespace on `host` in which all three can work, and measures there.
///
/// crun refuses a v2 hierarchy beside v1 ones, so such a one is unmounted, for all of them.
pub(crate) fn compare(host: &Host) {
    let own = std::env::current_exe().unwrap();
    let runtime =
        std::env::var("RUNTIME").unwrap_or_else(|_| own.with_file_name("isopod-runtime").display().to_string());
    let script = "umount /sys/fs/cgroup/unified 2> /dev/null; exec \"$@\"";
    let own = own.display().to_string();
    let status = host
        .command("unshare")
        .args(["--mount", "sh", "-c", script, "sh", &own, "inside", "runtime", &runtime])
        .status()
        .unwrap();
    assert!(status.success(), "the comparison of runtimes failed");
}

/// The comparison, on the host; `args` is where our runtime is.
pub(crate) fn run(args: &[String]) {
    let bundle = Bundle::new();
    let peers = ["crun", "runc"].iter().filter_map(|name| Peer::installed(name));
    let peers: Vec<Peer> = [Peer::new("isopod-runtime", &args[0])].into_iter().chain(peers).collect();
    speed::run_true(&peers, &bundle);
    speed::one_by_one(&peers, &bundle);
    speed::in_parallel(&peers, &bundle);
    peak::steps(&peers, &bundle);
    peak::in_parallel(&peers, &bundle);
    limits::smallest(&peers, &bundle);
}

/// A line of the result: what each peer, in their order, had as its median.
fn row(what: &str, peers: &[Peer], values: &[f64], unit: &str) {
    let mut line = String::new();
    for (n, (peer, value)) in peers.iter().zip(values).enumerate() {
        let value = if *value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") };
        let ratio = if n == 0 { String::new() } else { format!(" ({:.2})", values[0] / values[n]) };
        line.push_str(&format!("  {} {value} {unit}{ratio}", peer.name));
    }
    crate::row(what, line.trim_start());
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}
