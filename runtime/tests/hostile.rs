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
    time::{Duration, Instant},
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
    // Each time it holds the file of an entering process open it says so; it must have had its chances.
    let script = "while :; do for p in /proc/[0-9]*; do \
                  (exec 9<$p/exe; [ $(stat -L -c %i /proc/self/fd/9) = $0 ] || exit; echo held >> /held; \
                  sleep 0.05; echo overwritten > /proc/self/fd/9; echo overwritten > $p/exe) 2>/dev/null; done; done";
    let mut bundle = Bundle::new(&[]);
    // A copy of the runtime of its own: should it be overwritten, then only this one.
    let runtime = bundle.dir.path().join("isopod-runtime");
    fs::copy(common::RUNTIME, &runtime).unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&runtime).unwrap());
    bundle.config["process"]["args"] = json!(["sh", "-c", script, inode.to_string()]);
    bundle.config["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"],
        "effective": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"], "permitted": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]});
    symlink("/proc/self/exe", bundle.rootfs().join("bin/evil")).unwrap();
    bundle.config["root"]["readonly"] = false.into();
    let before = fs::read(&runtime).unwrap();
    bundle.start();
    let exec = |args: &[&str]| {
        let mut command = Command::new(&runtime);
        command.arg("--root").arg(bundle.dir.path().join("state")).args(["exec", &bundle.id]).args(args);
        command.output().unwrap()
    };
    let held = || fs::read_to_string(bundle.rootfs().join("held")).unwrap_or_default().lines().count();
    let chances = || {
        // It runs the runtime itself, slow enough to be caught, and the ordinary way.
        let evil = exec(&["/bin/evil", "--root", "/none", "exec", "none", "true"]);
        assert!(text(&evil.stderr).contains("does not exist"), "{}", text(&evil.stderr));
        exec(&["true"]);
        (held() >= 3).then_some(())
    };
    common::eventually("the runtime's file is held open from inside", chances, || format!("{} times", held()));
    assert!(fs::read(&runtime).unwrap() == before, "the runtime was overwritten");
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
    // The same from a directory of the container's works, so the refusals above are about the directory.
    let inside = bundle.call(&["exec", "--cwd", "/bin", &bundle.id, "sh", "-c", "ls ./busybox"]);
    assert_eq!(text(&inside.stdout), "./busybox\n", "{}", text(&inside.stderr));
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

/// Says stop when it goes, also in a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Swaps two names for each other without end while `attempt` is called, until it says `true`.
#[track_caller]
fn racing(a: &Path, b: &Path, what: &str, mut attempt: impl FnMut() -> bool) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                // A name may be missing for now: the runtime is yet to make it.
                let _ = rustix::fs::renameat_with(rustix::fs::CWD, a, rustix::fs::CWD, b, flags);
            }
        });
        let _stop = Stop(&stop);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !attempt() {
            assert!(Instant::now() < deadline, "{what}: never");
        }
    });
}

#[test]
fn a_parallel_writer_wins_nothing() {
    if !possible() {
        return;
    }
    // The image is shared with another container that swaps a directory and a link to the host for each other.
    let host = tempfile::tempdir().unwrap();
    let source = tempfile::tempdir().unwrap();
    let mut bundle = Bundle::new(&["cat", "/proc/self/mountinfo"]);
    let (shown, other) = (bundle.rootfs().join("vol"), bundle.rootfs().join("other"));
    fs::create_dir(&shown).unwrap();
    symlink(host.path(), &other).unwrap();
    // The race is a real one: who walks the path by name ends on the host soon.
    racing(&shown, &other, "a naive walk escapes", || {
        drop(fs::create_dir_all(shown.join("naive/walk")));
        host.path().join("naive").exists()
    });
    fs::remove_dir_all(host.path().join("naive")).unwrap();
    for name in ["deep/er", "file"] {
        let source = if name == "file" { Path::new(common::RUNTIME) } else { source.path() };
        mount(
            &mut bundle,
            json!({"destination": format!("/vol/{name}"), "type": "bind", "source": source, "options": ["bind"]}),
        );
    }
    // Both must happen: containers that came in time and run, with their volumes, and such that met the link.
    let (mut ran, mut refused) = (0, 0);
    racing(&shown, &other, "containers run and are refused", || {
        let output = bundle.run();
        if output.status.success() {
            assert_eq!(text(&output.stdout).matches("/deep/er ").count(), 1, "{}", text(&output.stdout));
            ran += 1;
        } else {
            assert!(text(&output.stderr).contains("mount bind on /vol/"), "{}", text(&output.stderr));
            refused += 1;
        }
        assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0, "something was made on the host");
        ran >= 20 && refused >= 20
    });
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(&*host.path().to_string_lossy()));
}

