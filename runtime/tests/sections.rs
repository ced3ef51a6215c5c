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
fn classes_of_service() {
    if !possible() {
        return;
    }
    let none = refusal(|b| b.config["linux"]["intelRdt"] = json!({}));
    assert!(none.contains("linux.intelRdt: no resctrl file system is mounted on /sys/fs/resctrl"), "{none}");
    // A stand-in: no machine here has the real one.
    let stand_in = "set -e; mkdir $DIR/fs; mount -t tmpfs none $DIR/fs; cd $DIR/fs
        mkdir -p cgroup resctrl/gold/mon_groups; echo 'L3:0=ff' | tee resctrl/schemata >resctrl/gold/schemata
        mount --rbind /sys/fs/cgroup cgroup; mount --rbind $DIR/fs /sys/fs; cd /sys/fs/resctrl
        status() { for file in \"$@\"; do echo $file $(cat $file 2>&1); done; }
        ";
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.config["linux"]["intelRdt"] =
        json!({"closID": "gold", "enableMonitoring": true, "l3CacheSchema": "L3:0=0ff"});
    let script = "$CREATE <&- >$DIR/err 2>&1 || cat $DIR/err; PID=$($RUNTIME ps -f json $ID | tr -d '[]')
        test $(cat gold/tasks) = $PID && test $(cat gold/mon_groups/$ID/tasks) = $PID && echo assigned
        $RUNTIME start $ID; $RUNTIME exec $ID true; test $(cat gold/tasks) != $PID && echo followed
        $RUNTIME update --l3-cache-schema L3:0=f $ID; status gold/schemata; $DELETE; status gold/mon_groups/$ID gold/schemata";
    let output = bundle.apart(&["--mount"], &format!("{stand_in}{script}"));
    let id = &bundle.id;
    let gone = format!(
        "assigned\nfollowed\ngold/schemata L3:0=f\ngold/mon_groups/{id} cat: gold/mon_groups/{id}: No such file or directory\ngold/schemata L3:0=f\n"
    );
    assert_eq!(text(&output.stdout), gone, "{}", text(&output.stderr));
    let mut bundle = Bundle::new(&["true"]);
    bundle.config["linux"]["intelRdt"] = json!({"closID": "gold", "memBwSchema": "MB:0=10"});
    let output = bundle.apart(&["--mount"], &format!("{stand_in}$RUN || ls /sys/fs/resctrl/gold"));
    assert!(text(&output.stderr).contains("gold/schemata does not have the schema"), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "mon_groups\nschemata\n");
}

/// Every limit as it stands in the control files; what this version of cgroups cannot do is an error.
#[test]
fn each_resource_by_itself() {
    if !possible() {
        return;
    }
    let disk = fs::read_dir("/sys/block").unwrap().find_map(|e| fs::read_to_string(e.unwrap().path().join("dev")).ok());
    let disk = disk.unwrap_or_default().trim().to_owned();
    let (major, minor) = disk.split_once(':').map_or((0, 0), |(a, b)| (a.parse().unwrap(), b.parse::<i64>().unwrap()));
    let throttle = json!([{"major": major, "minor": minor, "rate": 1_048_576}]);
    let gib = 1u64 << 30;
    // What is asked; controller, file and words of v1; those of v2, where no controller means an error.
    let rows = [
        (
            json!({"memory": {"limit": gib, "swap": gib + 4096}}),
            ("memory", "memory.memsw.limit_in_bytes", "1073745920"),
            ("memory", "memory.swap.max", "4096"),
        ),
        (
            json!({"memory": {"reservation": gib}}),
            ("memory", "memory.soft_limit_in_bytes", "1073741824"),
            ("memory", "memory.low", "1073741824"),
        ),
        (
            json!({"memory": {"swappiness": 7}}),
            ("memory", "memory.swappiness", "7"),
            ("", "memory.swappiness", "exists in cgroup v1 only"),
        ),
        (
            json!({"memory": {"disableOOMKiller": true}}),
            ("memory", "memory.oom_control", "oom_kill_disable 1"),
            ("", "", "memory.disableOOMKiller exists in cgroup v1 only"),
        ),
        (
            json!({"memory": {"kernelTCP": gib}}),
            ("memory", "memory.kmem.tcp.limit_in_bytes", "1073741824"),
            ("", "", "memory.kernelTCP exists in cgroup v1 only"),
        ),
        (
            json!({"cpu": {"quota": 20_000, "period": 50_000, "burst": 9000}}),
            ("cpu", "cpu.cfs_burst_us", "9000"),
            ("cpu", "cpu.max.burst", "9000"),
        ),
        (
            json!({"cpu": {"quota": -1, "period": 50_000}}),
            ("cpu", "cpu.cfs_period_us", "50000"),
            ("cpu", "cpu.max", "max 50000"),
        ),
        (json!({"cpu": {"idle": 1}}), ("cpu", "cpu.idle", "1"), ("cpu", "cpu.idle", "1")),
        (
            json!({"cpu": {"realtimePeriod": 900_000}}),
            ("cpu", "cpu.rt_period_us", "900000"),
            ("", "", "exists in cgroup v1 only"),
        ),
        (json!({"cpu": {"cpus": "0", "mems": "0"}}), ("cpuset", "cpuset.cpus", "0"), ("cpuset", "cpuset.mems", "0")),
        (json!({"pids": {"limit": 33}}), ("pids", "pids.max", "33"), ("pids", "pids.max", "33")),
        (
            json!({"blockIO": {"throttleReadBpsDevice": throttle}}),
            ("blkio", "blkio.throttle.read_bps_device", "1048576"),
            ("io", "io.max", "rbps=1048576"),
        ),
        (
            json!({"blockIO": {"throttleWriteIOPSDevice": throttle}}),
            ("blkio", "blkio.throttle.write_iops_device", "1048576"),
            ("io", "io.max", "wiops=1048576"),
        ),
        (
            json!({"blockIO": {"leafWeight": 100}}),
            ("", "", "blkio.leaf_weight"),
            ("", "", "blockIO.leafWeight exists in cgroup v1 only"),
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]}),
            ("unified", "hugetlb.2MB.max", "4194304"),
            ("hugetlb", "hugetlb.2MB.max", "4194304"),
        ),
        (
            json!({"network": {"classID": 5}}),
            ("", "", "network.classID: this machine has no cgroup controller"),
            ("", "", "network.classID: this machine has no cgroup controller"),
        ),
        (
            json!({"network": {"priorities": [{"name": "lo", "priority": 1}]}}),
            ("", "", "network.priorities: this machine has no"),
            ("", "", "network.priorities: this machine has no"),
        ),
        (json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}), ("", "", "rdma"), ("", "", "rdma")),
    ];
    for (resources, one, two) in rows {
        if disk.is_empty() && resources.to_string().contains("throttle") {
            continue;
        }
        let (controller, file, words) = if common::unified() { two } else { one };
        let mut bundle = Bundle::new(&["sleep", "1000"]);
        bundle.config["linux"]["resources"] = resources.clone();
        if controller.is_empty() {
            let error = text(&bundle.run().stderr);
            assert!(error.contains(words), "{resources}: {error}");
        } else {
            bundle.start();
            let file = bundle.cgroup(controller).join(file);
            let text = fs::read_to_string(&file).unwrap_or_else(|e| format!("{}: {e}", file.display()));
            assert!(text.contains(words), "{resources}: {text}");
        }
    }
}

