//! The specification's lifecycle: what a failing hook leads to, what hooks are told, what a created container is bound to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, path::Path};

use common::{Bundle, possible, text};
use serde_json::{Value, json};

/// A hook that writes its name and the state it is told as a line, then runs `then`.
fn hook(name: &str, log: &Path, then: &str) -> Value {
    let script = format!("echo {name} $(cat) >> {}; {then}", log.display());
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
}

/// A container whose hooks of all kinds write to one log, in which those named fail.
fn hooked(failing: &str) -> (Bundle, std::path::PathBuf) {
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    let log = bundle.dir.path().join("log");
    fs::write(&log, "").unwrap();
    let inside = Path::new("/hooks/log");
    let then = |name: &str| if name == failing { "exit 3" } else { "exit 0" };
    let one = |name: &str, log: &Path| json!([hook(name, log, then(name)), hook(&format!("{name}2"), log, "exit 0")]);
    bundle.config["hooks"] = json!({
        "prestart": one("prestart", &log), "createRuntime": one("createRuntime", &log),
        "createContainer": one("createContainer", &log), "startContainer": one("startContainer", inside),
        "poststart": one("poststart", &log), "poststop": one("poststop", &log),
    });
    bundle.config["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/hooks", "type": "bind", "source": bundle.dir.path(), "options": ["rbind", "rw"]}),
    );
    (bundle, log)
}

fn ran(log: &Path) -> Vec<String> {
    let log = fs::read_to_string(log).unwrap();
    log.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

const ALL: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

#[test]
fn a_failing_hook_ends_and_destroys_the_container() {
    if !possible() {
        return;
    }
    for (at, failing) in ALL.iter().enumerate().take(5) {
        let (bundle, log) = hooked(failing);
        bundle.write();
        let directory = bundle.dir.path().to_string_lossy().into_owned();
        // A created container keeps its creator's streams: they must not be our pipes.
        let mut create = bundle.command(&["create", "--bundle", &directory, &bundle.id]);
        let err = fs::File::create(bundle.dir.path().join("err")).unwrap();
        let created = create.stdout(std::process::Stdio::null()).stderr(err).status().unwrap();
        let said = if at < 3 {
            assert_eq!(created.code(), Some(1), "{failing}");
            fs::read_to_string(bundle.dir.path().join("err")).unwrap()
        } else {
            assert!(created.success(), "{failing}");
            let started = bundle.call(&["start", &bundle.id]);
            assert_eq!(started.status.code(), Some(1), "{failing}");
            text(&started.stderr)
        };
        assert!(said.contains(&format!("{failing} hook #0 /bin/sh: exited with 3")), "{said}");
        // Each kind before it ran both of its hooks, it ran its first, and the last kind follows.
        let before = ALL[..at].iter().flat_map(|name| [(*name).to_owned(), format!("{name}2")]);
        let expected: Vec<String> =
            before.chain([(*failing).to_owned(), "poststop".to_owned(), "poststop2".to_owned()]).collect();
        assert_eq!(ran(&log), expected);
        assert!(text(&bundle.call(&["state", &bundle.id]).stderr).contains("does not exist"), "{failing}");
        assert!(bundle.cgroups().is_empty(), "{failing} left {:?}", bundle.cgroups());
    }
}

#[test]
fn a_failing_last_hook_is_a_warning() {
    if !possible() {
        return;
    }
    let (bundle, log) = hooked("poststop");
    bundle.start();
    let deleted = bundle.call(&["delete", "--force", &bundle.id]);
    assert!(deleted.status.success() && bundle.cgroups().is_empty());
    assert!(text(&deleted.stderr).contains("warning: poststop hook #0 /bin/sh: exited with 3"));
    assert_eq!(ran(&log).last().unwrap(), "poststop2");
}

#[test]
fn hooks_are_told_the_state_as_they_see_it() {
    if !possible() {
        return;
    }
    let (bundle, log) = hooked("");
    bundle.start();
    let state: Value = serde_json::from_slice(&bundle.call(&["state", &bundle.id]).stdout).unwrap();
    let pid = state["pid"].as_i64().unwrap();
    assert!(bundle.call(&["delete", "--force", &bundle.id]).status.success());
    let expected = [
        ("prestart", "creating", pid),
        ("createRuntime", "creating", pid),
        ("createContainer", "creating", 1),
        ("startContainer", "created", 1),
        ("poststart", "running", pid),
        ("poststop", "stopped", 0),
    ];
    let text = fs::read_to_string(log).unwrap();
    for (name, status, pid) in expected {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} "))).unwrap();
        let told: Value = serde_json::from_str(line).unwrap();
        assert_eq!((told["status"].as_str(), told["pid"].as_i64()), (Some(status), Some(pid)), "{name}");
        assert_eq!((&told["id"], &told["bundle"]), (&state["id"], &state["bundle"]), "{name}");
        assert_eq!(told["ociVersion"], isopod_runtime::spec::VERSION);
    }
}

#[test]
fn changes_of_the_bundle_after_create_have_no_effect() {
    if !possible() {
        return;
    }
    let (mut bundle, log) = hooked("");
    bundle.start();
    bundle.config["process"]["env"] = json!(["PATH=/nowhere"]);
    bundle.config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_KILL"});
    bundle.config["hooks"] = json!({});
    bundle.write();
    let exec = bundle.call(&["exec", &bundle.id, "echo", "as before"]);
    assert_eq!(text(&exec.stdout), "as before\n", "{}", text(&exec.stderr));
    fs::remove_file(bundle.dir.path().join("config.json")).unwrap();
    assert!(bundle.call(&["delete", "--force", &bundle.id]).status.success());
    assert_eq!(ran(&log).last().unwrap(), "poststop2");
}