#[test]
fn a_procfs_that_is_moved_takes_its_masks_along() {
    if !possible() {
        return;
    }
    // CVE-2019-19921, CVE-2023-28642, CVE-2025-31133: what is masked by name is not what is mounted.
    let script = "for d in /proc /decoy /elsewhere; do if [ -e $d/self/status ]; then \
                  echo timers $(cat $d/timer_list | wc -c); (: >> $d/sys/kernel/core_pattern) 2>/dev/null && echo writable; fi; done; \
                  echo end";
    let mut bundle = Bundle::new(&["sh", "-c", script]);
    bundle.config["linux"]["maskedPaths"] = json!(["/proc/timer_list"]);
    without_mount(&mut bundle, "/sys");
    without_mount(&mut bundle, "/sys/fs/cgroup");
    let root = bundle.rootfs();
    fs::create_dir_all(root.join("decoy/sys/kernel")).unwrap();
    fs::write(root.join("decoy/timer_list"), "").unwrap();
    fs::create_dir(root.join("proc")).unwrap();
    symlink("decoy", root.join("elsewhere")).unwrap();
    // Without masks the script would tell.
    let protected = std::mem::take(&mut bundle.config["linux"]["readonlyPaths"]);
    bundle.config["linux"]["maskedPaths"] = json!([]);
    let bare = text(&bundle.run().stdout);
    assert!(bare.contains("writable") && !bare.contains("timers 0"), "{bare}");
    (bundle.config["linux"]["readonlyPaths"], bundle.config["linux"]["maskedPaths"]) =
        (protected, json!(["/proc/timer_list"]));
    let (mut seen, mut refused) = (0, 0);
    racing(&root.join("proc"), &root.join("elsewhere"), "containers run and are refused", || {
        let output = bundle.run();
        let out = text(&output.stdout);
        assert!(!out.contains("writable"), "{out}");
        assert!(out.lines().all(|l| matches!(l, "timers 0" | "end")), "{out}");
        seen += usize::from(out.contains("timers 0"));
        refused += usize::from(!output.status.success());
        seen >= 20 && refused >= 20
    });
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
    // A masked path that the image, or an earlier mount, made a link: what it shows inside is what is covered.
    let script = "ls -A /etc /proc/timer_list; cat /secret /hidden; stat -c %t,%T /hidden; cat /etc/passwd";
    let mut bundle = Bundle::new(&["sh", "-c", script]);
    let fake = tempfile::tempdir().unwrap();
    symlink("/etc", fake.path().join("timer_list")).unwrap();
    without_mount(&mut bundle, "/proc");
    mount(&mut bundle, json!({"destination": "/proc", "type": "bind", "source": fake.path(), "options": ["bind"]}));
    symlink("../../../../../../../../hidden", bundle.rootfs().join("secret")).unwrap();
    fs::write(bundle.rootfs().join("hidden"), "the secret").unwrap();
    bundle.config["linux"]["maskedPaths"] = json!(["/proc/timer_list", "/secret"]);
    let (etc, hosts) = (fs::read_dir("/etc").unwrap().count(), fs::read("/etc/passwd").unwrap());
    let output = bundle.run();
    let out = text(&output.stdout);
    assert_eq!(out, "/etc:\n\n/proc/timer_list:\n1,3\n", "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("cat: can't open '/etc/passwd'"), "{}", text(&output.stderr));
    assert_eq!(fs::read_dir("/etc").unwrap().count(), etc);
    assert_eq!(fs::read("/etc/passwd").unwrap(), hosts);
    // Links of procfs itself lead nowhere else.
    for (path, words) in [("/proc/self/root/etc", "open /proc/self/root/etc"), ("/proc/1/cwd", "open /proc/1/cwd")] {
        let mut bundle = Bundle::new(&["true"]);
        bundle.config["linux"]["maskedPaths"] = json!([path]);
        refused(&bundle, words);
    }
}

#[test]
fn a_made_device_is_not_led_elsewhere() {
    if !possible() {
        return;
    }
    // Whoever swaps a link for a node just made would have had the link's target get the node's mode.
    let host = tempfile::tempdir().unwrap();
    let victim = host.path().join("victim");
    fs::write(&victim, "").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let mut bundle = Bundle::new(&["sh", "-c", "stat -c %a /dev/mine"]);
    without_mount(&mut bundle, "/dev");
    bundle.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev/"));
    bundle.config["root"]["readonly"] = false.into();
    bundle.config["linux"]["devices"] =
        json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0, "gid": 0}]);
    fs::create_dir(bundle.rootfs().join("dev")).unwrap();
    let (node, link) = (bundle.rootfs().join("dev/mine"), bundle.rootfs().join("link"));
    symlink(&victim, &link).unwrap();
    let (mut ran, mut met) = (0, 0);
    racing(&node, &link, "nodes are made and links met", || {
        match bundle.run().status.success() {
            true => ran += 1,
            false => met += 1,
        }
        ran >= 20 && met >= 20
    });
    assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
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
    assert_eq!(text(&exec("web").stdout), "Uid:\t33\t33\t33\t33\n");
    put(&|p| assert!(Command::new("mkfifo").arg(p).status().unwrap().success()));
    assert!(text(&exec("web").stderr).contains("no regular file"));
    put(&|p| fs::create_dir(p).unwrap());
    assert!(text(&exec("web").stderr).contains("no regular file"));
    // The host's users are none of the container's.
    put(&|p| symlink("../../../../../../../../etc/passwd", p).unwrap());
    assert!(
        text(&exec("daemon").stderr).contains("too many levels of symbolic links"),
        "{}",
        text(&exec("daemon").stderr)
    );
    put(&|p| symlink("/proc/1/root/etc/group", p).unwrap());
    assert!(text(&exec("web").stderr).contains("too many levels of symbolic links"));
    // A group file of the same kind, and home directories that are none.
    put(&|p| fs::write(p, "web:x:33:44::/www:/bin/sh\n").unwrap());
    let group = bundle.rootfs().join("etc/group");
    fs::remove_file(&group).unwrap();
    assert!(Command::new("mkfifo").arg(&group).status().unwrap().success());
    assert!(text(&exec("web").stderr).contains("/etc/group in the container is no regular file"));
    fs::remove_file(&group).unwrap();
    // More groups than the kernel takes: an error, not a truncated list.
    fs::write(&group, (0..70_000).map(|g| format!("g{g}:x:{g}:web\n")).collect::<String>()).unwrap();
    assert!(text(&exec("web").stderr).contains("set 70000 additional groups"), "{}", text(&exec("web").stderr));
    fs::remove_file(&group).unwrap();
    put(&|p| fs::write(p, "web:x:-1:0::/:\nweb:x:4294967296:0::/:\n\0\0:::::::\n").unwrap());
    assert!(text(&exec("web").stderr).contains("malformed uid"));
    // Sparse and endless: read up to a bound.
    put(&|p| fs::File::create(p).unwrap().set_len(1 << 40).unwrap());
    assert!(text(&exec("web").stderr).contains("unable to find user web"));
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
    // Errors stay errors, however long the names in them are.
    let mut long = Bundle::new(&["true"]);
    long.config["process"]["args"] = json!(["/x".repeat(60_000)]);
    refused(&long, "exec: \"/x/x");
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
    for (resources, words) in [
        (json!({"unified": {climb.as_str(): "1"}}), "unified"),
        (json!({"hugepageLimits": [{"pageSize": climb, "limit": 1}]}), "malformed pageSize"),
        (json!({"rdma": {climb.as_str(): {"hcaHandles": 1}}}), "rdma"),
    ] {
        let mut bundle = Bundle::new(&["true"]);
        bundle.config["linux"]["resources"] = resources;
        refused(&bundle, words);
    }
    // The group below its own that an exec asks for.
    let bundle = Bundle::new(&["sleep", "1000"]);
    bundle.start();
    for path in ["..", "../..", "a/../../..", "/.."] {
        let output = bundle.call(&["exec", "--cgroup", path, &bundle.id, "true"]);
        assert!(text(&output.stderr).contains("cgroup path"), "{path}: {}", text(&output.stderr));
    }
    assert_eq!(fs::read_to_string(&target).unwrap(), "as it was");
}
