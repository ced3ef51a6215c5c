//! cgroup v2 control files.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::{
    Usage,
    control::{all_keyed, apply_alike, check_before, keyed, read_number, write},
};
use crate::error::{Context, Error, Result};

/// Delegates controllers down to the parent of `path`. Best effort: what is refused shows when a limit is written.
pub(super) fn enable_controllers(mount_point: &Path, path: &Path, controllers: &[String]) {
    let mut level = PathBuf::from(mount_point);
    let parts = path.strip_prefix("/").unwrap_or(path);
    for part in parts {
        let file = level.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for controller in controllers {
            if !enabled.split_whitespace().any(|e| e == controller) {
                drop(fs::write(&file, format!("+{controller}")));
            }
        }
        level.push(part);
    }
}

/// Writes the limits of the available controllers.
pub(super) fn apply(dir: &Path, controllers: &[String], resources: &LinuxResources) -> Result<()> {
    for controller in controllers {
        match controller.as_str() {
            "memory" => resources.memory().as_ref().map_or(Ok(()), |m| memory(dir, m))?,
            "cpu" => resources.cpu().as_ref().map_or(Ok(()), |c| cpu(dir, c))?,
            "io" => resources.block_io().as_ref().map_or(Ok(()), |b| block_io(dir, b))?,
            "hugetlb" => resources.hugepage_limits().iter().flatten().try_for_each(|page| huge_pages(dir, page))?,
            other => apply_alike(dir, other, resources)?,
        }
    }
    Ok(())
}

fn huge_pages(dir: &Path, page: &LinuxHugepageLimit) -> Result<()> {
    let value = page.limit().to_string();
    write(&dir.join(format!("hugetlb.{}.max", page.page_size())), &value)?;
    // Reservations too, where the kernel counts them: otherwise they can exceed the limit and fault later.
    let reserved = dir.join(format!("hugetlb.{}.rsvd.max", page.page_size()));
    if reserved.exists() { write(&reserved, &value) } else { Ok(()) }
}

/// Whether the section says anything.
pub(super) fn memory_asked(memory: &LinuxMemory) -> bool {
    [memory.limit(), memory.reservation(), memory.swap(), memory.kernel_tcp()].iter().any(|v| v.is_some_and(|v| v > 0))
}

/// Whether the section asks for more than a set of processors.
pub(super) fn cpu_asked(cpu: &LinuxCpu) -> bool {
    cpu.shares().is_some_and(|v| v != 0)
        || cpu.quota().is_some_and(|v| v > 0)
        || cpu.burst().is_some_and(|v| v != 0)
        || cpu.idle().is_some_and(|v| v != 0)
        || cpu.realtime_runtime().is_some_and(|v| v != 0)
}

/// Whether the section asks for a set of processors.
pub(super) fn cpuset_asked(cpu: &LinuxCpu) -> bool {
    [cpu.cpus(), cpu.mems()].iter().any(|list| list.as_ref().is_some_and(|l| !l.is_empty()))
}

/// Whether the section says anything.
pub(super) fn block_io_asked(io: &LinuxBlockIo) -> bool {
    let throttles = [
        io.throttle_read_bps_device(),
        io.throttle_write_bps_device(),
        io.throttle_read_iops_device(),
        io.throttle_write_iops_device(),
    ];
    io.weight().is_some_and(|w| w != 0)
        || io.leaf_weight().is_some_and(|w| w != 0)
        || io.weight_device().as_ref().is_some_and(|d| !d.is_empty())
        || throttles.iter().any(|t| t.as_ref().is_some_and(|t| !t.is_empty()))
}

fn only_v1(what: &str) -> Error {
    Error::invalid(format!("linux.resources.{what} exists in cgroup v1 only, and this is v2"))
}

/// Shares (2 to 262144) as a weight (1 to 10000), by the formula all runtimes use: 1024 shares are weight 39.
pub(crate) fn weight_of_shares(shares: u64) -> u64 {
    if shares == 0 {
        return 0;
    }
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// The v2 swap limit, which excludes memory, of v1's memory+swap.
pub(crate) fn swap_of(memory_and_swap: i64, limit: i64) -> Result<Option<i64>> {
    match (memory_and_swap, limit) {
        // As in v1, where no limit of memory means none of both.
        (0, -1) => Ok(Some(-1)),
        (0, _) => Ok(None),
        (-1, _) => Ok(Some(-1)),
        (total, limit) if limit <= 0 => Err(Error::invalid(format!("memory+swap limit {total} needs a memory limit"))),
        (total, limit) if total < limit => {
            Err(Error::invalid(format!("memory+swap limit {total} is below the memory limit {limit}")))
        }
        (total, limit) => Ok(Some(total - limit)),
    }
}

fn max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory(dir: &Path, memory: &LinuxMemory) -> Result<()> {
    let limit = memory.limit().unwrap_or(0);
    if memory.swappiness().is_some() {
        return Err(only_v1("memory.swappiness"));
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(only_v1("memory.disableOOMKiller"));
    }
    if memory.kernel_tcp().is_some_and(|t| t > 0) {
        return Err(only_v1("memory.kernelTCP"));
    }
    check_before(memory, &dir.join("memory.current"))?;
    if let Some(swap) = swap_of(memory.swap().unwrap_or(0), limit)? {
        let file = dir.join("memory.swap.max");
        if file.exists() {
            write(&file, &max(swap))?;
        }
    }
    if limit != 0 {
        write(&dir.join("memory.max"), &max(limit))?;
    }
    if let Some(reservation) = memory.reservation().filter(|&r| r != 0) {
        write(&dir.join("memory.low"), &max(reservation))?;
    }
    Ok(())
}

fn cpu(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|r| r != 0) || cpu.realtime_period().is_some_and(|p| p != 0) {
        return Err(only_v1("cpu.realtimeRuntime and realtimePeriod"));
    }
    if let Some(idle) = cpu.idle() {
        write(&dir.join("cpu.idle"), &idle.to_string())?;
    }
    if let Some(shares) = cpu.shares().filter(|&s| s != 0) {
        write(&dir.join("cpu.weight"), &weight_of_shares(shares).to_string())?;
    }
    let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
    if quota != 0 || period != 0 {
        let quota = if quota > 0 { quota.to_string() } else { "max".to_owned() };
        let value = if period > 0 { format!("{quota} {period}") } else { quota };
        // A smaller burst may have to go first: it may never exceed the quota.
        if let Some(burst) = cpu.burst() {
            drop(fs::write(dir.join("cpu.max.burst"), burst.to_string()));
        }
        write(&dir.join("cpu.max"), &value)?;
    }
    if let Some(burst) = cpu.burst() {
        write(&dir.join("cpu.max.burst"), &burst.to_string())?;
    }
    Ok(())
}

