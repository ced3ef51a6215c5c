//! The supervisor: logs, exits that last, attach, exec, an agent that comes and goes, nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    process::Command,
};

use common::{
    Bundle, RUNTIME, eventually,
    pod::{PATIENCE, Pod},
    possible, text,
};
use isopod_runtime::supervisor::{
    client::{Connection, Error},
    protocol::{
        Answer, ContainerState, ContainerStatus, Event, FailureKind, OLDEST, Op, PidMode, Rootfs, VERSION, WinSize,
    },
};
use serde_json::json;

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

#[test]
fn output_is_logged_and_the_exit_lasts() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let bundle =
        pod.bundle(&["sh", "-c", "echo out; echo err >&2; hostname; cat /proc/sys/kernel/shmmni; echo -n end; exit 5"]);
    pod.create(&bundle, false, false);
    assert_eq!(pod.list()[0].state, ContainerState::Created);
    pod.start(&bundle);
    let status = pod.ended();
    let exit = status.exit.clone().unwrap();
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (5, None, false));
    let file = pod.dir.path().join("containers").join(&bundle.id).join("status.json");
    let durable: ContainerStatus = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(durable, status);
    let entries = pod.entries(&bundle);
    let of = |stream: &str| entries.iter().filter(|e| e.0 == stream).map(|e| e.2.clone()).collect::<Vec<_>>();
    assert_eq!(of("stdout"), ["out", "podhost", "1234", "end"]);
    assert_eq!(of("stderr"), ["err"]);
    pod.call(Op::Delete { container: bundle.id.clone() }).unwrap();
    pod.call(Op::Delete { container: bundle.id.clone() }).unwrap();
    assert!(!file.exists());
    assert!(pod.list().is_empty());
    pod.call(Op::Shutdown).unwrap();
    eventually(
        "no cgroups",
        || {
            pod.cgroups()
                .iter()
                .all(|c| c.join("supervisor").exists().then_some(()).is_none() && !c.join(&bundle.id).exists())
                .then_some(())
        },
        || format!("{:?}", pod.cgroups()),
    );
}

#[test]
fn oom_kills_are_told_apart() {
    if !possible() || !common::unified() && !std::path::Path::new("/sys/fs/cgroup/memory").exists() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let mut bundle = pod.bundle(&["sh", "-c", "x=$(yes | tr -d '\\n' | head -c 200000000); echo survived"]);
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    pod.create(&bundle, false, false);
    pod.start(&bundle);
    let exit = pod.ended().exit.unwrap();
    assert!(exit.oom_killed, "{exit:?}");
    pod.call(Op::Delete { container: bundle.id.clone() }).unwrap();

    let bundle = pod.bundle(&["sleep", "1000"]);
    pod.create(&bundle, false, false);
    pod.start(&bundle);
    pod.call(Op::Kill { container: bundle.id.clone(), signal: libc::SIGKILL, all: false }).unwrap();
    let exit = pod.ended().exit.unwrap();
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, Some(9), false));
    pod.call(Op::Kill { container: bundle.id.clone(), signal: 9, all: false }).unwrap();
}

#[test]
fn a_real_time_signal_ends_a_container_too() {
    if !possible() {
        return;
    }
    // PID 1 of a namespace ignores what it has no handler for, unless the signal comes from within a shared one.
    let mut pod = Pod::new(PidMode::Pod);
    pod.call(Op::Subscribe).unwrap();
    let bundle = pod.bundle(&["sleep", "1000"]);
    pod.create(&bundle, false, false);
    pod.start(&bundle);
    pod.call(Op::Kill { container: bundle.id.clone(), signal: 40, all: false }).unwrap();
    let exit = pod.ended().exit.unwrap();
    assert_eq!((exit.code, exit.signal), (168, Some(40)));
}

#[test]
fn a_container_sees_its_targets_processes() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let target = pod.bundle(&["sleep", "1234"]);
    let debugger = pod.bundle(&["sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline; echo"]);
    debugger.write();
    let join = |pod: &Pod| Op::Create {
        container: debugger.id.clone(),
        bundle: debugger.dir.path().to_owned(),
        rootfs: Rootfs::Directory,
        log_path: Some(pod.log(&debugger)),
        stdin: false,
        stdin_once: false,
        pid_of: Some(target.id.clone()),
    };
    let early = join(&pod);
    assert!(pod.call(early).is_err(), "the target does not run yet");
    pod.create(&target, false, false);
    pod.start(&target);
    let op = join(&pod);
    pod.call(op).unwrap();
    pod.start(&debugger);
    assert_eq!(pod.ended().id, debugger.id);
    assert_eq!(pod.entries(&debugger)[0].2.trim(), "sleep 1234");
}

