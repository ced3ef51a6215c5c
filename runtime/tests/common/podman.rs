//! Debian's podman with this runtime instead of crun, on a storage of its own with the image `busybox:1`.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use super::{Bundle, RUNTIME, groups, possible, text, unified};

/// Id and name of the ordinary user that exists in a mount namespace of the test only.
pub(crate) const ID: u32 = 54_321;
const NAME: &str = "isopod-test";
/// Binds the files of users over the machine's in a mount namespace of its own and becomes the user.
const AS_USER: &str = "for file in passwd group subuid subgid; do mount --bind \"$0/etc/$file\" \"/etc/$file\"; done; \
     exec setpriv --reuid=54321 --regid=54321 --clear-groups \"$@\"";

/// Who calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Caller {
    Root,
    /// An ordinary user made for the test, to whom no cgroup is delegated.
    Made,
    /// One who exists and has a service manager.
    Session {
        name: String,
        uid: u32,
    },
}

pub(crate) struct Podman {
    pub(crate) dir: tempfile::TempDir,
    /// Groups are made below this one; empty for podman's own choice.
    pub(crate) parent: String,
    manager: &'static str,
    caller: Caller,
}

impl Podman {
    /// For root, with the runtime making the groups.
    pub(crate) fn new() -> Option<Self> {
        Self::made(Caller::Root, "cgroupfs")
    }

    /// For root, with systemd making them; `None` where systemd does not run or has no cgroup v2.
    pub(crate) fn with_systemd() -> Option<Self> {
        (Path::new("/run/systemd/system").exists() && unified()).then(|| Self::made(Caller::Root, "systemd"))?
    }

    /// For an ordinary user.
    pub(crate) fn rootless() -> Option<Self> {
        Command::new("newuidmap").output().ok()?;
        Self::made(Caller::Made, "cgroupfs")
    }

    /// For an ordinary user with a systemd of his own, whose name is in `ISOPOD_TEST_USER`.
    pub(crate) fn session() -> Option<Self> {
        let name = std::env::var("ISOPOD_TEST_USER").ok()?;
        let uid = Command::new("id").args(["-u", &name]).output().ok()?;
        let uid = text(&uid.stdout).trim().parse().unwrap();
        Self::made(Caller::Session { name, uid }, "systemd")
    }

