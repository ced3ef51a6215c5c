//! cgroup v1 control files.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{
    Usage,
    control::{all_keyed, apply_alike, check_before, keyed, read_number, write},
};
use crate::error::{Error, Result};

/// Controllers every container joins: they account for it or confine it.
pub(super) fn always(controller: &str) -> bool {
    matches!(controller, "memory" | "pids" | "cpuacct" | "devices")
}

/// Whether the resources need the controller.
pub(super) fn wanted(controller: &str, resources: Option<&LinuxResources>, v2_freezer: bool) -> bool {
    if controller == "freezer" {
        return !v2_freezer;
    }
    let Some(resources) = resources else { return false };
    let cpu = resources.cpu().as_ref();
    match controller {
        "cpu" => cpu.is_some_and(|c| {
            c.shares().is_some()
                || c.quota().is_some()
                || c.period().is_some()
                || c.burst().is_some()
                || c.idle().is_some()
                || c.realtime_runtime().is_some()
                || c.realtime_period().is_some()
        }),
        "cpuset" => cpu.is_some_and(|c| {
            c.cpus().as_ref().is_some_and(|s| !s.is_empty()) || c.mems().as_ref().is_some_and(|s| !s.is_empty())
        }),
        "blkio" => resources.block_io().is_some(),
        "hugetlb" => resources.hugepage_limits().as_ref().is_some_and(|h| !h.is_empty()),
        "net_cls" => resources.network().as_ref().is_some_and(|n| n.class_id().is_some()),
        "net_prio" => resources.network().as_ref().is_some_and(|n| n.priorities().is_some()),
        "rdma" => resources.rdma().is_some(),
        _ => false,
    }
}

/// A new cpuset group is empty and unusable until it has its parent's processors and memory nodes.
pub(super) fn inherit_cpuset(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let current = fs::read_to_string(dir.join(file))?;
        if current.trim().is_empty() {
            let inherited = fs::read_to_string(parent.join(file))?;
            fs::write(dir.join(file), inherited.trim())?;
        }
    }
    Ok(())
}

/// Writes the limits of the hierarchy's controllers.
pub(super) fn apply(dir: &Path, controllers: &[String], resources: &LinuxResources) -> Result<()> {
    for controller in controllers {
        match controller.as_str() {
            "memory" => resources.memory().as_ref().map_or(Ok(()), |m| memory(dir, m))?,
            "cpu" => resources.cpu().as_ref().map_or(Ok(()), |c| cpu(dir, c))?,
            "blkio" => resources.block_io().as_ref().map_or(Ok(()), |b| block_io(dir, b))?,
            "hugetlb" => {
                for page in resources.hugepage_limits().iter().flatten() {
                    let file = format!("hugetlb.{}.limit_in_bytes", page.page_size());
                    write(&dir.join(file), &page.limit().to_string())?;
                }
            }
            "net_cls" => {
                if let Some(class) = resources.network().as_ref().and_then(|n| n.class_id()) {
                    write(&dir.join("net_cls.classid"), &class.to_string())?;
                }
            }
            "net_prio" => {
                for priority in resources.network().iter().filter_map(|n| n.priorities().as_ref()).flatten() {
                    let line = format!("{} {}", priority.name(), priority.priority());
                    write(&dir.join("net_prio.ifpriomap"), &line)?;
                }
            }
            other => apply_alike(dir, other, resources)?,
        }
    }
    Ok(())
}

fn memory(dir: &Path, memory: &LinuxMemory) -> Result<()> {
    let limit = memory.limit().filter(|&l| l != 0);
    let swap = memory.swap().filter(|&s| s != 0);
    check_before(memory, &dir.join("memory.usage_in_bytes"))?;
    let set_limit = |value: i64| write(&dir.join("memory.limit_in_bytes"), &value.to_string());
    let set_swap = |value: i64| {
        let file = dir.join("memory.memsw.limit_in_bytes");
        // Without swap accounting there is no such file, and nothing to limit.
        if file.exists() { write(&file, &value.to_string()) } else { Ok(()) }
    };
    match (limit, swap) {
        (Some(limit), Some(swap)) => {
            if swap > 0 && limit > swap {
                return Err(Error::invalid(format!("memory+swap limit {swap} is below the memory limit {limit}")));
            }
            // limit <= memory+swap must hold after each write: grow the outer one first.
            let current = read_number(&dir.join("memory.memsw.limit_in_bytes"));
            if swap < 0 || current < limit as u64 {
                set_swap(swap)?;
                set_limit(limit)?;
            } else {
                set_limit(limit)?;
                set_swap(swap)?;
            }
        }
        (Some(limit), None) => {
            if limit < 0 {
                set_swap(-1)?;
            }
            set_limit(limit)?;
        }
        (None, Some(swap)) => set_swap(swap)?,
        (None, None) => {}
    }
    if let Some(reservation) = memory.reservation().filter(|&r| r != 0) {
        write(&dir.join("memory.soft_limit_in_bytes"), &reservation.to_string())?;
    }
    if let Some(tcp) = memory.kernel_tcp().filter(|&t| t != 0) {
        write(&dir.join("memory.kmem.tcp.limit_in_bytes"), &tcp.to_string())?;
    }
    if memory.disable_oom_killer() == Some(true) {
        write(&dir.join("memory.oom_control"), "1")?;
    }
    if let Some(swappiness) = memory.swappiness() {
        write(&dir.join("memory.swappiness"), &swappiness.to_string())?;
    }
    Ok(())
}

