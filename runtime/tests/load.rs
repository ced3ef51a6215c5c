//! The supervisor under load: floods of output, rotation in the middle of them, a full disk, many restarts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Instant};

use common::{Bundle, eventually, pod::Pod, possible};
use isopod_runtime::supervisor::protocol::{Op, PidMode};

/// Runs a container to its end; its exit code.
fn run(pod: &mut Pod, bundle: &Bundle) -> i32 {
    pod.create(bundle, false, false);
    pod.start(bundle);
    pod.ended().exit.unwrap().code
}

/// The log and its rotated parts, the oldest first.
fn files(log: &Path) -> Vec<std::path::PathBuf> {
    let name = log.file_name().unwrap().to_string_lossy().into_owned();
    let all = fs::read_dir(log.parent().unwrap()).unwrap().map(|e| e.unwrap().path());
    let mut rotated: Vec<_> =
        all.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with(&format!("{name}."))).collect();
    rotated.sort();
    rotated.push(log.to_owned());
    rotated
}

#[test]
fn rotation_in_a_flood_loses_and_tears_nothing() {
    if !possible() {
        return;
    }
    let mut pod = Pod::with_rotation(PidMode::Container, 1 << 20, 1000);
    pod.call(Op::Subscribe).unwrap();
    let bundle = pod.bundle(&["sh", "-c", "seq 1 300000; seq 300001 400000 >&2"]);
    assert_eq!(run(&mut pod, &bundle), 0);
    let files = files(&pod.log(&bundle));
    assert!(files.len() > 10, "{} files", files.len());
    let mut next = [1, 300_001];
    for file in files {
        assert!(fs::metadata(&file).unwrap().len() <= 1 << 20);
        let whole = fs::read_to_string(&file).unwrap();
        assert!(whole.ends_with('\n'), "{} is torn", file.display());
        for line in whole.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [time, stream, tag, number] = fields[..] else { panic!("{line:?}") };
            let next = &mut next[usize::from(stream == "stderr")];
            assert_eq!((time.len(), tag, number.parse()), (30, "F", Ok(*next)), "{line:?} in {}", file.display());
            *next += 1;
        }
    }
    assert_eq!(next, [300_001, 400_001]);
}

#[test]
fn output_is_taken_as_fast_as_it_comes() {
    if !possible() {
        return;
    }
    let mut pod = Pod::with_rotation(PidMode::Container, 10 << 20, 3);
    pod.call(Op::Subscribe).unwrap();
    // From a file: busybox's yes and head are slower than the supervisor.
    let line = format!("{}\n", "x".repeat(127));
    let (file, times) = (64 << 20, 8);
    let copies = " /flood".repeat(times);
    let bundle = pod.bundle(&["sh", "-c", &format!("cat{copies}")]);
    fs::write(bundle.rootfs().join("flood"), line.repeat(file / line.len())).unwrap();
    pod.create(&bundle, false, false);
    let started = Instant::now();
    pod.start(&bundle);
    assert_eq!(pod.ended().exit.unwrap().code, 0);
    let rate = ((file * times) >> 20) as f64 / started.elapsed().as_secs_f64();
    eprintln!("{rate:.0} MB/s of 128-byte lines");
    assert!(files(&pod.log(&bundle)).len() == 3);
}

