//! The supervisor killed at every step of what it does: its successor tells the truth and a shutdown leaves nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use common::{
    Bundle, RUNTIME, eventually,
    pod::{PATIENCE, Pod},
    text,
    trace::{self, Point, Traced},
};
use isopod_runtime::supervisor::{
    client::{Connection, Error},
    protocol::{Answer, ContainerState, Op, PidMode, Rootfs},
};
use serde_json::json;

/// A pod and the container in question.
struct Case {
    pod: Pod,
    bundle: Bundle,
}

impl Case {
    fn new() -> Self {
        let pod = Pod::new(PidMode::Pod);
        let mut bundle = pod.bundle(&[]);
        bundle.config["process"]["args"] = json!(["sh", "-c", "while :; do sleep 1000; done", bundle.id]);
        bundle.write();
        Self { pod, bundle }
    }

    fn create(&self) -> Op {
        Op::Create {
            container: self.bundle.id.clone(),
            bundle: self.bundle.dir.path().to_owned(),
            rootfs: Rootfs::Directory,
            log_path: Some(self.pod.log(&self.bundle)),
            stdin: true,
            stdin_once: false,
            pid_of: None,
        }
    }

    fn start(&self) -> Op {
        Op::Start { container: self.bundle.id.clone() }
    }

    fn kill(&self) -> Op {
        Op::Kill { container: self.bundle.id.clone(), signal: libc::SIGKILL, all: true }
    }

    fn exec(&self) -> Op {
        let mut process = self.bundle.config["process"].clone();
        process["args"] = json!(["sh", "-c", "while :; do sleep 1000; done", self.bundle.id]);
        let container = self.bundle.id.clone();
        Op::Exec { container, exec: "e".into(), process, stdin: false, stdout: false, stderr: false }
    }

    fn delete(&self) -> Op {
        Op::Delete { container: self.bundle.id.clone() }
    }

    fn supervisor(&self) -> i32 {
        fs::read_to_string(self.pod.dir.path().join("supervisor.pid")).unwrap().trim().parse().unwrap()
    }

    /// Whether the container's end, when it was killed, is on disk, or the supervisor is gone.
    fn settled(&self, op: &Op) -> bool {
        let status = self.pod.dir.path().join("containers").join(&self.bundle.id).join("status.json");
        !matches!(op, Op::Kill { .. })
            || fs::read_to_string(status).unwrap_or_default().contains("exited")
            || self.is_dead()
    }

    fn is_dead(&self) -> bool {
        fs::read(format!("/proc/{}/cmdline", self.supervisor())).unwrap_or_default().is_empty()
    }

    fn trace(&self) -> std::path::PathBuf {
        self.pod.dir.path().join("trace")
    }

    /// What the agent does when a supervisor is gone, and what must be true then. Tells what was listed.
    fn clean_up(&mut self, at: &str) -> Vec<ContainerState> {
        let id = self.bundle.id.clone();
        self.pod.connection = Pod::supervise(&self.pod.dir);
        let listed = self.pod.list();
        for status in &listed {
            assert_eq!((status.state, status.pid), (ContainerState::Exited, None), "{at}");
            // Its real end where that was recorded, nothing invented where not.
            assert!(matches!(status.exit.as_ref().map(|e| e.code), Some(255 | 137)), "{at}: {status:?}");
        }
        let alive = || trace::alive(&id);
        eventually("all are gone", || alive().is_empty().then_some(()), || format!("{at}: {:?}", alive()));
        let delete = self.delete();
        self.pod.call(delete).unwrap_or_else(|e| panic!("{at}: {e}"));
        self.pod.call(Op::Shutdown).unwrap_or_else(|e| panic!("{at}: {e}"));
        for group in self.pod.cgroups() {
            let below = fs::read_dir(&group).unwrap().flatten().filter(|e| e.file_type().unwrap().is_dir());
            assert_eq!(below.map(|e| e.path()).collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new(), "{at}");
        }
        let containers = fs::read_dir(self.pod.dir.path().join("containers"));
        assert_eq!(containers.map_or(0, Iterator::count), 0, "{at}");
        for file in ["supervisor.sock", "supervisor.pid"] {
            assert!(!self.pod.dir.path().join(file).exists(), "{at}: {file}");
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(&*self.bundle.dir.path().to_string_lossy()), "{at} leaves mounts");
        listed.into_iter().map(|s| s.state).collect()
    }
}