#[test]
fn an_agent_that_dies_comes_back_to_running_containers() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    let bundle = pod.bundle(&["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"]);
    let pid = pod.create(&bundle, false, false);
    assert_eq!(pod.start(&bundle), pid);
    // A client that is gone without a word, with a request on the way.
    let again = Connection::connect(pod.dir.path()).unwrap();
    drop(std::mem::replace(&mut pod.connection, again));
    let list = match pod.call(Op::Subscribe).unwrap() {
        Answer::List(list) => list,
        other => panic!("{other:?}"),
    };
    assert_eq!((list[0].pid, list[0].state), (Some(pid), ContainerState::Running));
    pod.call(Op::Kill { container: bundle.id.clone(), signal: 9, all: true }).unwrap();
    assert_eq!(pod.ended().id, bundle.id);
    let numbers: Vec<usize> = pod.entries(&bundle).iter().map(|e| e.2.parse().unwrap()).collect();
    assert_eq!(numbers, (0..numbers.len()).collect::<Vec<_>>());
}

#[test]
fn a_new_supervisor_reports_what_its_predecessor_left() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    let bundle = pod.bundle(&["sleep", "1000"]);
    let pid = pod.create(&bundle, false, false);
    pod.start(&bundle);
    let second = Command::new(RUNTIME).arg("supervise").arg(pod.dir.path()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stdout).starts_with("error: another supervisor"), "{}", text(&second.stdout));
    let supervisor: i32 = fs::read_to_string(pod.dir.path().join("supervisor.pid")).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(supervisor).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    assert!(matches!(pod.connection.next(PATIENCE), Err(Error::Closed)));
    pod.connection = Pod::supervise(&pod.dir);
    let status = pod.list().remove(0);
    assert_eq!((status.state, status.pid), (ContainerState::Exited, None));
    assert_eq!(status.exit.unwrap().code, 255);
    eventually("killed", || (!std::path::Path::new(&format!("/proc/{pid}/ns")).exists()).then_some(()), String::new);
    pod.call(Op::Delete { container: bundle.id.clone() }).unwrap();
}

#[test]
fn the_first_client_of_its_own_hears_what_was_said_before_it_came() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let bundle = pod.bundle(&["sh", "-c", "echo early; echo wrong >&2; read x; echo late"]);
    pod.create(&bundle, true, true);
    pod.start(&bundle);
    eventually("said", || (pod.entries(&bundle).len() == 2).then_some(()), String::new);
    let mut attach = |stdin: bool| {
        let ((in_r, in_w), (out_r, out_w), (err_r, err_w)) = (pipe(), pipe(), pipe());
        let op = Op::Attach { container: bundle.id.clone(), stdin, stdout: true, stderr: true };
        let ends = [in_r.as_fd(), out_w.as_fd(), err_w.as_fd()];
        pod.connection.call(op, &ends[usize::from(!stdin)..], PATIENCE).unwrap();
        (in_w, fs::File::from(out_r), fs::File::from(err_r))
    };
    let (input, first, wrong) = attach(true);
    let (_, second, _) = attach(false);
    drop(input);
    pod.ended();
    let all = |file: fs::File| std::io::read_to_string(file).unwrap();
    assert_eq!((all(first), all(wrong), all(second)), ("early\nlate\n".into(), "wrong\n".into(), "late\n".into()));
}

#[test]
fn attach_feeds_stdin_and_sees_output() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let bundle = pod.bundle(&["sh", "-c", "cat; echo done"]);
    pod.create(&bundle, true, true);
    let ((stdin_r, stdin_w), (out_r, out_w)) = (pipe(), pipe());
    let op = Op::Attach { container: bundle.id.clone(), stdin: true, stdout: true, stderr: false };
    pod.connection.call(op, &[stdin_r.as_fd(), out_w.as_fd()], PATIENCE).unwrap();
    drop((stdin_r, out_w));
    pod.start(&bundle);
    // More than a pipe holds, so that both sides must wait for each other.
    let sent: Vec<u8> = (0..60_000u32).flat_map(|i| format!("{i}\n").into_bytes()).collect();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || fs::File::from(stdin_w).write_all(&copy).unwrap());
    let mut got = vec![];
    fs::File::from(out_r).read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert_eq!(pod.ended().exit.unwrap().code, 0);
    assert_eq!(got.len(), sent.len() + 5);
    assert!(got.starts_with(&sent) && got.ends_with(b"done\n"));
    assert_eq!(pod.entries(&bundle).len(), 60_001);
}

