//! Control files and directories: the small operations every hierarchy shares.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxRdma, LinuxResources};
use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error, Result};

/// A path in the hierarchy mounted at `mount_point`.
pub(super) fn below(mount_point: &Path, path: &Path) -> PathBuf {
    mount_point.join(path.strip_prefix("/").unwrap_or(path))
}

/// mkdir -p below a mount point, telling `made` of each new level.
pub(super) fn make(mount_point: &Path, path: &Path, mut made: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let whole = below(mount_point, path);
    match fs::create_dir(&whole) {
        Ok(()) => return made(&whole),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut level = mount_point.to_path_buf();
    for part in path.strip_prefix("/").unwrap_or(path) {
        level.push(part);
        match fs::create_dir(&level) {
            Ok(()) => made(&level)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes a control file in one write.
pub(super) fn write(file: &Path, value: &str) -> Result<()> {
    rustix::fs::open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|fd| rustix::io::write(fd, value.as_bytes()))
        .map(drop)
        .context(|| format!("write {value:?} to {}", file.display()))
}

/// The number a file holds; 0 where there is none or it says "max".
pub(super) fn read_number(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// The value after `key` in a file of `key value` lines.
pub(super) fn keyed(file: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .find(|(k, _)| *k == key)
        .and_then(|(_, v)| v.trim().parse().ok())
        .unwrap_or(0)
}

/// All numbers of a file of `key value` lines.
pub(super) fn all_keyed(file: &Path) -> HashMap<String, u64> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .filter_map(|(k, v)| Some((k.to_owned(), v.trim().parse().ok()?)))
        .collect()
}

/// Writes the limits of a controller that is the same in v1 and v2.
pub(super) fn apply_alike(dir: &Path, controller: &str, resources: &LinuxResources) -> Result<()> {
    match controller {
        "cpuset" => resources.cpu().as_ref().map_or(Ok(()), |c| cpuset(dir, c)),
        "pids" => resources.pids().as_ref().map_or(Ok(()), |pids| {
            let limit = pids.limit();
            write(&dir.join("pids.max"), &if limit <= 0 { "max".to_owned() } else { limit.to_string() })
        }),
        "rdma" => resources
            .rdma()
            .iter()
            .flatten()
            .try_for_each(|(device, limit)| write(&dir.join("rdma.max"), &rdma_line(device, limit))),
        _ => Ok(()),
    }
}

fn cpuset(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(cpus) = cpu.cpus().as_ref().filter(|c| !c.is_empty()) {
        write(&dir.join("cpuset.cpus"), cpus)?;
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|m| !m.is_empty()) {
        write(&dir.join("cpuset.mems"), mems)?;
    }
    Ok(())
}

fn rdma_line(device: &str, limit: &LinuxRdma) -> String {
    let limits = [("hca_handle", limit.hca_handles()), ("hca_object", limit.hca_objects())];
    let words = limits.into_iter().filter_map(|(key, value)| Some(format!(" {key}={}", value?)));
    format!("{device}{}", words.collect::<String>())
}

/// With `checkBeforeUpdate` a limit below what is in use is an error instead of an OOM kill.
pub(super) fn check_before(memory: &LinuxMemory, usage: &Path) -> Result<()> {
    let limit = memory.limit().filter(|&l| l > 0 && memory.check_before_update() == Some(true));
    let used = read_number(usage);
    match limit {
        Some(limit) if used > limit as u64 => {
            Err(Error::state(format!("memory limit {limit} is below what is in use ({used})")))
        }
        _ => Ok(()),
    }
}

/// Processes of a group and those below.
pub(super) fn collect(dir: &Path, pids: &mut Vec<i32>, depth: usize) -> io::Result<()> {
    let text = fs::read_to_string(dir.join("cgroup.procs"))?;
    // 0 is a process of no namespace of ours; a signal to 0 goes to ourselves.
    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
    if depth < 32 {
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                match collect(&entry.path(), pids, depth + 1) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// Removes a group; those below it first. A process just reaped may keep it busy for a moment.
pub(super) fn remove_dir(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut pause = Duration::from_micros(100);
    loop {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                    if entry.file_type().is_ok_and(|t| t.is_dir()) {
                        remove_dir(&entry.path())?;
                    }
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}
