//! What escapes of containers have used, each failing closed: the runtime's own file, leaked descriptors, symlinks and
//! races under mount targets, masks, device nodes, passwd files, configurations and cgroup paths made to hurt.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use common::{Bundle, possible, text};
use serde_json::json;

/// Appends a mount to a configuration.
fn mount(bundle: &mut Bundle, mount: serde_json::Value) {
    bundle.config["mounts"].as_array_mut().unwrap().push(mount);
}

fn without_mount(bundle: &mut Bundle, destination: &str) {
    bundle.config["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != destination);
}

/// Runs it and expects refusal with these words, nothing left.
#[track_caller]
fn refused(bundle: &Bundle, words: &str) {
    let output = bundle.run();
    let said = text(&output.stderr);
    assert!(
        !output.status.success() && said.contains(words),
        "{words:?} is not in {said:?} ({})",
        text(&output.stdout)
    );
    assert!(bundle.cgroups().is_empty(), "{:?}", bundle.cgroups());
    assert!(!bundle.dir.path().join("state").join(&bundle.id).exists());
}

#[test]
fn the_runtimes_file_survives_a_container_that_waits_for_it() {
    if !possible() {
        return;
    }
    // CVE-2019-5736: processes of the container open the runtime's file while it enters and write to it once it is gone.
    let script = "while :; do for p in /proc/[0-9]*; do \
                  (exec 9<$p/exe && sleep 0.05; echo overwritten > /proc/self/fd/9) 2>/dev/null; done; done";
    let mut bundle = Bundle::new(&["sh", "-c", script]);
    bundle.config["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"],
        "effective": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"], "permitted": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]});
    symlink("/proc/self/exe", bundle.rootfs().join("bin/evil")).unwrap();
    let before = fs::read(common::RUNTIME).unwrap();
    bundle.start();
    for _ in 0..10 {
        bundle.call(&["exec", &bundle.id, "/bin/evil", "--version"]);
        bundle.call(&["exec", &bundle.id, "true"]);
    }
    assert!(fs::read(common::RUNTIME).unwrap() == before, "the runtime was overwritten");
}

#[test]
fn no_descriptor_of_the_host_is_a_way_out() {
    if !possible() {
        return;
    }
    // CVE-2024-21626: a directory of the host that the runtime, or its caller, has open.
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.config["root"]["readonly"] = false.into();
    for fd in 3..16 {
        symlink(format!("/proc/self/fd/{fd}"), bundle.rootfs().join(format!("way{fd}"))).unwrap();
    }
    bundle.start();
    for fd in 3..16 {
        for cwd in [format!("/proc/self/fd/{fd}"), format!("/way{fd}"), format!("/proc/self/fd/{fd}/../..")] {
            let args = ["exec", "--cwd", &cwd, &bundle.id, "sh", "-c", "ls ../../../../../../home ../../../../usr"];
            // A caller that leaves a directory open for whoever it executes.
            let shell = format!("exec {fd}</; exec \"$@\"");
            let mut inner = vec!["-c".to_owned(), shell, "sh".to_owned()];
            let command = bundle.command(&args);
            inner.push(command.get_program().to_string_lossy().into_owned());
            inner.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
            let output = Command::new("bash").args(&inner).output().unwrap();
            assert!(!output.status.success() && output.stdout.is_empty(), "{cwd}: {}", text(&output.stdout));
        }
    }
    let list = bundle.call(&["exec", &bundle.id, "ls", "/proc/self/fd"]);
    assert_eq!(text(&list.stdout).split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
}

#[test]
fn mount_targets_are_inside_whatever_the_image_says() {
    if !possible() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let source = tempfile::tempdir().unwrap();
    // Directories on the way are links to the host; made-up parts must appear inside.
    let mut bundle = Bundle::new(&["true"]);
    symlink(host.path(), bundle.rootfs().join("a")).unwrap();
    fs::create_dir(bundle.rootfs().join("c")).unwrap();
    symlink("../../../../../..", bundle.rootfs().join("c/up")).unwrap();
    mount(
        &mut bundle,
        json!({"destination": "/c/up/made/up", "type": "bind", "source": source.path(), "options": ["bind"]}),
    );
    let output = bundle.run();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(bundle.rootfs().join("made/up").is_dir());
    mount(&mut bundle, json!({"destination": "/a/b", "type": "bind", "source": source.path(), "options": ["bind"]}));
    drop(bundle.run());
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0);
    // Links of procfs are no way out either, nor a way to cover the kernel's files.
    for (link, target) in [("/proc/1/root/tmp", "/vol/x"), ("/proc/self/cwd", "/vol/x"), ("/proc", "/vol/self/attr")] {
        let mut bundle = Bundle::new(&["true"]);
        symlink(link, bundle.rootfs().join("vol")).unwrap();
        mount(&mut bundle, json!({"destination": target, "type": "tmpfs", "source": "tmpfs"}));
        refused(&bundle, "mount tmpfs on");
    }
    for (kind, at) in [("proc", "proc"), ("sysfs", "sys")] {
        let bundle = Bundle::new(&["true"]);
        fs::create_dir(bundle.rootfs().join("elsewhere")).unwrap();
        symlink("elsewhere", bundle.rootfs().join(at)).unwrap();
        refused(&bundle, &format!("{kind} must be mounted on an ordinary directory"));
    }
}

#[test]
fn a_parallel_writer_wins_nothing() {
    if !possible() {
        return;
    }
    // The image is shared with another container that swaps a directory and a link to the host for each other.
    let host = tempfile::tempdir().unwrap();
    let source = tempfile::tempdir().unwrap();
    let mut bundle = Bundle::new(&["true"]);
    let (shown, other) = (bundle.rootfs().join("vol"), bundle.rootfs().join("other"));
    fs::create_dir(&shown).unwrap();
    symlink(host.path(), &other).unwrap();
    for name in ["deep/er", "file"] {
        let source = if name == "file" { Path::new(common::RUNTIME) } else { source.path() };
        mount(
            &mut bundle,
            json!({"destination": format!("/vol/{name}"), "type": "bind", "source": source, "options": ["bind"]}),
        );
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(rustix::fs::CWD, &shown, rustix::fs::CWD, &other, flags).unwrap();
            }
        });
        let ended = (0..60).filter(|_| bundle.run().status.success()).count();
        stop.store(true, Ordering::Relaxed);
        eprintln!("{ended} of 60 containers ran");
    });
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0, "something was made on the host");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(&*host.path().to_string_lossy()));
}

