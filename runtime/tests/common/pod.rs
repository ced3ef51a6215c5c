//! A pod under its supervisor, and the agent's end of it.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use isopod_runtime::supervisor::{
    client::{Connection, Error},
    protocol::{Answer, ContainerStatus, Event, Op, PidMode, PodConfig, Rootfs, VERSION},
};

use super::{Bundle, RUNTIME, text};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A supervised pod.
pub(crate) struct Pod {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) cgroup: String,
    pub(crate) connection: Connection,
}

impl Pod {
    /// Containers log to files that are never rotated.
    pub(crate) fn new(pid: PidMode) -> Self {
        Self::with_rotation(pid, 0, 2)
    }

    pub(crate) fn with_rotation(pid: PidMode, log_max_size: u64, log_max_files: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().file_name().unwrap().to_string_lossy().replace('.', "");
        let cgroup = format!("isopod-test-pod{name}");
        let mut sysctls = std::collections::BTreeMap::new();
        sysctls.insert("kernel.shmmni".to_owned(), "1234".to_owned());
        let pod = PodConfig {
            version: VERSION,
            uid: name.clone(),
            namespace: "default".into(),
            name,
            netns: None,
            hostname: Some("podhost".into()),
            host_ipc: false,
            pid,
            sysctls,
            cgroup: cgroup.clone(),
            log_max_size,
            log_max_files,
        };
        fs::write(dir.path().join("pod.json"), serde_json::to_vec(&pod).unwrap()).unwrap();
        let connection = Self::supervise(&dir);
        Self { dir, cgroup, connection }
    }

    pub(crate) fn supervise(dir: &tempfile::TempDir) -> Connection {
        let output = Command::new(RUNTIME).arg("supervise").arg(dir.path()).output().unwrap();
        assert_eq!(text(&output.stdout), "ready\n", "{}", text(&output.stderr));
        let mut connection = Connection::connect(dir.path()).unwrap();
        assert_eq!(connection.hello(PATIENCE).unwrap(), VERSION);
        connection
    }

    pub(crate) fn call(&mut self, op: Op) -> Result<Answer, Error> {
        self.connection.call(op, &[], PATIENCE).map(|(answer, _)| answer)
    }

    pub(crate) fn bundle(&self, args: &[&str]) -> Bundle {
        let mut bundle = Bundle::new(args);
        bundle.config["linux"]["cgroupsPath"] = format!("/{}/{}", self.cgroup, bundle.id).into();
        bundle
    }

    pub(crate) fn log(&self, bundle: &Bundle) -> PathBuf {
        self.dir.path().join(format!("{}.log", bundle.id))
    }

    pub(crate) fn create(&mut self, bundle: &Bundle, stdin: bool, stdin_once: bool) -> i32 {
        bundle.write();
        let op = Op::Create {
            container: bundle.id.clone(),
            bundle: bundle.dir.path().to_owned(),
            rootfs: Rootfs::Directory,
            log_path: Some(self.log(bundle)),
            stdin,
            stdin_once,
            pid_of: None,
        };
        match self.call(op).unwrap() {
            Answer::Created { pid } => pid,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn start(&mut self, bundle: &Bundle) -> i32 {
        match self.call(Op::Start { container: bundle.id.clone() }).unwrap() {
            Answer::Started { pid, .. } => pid,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn list(&mut self) -> Vec<ContainerStatus> {
        match self.call(Op::List).unwrap() {
            Answer::List(list) => list,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ended(&mut self) -> ContainerStatus {
        match self.connection.next(PATIENCE).unwrap() {
            Event::Exited { status } => status,
            other @ Event::ExecExited { .. } => panic!("{other:?}"),
        }
    }

    /// Entries of the log as (stream, tag, text).
    pub(crate) fn entries(&self, bundle: &Bundle) -> Vec<(String, String, String)> {
        let log = fs::read_to_string(self.log(bundle)).unwrap();
        log.lines()
            .map(|l| {
                let mut f = l.splitn(4, ' ').skip(1).map(str::to_owned);
                (f.next().unwrap(), f.next().unwrap(), f.next().unwrap_or_default())
            })
            .collect()
    }

    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        super::groups(&self.cgroup)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Ok(mut connection) = Connection::connect(self.dir.path()) {
            let _ = connection.call(Op::Shutdown, &[], PATIENCE);
        }
        for dir in self.cgroups() {
            let _ = fs::remove_dir(dir);
        }
    }
}