#[test]
fn a_refused_update_leaves_nothing_behind() {
    if !possible() {
        return;
    }
    let bundle = Bundle::new(&["sleep", "1000"]);
    bundle.start();
    let refused = bundle.call(&["update", "--cpuset-cpus", "999", &bundle.id]);
    assert!(text(&refused.stderr).contains("cpuset.cpus"), "{}", text(&refused.stderr));
    assert!(bundle.call(&["delete", "--force", &bundle.id]).status.success());
    assert!(bundle.cgroups().is_empty(), "{:?}", bundle.cgroups());
}

#[test]
fn default_devices_and_those_asked_for() {
    if !possible() {
        return;
    }
    let script = "cd /dev; stat -c '%n %t:%T %a %u:%g' null zero full random urandom tty mine fifo; \
                  stat -c '%F' fifo; for link in ptmx fd stdin stdout stderr; do readlink $link; done; test -e console || echo none";
    let seen = said(&["sh", "-c", script], |b| {
        b.config["linux"]["devices"] = json!([
            {"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4},
            {"path": "/dev/fifo", "type": "p", "fileMode": 0o600},
        ]);
    });
    let expected = "null 1:3 666 0:0\nzero 1:5 666 0:0\nfull 1:7 666 0:0\nrandom 1:8 666 0:0\nurandom 1:9 666 0:0\n\
                    tty 5:0 666 0:0\nmine a:e5 640 3:4\nfifo 0:0 600 0:0\nfifo\n\
                    pts/ptmx\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\nnone\n";
    assert_eq!(seen, expected);
}

#[test]
fn a_path_must_be_of_its_namespaces_type() {
    if !possible() {
        return;
    }
    for (at, kind) in [(0, "pid"), (1, "network"), (2, "ipc"), (3, "uts"), (5, "cgroup")] {
        let other = if kind == "uts" { "/proc/self/ns/ipc" } else { "/proc/self/ns/uts" };
        for (path, words) in
            [(other, "invalid argument"), ("/proc/self/status", "invalid argument"), ("/nosuch", "/nosuch")]
        {
            let wrong = refusal(|b| {
                assert_eq!(b.config["linux"]["namespaces"][at]["type"], kind);
                b.config["linux"]["namespaces"][at]["path"] = path.into();
                b.config.as_object_mut().unwrap().remove("hostname");
            });
            assert!(wrong.contains(words), "{kind} {path}: {wrong}");
        }
    }
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