/// Kills the supervisor at every `step`th system call (every one with `ISOPOD_EVERY_STEP=1`) of what `op` makes it do, after
/// `prepare`.
fn kill_at_every_step(step: usize, prepare: impl Fn(&mut Case) + Sync, op: impl Fn(&Case) -> Op + Sync) {
    let step = if std::env::var_os("ISOPOD_EVERY_STEP").is_some() { 1 } else { step };
    let prepared = || {
        let mut case = Case::new();
        prepare(&mut case);
        case
    };
    let mut case = prepared();
    let traced = Traced::attach(case.supervisor(), None, case.trace());
    let wanted = op(&case);
    case.pod.call(wanted.clone()).unwrap();
    eventually("it is settled", || case.settled(&wanted).then_some(()), String::new);
    let points = traced.detach();
    let (tried, killed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    trace::at_each(&points, step, |point| {
        let mut case = prepared();
        let known = case.pod.list().len();
        let traced = Traced::attach(case.supervisor(), Some(point), case.trace());
        let wanted = op(&case);
        let told = case.pod.call(wanted.clone());
        let mut died = told.is_err();
        if told.is_ok() {
            // It died after its answer, or the point was never reached: now it does.
            eventually("it is settled", || case.settled(&wanted).then_some(()), || format!("{point:?}"));
            died = case.is_dead();
            let pid = rustix::process::Pid::from_raw(case.supervisor()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        assert!(matches!(told, Ok(_) | Err(Error::Closed | Error::Io(_))), "{point:?}: {told:?}");
        assert!(matches!(case.pod.connection.next(PATIENCE), Err(Error::Closed | Error::Io(_))), "{point:?}");
        traced.detach();
        tried.fetch_add(1, Ordering::Relaxed);
        killed.fetch_add(usize::from(died), Ordering::Relaxed);
        let listed = case.clean_up(&format!("{wanted:?} at {point:?}"));
        // Who was told of a container finds it again, unless it was to be deleted.
        let acknowledged = known + usize::from(matches!(told, Ok(Answer::Created { .. })));
        assert!(matches!(wanted, Op::Delete { .. }) || listed.len() >= acknowledged, "{point:?}: {listed:?}");
    });
    let (tried, killed) = (tried.into_inner(), killed.into_inner());
    eprintln!("killed at {killed} of {tried} points");
    assert!(tried > 4 && killed * 2 > tried, "killed at {killed} of {tried} points");
}

fn created(case: &mut Case) {
    let op = case.create();
    case.pod.call(op).unwrap();
}

fn started(case: &mut Case) {
    created(case);
    let op = case.start();
    case.pod.call(op).unwrap();
}

#[test]
fn create_survives_the_supervisor() {
    if trace::ready() {
        kill_at_every_step(3, |_| (), Case::create);
    }
}

#[test]
fn start_survives_the_supervisor() {
    if trace::ready() {
        kill_at_every_step(1, created, Case::start);
    }
}

#[test]
fn exec_survives_the_supervisor() {
    if trace::ready() {
        kill_at_every_step(2, started, Case::exec);
    }
}

#[test]
fn an_end_survives_the_supervisor() {
    if trace::ready() {
        kill_at_every_step(1, started, Case::kill);
    }
}

#[test]
fn delete_survives_the_supervisor() {
    if trace::ready() {
        kill_at_every_step(1, created, Case::delete);
    }
}

#[test]
fn becoming_a_supervisor_killed_anywhere_is_begun_again() {
    if !trace::ready() {
        return;
    }
    // The executing process and the supervisor it clones count their calls apart: each point kills one of them.
    let attempt = |dir: &std::path::Path, at: Option<&Point>, trace: &std::path::Path| {
        let mut command = Command::new("strace");
        command.args(["-f", "-qqq", "-o"]).arg(trace);
        if let Some((name, nth)) = at {
            command.arg("-e").arg(format!("inject={name}:signal=KILL:when={nth}"));
        }
        command.arg(RUNTIME).arg("supervise").arg(dir);
        command.spawn().unwrap()
    };
    let stop = |case: &Case, mut strace: std::process::Child| {
        if let Ok(mut connection) = Connection::connect(case.pod.dir.path()) {
            let _ = connection.call(Op::Shutdown, &[], PATIENCE);
        }
        eventually("strace ends", || strace.try_wait().unwrap(), String::new);
    };
    let fresh = || {
        let mut case = Case::new();
        case.pod.call(Op::Shutdown).unwrap();
        case
    };
    let case = fresh();
    let strace = attempt(case.pod.dir.path(), None, &case.trace());
    let listens = || Connection::connect(case.pod.dir.path()).is_ok().then_some(());
    eventually("it listens", listens, String::new);
    stop(&case, strace);
    // Lines begin with a pid; calls of one name are numbered in each process.
    let text = text(&fs::read(case.trace()).unwrap());
    let mut counts = std::collections::HashMap::new();
    let mut points: Vec<Point> = vec![];
    for line in text.lines() {
        let Some((pid, (name, _))) = line.split_once(' ').and_then(|(p, c)| Some((p, c.trim().split_once('(')?)))
        else {
            continue;
        };
        let count = counts.entry((pid.to_owned(), name.to_owned())).or_insert(0);
        *count += 1;
        if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !points.contains(&(name.to_owned(), *count)) {
            points.push((name.to_owned(), *count));
        }
    }
    assert!(points.len() > 60, "{points:?}");
    trace::at_each(&points, 2, |point| {
        let mut case = fresh();
        let mut strace = attempt(case.pod.dir.path(), Some(point), "/dev/null".as_ref());
        // strace ends with the last of those it traces.
        let ended = || {
            let ended = strace.try_wait().unwrap().is_some() || Connection::connect(case.pod.dir.path()).is_ok();
            ended.then_some(())
        };
        eventually("it is dead or listens", ended, || format!("{point:?}"));
        stop(&case, strace);
        assert_eq!(case.clean_up(&format!("{point:?}")), []);
    });
}
