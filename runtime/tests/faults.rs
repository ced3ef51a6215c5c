//! The runtime killed at every step, and many of it at once: `delete --force` cleans up wholly, and a container is never
//! two things at the same time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
};

use common::{Bundle, eventually, possible, text};

/// Processes whose command line names the container, and those it runs.
fn alive(bundle: &Bundle) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().into_string().ok());
    all.filter(|name| name.parse::<i32>().is_ok())
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = text(&line).replace('\0', " ");
            line.contains(&bundle.id).then_some(format!("{pid} {line}"))
        })
        .collect()
}

/// A container whose every process can be told by its id.
fn bundle() -> Bundle {
    let mut bundle = Bundle::new(&["sh", "-c", "", "x"]);
    bundle.config["process"]["args"] = serde_json::json!(["sh", "-c", "while :; do sleep 1000; done", bundle.id]);
    bundle
}

/// A command of the runtime under strace, with these options.
fn traced(bundle: &Bundle, options: &[&str], args: &[&str]) -> std::process::ExitStatus {
    let mut command = Command::new("strace");
    command.args(options);
    let runtime = bundle.command(args);
    command.arg(runtime.get_program()).args(runtime.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

/// Every system call the command makes, as its name and which of that name it is.
fn calls(bundle: &Bundle, args: &[&str]) -> Vec<(String, usize)> {
    let file = bundle.dir.path().join("trace");
    traced(bundle, &["-qqq", "-o", &file.to_string_lossy()], args);
    let mut counts = std::collections::HashMap::new();
    let trace = fs::read_to_string(file).unwrap();
    let names = trace.lines().filter_map(|line| line.split_once('(').map(|(name, _)| name.to_owned()));
    names
        .filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        .map(|name| {
            let count = counts.entry(name.clone()).or_insert(0);
            *count += 1;
            (name, *count)
        })
        .collect()
}

/// Kills `args` at every `step`th system call, each time on a container that `prepare` made, and has it deleted.
fn kill_at_every_step(step: usize, prepare: impl Fn(&Bundle), args: impl Fn(&Bundle) -> Vec<String>) {
    let on = |with: &dyn Fn(&Bundle, &[&str])| {
        let bundle = bundle();
        bundle.write();
        prepare(&bundle);
        let args = args(&bundle);
        with(&bundle, &args.iter().map(String::as_str).collect::<Vec<_>>());
    };
    let recorded = std::cell::RefCell::new(vec![]);
    on(&|bundle, args| *recorded.borrow_mut() = calls(bundle, args));
    let killed = std::cell::Cell::new(0);
    let points = recorded.into_inner().into_iter().step_by(step);
    for (name, nth) in points.clone() {
        on(&|bundle, args| {
            let inject = format!("inject={name}:signal=KILL:when={nth}");
            let options = ["-qqq", "-o", "/dev/null", "-e", &inject];
            let status = traced(bundle, &options, args);
            killed.set(killed.get() + usize::from(status.signal() == Some(libc::SIGKILL)));
            let at = format!("{} at {name} #{nth}", args[0]);
            let deleted = bundle.call(&["delete", "--force", &bundle.id]);
            assert!(deleted.status.success(), "{at}: {}", text(&deleted.stderr));
            assert!(bundle.cgroups().is_empty(), "{at}: {:?}", bundle.cgroups());
            assert!(!bundle.dir.path().join("state").join(&bundle.id).exists(), "{at}");
            // Its end may still be on the way.
            let gone = || alive(bundle).is_empty().then_some(());
            eventually("all are gone", gone, || format!("{at}: {:?}", alive(bundle)));
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!table.contains(&*bundle.dir.path().to_string_lossy()), "{at} leaves mounts");
        });
    }
    let tried = points.count();
    eprintln!("killed at {} of {tried} points", killed.get());
    assert!(tried > 10 && killed.get() * 3 > tried * 2, "killed at {} of {tried} points", killed.get());
}

fn ready() -> bool {
    possible() && Command::new("strace").arg("-V").output().is_ok()
}

fn create(bundle: &Bundle) -> Vec<String> {
    ["create", "--bundle", &bundle.dir.path().to_string_lossy(), &bundle.id].map(str::to_owned).to_vec()
}

#[test]
fn create_killed_anywhere_is_deleted() {
    if ready() {
        kill_at_every_step(5, |_| (), create);
    }
}

#[test]
fn start_killed_anywhere_is_deleted() {
    if ready() {
        let prepare = |bundle: &Bundle| {
            let args = create(bundle);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            assert!(bundle.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
        };
        kill_at_every_step(3, prepare, |bundle| vec!["start".into(), bundle.id.clone()]);
    }
}

#[test]
fn exec_killed_anywhere_is_deleted() {
    if ready() {
        let exec = |bundle: &Bundle| {
            let mut args = vec!["exec".to_owned(), "--detach".into(), bundle.id.clone()];
            args.extend(["sh", "-c", "while :; do sleep 1000; done", &bundle.id].map(str::to_owned));
            args
        };
        kill_at_every_step(7, Bundle::start, exec);
    }
}

#[test]
fn delete_killed_anywhere_is_deleted() {
    if ready() {
        kill_at_every_step(3, Bundle::start, |bundle| vec!["delete".into(), "--force".into(), bundle.id.clone()]);
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
