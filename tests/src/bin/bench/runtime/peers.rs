//! The runtimes and what they are given.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// A runtime.
pub(super) struct Peer {
    pub(super) name: &'static str,
    program: PathBuf,
    state: PathBuf,
}

impl Peer {
    pub(super) fn new(name: &'static str, program: impl Into<PathBuf>) -> Self {
        Self { name, program: program.into(), state: Path::new("/run/bench").join(name) }
    }

    /// A runtime of Debian's; `None`, with a line that says so, where it is not installed.
    pub(super) fn installed(name: &'static str) -> Option<Self> {
        let there = Command::new(name).arg("--version").stdout(Stdio::null()).status().is_ok();
        if !there {
            crate::row(name, "not installed: make bench-deps");
        }
        there.then(|| Self::new(name, name))
    }

    /// A call of it. Containers keep the standard streams, so they are not ours.
    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.state).args(args);
        quiet(&mut command);
        command
    }

    /// The same through `wrapper`, a program with arguments that executes what follows them.
    pub(super) fn wrapped(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(&self.program).arg("--root").arg(&self.state).args(args);
        quiet(&mut command);
        command
    }

    /// Makes the call and returns how long it took.
    pub(super) fn timed(&self, args: &[&str]) -> Duration {
        let mut command = self.command(args);
        let started = Instant::now();
        let status = command.status().unwrap();
        let took = started.elapsed();
        assert!(status.success(), "{} {args:?}: {status}: {}", self.name, last_words());
        took
    }

    pub(super) fn must(&self, args: &[&str]) {
        self.timed(args);
    }

    /// The pid of a container's init.
    pub(super) fn pid(&self, id: &str) -> i64 {
        let output = Command::new(&self.program).arg("--root").arg(&self.state).args(["state", id]).output().unwrap();
        let state: Value = serde_json::from_slice(&output.stdout).unwrap();
        state["pid"].as_i64().unwrap()
    }

    /// Ends a container's program without removing the container.
    pub(super) fn end(&self, id: &str) {
        let pid = self.pid(id);
        self.must(&["kill", id, "KILL"]);
        // The host's init, its parent, reaps it.
        isopod_tests::eventually("the container's init is gone", || {
            if Path::new("/proc").join(pid.to_string()).exists() { Err("still there") } else { Ok(()) }
        });
    }
}

/// What the runtimes said of themselves, on the host.
const ERRORS: &str = "/var/log/bench-errors";

/// The last line of it.
pub(super) fn last_words() -> String {
    fs::read_to_string(ERRORS).unwrap_or_default().lines().last().unwrap_or_default().to_owned()
}

fn quiet(command: &mut Command) {
    let errors = fs::File::options().create(true).append(true).open(ERRORS).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
}

/// Busybox under the configuration `crun spec` writes, whose limits and groups the benchmarks set.
pub(super) struct Bundle {
    dir: PathBuf,
    config: Value,
}

impl Bundle {
    pub(super) fn new() -> Self {
        let dir = PathBuf::from("/var/lib/bench");
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for name in ["true", "sleep"] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        let written = Command::new("crun").arg("spec").current_dir(&dir).status().unwrap();
        assert!(written.success());
        let mut config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        config["process"]["terminal"] = false.into();
        config["root"]["path"] = dir.join("rootfs").to_str().unwrap().into();
        config["root"]["readonly"] = false.into();
        Self { dir, config }
    }

    /// Writes the configuration for a container that runs `args`, in the group `cgroup`, with a memory limit.
    pub(super) fn write(&self, args: &[&str], cgroup: Option<&str>, memory: Option<u64>) {
        self.write_into(&self.dir, args, cgroup, memory);
    }

    /// Another bundle with the same root; its directory.
    pub(super) fn copy(&self, name: &str, args: &[&str], cgroup: &str) -> String {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        self.write_into(&dir, args, Some(cgroup), None);
        dir.to_str().unwrap().to_owned()
    }

    fn write_into(&self, dir: &Path, args: &[&str], cgroup: Option<&str>, memory: Option<u64>) {
        let mut config = self.config.clone();
        config["process"]["args"] = json!(args);
        if let Some(cgroup) = cgroup {
            config["linux"]["cgroupsPath"] = cgroup.into();
        }
        if let Some(memory) = memory {
            config["linux"]["resources"]["memory"] = json!({"limit": memory});
        }
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
    }

    /// The directory, for `--bundle`.
    pub(super) fn path(&self) -> &str {
        self.dir.to_str().unwrap()
    }
}
