//! Containers by the command line: exit codes, isolation, limits, exec, terminals, seccomp.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    os::{fd::AsFd, unix::fs::symlink},
    process::Command,
};

use common::{Bundle, eventually, possible, text};
use serde_json::json;

#[test]
fn exit_codes_and_messages() {
    if !possible() {
        return;
    }
    let cases: [(&[&str], i32, &str); 7] = [
        (&["true"], 0, ""),
        (&["sh", "-c", "exit 7"], 7, ""),
        (&["nope"], 127, "exec: \"nope\": executable file not found in $PATH"),
        (&["/nope"], 127, "exec: \"/nope\": stat /nope: no such file or directory"),
        (&["/etc/passwd"], 126, "exec: \"/etc/passwd\": permission denied"),
        (&["/etc"], 126, "exec: \"/etc\": is a directory"),
        (&["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"], 143, ""),
    ];
    for (args, code, message) in cases {
        let bundle = Bundle::new(args);
        let output = bundle.run();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(message), "{args:?}: {stderr}");
        assert!(bundle.cgroups().is_empty(), "{args:?} left {:?}", bundle.cgroups());
        assert!(!bundle.dir.path().join("state").join(&bundle.id).exists());
    }
}

#[test]
fn a_container_sees_only_itself() {
    if !possible() {
        return;
    }
    let script = "echo pid $$; hostname; id -u; grep Cap /proc/self/status; grep NoNew /proc/self/status; \
                  ls /proc/acpi /sys/firmware | wc -l; cat /proc/timer_list | wc -c; \
                  touch /x 2>&1; (echo core > /proc/sys/kernel/core_pattern) 2>&1 || echo refused; ls -l /proc/self/fd | wc -l; \
                  cat /proc/self/cgroup | grep -v ':/$' | wc -l; readlink /dev/fd; ls /sys/fs/cgroup";
    let bundle = Bundle::new(&["sh", "-c", script]);
    let output = bundle.run();
    let out = text(&output.stdout);
    for words in [
        "pid 1\n",
        "isopod\n0\n",
        "CapEff:\t0000000020000420",
        "CapBnd:\t0000000020000420",
        "NoNewPrivs:\t1",
        "touch: /x: Read-only file system",
        "core_pattern: Read-only file system",
        "refused",
        "/proc/self/fd\n",
        if common::unified() { "cgroup.procs" } else { "unified" },
    ] {
        assert!(out.contains(words), "{words:?} is not in {out}\n{}", text(&output.stderr));
    }
}

#[test]
fn users_groups_env_and_cwd() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&[
        "sh",
        "-c",
        "id; echo $HOME $PWD; umask; grep -i 'CapEff\\|CapAmb' /proc/self/status; echo x > /dev/stdout",
    ]);
    bundle.config["process"]["user"] = json!({"uid": 33, "gid": 44, "additionalGids": [63, 1000], "umask": 0o77});
    bundle.config["process"]["cwd"] = "/made/up".into();
    bundle.config["root"]["readonly"] = false.into();
    let caps = json!(["CAP_NET_BIND_SERVICE"]);
    bundle.config["process"]["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps});
    let output = bundle.run();
    let out = text(&output.stdout);
    for words in [
        "uid=33",
        "gid=44",
        "groups=63",
        "1000",
        "/www /made/up",
        "0077",
        "CapEff:\t0000000000000400",
        "CapAmb:\t0000000000000400",
        "\nx\n",
    ] {
        assert!(out.contains(words), "{words:?} is not in {out}\n{}", text(&output.stderr));
    }
}

