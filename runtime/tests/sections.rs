//! Sections of config.json that few containers use, each as the container sees it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::{Bundle, possible, text};
use serde_json::json;

/// Runs a container whose configuration was changed; what it said.
#[track_caller]
fn said(args: &[&str], change: impl FnOnce(&mut Bundle)) -> String {
    let mut bundle = Bundle::new(args);
    change(&mut bundle);
    let output = bundle.run();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs one that is refused; why.
#[track_caller]
fn refusal(change: impl FnOnce(&mut Bundle)) -> String {
    let mut bundle = Bundle::new(&["true"]);
    change(&mut bundle);
    let output = bundle.run();
    assert!(!output.status.success() && bundle.cgroups().is_empty());
    assert!(!bundle.dir.path().join("state").join(&bundle.id).exists());
    text(&output.stderr)
}

#[test]
fn scheduling() {
    if !possible() {
        return;
    }
    let io = said(&["busybox", "ionice"], |b| {
        b.config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    });
    assert_eq!(io, "best-effort: prio 6\n");
    // Niceness and policy are fields 19 and 41.
    let cpu = said(&["sh", "-c", "exec busybox cut -d ' ' -f 19,41 /proc/self/stat"], |b| {
        b.config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    });
    assert_eq!(cpu, "5 3\n");
    let wrong = refusal(|b| b.config["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 1000}));
    assert!(wrong.contains("set process.scheduler"), "{wrong}");
}

#[test]
fn flags_of_the_scheduler() {
    if !possible() {
        return;
    }
    // Fields 19 and 41 are niceness and policy; a negative niceness does not outlive a fork with the first flag.
    let field = |number: &str, file: &str| format!("busybox cut -d ' ' -f {number} {file}");
    let script = format!("{}; {}; :", field("19", "/proc/1/stat"), field("19", "/proc/self/stat"));
    let nice = |flags: serde_json::Value| {
        said(&["sh", "-c", &script], |b| {
            b.config["process"]["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": -5, "flags": flags});
        })
    };
    assert_eq!(nice(json!([])), "-5\n-5\n");
    assert_eq!(nice(json!(["SCHED_FLAG_RESET_ON_FORK"])), "-5\n0\n");
    let deadline = said(&["sh", "-c", &format!("exec {}", field("41", "/proc/self/stat"))], |b| {
        b.config["process"]["scheduler"] = json!({"policy": "SCHED_DEADLINE", "runtime": 500_000_000,
            "deadline": 1_000_000_000, "period": 1_000_000_000, "flags": ["SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]});
    });
    assert_eq!(deadline, "6\n");
    let unknown = refusal(|b| {
        b.config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_NOSUCH"]});
    });
    assert!(unknown.contains("unknown variant `SCHED_FLAG_NOSUCH`"), "{unknown}");
}

#[test]
fn what_has_no_effect_is_said() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["grep", "CapEff", "/proc/self/status"]);
    let source = tempfile::tempdir().unwrap();
    bundle.config["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/v", "type": "bind", "source": source.path(), "options": ["rbind", "size=5m", "nofail"]}),
    );
    bundle.config["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_FLY"], "effective": ["CAP_KILL", "CAP_FLY"], "permitted": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    });
    bundle.config["linux"]["resources"]["memory"] = json!({"kernel": 1_000_000, "useHierarchy": false});
    bundle.write();
    let log = bundle.dir.path().join("log");
    let directory = bundle.dir.path().to_string_lossy().into_owned();
    let output =
        bundle.call(&["--log", &log.to_string_lossy(), "--log-format", "json", "run", "-b", &directory, &bundle.id]);
    assert_eq!(text(&output.stdout), "CapEff:\t0000000000000020\n", "{}", text(&output.stderr));
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for words in [
        "process.capabilities: \"CAP_FLY\" is unknown and left out",
        "process.capabilities: CAP_KILL cannot be granted",
        "mount on /v: size has no effect on a bind mount",
        "linux.resources.memory.kernel has no effect: the kernel has dropped it",
        "linux.resources.memory.useHierarchy has no effect: the kernel has dropped it",
    ] {
        assert!(lines.iter().any(|l| l["msg"] == words && l["level"] == "warning"), "{words:?} is not in {log}");
    }
    assert_eq!(lines.len(), 5, "{log}");
}

