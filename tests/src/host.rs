//! Virtual hosts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// Hosts joined by one bridge; removed with everything on them when dropped.
pub struct Net {
    dir: PathBuf,
    hosts: u32,
}

/// One virtual host.
#[derive(Clone)]
pub struct Host {
    net: PathBuf,
    name: String,
    /// Its address on the bridge.
    pub address: String,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Exit code, -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Standard output, provided that it succeeded.
    pub fn ok(self) -> Result<String, Ran> {
        if self.code == 0 { Ok(self.out) } else { Err(self) }
    }
}

static NETS: AtomicU32 = AtomicU32::new(0);

fn vhost() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vhost")
}

/// The directory of the executables under test: beside the test executables' own.
pub fn binaries() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let dir = own.ancestors().find(|dir| dir.join("isopod").is_file());
    dir.expect("isopod is not built: cargo build --workspace --bins").to_owned()
}

impl Net {
    /// An empty net.
    pub fn new() -> Self {
        let n = NETS.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("isopod-{}-{n}", std::process::id()));
        Self { dir, hosts: 0 }
    }

    /// Adds a host.
    pub fn host(&mut self, name: &str) -> Host {
        self.hosts += 1;
        let address = format!("10.88.0.{}", self.hosts);
        let output =
            Command::new(vhost()).arg("start").arg(&self.dir).args([name, &format!("{address}/24")]).output().unwrap();
        assert!(output.status.success(), "start host {name}: {}", String::from_utf8_lossy(&output.stderr));
        Host { net: self.dir.clone(), name: name.to_owned(), address }
    }
}

impl Default for Net {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
                let log = entry.path().join("disk/var/log/isopod/agent.log");
                if let Ok(text) = fs::read_to_string(&log) {
                    let tail: Vec<_> = text.lines().rev().take(60).collect();
                    eprintln!("--- {} (last lines)", log.display());
                    for line in tail.iter().rev() {
                        eprintln!("{line}");
                    }
                }
            }
        }
        if std::env::var_os("ISOPOD_TEST_KEEP").is_none() {
            let status = Command::new(vhost()).arg("stop").arg(&self.dir).status();
            if !status.is_ok_and(|status| status.success()) && !std::thread::panicking() {
                panic!("hosts in {} were not removed", self.dir.display());
            }
        }
    }
}

impl Host {
    /// A command on the host, not yet run.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(vhost());
        command.arg("exec").arg(&self.net).args([&self.name, program]).stdin(Stdio::null());
        command
    }

    /// Runs a program with arguments.
    pub fn run(&self, program: &str, args: &[&str]) -> Ran {
        Ran::new(self.command(program).args(args).output().unwrap())
    }

    /// Runs a shell script.
    pub fn sh(&self, script: &str) -> Ran {
        self.run("sh", &["-c", script])
    }

    /// Runs a shell script that must succeed; its output.
    #[track_caller]
    pub fn must(&self, script: &str) -> String {
        self.sh(script).ok().unwrap_or_else(|ran| panic!("on {}: {script}: {ran:?}", self.name))
    }

    /// Starts something that goes on in the background, its output in a file of the host's disk.
    pub fn spawn(&self, log: &str, program: &str, args: &[&str]) -> Child {
        let file = fs::File::options().create(true).append(true).open(self.disk().join(log)).unwrap();
        let copy = file.try_clone().unwrap();
        self.command(program).args(args).stdout(file).stderr(copy).spawn().unwrap()
    }

    /// Where the host's files are, seen from outside.
    pub fn disk(&self) -> PathBuf {
        self.net.join(&self.name).join("disk")
    }

    /// The host's `/var/lib`, `/etc/isopod` and so on, seen from outside.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.disk().join(absolute.trim_start_matches('/'))
    }

    /// A file of the host that is on none of its disks, such as a socket in `/run`, seen from outside.
    pub fn inside(&self, absolute: &str) -> PathBuf {
        let pid = fs::read_to_string(self.net.join(&self.name).join("pid")).unwrap();
        PathBuf::from(format!("/proc/{}/root{absolute}", pid.trim()))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}