#[test]
fn a_full_disk_holds_nobody_up() {
    if !possible() {
        return;
    }
    // Its own mount table: the small file system goes with this test.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .unwrap();
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let small = pod.dir.path().join("small");
    fs::create_dir(&small).unwrap();
    rustix::mount::mount("tmpfs", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=1m")).unwrap();
    let bundle = pod.bundle(&["sh", "-c", "seq 1 200000; read x < /first; read x < /second; seq 200001 200010"]);
    // Two, so that the second is not entered while the first is still open for writing.
    let gates = ["first", "second"].map(|name| bundle.rootfs().join(name));
    for gate in &gates {
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o666));
        rustix::fs::mknodat(rustix::fs::CWD, gate, kind, mode, 0).unwrap();
    }
    let log = small.join("log");
    fs::write(&log, "").unwrap();
    // The pod's log lies on the small file system.
    std::os::unix::fs::symlink(&log, pod.log(&bundle)).unwrap();
    pod.create(&bundle, false, false);
    pod.start(&bundle);
    // 200,000 lines are 9 MB: the container goes on all the same, up to its gate.
    fs::write(&gates[0], "go\n").unwrap();
    let full = fs::read_to_string(&log).unwrap();
    assert!(full.len() > 900_000 && full.ends_with('\n'), "{} bytes", full.len());
    assert!(full.lines().all(|l| l.split(' ').count() == 4), "a line is torn");
    // With room again it is written again: the lines after the second gate.
    fs::File::options().write(true).open(&log).unwrap().set_len(0).unwrap();
    fs::write(&gates[1], "go\n").unwrap();
    assert_eq!(pod.ended().exit.unwrap().code, 0);
    let last = fs::read_to_string(&log).unwrap();
    assert!(last.ends_with(" 200010\n") && last.trim_start_matches('\0').lines().count() == 10, "{last:?}");
}

#[test]
fn restarts_leak_nothing() {
    if !possible() {
        return;
    }
    let restarts: usize = std::env::var("ISOPOD_RESTARTS").map_or(200, |n| n.parse().unwrap());
    let mut pod = Pod::new(PidMode::Container);
    pod.call(Op::Subscribe).unwrap();
    let supervisor = fs::read_to_string(pod.dir.path().join("supervisor.pid")).unwrap();
    let proc = Path::new("/proc").join(supervisor.trim());
    let group = common::groups(&pod.cgroup).remove(0);
    let anonymous = || {
        let rollup = fs::read_to_string(proc.join("smaps_rollup")).unwrap();
        let line = rollup.lines().find(|l| l.starts_with("Anonymous:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let state = || {
        (
            fs::read_dir(proc.join("fd")).unwrap().count(),
            fs::read_to_string(proc.join("mountinfo")).unwrap().lines().count(),
            fs::metadata(&group).unwrap().nlink(),
            fs::read_to_string(proc.join("task").join(supervisor.trim()).join("children")).unwrap(),
        )
    };
    let bundle = pod.bundle(&["sh", "-c", "echo out; echo err >&2"]);
    let mut once = || {
        assert_eq!(run(&mut pod, &bundle), 0);
        pod.call(Op::Delete { container: bundle.id.clone() }).unwrap();
    };
    // What is allocated once is no leak.
    (0..20).for_each(|_| once());
    let (before, memory) = (state(), anonymous());
    (0..restarts).for_each(|_| once());
    eventually("as before", || (state() == before).then_some(()), || format!("{before:?} {:?}", state()));
    assert!(anonymous() <= memory + 64, "{memory} KiB became {} KiB", anonymous());
    eprintln!("{restarts} restarts: {before:?}, {memory} to {} KiB", anonymous());
}

/// `cargo test --release -p isopod-runtime --test load private_memory -- --nocapture` prints what the documentation says.
#[test]
fn private_memory_with_one_and_ten_containers() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new(PidMode::Container);
    let pid = fs::read_to_string(pod.dir.path().join("supervisor.pid")).unwrap().trim().to_owned();
    let mut bundles = vec![];
    for count in [1, 10] {
        while bundles.len() < count {
            let bundle = pod.bundle(&["sh", "-c", "echo hello; sleep 1000"]);
            pod.create(&bundle, false, false);
            pod.start(&bundle);
            bundles.push(bundle);
        }
        let said = || bundles.iter().all(|b| !pod.entries(b).is_empty()).then_some(());
        eventually("all have logged", said, String::new);
        let look = || {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
            let of = |key: &str| -> u64 {
                let line = rollup.lines().find(|l| l.starts_with(key)).unwrap();
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            };
            [of("Private_Clean:"), of("Private_Dirty:"), of("Anonymous:")]
        };
        // Pages of an executable the linker has only just written are dirty until the kernel writes them back.
        let small = || Some(look()).filter(|[clean, dirty, _]| clean + dirty < 1024);
        let [clean, dirty, own] = eventually("it is small", small, || format!("{:?}", look()));
        eprintln!(
            "{count} containers: private {} KiB (clean {clean}, dirty {dirty}), anonymous {own} KiB",
            clean + dirty
        );
    }
}
