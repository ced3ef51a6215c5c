//! How long a call takes.

use std::{
    process::{Child, Command},
    time::{Duration, Instant},
};

use super::{
    median,
    peers::{Bundle, Peer, last_words},
    row,
};

const RUNS: usize = 40;
/// Containers created at once, and how often.
pub(super) const MANY: usize = 500;
const ROUNDS: usize = 3;

/// `peers` beginning with another one each time.
pub(super) fn in_turn(peers: &[Peer], round: usize) -> impl Iterator<Item = (usize, &Peer)> {
    (0..peers.len()).map(move |n| (n + round) % peers.len()).map(move |n| (n, &peers[n]))
}

/// One row of milliseconds.
fn milliseconds(what: &str, peers: &[Peer], times: Vec<Vec<Duration>>) {
    let medians: Vec<f64> =
        times.into_iter().map(|all| median(all.iter().map(|time| time.as_secs_f64() * 1000.0).collect())).collect();
    row(what, peers, &medians, "ms");
}

/// A container's whole life in one call.
pub(super) fn run_true(peers: &[Peer], bundle: &Bundle) {
    bundle.write(&["/bin/true"], None, None);
    let mut times = vec![vec![]; peers.len()];
    for round in 0..RUNS {
        for (n, peer) in in_turn(peers, round) {
            times[n].push(peer.timed(&["run", "--bundle", bundle.path(), &format!("run-{round}")]));
        }
    }
    milliseconds(&format!("run of /bin/true (median of {RUNS})"), peers, times);
}

/// A container's life call by call.
pub(super) fn one_by_one(peers: &[Peer], bundle: &Bundle) {
    const STEPS: [&str; 5] = ["create", "start", "exec of /bin/true", "delete", "delete --force"];
    bundle.write(&["/bin/sleep", "1000"], None, None);
    let mut times = vec![vec![vec![]; peers.len()]; STEPS.len()];
    for round in 0..RUNS {
        for (n, peer) in in_turn(peers, round) {
            let (id, running) = (format!("step-{round}"), format!("running-{round}"));
            let mut took = |step: usize, args: &[&str]| times[step][n].push(peer.timed(args));
            took(0, &["create", "--bundle", bundle.path(), &id]);
            took(1, &["start", &id]);
            took(2, &["exec", &id, "/bin/true"]);
            peer.end(&id);
            took(3, &["delete", &id]);
            peer.must(&["run", "--detach", "--bundle", bundle.path(), &running]);
            took(4, &["delete", "--force", &running]);
        }
    }
    for (step, times) in STEPS.iter().zip(times) {
        milliseconds(&format!("{step} (median of {RUNS})"), peers, times);
    }
}

/// Makes `MANY` calls at once, each with an id of its own at the end, and returns when all have ended.
pub(super) fn at_once(mut command: impl FnMut(&str) -> Command) {
    let children: Vec<Child> = (0..MANY).map(|n| command(&format!("many-{n}")).spawn().unwrap()).collect();
    for mut child in children {
        let status = child.wait().unwrap();
        assert!(status.success(), "one of {MANY} at once: {status}: {}", last_words());
    }
}

pub(super) fn in_parallel(peers: &[Peer], bundle: &Bundle) {
    bundle.write(&["/bin/sleep", "1000"], None, None);
    let (mut made, mut gone) = (vec![vec![]; peers.len()], vec![vec![]; peers.len()]);
    for round in 0..ROUNDS {
        for (n, peer) in in_turn(peers, round) {
            let started = Instant::now();
            at_once(|id| peer.command(&["create", "--bundle", bundle.path(), id]));
            made[n].push(started.elapsed());
            let started = Instant::now();
            at_once(|id| peer.command(&["delete", "--force", id]));
            gone[n].push(started.elapsed());
        }
    }
    milliseconds(&format!("{MANY} created at once (median of {ROUNDS})"), peers, made);
    milliseconds(&format!("{MANY} deleted at once, by force (median of {ROUNDS})"), peers, gone);
}