/// 10 to 1000 becomes 1 to 10000.
fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight).saturating_sub(10) * 9999 / 990
}

fn block_io(dir: &Path, io: &LinuxBlockIo) -> Result<()> {
    if let Some(weight) = io.weight().filter(|&w| w != 0) {
        if dir.join("io.bfq.weight").exists() {
            write(&dir.join("io.bfq.weight"), &weight.to_string())?;
        } else {
            write(&dir.join("io.weight"), &format!("default {}", io_weight(weight)))?;
        }
    }
    if io.leaf_weight().is_some_and(|w| w != 0) {
        return Err(only_v1("blockIO.leafWeight"));
    }
    for device in io.weight_device().iter().flatten() {
        if device.leaf_weight().is_some_and(|w| w != 0) {
            return Err(only_v1("blockIO.weightDevice.leafWeight"));
        }
        let Some(weight) = device.weight().filter(|&w| w != 0) else { continue };
        let (major, minor) = (device.major(), device.minor());
        if dir.join("io.bfq.weight").exists() {
            write(&dir.join("io.bfq.weight"), &format!("{major}:{minor} {weight}"))?;
        } else {
            write(&dir.join("io.weight"), &format!("{major}:{minor} {}", io_weight(weight)))?;
        }
    }
    let throttles = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let line = format!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
            write(&dir.join("io.max"), &line)?;
        }
    }
    Ok(())
}

/// Stops or continues the group and waits for the kernel's word that it is so.
pub(super) fn freeze(dir: &Path, frozen: bool) -> Result<()> {
    write(&dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let file = dir.join("cgroup.events");
    let wanted = if frozen { "frozen 1" } else { "frozen 0" };
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let events = fs::File::open(&file).context(|| format!("open {}", file.display()))?;
        let text = std::io::read_to_string(&events).context(|| format!("read {}", file.display()))?;
        if text.contains(wanted) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::state(format!("cgroup {} does not reach {wanted:?}", dir.display())));
        }
        // The file signals a change since it was read as exceptional.
        let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let _ = rustix::event::poll(&mut [PollFd::new(&events.as_fd(), PollFlags::PRI)], Some(&timeout));
    }
}

/// Reads the use of the available controllers.
pub(super) fn usage(dir: &Path, controllers: &[String], usage: &mut Usage) {
    for controller in controllers {
        match controller.as_str() {
            "memory" => {
                usage.memory_bytes = read_number(&dir.join("memory.current"));
                usage.memory_limit = read_number(&dir.join("memory.max"));
                usage.memory_stat = all_keyed(&dir.join("memory.stat"));
            }
            "cpu" => {
                let file = dir.join("cpu.stat");
                usage.cpu_ns = keyed(&file, "usage_usec") * 1000;
                usage.cpu_user_ns = keyed(&file, "user_usec") * 1000;
                usage.cpu_system_ns = keyed(&file, "system_usec") * 1000;
                usage.throttled_periods = keyed(&file, "nr_throttled");
            }
            "pids" => {
                usage.pids = read_number(&dir.join("pids.current"));
                usage.pids_limit = read_number(&dir.join("pids.max"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights_as_upstream() {
        let cases = [(0, 0), (2, 1), (1024, 39), (262_144, 10_000), (1, 1), (999_999, 10_000), (512, 20)];
        for (shares, weight) in cases {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
    }

    #[test]
    fn swap_excludes_memory() {
        assert_eq!(swap_of(0, 100).unwrap(), None);
        assert_eq!(swap_of(0, -1).unwrap(), Some(-1));
        assert_eq!(swap_of(-1, 100).unwrap(), Some(-1));
        assert_eq!(swap_of(150, 100).unwrap(), Some(50));
        assert_eq!(swap_of(100, 100).unwrap(), Some(0));
        assert!(swap_of(50, 100).is_err());
        assert!(swap_of(50, 0).is_err());
    }
}