fn cpu(dir: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(idle) = cpu.idle() {
        write(&dir.join("cpu.idle"), &idle.to_string())?;
    }
    if let Some(shares) = cpu.shares().filter(|&s| s != 0) {
        write(&dir.join("cpu.shares"), &shares.to_string())?;
    }
    if let Some(period) = cpu.period().filter(|&p| p != 0) {
        // With the old quota the new period may exceed the parent's share; the quota then goes first.
        if write(&dir.join("cpu.cfs_period_us"), &period.to_string()).is_err() {
            if let Some(quota) = cpu.quota().filter(|&q| q != 0) {
                write(&dir.join("cpu.cfs_quota_us"), &quota.to_string())?;
            }
            write(&dir.join("cpu.cfs_period_us"), &period.to_string())?;
        }
    }
    if let Some(quota) = cpu.quota().filter(|&q| q != 0) {
        write(&dir.join("cpu.cfs_quota_us"), &quota.to_string())?;
    }
    if let Some(burst) = cpu.burst() {
        write(&dir.join("cpu.cfs_burst_us"), &burst.to_string())?;
    }
    if let Some(period) = cpu.realtime_period().filter(|&p| p != 0) {
        write(&dir.join("cpu.rt_period_us"), &period.to_string())?;
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|&r| r != 0) {
        write(&dir.join("cpu.rt_runtime_us"), &runtime.to_string())?;
    }
    Ok(())
}

fn block_io(dir: &Path, io: &LinuxBlockIo) -> Result<()> {
    let weight_file = if dir.join("blkio.bfq.weight").exists() { "blkio.bfq.weight" } else { "blkio.weight" };
    if let Some(weight) = io.weight().filter(|&w| w != 0) {
        write(&dir.join(weight_file), &weight.to_string())?;
    }
    if let Some(weight) = io.leaf_weight().filter(|&w| w != 0) {
        write(&dir.join("blkio.leaf_weight"), &weight.to_string())?;
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.leaf_weight().filter(|&w| w != 0) {
            let line = format!("{}:{} {weight}", device.major(), device.minor());
            write(&dir.join("blkio.leaf_weight_device"), &line)?;
        }
        if let Some(weight) = device.weight() {
            let line = format!("{}:{} {weight}", device.major(), device.minor());
            write(&dir.join(format!("{weight_file}_device")), &line)?;
        }
    }
    let throttles = [
        ("blkio.throttle.read_bps_device", io.throttle_read_bps_device()),
        ("blkio.throttle.write_bps_device", io.throttle_write_bps_device()),
        ("blkio.throttle.read_iops_device", io.throttle_read_iops_device()),
        ("blkio.throttle.write_iops_device", io.throttle_write_iops_device()),
    ];
    for (file, devices) in throttles {
        for device in devices.iter().flatten() {
            let line = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            write(&dir.join(file), &line)?;
        }
    }
    Ok(())
}

/// Stops or continues the group; a freeze can need several attempts while processes fork.
pub(super) fn freeze(dir: &Path, frozen: bool) -> Result<()> {
    let file = dir.join("freezer.state");
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        write(&file, wanted)?;
        let state = fs::read_to_string(&file).unwrap_or_default();
        if state.trim() == wanted {
            return Ok(());
        }
        if Instant::now() > deadline {
            write(&file, "THAWED")?;
            return Err(Error::state(format!("{} stays {}", file.display(), state.trim())));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reads the use of the hierarchy's controllers.
pub(super) fn usage(dir: &Path, controllers: &[String], usage: &mut Usage) {
    for controller in controllers {
        match controller.as_str() {
            "memory" => {
                usage.memory_bytes = read_number(&dir.join("memory.usage_in_bytes"));
                usage.memory_limit = read_number(&dir.join("memory.limit_in_bytes"));
                usage.memory_stat = all_keyed(&dir.join("memory.stat"));
            }
            "cpuacct" => {
                usage.cpu_ns = read_number(&dir.join("cpuacct.usage"));
                usage.cpu_user_ns = read_number(&dir.join("cpuacct.usage_user"));
                usage.cpu_system_ns = read_number(&dir.join("cpuacct.usage_sys"));
            }
            "cpu" => usage.throttled_periods = keyed(&dir.join("cpu.stat"), "nr_throttled"),
            "pids" => {
                usage.pids = read_number(&dir.join("pids.current"));
                usage.pids_limit = read_number(&dir.join("pids.max"));
            }
            _ => {}
        }
    }
}