#[test]
fn memory_policy() {
    if !possible() || !std::path::Path::new("/proc/self/numa_maps").exists() {
        return;
    }
    let policy = |policy: serde_json::Value| {
        said(&["head", "-n", "1", "/proc/self/numa_maps"], |b| b.config["linux"]["memoryPolicy"] = policy)
    };
    assert!(policy(json!({"mode": "MPOL_INTERLEAVE", "nodes": "0"})).contains(" interleave:0 "));
    let flagged = policy(json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}));
    assert!(flagged.contains(" bind=static:0 "), "{flagged}");
    assert!(policy(json!({"mode": "MPOL_DEFAULT"})).contains(" default "));
    let none = refusal(|b| b.config["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "900"}));
    assert!(none.contains("set linux.memoryPolicy: invalid argument"), "{none}");
    let useless = refusal(|b| b.config["linux"]["memoryPolicy"] = json!({"mode": "MPOL_LOCAL", "nodes": "0"}));
    assert!(useless.contains("MPOL_LOCAL takes no nodes"), "{useless}");
}

#[test]
fn time_offsets() {
    if !possible() {
        return;
    }
    let uptime = said(&["cat", "/proc/uptime"], |b| {
        b.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
        b.config["linux"]["timeOffsets"] =
            json!({"boottime": {"secs": 3_000_000_000u64}, "monotonic": {"nanosecs": 5}});
    });
    let seconds: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
    assert!((3.0e9..3.1e9).contains(&seconds), "{uptime}");
    let wrong = refusal(|b| b.config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1}}));
    assert!(wrong.contains("timeOffsets need a time namespace"), "{wrong}");
}

#[test]
fn propagation_of_the_root() {
    if !possible() {
        return;
    }
    let root = |word: &str| {
        let table = said(&["cat", "/proc/self/mountinfo"], |b| b.config["linux"]["rootfsPropagation"] = word.into());
        table.lines().find(|l| l.split(' ').nth(4) == Some("/")).unwrap().to_owned()
    };
    assert!(root("shared").contains(" shared:"), "{}", root("shared"));
    assert!(root("unbindable").contains(" unbindable "));
    assert!(!root("private").contains(" shared:"));
    let wrong = refusal(|b| b.config["linux"]["rootfsPropagation"] = "sideways".into());
    assert!(wrong.contains("linux.rootfsPropagation: unknown value \"sideways\""), "{wrong}");
}

#[test]
fn personality() {
    if !possible() {
        return;
    }
    let machine =
        said(&["busybox", "uname", "-m"], |b| b.config["linux"]["personality"] = json!({"domain": "LINUX32"}));
    assert!(machine.starts_with('i'), "{machine}");
    let plain = said(&["busybox", "uname", "-m"], |b| b.config["linux"]["personality"] = json!({"domain": "LINUX"}));
    assert_eq!(plain.trim(), std::env::consts::ARCH);
}

#[test]
fn annotations_are_told_and_nothing_else() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    let log = bundle.dir.path().join("told");
    // Other runtimes have keys that change what they do.
    bundle.config["annotations"] = json!({"org.example.key": "value", "run.oci.handler": "krun"});
    let script = format!("cat > {}", log.display());
    bundle.config["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    bundle.start();
    for state in [bundle.call(&["state", &bundle.id]).stdout, fs::read(&log).unwrap()] {
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        assert_eq!(state["annotations"], bundle.config["annotations"]);
    }
}

#[test]
fn ids_of_mounts() {
    if !possible() {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), "").unwrap();
    let volume = |options: serde_json::Value, kind: &str| {
        json!({"destination": "/volume", "type": kind, "source": source.path(), "options": options,
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
            "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 10}]})
    };
    for options in [json!(["bind"]), json!(["bind", "idmap"]), json!(["rbind", "ridmap", "ro"])] {
        let owner = said(&["stat", "-c", "%u:%g", "/volume/file"], |b| {
            b.config["mounts"].as_array_mut().unwrap().push(volume(options, "bind"));
        });
        assert_eq!(owner, "1000:2000\n");
    }
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(source.path().join("file")).unwrap()), 0);
    let wrong = refusal(|b| {
        b.config["mounts"].as_array_mut().unwrap().push(volume(json!([]), "proc"));
    });
    assert!(wrong.contains("ids cannot be mapped on this type of mount"), "{wrong}");
}