#[test]
fn exec_with_descriptors_and_with_a_terminal() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    let bundle = pod.bundle(&["sleep", "1000"]);
    pod.create(&bundle, false, false);
    let process = |args: serde_json::Value, terminal: bool| {
        let mut process = bundle.config["process"].clone();
        process["args"] = args;
        process["terminal"] = terminal.into();
        process
    };
    let exec = |exec: &str, process: serde_json::Value, stdout: bool| Op::Exec {
        container: bundle.id.clone(),
        exec: exec.into(),
        process,
        stdin: false,
        stdout,
        stderr: false,
    };
    let early = pod.call(exec("e0", process(json!(["true"]), false), false));
    assert!(matches!(early, Err(Error::Failure(f)) if f.kind == FailureKind::State));
    pod.start(&bundle);
    let (out_r, out_w) = pipe();
    let op = exec("e1", process(json!(["sh", "-c", "echo $$; hostname; exit 4"]), false), true);
    pod.connection.call(op, &[out_w.as_fd()], PATIENCE).unwrap();
    drop(out_w);
    let mut said = String::new();
    fs::File::from(out_r).read_to_string(&mut said).unwrap();
    assert!(said.ends_with("podhost\n"), "{said}");
    match pod.connection.next(PATIENCE).unwrap() {
        Event::ExecExited { exec, exit } => assert_eq!((exec.as_str(), exit.code), ("e1", 4)),
        other => panic!("{other:?}"),
    }
    let op = exec("e2", process(json!(["sh", "-c", "read x; stty size 2>/dev/null; echo got $x"]), true), false);
    let (_, fds) = pod.connection.call(op, &[], PATIENCE).unwrap();
    pod.call(Op::Resize { target: "e2".into(), size: WinSize { rows: 33, cols: 77 } }).unwrap();
    let mut master = fs::File::from(fds.into_iter().next().unwrap());
    let size = rustix::termios::tcgetwinsize(&master).unwrap();
    assert_eq!((size.ws_row, size.ws_col), (33, 77));
    master.write_all(b"hello\n").unwrap();
    let mut said = vec![];
    let mut buffer = [0; 256];
    while let Ok(n @ 1..) = master.read(&mut buffer) {
        said.extend_from_slice(&buffer[..n]);
    }
    assert!(text(&said).contains("got hello"), "{}", text(&said));
    let missing = pod.call(exec("e3", process(json!(["nope"]), false), false));
    match missing {
        Err(Error::Failure(f)) => {
            assert_eq!(f.kind, FailureKind::Invalid);
            assert!(f.message.contains("executable file not found in $PATH"), "{f}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn containers_share_a_pid_namespace_when_asked() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Pod);
    pod.call(Op::Subscribe).unwrap();
    let first = pod.bundle(&["sleep", "1000"]);
    pod.create(&first, false, false);
    pod.start(&first);
    let second = pod.bundle(&["sh", "-c", "ps; (sleep 1000 &)"]);
    pod.create(&second, false, false);
    pod.start(&second);
    // Its background process does not outlive it.
    assert_eq!(pod.ended().id, second.id);
    let seen: Vec<String> = pod.entries(&second).into_iter().map(|e| e.2).collect();
    assert!(seen.iter().any(|l| l.contains("pause")) && seen.iter().any(|l| l.contains("sleep 1000")), "{seen:?}");
    let path = common::groups(&format!("{}/{}", pod.cgroup, second.id)).remove(0).join("cgroup.procs");
    eventually(
        "empty",
        || fs::read_to_string(&path).unwrap().is_empty().then_some(()),
        || fs::read_to_string(&path).unwrap(),
    );
}

#[test]
fn failures_are_told_and_leave_nothing() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    let kind = |result: Result<Answer, Error>| match result {
        Err(Error::Failure(failure)) => failure.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(pod.call(Op::Start { container: "no".into() })), FailureKind::NotFound);
    let bundle = pod.bundle(&["nope"]);
    bundle.write();
    let create = |bundle: &Bundle| Op::Create {
        container: bundle.id.clone(),
        bundle: bundle.dir.path().to_owned(),
        rootfs: Rootfs::Directory,
        log_path: None,
        stdin: false,
        stdin_once: false,
        pid_of: None,
    };
    assert_eq!(kind(pod.call(create(&bundle))), FailureKind::Invalid);
    assert!(pod.list().is_empty());
    for root in pod.cgroups() {
        assert!(!root.join(&bundle.id).exists());
    }
}

#[test]
fn agents_of_other_versions_are_served() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    let mut asked = 100;
    let mut ask = |pod: &Pod, op: serde_json::Value| {
        asked += 1;
        let request = json!({"id": asked, "op": op, "trace": "abc", "deadline": 9}).to_string();
        isopod_runtime::supervisor::wire::send_bytes(pod.connection.as_fd(), request.as_bytes(), &[]).unwrap();
        let reply = eventually("reply", || pod.connection.recv().ok().flatten(), String::new);
        let mut reply = serde_json::to_value(&reply.0).unwrap()["reply"].take();
        assert_eq!(reply["id"], asked);
        reply["result"].take()
    };
    // The one before, the next, and one that skipped some.
    for (theirs, agreed) in [(VERSION, VERSION), (VERSION + 1, VERSION), (u32::MAX, VERSION)] {
        let said = ask(&pod, json!({"hello": {"version": theirs, "features": ["levitation"]}}));
        assert_eq!(said["Ok"]["hello"]["version"], agreed);
    }
    let said = ask(&pod, json!({"hello": {"version": OLDEST - 1}}));
    assert_eq!(said["Err"]["message"], "version 0 of the protocol is not spoken any more, the oldest is 1");
    // Operations and values it has never heard of fail alone.
    for op in [json!({"levitate": {"container": "x"}}), json!("dance"), json!({"kill": {"container": "x"}}), json!(7)] {
        assert_eq!(ask(&pod, op.clone())["Err"]["kind"], "invalid", "{op}");
    }
    // Fields it has never heard of are passed over.
    let bundle = pod.bundle(&["sleep", "1000"]);
    bundle.write();
    let create = json!({"create": {"container": bundle.id, "bundle": bundle.dir.path(), "rootfs": "directory",
        "logPath": null, "stdin": false, "stdinOnce": false, "priority": {"of": "tomorrow"}}});
    assert!(ask(&pod, create)["Ok"]["created"]["pid"].is_u64());
    assert!(ask(&pod, json!({"start": {"container": bundle.id, "slowly": true}}))["Ok"]["started"]["pid"].is_u64());
    assert_eq!(pod.list()[0].state, ContainerState::Running);
    pod.call(Op::Shutdown).unwrap();
    // A pod that a younger agent describes is not run as if nothing were missing.
    let path = pod.dir.path().join("pod.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["version"] = (VERSION + 1).into();
    fs::write(&path, config.to_string()).unwrap();
    let output = Command::new(RUNTIME).arg("supervise").arg(pod.dir.path()).output().unwrap();
    let line = text(&output.stdout);
    assert!(
        line.trim_end().ends_with("is of protocol version 2, isopod-runtime speaks 1: it is older than the agent"),
        "{line}"
    );
}

#[test]
fn an_overlay_root_keeps_its_layers_clean() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let mut bundle = pod.bundle(&["sh", "-c", "echo new > /file; cat /file /top"]);
    bundle.config["root"]["readonly"] = false.into();
    bundle.write();
    let path = |name: &str| {
        let path = bundle.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    // Overlay cannot have its upper directory on another overlay or with xattr-less file systems.
    let (top, upper, work) = (path("top"), path("upper"), path("work"));
    fs::write(top.join("top"), "upper layer\n").unwrap();
    let op = Op::Create {
        container: bundle.id.clone(),
        bundle: bundle.dir.path().to_owned(),
        rootfs: Rootfs::Overlay { lower: vec![top, bundle.rootfs()], upper: upper.clone(), work },
        log_path: Some(pod.log(&bundle)),
        stdin: false,
        stdin_once: false,
        pid_of: None,
    };
    pod.call(op).unwrap();
    pod.start(&bundle);
    assert_eq!(pod.ended().exit.unwrap().code, 0);
    let lines: Vec<String> = pod.entries(&bundle).into_iter().map(|e| e.2).collect();
    assert_eq!(lines, ["new", "upper layer"]);
    assert_eq!(fs::read_to_string(upper.join("file")).unwrap(), "new\n");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(&*bundle.dir.path().to_string_lossy()));
}
