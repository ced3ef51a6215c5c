//! Killing a process at its system calls, by strace.

use std::{
    collections::HashMap,
    fs,
    io::BufRead,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
};

use super::possible;

/// A system call: its name and which of that name it is.
pub(crate) type Point = (String, usize);

/// Whether this machine has what it takes.
pub(crate) fn ready() -> bool {
    possible() && Command::new("strace").arg("-V").output().is_ok()
}

/// The calls in a trace.
fn points(trace: &Path) -> Vec<Point> {
    let mut counts = HashMap::new();
    let trace = fs::read_to_string(trace).unwrap();
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

fn strace(at: Option<&Point>, trace: &Path) -> Command {
    let mut command = Command::new("strace");
    command.arg("-o").arg(trace);
    if let Some((name, nth)) = at {
        command.arg("-e").arg(format!("inject={name}:signal=KILL:when={nth}"));
    }
    command
}

/// Runs a command to its end, killed at a point.
pub(crate) fn run(command: &Command, at: Option<&Point>, trace: &Path) -> ExitStatus {
    let mut traced = strace(at, trace);
    traced.arg("-qqq").arg(command.get_program()).args(command.get_args());
    traced.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

/// Every call a command makes.
pub(crate) fn record(command: &Command, directory: &Path) -> Vec<Point> {
    let trace = directory.join("trace");
    run(command, None, &trace);
    points(&trace)
}

/// A process that is being traced.
pub(crate) struct Traced {
    strace: Child,
    trace: PathBuf,
}

impl Traced {
    /// Attaches to a process, to be killed at a point.
    pub(crate) fn attach(pid: i32, at: Option<&Point>, trace: PathBuf) -> Self {
        let mut command = strace(at, &trace);
        command.args(["-p", &pid.to_string()]).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut strace = command.spawn().unwrap();
        let mut said = String::new();
        std::io::BufReader::new(strace.stderr.take().unwrap()).read_line(&mut said).unwrap();
        assert!(said.contains("attached"), "{said}");
        Self { strace, trace }
    }

    /// Lets go of it; the calls it made.
    pub(crate) fn detach(mut self) -> Vec<Point> {
        let pid = rustix::process::Pid::from_child(&self.strace);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        self.strace.wait().unwrap();
        points(&self.trace)
    }
}

/// Calls `each` for every `step`th point, some at a time: most of it is waiting for the kernel.
pub(crate) fn at_each(points: &[Point], step: usize, each: impl Fn(&Point) + Sync) {
    let left = Mutex::new(points.iter().step_by(step));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(point) = left.lock().unwrap().next() else { return };
                    each(point);
                }
            });
        }
    });
}

/// Processes whose command line names `word`.
pub(crate) fn alive(word: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().into_string().ok());
    all.filter(|name| name.parse::<i32>().is_ok())
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = super::text(&line).replace('\0', " ");
            line.contains(word).then_some(format!("{pid} {line}"))
        })
        .collect()
}