#[test]
fn limits_reach_the_kernel() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.config["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20},
        "cpu": {"shares": 512, "quota": 50000, "period": 100_000},
        "pids": {"limit": 17},
    });
    bundle.start();
    let read = |controller: &str, file: &str| {
        fs::read_to_string(bundle.cgroup(controller).join(file)).unwrap_or_else(|e| e.to_string()).trim().to_owned()
    };
    if !bundle.cgroup("memory").exists() {
        return;
    }
    // One directory in v2, one for each controller in v1.
    let (memory, cpu) = if common::unified() {
        (("memory", "memory.max"), [("cpu.weight", "20"), ("cpu.max", "50000 100000")])
    } else {
        (("memory", "memory.limit_in_bytes"), [("cpu.shares", "512"), ("cpu.cfs_quota_us", "50000")])
    };
    assert_eq!(read(memory.0, memory.1), (64u64 << 20).to_string());
    for (file, value) in cpu {
        assert_eq!(read("cpu", file), value);
    }
    assert_eq!(read("pids", "pids.max"), "17");
    let pid = read("memory", "cgroup.procs");
    if !common::unified() {
        assert!(!read("devices", "devices.list").contains("a *:*"));
        for controller in ["cpu", "pids", "devices", "cpuacct"] {
            assert_eq!(read(controller, "cgroup.procs"), pid, "{controller}");
        }
    }
    // Not among the devices of a container: the controller, not the node, says so.
    let exec =
        bundle.call(&["exec", "--cap", "CAP_MKNOD", &bundle.id, "sh", "-c", "mknod /dev/kmsg2 c 1 11; cat /dev/kmsg2"]);
    assert!(text(&exec.stderr).contains("Operation not permitted"), "{}", text(&exec.stderr));
    let updated =
        bundle.call(&["update", "--memory", "33554432", "--pids-limit", "9", "--cpuset-cpus", "0", &bundle.id]);
    assert!(updated.status.success(), "{}", text(&updated.stderr));
    assert_eq!(read(memory.0, memory.1), "33554432");
    assert_eq!(read("pids", "pids.max"), "9");
    assert_eq!(read("cpuset", "cpuset.cpus"), "0");
    assert_eq!(read("cpuset", "cgroup.procs"), pid);
    assert!(bundle.call(&["delete", "--force", &bundle.id]).status.success());
    assert!(bundle.cgroups().is_empty());
}

#[test]
fn lifecycle_exec_pause_and_states() {
    if !possible() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.02; done"]);
    bundle.start();
    let status = || {
        let state: serde_json::Value = serde_json::from_slice(&bundle.call(&["state", &bundle.id]).stdout).unwrap();
        state["status"].as_str().unwrap().to_owned()
    };
    assert_eq!(status(), "running");
    let exec = bundle.call(&[
        "exec",
        "-e",
        "A=b",
        "--cwd",
        "/bin",
        "--user",
        "web",
        &bundle.id,
        "sh",
        "-c",
        "id; echo $A $PWD $HOME; exit 9",
    ]);
    assert_eq!(exec.status.code(), Some(9), "{}", text(&exec.stderr));
    for words in ["uid=33", "gid=44", "63(audio)", "b /bin /www"] {
        assert!(text(&exec.stdout).contains(words), "{}", text(&exec.stdout));
    }
    let exec = bundle.call(&["exec", &bundle.id, "nope"]);
    assert_eq!(exec.status.code(), Some(127), "{}", text(&exec.stderr));
    assert!(bundle.call(&["pause", &bundle.id]).status.success());
    assert_eq!(status(), "paused");
    assert!(bundle.call(&["resume", &bundle.id]).status.success());
    assert_eq!(status(), "running");
    assert!(!bundle.call(&["start", &bundle.id]).status.success());
    assert!(!bundle.call(&["delete", &bundle.id]).status.success());
    let second = bundle.call(&["create", "--bundle", &bundle.dir.path().to_string_lossy(), &bundle.id]);
    assert!(text(&second.stderr).contains("exists already"));
    assert!(bundle.call(&["kill", &bundle.id, "TERM"]).status.success());
    eventually("stopped", || (status() == "stopped").then_some(()), status);
    assert!(bundle.call(&["delete", &bundle.id]).status.success());
    assert!(bundle.cgroups().is_empty());
}

#[test]
fn a_terminal_and_its_size() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["sh", "-c", "tty; stat -c %t /dev/console; test -t 1 && echo yes"]);
    bundle.config["process"]["terminal"] = true.into();
    let output = bundle.run();
    let out = text(&output.stdout);
    assert!(out.contains("/dev/pts/0") && out.contains("yes"), "{out} {}", text(&output.stderr));
    assert!(out.contains("\r\n"), "{out:?}");
}

#[test]
fn seccomp_refuses_what_the_profile_does() {
    if !possible() {
        return;
    }
    for no_new_privileges in [true, false] {
        let mut bundle =
            Bundle::new(&["sh", "-c", "grep Seccomp: /proc/self/status; mkdir /d && echo made || echo refused"]);
        bundle.config["root"]["readonly"] = false.into();
        bundle.config["process"]["noNewPrivileges"] = no_new_privileges.into();
        let mut profile = serde_json::to_value(isopod_runtime::seccomp::default_profile()).unwrap();
        profile["syscalls"].as_array_mut().unwrap()[0]["names"].as_array_mut().unwrap().retain(|n| n != "mkdir");
        bundle.config["linux"]["seccomp"] = profile;
        let output = bundle.run();
        assert_eq!(text(&output.stdout), "Seccomp:\t2\nrefused\n", "{}", text(&output.stderr));
    }
}

