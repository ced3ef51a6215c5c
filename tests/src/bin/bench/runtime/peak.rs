//! How much memory a call needs: the most its group was charged, with kernel memory and what it starts, and the
//! resident size of its largest process.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    peers::{Bundle, Peer, last_words},
    row,
    speed::{MANY, at_once, in_turn},
};

const ROUNDS: usize = 40;
/// Where GNU time writes the resident size.
const RESIDENT: &str = "/run/bench-resident";
/// Moves itself into the group `$0` before it is the program it is given, on one processor: the kernel charges ahead, by
/// up to 256 KiB on each.
const ENTER: &str = "echo 0 > \"$0/cgroup.procs\"; exec taskset --cpu-list 0 \"$@\"";

/// A group that remembers the most it was charged, with one group for calls and one for containers below it.
struct Group {
    dir: PathBuf,
    path: String,
    peak: File,
}

impl Group {
    fn new(name: &str) -> Self {
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let root = Path::new(if unified { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/memory" });
        let path = format!("/bench/{name}");
        let dir = root.join(&path[1..]);
        fs::create_dir_all(dir.join("call")).unwrap();
        if unified {
            for level in [root, &root.join("bench"), &dir] {
                fs::write(level.join("cgroup.subtree_control"), "+memory").unwrap();
            }
        }
        let file = dir.join(if unified { "memory.peak" } else { "memory.max_usage_in_bytes" });
        let peak = File::options().read(true).write(true).open(file).unwrap();
        Self { dir, path, peak }
    }

    /// The group of containers.
    fn container(&self, id: &str) -> String {
        format!("{}/{id}", self.path)
    }

    /// Makes the call inside, and returns the most that was charged meanwhile, in KiB.
    fn charged(&mut self, peer: &Peer, args: &[&str]) -> f64 {
        self.reset();
        must(peer, self.command(peer, args));
        self.most()
    }

    fn command(&self, peer: &Peer, args: &[&str]) -> Command {
        peer.wrapped(&["sh", "-c", ENTER, self.dir.join("call").to_str().unwrap()], args)
    }

    fn reset(&mut self) {
        self.peak.write_all(b"0").unwrap();
    }

    fn most(&mut self) -> f64 {
        let mut text = String::new();
        self.peak.rewind().unwrap();
        self.peak.read_to_string(&mut text).unwrap();
        text.trim().parse::<f64>().unwrap() / 1024.0
    }
}

fn must(peer: &Peer, mut command: Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{} {command:?}: {status}: {}", peer.name, last_words());
}

/// Makes the call and returns the resident size of its largest process, in KiB.
fn resident(peer: &Peer, args: &[&str]) -> f64 {
    must(peer, peer.wrapped(&["time", "--format=%M", "--output", RESIDENT], args));
    let kib: f64 = fs::read_to_string(RESIDENT).unwrap().trim().parse().unwrap();
    kib
}

/// What is charged ahead differs from call to call: the mean knows more than the median.
fn mean(values: Vec<f64>) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Both numbers of every call, in a row each.
pub(super) fn steps(peers: &[Peer], bundle: &Bundle) {
    const STEPS: [&str; 5] = ["run of /bin/true", "create", "start", "exec of /bin/true", "delete"];
    let mut all = vec![vec![vec![]; peers.len()]; 2 * STEPS.len()];
    for round in 0..ROUNDS {
        for (n, peer) in in_turn(peers, round) {
            let mut group = Group::new(peer.name);
            let id = format!("memory-{round}");
            let container = group.container(&id);
            let mut call = |step: usize, args: &[&str]| {
                let charged = round % 2 == 0;
                let value = if charged { group.charged(peer, args) } else { resident(peer, args) };
                all[2 * step + usize::from(!charged)][n].push(value);
            };
            bundle.write(&["/bin/true"], Some(&container), None);
            call(0, &["run", "--bundle", bundle.path(), &id]);
            bundle.write(&["/bin/sleep", "1000"], Some(&container), None);
            call(1, &["create", "--bundle", bundle.path(), &id]);
            call(2, &["start", &id]);
            call(3, &["exec", &id, "/bin/true"]);
            peer.end(&id);
            call(4, &["delete", &id]);
        }
    }
    for (n, values) in all.into_iter().enumerate() {
        let kind = if n % 2 == 0 { "most memory charged" } else { "largest process" };
        row(&format!("{}: {kind}", STEPS[n / 2]), peers, &values.into_iter().map(mean).collect::<Vec<_>>(), "KiB");
    }
}

/// The group of all containers and calls while many are created at once, and when all of them wait.
pub(super) fn in_parallel(peers: &[Peer], bundle: &Bundle) {
    let (mut most, mut after) = (vec![], vec![]);
    for peer in peers {
        let mut group = Group::new(&format!("{}-many", peer.name));
        group.reset();
        at_once(|id| {
            let dir = bundle.copy(id, &["/bin/sleep", "1000"], &group.container(id));
            group.command(peer, &["create", "--bundle", &dir, id])
        });
        most.push(group.most());
        group.reset();
        after.push(group.most());
        at_once(|id| peer.command(&["delete", "--force", id]));
    }
    row(&format!("{MANY} created at once: most memory charged"), peers, &most, "KiB");
    row(&format!("{MANY} created containers: memory charged"), peers, &after, "KiB");
}