    fn made(caller: Caller, manager: &'static str) -> Option<Self> {
        if !possible() || Command::new("podman").arg("--version").output().is_err() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let parent = match (&caller, manager) {
            (Caller::Root, "cgroupfs") => format!("/isopod-test-podman{}", std::process::id()),
            (Caller::Root, _) => format!("isopodtest{}.slice", std::process::id()),
            _ => String::new(),
        };
        let podman = Self { dir, parent, manager, caller };
        podman.prepare_user();
        let bundle = Bundle::new(&["true"]);
        for name in ["tmp", "mnt"] {
            fs::create_dir(bundle.rootfs().join(name)).unwrap();
        }
        let archive = podman.dir.path().join("busybox.tar");
        let packed = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(bundle.rootfs()).arg(".").status();
        assert!(packed.unwrap().success());
        // Two podmans that are the first ever of a machine stumble over each other's locks.
        let turn = fs::File::create(std::env::temp_dir().join("isopod-test-podman.lock")).unwrap();
        turn.lock().unwrap();
        podman.ok(&["import", "--change", "ENV PATH=/bin", &archive.to_string_lossy(), "busybox:1"]);
        Some(podman)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Directories the user may use, and a runtime he may execute.
    fn prepare_user(&self) {
        let uid = match self.caller {
            Caller::Root => return,
            Caller::Made => ID,
            Caller::Session { uid, .. } => uid,
        };
        fs::set_permissions(self.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(RUNTIME, self.at("isopod-runtime")).unwrap();
        for name in ["home", "xdg", "volume"] {
            fs::create_dir(self.at(name)).unwrap();
            chown(self.at(name), Some(uid), Some(uid)).unwrap();
        }
        fs::set_permissions(self.at("xdg"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::create_dir(self.at("etc")).unwrap();
        for (file, line) in [
            ("passwd", format!("{NAME}:x:{ID}:{ID}::{}:/bin/sh\n", self.at("home").display())),
            ("group", format!("{NAME}:x:{ID}:\n")),
            ("subuid", format!("{NAME}:3000000:65536\n")),
            ("subgid", format!("{NAME}:3000000:65536\n")),
        ] {
            let there = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
            fs::write(self.at("etc").join(file), there + &line).unwrap();
        }
    }

    /// podman itself, for the caller.
    fn program(&self) -> Command {
        let home = format!("HOME={}", self.at("home").display());
        let mut command;
        match &self.caller {
            Caller::Root => command = Command::new("podman"),
            Caller::Made => {
                command = Command::new("unshare");
                command.args(["--mount", "--propagation=private", "sh", "-c", AS_USER]).arg(self.dir.path());
                let xdg = format!("XDG_RUNTIME_DIR={}", self.at("xdg").display());
                command.args(["env", "-u", "DBUS_SESSION_BUS_ADDRESS", &home, &xdg, "podman"]);
            }
            Caller::Session { name, uid } => {
                command = Command::new("setpriv");
                let ids = [format!("--reuid={name}"), format!("--regid={name}")];
                let environment = format!("XDG_RUNTIME_DIR=/run/user/{uid}");
                command.args(ids).args(["--init-groups", "env", &environment, "systemd-run", "--user"]);
                command.args(["--quiet", "--pipe", "--wait", "--collect", &format!("--setenv={home}")]);
                // What it starts in the background lives on, as after a login shell's command.
                command.args(["--property=Delegate=yes", "--property=KillMode=process", "podman"]);
            }
        }
        command.current_dir("/").stdin(Stdio::null());
        command
    }

    fn command(&self) -> Command {
        let mut command = self.program();
        let (root, run) = match self.caller {
            Caller::Root => ("root", "run"),
            _ => ("home/root", "xdg/run"),
        };
        command.arg("--root").arg(self.at(root)).arg("--runroot").arg(self.at(run));
        if self.caller == Caller::Root {
            command.arg("--tmpdir").arg(self.at("tmp"));
        }
        command.args([&format!("--cgroup-manager={}", self.manager), "--events-backend=file", "--storage-driver=vfs"]);
        let runtime = if self.caller == Caller::Root { RUNTIME.into() } else { self.at("isopod-runtime") };
        command.arg("--runtime").arg(runtime);
        command
    }

    pub(crate) fn call(&self, args: &[&str]) -> Output {
        self.command().args(args).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// `podman COMMAND OPTIONS ...` of a new container or pod, in the right group.
    pub(crate) fn new_one<'a>(&self, first: &[&'a str], rest: &[&'a str]) -> Output {
        let parent = format!("--cgroup-parent={}", self.parent);
        let mut args = first.to_vec();
        if !self.parent.is_empty() {
            args.push(&parent);
        }
        args.extend(rest);
        self.call(&args)
    }

    /// `podman run --rm OPTIONS busybox:1 COMMAND`, without a network.
    pub(crate) fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.new_one(&["run", "--rm", "--network=none"], &[options, &["busybox:1"], command].concat())
    }

    #[track_caller]
    pub(crate) fn says(&self, options: &[&str], command: &[&str]) -> String {
        let output = self.run(options, command);
        assert!(output.status.success(), "{options:?} {command:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Starts the container `c` in the background.
    #[track_caller]
    pub(crate) fn background(&self, options: &[&str], command: &[&str]) {
        let first = ["run", "--detach", "--name=c", "--network=none"];
        let output = self.new_one(&first, &[options, &["busybox:1"], command].concat());
        assert!(output.status.success(), "{options:?} {command:?}: {}", text(&output.stderr));
    }

    /// A control file of the container `c`, as it sees it.
    #[track_caller]
    pub(crate) fn control(&self, controller: &str, file: &str) -> String {
        let file =
            if unified() { format!("/sys/fs/cgroup/{file}") } else { format!("/sys/fs/cgroup/{controller}/{file}") };
        self.ok(&["exec", "c", "cat", &file]).trim().to_owned()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        for what in ["pod", "container"] {
            let _ = self.call(&[what, "rm", "--force", "--all", "--time", "0"]);
        }
        if self.caller != Caller::Root {
            // Ends the process that keeps the user's namespaces, and removes files of ids that are not his.
            let _ = self.call(&["system", "reset", "--force"]);
            let _ = self.program().args(["unshare", "rm", "-rf"]).arg(self.at("home")).output();
            // Which has started that process once more.
            if let Ok(pid) = fs::read_to_string(self.at("xdg/libpod/tmp/pause.pid")) {
                let _ = Command::new("kill").args(["-9", pid.trim()]).status();
            }
        } else if self.manager == "systemd" {
            let _ = Command::new("systemctl").args(["stop", &self.parent]).output();
        } else {
            // Its monitor has a group beside the containers'.
            for group in ["/conmon", ""].iter().flat_map(|name| groups(&format!("{}{name}", &self.parent[1..]))) {
                let _ = fs::remove_dir(group);
            }
        }
        // What its graph driver keeps mounted for later calls.
        for name in ["root/vfs", "run"] {
            let _ = Command::new("umount").arg(self.at(name)).stderr(Stdio::null()).status();
        }
    }
}
