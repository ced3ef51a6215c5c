//! What tests with real packets share: network namespaces of the calling thread's own, with no way out.

use std::process::Command;

use nix::{mount::MsFlags, sched::CloneFlags};

/// Runs a command that must succeed; its output.
pub(crate) fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Moves the calling thread into an empty network namespace, where `ip netns add` makes others that only it sees.
pub(crate) fn leave() {
    nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("tests of the data plane need root");
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

/// Makes addresses of links to come good at once: until a link's own is, a node asks for no neighbour of it.
pub(crate) fn trust_addresses(place: &str) {
    let write = |which: &str| std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/accept_dad"), "0").unwrap();
    at(place, || ["default", "all"].map(write));
}

/// Runs a closure in a namespace, on a thread of its own; `node` is the calling thread's.
pub(crate) fn at<T: Send>(place: &str, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if place != "node" {
                let ns = std::fs::File::open(format!("/run/netns/{place}")).unwrap();
                nix::sched::setns(&ns, CloneFlags::CLONE_NEWNET).unwrap();
            }
            body()
        });
        thread.join().unwrap()
    })
}
