//! The runtime killed at every step, and many of it at once: `delete --force` cleans up wholly, and a container is never
//! two things at the same time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::Stdio,
    sync::atomic::{AtomicUsize, Ordering},
};

use common::{Bundle, eventually, possible, text, trace};
use serde_json::json;

/// A container whose every process can be told by its id; with what takes further processes to make.
fn bundle() -> Bundle {
    let mut bundle = Bundle::new(&["sh", "-c", "", "x"]);
    bundle.config["process"]["args"] = json!(["sh", "-c", "while :; do sleep 1000; done", bundle.id]);
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    let volume = json!({"destination": "/volume", "type": "bind", "source": bundle.rootfs(), "options": ["bind"],
        "uidMappings": map, "gidMappings": map});
    bundle.config["mounts"].as_array_mut().unwrap().push(volume);
    bundle
}

/// Kills `args` at every `step`th system call (every one with `ISOPOD_EVERY_STEP=1`), each time on a container that `prepare`
/// made, and has it deleted.
fn kill_at_every_step(step: usize, prepare: impl Fn(&Bundle) + Sync, args: impl Fn(&Bundle) -> Vec<String> + Sync) {
    let step = if std::env::var_os("ISOPOD_EVERY_STEP").is_some() { 1 } else { step };
    let on = |with: &dyn Fn(&Bundle, &[&str])| {
        let bundle = bundle();
        bundle.write();
        prepare(&bundle);
        let args = args(&bundle);
        with(&bundle, &args.iter().map(String::as_str).collect::<Vec<_>>());
    };
    let recorded = std::cell::RefCell::new(vec![]);
    on(&|bundle, args| *recorded.borrow_mut() = trace::record(&bundle.command(args), bundle.dir.path()));
    let (tried, killed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    trace::at_each(&recorded.into_inner(), step, |point| {
        on(&|bundle, args| {
            let status = trace::run(&bundle.command(args), Some(point), "/dev/null".as_ref());
            tried.fetch_add(1, Ordering::Relaxed);
            killed.fetch_add(usize::from(status.signal() == Some(libc::SIGKILL)), Ordering::Relaxed);
            let at = format!("{} at {point:?}", args[0]);
            let deleted = bundle.call(&["delete", "--force", &bundle.id]);
            assert!(deleted.status.success(), "{at}: {}", text(&deleted.stderr));
            assert!(bundle.cgroups().is_empty(), "{at}: {:?}", bundle.cgroups());
            assert!(!bundle.dir.path().join("state").join(&bundle.id).exists(), "{at}");
            // Its end may still be on the way.
            let alive = || trace::alive(&bundle.id);
            eventually("all are gone", || alive().is_empty().then_some(()), || format!("{at}: {:?}", alive()));
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!table.contains(&*bundle.dir.path().to_string_lossy()), "{at} leaves mounts");
        });
    });
    let (tried, killed) = (tried.into_inner(), killed.into_inner());
    eprintln!("killed at {killed} of {tried} points");
    assert!(tried > 20 && killed * 4 > tried * 3, "killed at {killed} of {tried} points");
}

fn create(bundle: &Bundle) -> Vec<String> {
    ["create", "--bundle", &bundle.dir.path().to_string_lossy(), &bundle.id].map(str::to_owned).to_vec()
}

#[test]
fn create_killed_anywhere_is_deleted() {
    if trace::ready() {
        kill_at_every_step(2, |_| (), create);
    }
}

#[test]
fn start_killed_anywhere_is_deleted() {
    if trace::ready() {
        let prepare = |bundle: &Bundle| {
            let args = create(bundle);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            assert!(bundle.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
        };
        kill_at_every_step(1, prepare, |bundle| vec!["start".into(), bundle.id.clone()]);
    }
}

#[test]
fn exec_killed_anywhere_is_deleted() {
    if trace::ready() {
        let exec = |bundle: &Bundle| {
            let mut args = vec!["exec".to_owned(), "--detach".into(), bundle.id.clone()];
            args.extend(["sh", "-c", "while :; do sleep 1000; done", &bundle.id].map(str::to_owned));
            args
        };
        kill_at_every_step(2, Bundle::start, exec);
    }
}

#[test]
fn delete_killed_anywhere_is_deleted() {
    if trace::ready() {
        kill_at_every_step(1, Bundle::start, |bundle| vec!["delete".into(), "--force".into(), bundle.id.clone()]);
    }
}

#[test]
fn many_commands_at_once_leave_one_truth() {
    if !possible() {
        return;
    }
    for round in 0..5 {
        let bundle = bundle();
        bundle.write();
        let directory = bundle.dir.path().to_string_lossy().into_owned();
        let quietly = |args: &[&str]| {
            bundle.command(args).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
        };
        let at_once = |n: usize, args: &[&str]| {
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..n).map(|_| scope.spawn(|| quietly(args))).collect();
                threads.into_iter().map(|t| t.join().unwrap()).filter(|ok| *ok).count()
            })
        };
        assert_eq!(at_once(6, &["create", "--bundle", &directory, &bundle.id]), 1, "round {round}");
        assert_eq!(at_once(6, &["start", &bundle.id]), 1, "round {round}");
        let id = bundle.id.as_str();
        let storm: [&[&str]; 7] = [
            &["kill", id, "0"],
            &["kill", "--all", id, "0"],
            &["update", "--pids-limit", "100", id],
            &["exec", id, "true"],
            &["state", id],
            &["list"],
            &["ps", "--format", "json", id],
        ];
        std::thread::scope(|scope| {
            // What is executed while the container is frozen waits: whoever stops it also continues it.
            scope.spawn(|| (0..8).for_each(|_| _ = (quietly(&["pause", id]), quietly(&["resume", id]))));
            for args in storm {
                scope.spawn(move || (0..8).for_each(|_| _ = quietly(args)));
            }
        });
        let state: serde_json::Value = serde_json::from_slice(&bundle.call(&["state", id]).stdout).unwrap();
        assert_eq!(state["status"], "running", "round {round}");
        assert!(at_once(4, &["delete", "--force", id]) >= 1);
        assert!(bundle.cgroups().is_empty(), "{:?}", bundle.cgroups());
        assert!(!bundle.call(&["state", id]).status.success());
    }
}