#[test]
fn masks_and_devices_are_the_kernels_own() {
    if !possible() {
        return;
    }
    // CVE-2025-31133 and 52565: the image's /dev/null or /dev/console leads to a file that must stay as it is.
    for name in ["null", "console"] {
        let mut bundle = Bundle::new(&["sh", "-c", "cat /proc/timer_list; grep -c core_pattern /proc/self/mountinfo"]);
        without_mount(&mut bundle, "/dev");
        bundle.config["root"]["readonly"] = false.into();
        fs::create_dir(bundle.rootfs().join("dev")).unwrap();
        symlink("/proc/sys/kernel/core_pattern", bundle.rootfs().join("dev").join(name)).unwrap();
        bundle.config["process"]["terminal"] = (name == "console").into();
        let words = if name == "null" { "something else than that device" } else { "ordinary file" };
        refused(&bundle, words);
    }
    // A node of the image with a good name and a bad number.
    let mut bundle = Bundle::new(&["true"]);
    without_mount(&mut bundle, "/dev");
    fs::create_dir(bundle.rootfs().join("dev")).unwrap();
    let made = Command::new("mknod").arg(bundle.rootfs().join("dev/zero")).args(["c", "1", "1"]).status().unwrap();
    assert!(made.success());
    refused(&bundle, "something else than that device");
    // A node that is none of the container's: the controller refuses what the file mode would allow.
    let bundle = Bundle::new(&["sh", "-c", "cat /disk /mem | head -c 1 | wc -c"]);
    for (name, args) in [("disk", ["b", "254", "0"]), ("mem", ["c", "1", "1"])] {
        assert!(Command::new("mknod").arg(bundle.rootfs().join(name)).args(args).status().unwrap().success());
    }
    let output = bundle.run();
    assert_eq!(text(&output.stdout).trim(), "0", "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Operation not permitted"), "{}", text(&output.stderr));
    // A masked path that an earlier mount replaced by a link out of /proc.
    let mut bundle = Bundle::new(&["true"]);
    let fake = tempfile::tempdir().unwrap();
    symlink("/etc", fake.path().join("timer_list")).unwrap();
    without_mount(&mut bundle, "/proc");
    mount(&mut bundle, json!({"destination": "/proc", "type": "bind", "source": fake.path(), "options": ["bind"]}));
    // The mask lands on whatever the link shows inside the container; nothing of the host's is touched.
    let before = fs::read_dir("/etc").unwrap().count();
    drop(bundle.run());
    assert_eq!(fs::read_dir("/etc").unwrap().count(), before);
}