/// A program that makes one system call and exits with minus what it returned.
fn caller(code: &[u8]) -> Vec<u8> {
    let negate_and_exit = [0xf7, 0xd8, 0x89, 0xc7, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05];
    let code = [code, &negate_and_exit[..]].concat();
    let word = |n: u64| n.to_le_bytes();
    let (base, headers) = (0x40_0000u64, 120);
    let mut elf = [&b"\x7fELF\x02\x01\x01"[..], &[0; 9], &[2, 0, 62, 0, 1, 0, 0, 0]].concat();
    elf.extend([word(base + headers), word(64), word(0)].concat());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let size = headers + code.len() as u64;
    elf.extend([word(0), word(base), word(base), word(size), word(size), word(4096)].concat());
    [elf, code].concat()
}

/// `mov eax, number; mov ebx, first; int 0x80`: as a 32-bit program calls.
fn old_call(number: u8, first: u8) -> Vec<u8> {
    caller(&[0xb8, number, 0, 0, 0, 0xbb, first, 0, 0, 0, 0xcd, 0x80])
}

#[test]
fn seccomp_holds_for_calls_of_other_abis() {
    if !possible() {
        return;
    }
    // x32 has the numbers of x86_64 and a bit: mkdir.
    let x32 = caller(&[0xb8, 83, 0, 0, 0x40, 0x31, 0xff, 0x0f, 0x05]);
    let (getpid, mkdir, socket, shmget) = (old_call(20, 0), old_call(39, 0), old_call(102, 1), old_call(117, 23));
    let (killed, refused) = (128 + libc::SIGSYS, 71);
    let run = |program: &[u8], architectures: Option<&[&str]>| {
        let mut bundle = Bundle::new(&["/prog"]);
        // Copied by another process, so that no child holds it open for writing.
        let made = bundle.dir.path().join("prog");
        fs::write(&made, program).unwrap();
        let script = "cp \"$0\" \"$1\" && chmod 755 \"$1\"";
        let target = bundle.rootfs().join("prog");
        assert!(Command::new("sh").args(["-c", script]).arg(made).arg(target).status().unwrap().success());
        if let Some(architectures) = architectures {
            let names = ["mkdir", "socket", "shmget"];
            bundle.config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures,
                "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": refused}]});
        }
        let output = bundle.run();
        output.status.code().unwrap_or_else(|| panic!("{}", text(&output.stderr)))
    };
    assert_eq!(run(&x32, Some(&[])), killed);
    assert_eq!(run(&x32, Some(&["SCMP_ARCH_X32"])), refused);
    if run(&getpid, None) != 255 {
        eprintln!("this kernel runs no 32-bit programs");
        return;
    }
    assert_eq!(run(&getpid, Some(&["SCMP_ARCH_X86_64", "SCMP_ARCH_ARM"])), killed);
    assert_eq!(run(&getpid, Some(&["SCMP_ARCH_X86"])), 255);
    for call in [&mkdir, &socket, &shmget] {
        assert_eq!(run(call, Some(&["SCMP_ARCH_X86"])), refused);
        assert_ne!(run(call, None), refused);
    }
}

#[test]
fn hostile_root_file_systems_fail_closed() {
    if !possible() {
        return;
    }
    // /proc as a symlink: masks would not hold.
    let bundle = Bundle::new(&["true"]);
    fs::create_dir(bundle.rootfs().join("elsewhere")).unwrap();
    symlink("elsewhere", bundle.rootfs().join("proc")).unwrap();
    let output = bundle.run();
    assert!(text(&output.stderr).contains("ordinary directory"), "{}", text(&output.stderr));

    // A volume through a symlink that climbs lands inside the root; one that leads nowhere there is refused.
    let host = tempfile::tempdir().unwrap();
    for (link, mounted) in [(std::path::Path::new("/../../../etc"), true), (host.path(), false)] {
        let mut bundle = Bundle::new(&["cat", "/vol/file"]);
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("file"), "inside").unwrap();
        symlink(link, bundle.rootfs().join("vol")).unwrap();
        let mount = json!({"destination": "/vol", "type": "bind", "source": source.path(), "options": ["rbind", "ro"]});
        bundle.config["mounts"].as_array_mut().unwrap().push(mount);
        let output = bundle.run();
        assert_eq!(text(&output.stdout) == "inside", mounted, "{}", text(&output.stderr));
    }
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0);

    // A mount into procfs would fake the kernel's word.
    let mut bundle = Bundle::new(&["true"]);
    let mount = json!({"destination": "/proc/self/attr", "type": "tmpfs", "source": "tmpfs"});
    bundle.config["mounts"].as_array_mut().unwrap().push(mount);
    assert!(text(&bundle.run().stderr).contains("cannot mount inside /proc"));

    // The working directory as a leaked descriptor.
    for fd in 3..12 {
        let mut bundle = Bundle::new(&["sh", "-c", "ls ../../../../../home ../../../../../usr"]);
        bundle.config["process"]["cwd"] = format!("/proc/self/fd/{fd}").into();
        let output = bundle.run();
        assert_ne!(output.status.code(), Some(0), "{fd}: {}", text(&output.stdout));
        assert_eq!(text(&output.stdout), "", "{fd}");
    }
}

