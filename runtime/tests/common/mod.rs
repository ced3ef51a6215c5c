//! Bundles, containers and pods for the kernel tests. They need root; as another user they do nothing.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a fixture fails its test by panicking")]

pub(crate) mod pod;
pub(crate) mod podman;
pub(crate) mod trace;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// The binary under test.
pub(crate) const RUNTIME: &str = env!("CARGO_BIN_EXE_isopod-runtime");
const APPLETS: &[&str] = &[
    "sh", "true", "false", "cat", "ls", "id", "sleep", "mount", "echo", "head", "ps", "stat", "tty", "kill", "env",
    "hostname", "dd", "yes", "grep", "readlink", "touch", "wc", "mkdir", "seq", "chmod", "mknod", "tr", "tail", "ln",
];

/// Whether this machine lets us test.
pub(crate) fn possible() -> bool {
    rustix::process::geteuid().is_root() && Path::new("/bin/busybox").exists()
}

/// A bundle in a temporary directory, and the state directory of its containers.
pub(crate) struct Bundle {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: Value,
    pub(crate) id: String,
    /// Use the systemd driver.
    pub(crate) systemd: bool,
}

impl Bundle {
    /// With busybox as the root file system.
    pub(crate) fn new(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(dir.path().join("rootfs/etc")).unwrap();
        // By another process: a file that this one writes may be open in a child that a thread beside forks, and then be busy.
        assert!(Command::new("cp").arg("/bin/busybox").arg(bin.join("busybox")).status().unwrap().success());
        for applet in APPLETS {
            symlink("busybox", bin.join(applet)).unwrap();
        }
        fs::write(dir.path().join("rootfs/etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:44::/www:/bin/sh\n")
            .unwrap();
        fs::write(dir.path().join("rootfs/etc/group"), "root:x:0:\nwww:x:44:\naudio:x:63:web\n").unwrap();
        let mut config = serde_json::to_value(isopod_runtime::spec::template()).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(args);
        let id =
            format!("t{}-{}", std::process::id(), dir.path().file_name().unwrap().to_string_lossy().replace('.', ""));
        config["linux"]["cgroupsPath"] = format!("/isopod-test-{id}").into();
        Self { dir, config, id, systemd: false }
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    pub(crate) fn write(&self) {
        fs::write(self.dir.path().join("config.json"), self.config.to_string()).unwrap();
    }

    /// A command of the runtime on this bundle's state directory.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(RUNTIME);
        command.arg("--root").arg(self.dir.path().join("state"));
        if self.systemd {
            command.arg("--systemd-cgroup");
        }
        command.args(args).stdin(Stdio::null());
        command
    }

    /// Runs such a command to its end.
    pub(crate) fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Writes the configuration and runs the container in the foreground.
    pub(crate) fn run(&self) -> Output {
        self.write();
        self.call(&["run", "--bundle", &self.dir.path().to_string_lossy(), &self.id])
    }

    /// Writes the configuration, creates and starts the container.
    pub(crate) fn start(&self) {
        self.write();
        let bundle = self.dir.path().to_string_lossy().into_owned();
        // A created container keeps its creator's streams: they must not be our pipes.
        let created = self
            .command(&["create", "--bundle", &bundle, &self.id])
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.dir.path().join("err")).unwrap())
            .status()
            .unwrap();
        assert!(created.success(), "{}", fs::read_to_string(self.dir.path().join("err")).unwrap());
        let started = self.call(&["start", &self.id]);
        assert!(started.status.success(), "{}", text(&started.stderr));
    }

    /// Runs a script in namespaces of its own, with the runtime's commands for the container as variables.
    pub(crate) fn apart(&self, unshare: &[&str], script: &str) -> Output {
        self.write();
        let dir = self.dir.path().display();
        let runtime = format!("{RUNTIME} --root {dir}/state");
        let made = |verb: &str| format!("{runtime} {verb} --bundle {dir} {}", self.id);
        let mut command = Command::new("unshare");
        command.args(unshare).args(["sh", "-c", script]).env("DIR", self.dir.path()).env("ID", &self.id);
        command.env("RUNTIME", &runtime).env("RUN", made("run")).env("CREATE", made("create"));
        command.env("DELETE", format!("{runtime} delete --force {}", self.id)).output().unwrap()
    }

    /// Where a controller has the container's group.
    pub(crate) fn cgroup(&self, controller: &str) -> PathBuf {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchy = if unified() { root.to_path_buf() } else { root.join(controller) };
        hierarchy.join(format!("isopod-test-{}", self.id))
    }

    /// Directories of the container's group that exist.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        groups(&format!("isopod-test-{}", self.id))
    }
}

/// Whether cgroup v2 is all there is.
pub(crate) fn unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Where a group exists, in all hierarchies.
pub(crate) fn groups(path: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = match unified() {
        true => vec![root.to_path_buf()],
        false => fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect(),
    };
    hierarchies.into_iter().map(|h| h.join(path)).filter(|p| p.exists()).collect()
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.call(&["delete", "--force", &self.id]);
    }
}

/// Lossy text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits until `condition` holds; shows `state` when it never does.
pub(crate) fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>, state: impl Fn() -> String) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: {}", state());
        std::thread::sleep(Duration::from_millis(5));
    }
}
