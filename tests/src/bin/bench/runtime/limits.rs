//! The smallest memory limit a container starts under.

use super::{
    peers::{Bundle, Peer},
    row,
};

/// Limits are counted in pages.
const STEP: u64 = 4 << 10;
const TRIES: usize = 5;

/// The smallest `linux.resources.memory.limit` with which /bin/true runs, every time.
pub(super) fn smallest(peers: &[Peer], bundle: &Bundle) {
    let found: Vec<f64> = peers.iter().map(|peer| (bisect(peer, bundle) * STEP) as f64 / 1024.0).collect();
    row("smallest memory limit for /bin/true", peers, &found, "KiB");
}

fn bisect(peer: &Peer, bundle: &Bundle) -> u64 {
    let (mut fails, mut runs) = (0, (64 << 20) / STEP);
    while runs - fails > 1 {
        let middle = fails.midpoint(runs);
        bundle.write(&["/bin/true"], None, Some(middle * STEP));
        if (0..TRIES).all(|n| runs_once(peer, bundle, &format!("limit-{middle}-{n}"))) {
            runs = middle;
        } else {
            fails = middle;
        }
    }
    runs
}

fn runs_once(peer: &Peer, bundle: &Bundle, id: &str) -> bool {
    let ran = peer.command(&["run", "--bundle", bundle.path(), id]).status().unwrap().success();
    if !ran {
        // What a failed run may leave; most often nothing.
        drop(peer.command(&["delete", "--force", id]).status());
    }
    ran
}