#[test]
fn the_runtime_cannot_be_overwritten_from_inside() {
    if !possible() {
        return;
    }
    // The container runs its own loader's image: the runtime's file through /proc/self/exe.
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.config["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"], "effective": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"], "permitted": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]});
    bundle.start();
    let before = fs::metadata(common::RUNTIME).unwrap().len();
    symlink("/proc/self/exe", bundle.rootfs().join("bin/evil")).unwrap();
    let exec = bundle.call(&["exec", &bundle.id, "/bin/evil", "--version"]);
    // It runs the runtime's own file, which lies on a read-only mount there.
    assert!(exec.status.success(), "{}", text(&exec.stderr));
    assert!(text(&exec.stdout).contains("isopod-runtime"));
    fs::write(bundle.rootfs().join("bin/script"), "#!/proc/self/exe --root=/x exec\n").unwrap();
    let attempt = bundle
        .command(&["exec", &bundle.id, "sh", "-c", "for p in /proc/[0-9]*; do echo x > $p/exe; done"])
        .output()
        .unwrap();
    assert!(!attempt.status.success());
    assert_eq!(fs::metadata(common::RUNTIME).unwrap().len(), before);
}

#[test]
fn preserved_descriptors_pass_and_others_do_not() {
    if !possible() {
        return;
    }
    let bundle = Bundle::new(&["sh", "-c", "ls /proc/self/fd"]);
    bundle.write();
    let file = fs::File::open("/etc/hostname").unwrap();
    let list = |preserve: &str| {
        use std::os::fd::AsRawFd;
        let script = format!(
            "exec 3<&{fd} 4<&{fd} 5<&{fd}; exec {runtime} --root {root} run --preserve-fds {preserve} --bundle {bundle} {id}",
            fd = file.as_fd().as_raw_fd(),
            runtime = common::RUNTIME,
            root = bundle.dir.path().join("state").display(),
            bundle = bundle.dir.path().display(),
            id = bundle.id,
        );
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        text(&output.stdout).split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    // ls itself opens one.
    assert_eq!(list("0"), ["0", "1", "2", "3"]);
    assert_eq!(list("2"), ["0", "1", "2", "3", "4", "5"]);
}

#[test]
fn hooks_run_in_order_with_the_state() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["true"]);
    let log = bundle.dir.path().join("hooks");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat | tr -d '\\n' | grep -o '\"status\":\"[a-z]*\"') >> {}", log.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], "timeout": 5}])
    };
    bundle.config["hooks"] = json!({
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
        "poststart": hook("poststart"), "poststop": hook("poststop"),
    });
    let output = bundle.run();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines: Vec<String> = fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect();
    let expected = [
        "prestart \"status\":\"creating\"",
        "createRuntime \"status\":\"creating\"",
        "poststart \"status\":\"running\"",
        "poststop \"status\":\"stopped\"",
    ];
    assert_eq!(lines, expected);

    let mut failing = Bundle::new(&["true"]);
    failing.config["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 4"]}]});
    let output = failing.run();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("createRuntime hook #0 /bin/sh: exited with 4"), "{}", text(&output.stderr));
    assert!(failing.cgroups().is_empty());
}

#[test]
fn user_namespaces_map_ids() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["sh", "-c", "id -u; cat /proc/self/uid_map | tr -s ' '; ls -l /dev/null"]);
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    bundle.config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    bundle.config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let open = |path: &std::path::Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    open(bundle.dir.path());
    let status =
        std::process::Command::new("chown").args(["-R", "100000:100000"]).arg(bundle.rootfs()).status().unwrap();
    assert!(status.success());
    let output = bundle.run();
    assert!(
        text(&output.stdout).starts_with("0\n 0 100000 65536\n"),
        "{} {}",
        text(&output.stdout),
        text(&output.stderr)
    );
    assert!(output.status.success());
}
