//! The systemd driver: scopes that systemd knows of. Needs systemd and cgroup v2, so it does its work in `make test-vm`;
//! elsewhere the refusal is tested.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, path::Path, process::Command};

use common::{Bundle, eventually, possible, text};
use serde_json::json;

fn systemd() -> bool {
    Path::new("/run/systemd/system").exists() && common::unified()
}

fn show(unit: &str, property: &str) -> String {
    let output = Command::new("systemctl").args(["show", "--value", "--property", property, unit]).output().unwrap();
    text(&output.stdout).trim().to_owned()
}

#[test]
fn a_container_is_a_scope_of_its_slice() {
    if !possible() || !systemd() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    let id = bundle.id.clone();
    bundle.systemd = true;
    bundle.config["linux"]["cgroupsPath"] = format!("tests-nested.slice:t:{id}").into();
    bundle.config["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20}, "cpu": {"quota": 50_000, "period": 100_000, "shares": 512}, "pids": {"limit": 17},
    });
    bundle.start();
    let state: serde_json::Value = serde_json::from_slice(&bundle.call(&["state", &id]).stdout).unwrap();
    let pid = state["pid"].as_i64().unwrap();
    let unit = format!("t-{id}.scope");
    let group = format!("/tests.slice/tests-nested.slice/{unit}");
    let of = |pid: i64| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap().trim().to_owned();
    assert_eq!(of(pid), format!("0::{group}"));
    let read = |file: &str| {
        fs::read_to_string(format!("/sys/fs/cgroup{group}/{file}")).unwrap_or_else(|e| e.to_string()).trim().to_owned()
    };
    assert_eq!(read("cgroup.procs"), pid.to_string(), "the placeholder stays");
    let limits = |memory: &str, pids: &str| {
        assert_eq!((read("memory.max").as_str(), show(&unit, "MemoryMax").as_str()), (memory, memory));
        assert_eq!((read("pids.max").as_str(), show(&unit, "TasksMax").as_str()), (pids, pids));
        assert_eq!((read("cpu.max").as_str(), show(&unit, "CPUQuotaPerSecUSec").as_str()), ("50000 100000", "500ms"));
        assert_eq!(read("cpu.weight"), "20");
    };
    limits("67108864", "17");
    let updated = bundle.call(&["update", "--memory", "33554432", "--pids-limit", "9", &id]);
    assert!(updated.status.success(), "{}", text(&updated.stderr));
    limits("33554432", "9");
    // A reload writes what systemd knows; it must be what we wrote.
    assert!(Command::new("systemctl").arg("daemon-reload").status().unwrap().success());
    limits("33554432", "9");
    let exec = bundle.call(&["exec", &id, "cat", "/proc/self/cgroup"]);
    assert_eq!(text(&exec.stdout), "0::/\n");
    assert!(bundle.call(&["pause", &id]).status.success());
    assert!(bundle.call(&["resume", &id]).status.success());
    assert!(bundle.call(&["delete", "--force", &id]).status.success());
    let gone = || show(&unit, "LoadState") == "not-found" && !Path::new(&format!("/sys/fs/cgroup{group}")).exists();
    eventually("the scope is gone", || gone().then_some(()), || show(&unit, "ActiveState"));
}

#[test]
fn a_scope_whose_container_fails_goes() {
    if !possible() || !systemd() {
        return;
    }
    let mut bundle = Bundle::new(&["nope"]);
    bundle.systemd = true;
    bundle.config["linux"]["cgroupsPath"] = format!("system.slice:t:{}", bundle.id).into();
    let unit = format!("t-{}.scope", bundle.id);
    let output = bundle.run();
    assert_eq!(output.status.code(), Some(127), "{}", text(&output.stderr));
    let state = || show(&unit, "LoadState");
    eventually("the scope is gone", || (state() == "not-found").then_some(()), state);
    // A limit systemd does not take.
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 1 << 20, "swap": 1}});
    let output = bundle.run();
    assert!(text(&output.stderr).contains("below the memory limit"), "{}", text(&output.stderr));
    eventually("the scope is gone", || (state() == "not-found").then_some(()), state);
}

#[test]
fn without_cgroup_v2_the_driver_is_refused() {
    if !possible() || common::unified() {
        return;
    }
    let mut bundle = Bundle::new(&["true"]);
    bundle.systemd = true;
    bundle.config["linux"]["cgroupsPath"] = format!("system.slice:t:{}", bundle.id).into();
    let output = bundle.run();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--systemd-cgroup needs cgroup v2"), "{}", text(&output.stderr));
    assert!(!bundle.dir.path().join("state").join(&bundle.id).exists());
}