#[test]
fn a_hostile_passwd_file_costs_an_error() {
    if !possible() {
        return;
    }
    let bundle = Bundle::new(&["sleep", "1000"]);
    bundle.start();
    let passwd = bundle.rootfs().join("etc/passwd");
    let exec = |user: &str| bundle.call(&["exec", "--user", user, &bundle.id, "grep", "Uid", "/proc/self/status"]);
    let put = |make: &dyn Fn(&Path)| {
        let _ = fs::remove_file(&passwd).or_else(|_| fs::remove_dir(&passwd));
        make(&passwd);
    };
    put(&|p| assert!(Command::new("mkfifo").arg(p).status().unwrap().success()));
    assert!(text(&exec("web").stderr).contains("no regular file"));
    put(&|p| fs::create_dir(p).unwrap());
    assert!(text(&exec("web").stderr).contains("no regular file"));
    // The host's users are none of the container's.
    put(&|p| symlink("../../../../../../../../etc/passwd", p).unwrap());
    assert!(!exec("daemon").status.success());
    put(&|p| symlink("/proc/1/root/etc/passwd", p).unwrap());
    assert!(!exec("web").status.success());
    put(&|p| fs::write(p, "web:x:-1:0::/:\nweb:x:4294967296:0::/:\n\0\0:::::::\n").unwrap());
    assert!(text(&exec("web").stderr).contains("malformed uid"));
    // Sparse and endless: read up to a bound.
    put(&|p| fs::File::create(p).unwrap().set_len(1 << 40).unwrap());
    assert!(!exec("web").status.success());
    assert_eq!(text(&exec("33").stdout), "Uid:\t33\t33\t33\t33\n");
}

#[test]
fn configurations_have_bounds() {
    if !possible() {
        return;
    }
    let bundle = Bundle::new(&["true"]);
    let run = |config: &[u8]| {
        fs::write(bundle.dir.path().join("config.json"), config).unwrap();
        bundle.call(&["run", "--bundle", &bundle.dir.path().to_string_lossy(), &bundle.id])
    };
    let deep = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    let nested = format!("{{\"ociVersion\": \"1.0.0\", \"annotations\": {}}}", String::from_utf8(deep).unwrap());
    for (config, words) in [
        (vec![b' '; 17 << 20], "larger than"),
        (nested.into_bytes(), "expected a map"),
        (b"{\"ociVersion\": \"1.0.0\"".to_vec(), "EOF"),
        (b"\xff\xfe".to_vec(), "parse"),
        (vec![], "EOF"),
    ] {
        let output = run(&config);
        assert!(text(&output.stderr).contains(words), "{words}: {}", text(&output.stderr));
        assert!(!bundle.dir.path().join("state").join(&bundle.id).exists());
    }
    for id in ["../x", "a/b", "", ".", ".."] {
        let output = bundle.call(&["run", "--bundle", &bundle.dir.path().to_string_lossy(), id]);
        assert!(!output.status.success(), "{id:?}");
    }
}

#[test]
fn cgroup_paths_stay_in_their_hierarchy() {
    if !possible() {
        return;
    }
    for path in ["/../../tmp/x", "a/../../b", "..", "/", "/a/\0b"] {
        let mut bundle = Bundle::new(&["true"]);
        bundle.config["linux"]["cgroupsPath"] = path.into();
        refused(&bundle, "cgroup path");
    }
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("target");
    fs::write(&target, "as it was").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o666)).unwrap();
    let climb = format!("../../../../..{}", target.display());
    for resources in
        [json!({"unified": {climb.as_str(): "1"}}), json!({"hugepageLimits": [{"pageSize": climb, "limit": 1}]})]
    {
        let mut bundle = Bundle::new(&["true"]);
        bundle.config["linux"]["resources"] = resources;
        assert!(!bundle.run().status.success());
    }
    assert_eq!(fs::read_to_string(&target).unwrap(), "as it was");
}
