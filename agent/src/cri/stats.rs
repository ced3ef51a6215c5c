//! What sandboxes and containers use, read when somebody asks.

use std::fs;

use super::view::{Container, Group, Sandbox};
use crate::{
    cgroups::Usage,
    context::Context,
    grpc::proto::cri::{
        ContainerAttributes, ContainerStats, CpuUsage, FilesystemIdentifier, FilesystemUsage, IoUsage,
        LinuxPodSandboxStats, MemoryUsage, NamespaceMode, NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes,
        PodSandboxStats, ProcessUsage, PsiData, PsiStats, SwapUsage, UInt64Value,
    },
    pods::state::now,
    stats,
};

fn value(value: Option<u64>) -> Option<UInt64Value> {
    value.map(|value| UInt64Value { value })
}

/// How long a group's tasks waited for a resource.
fn psi(ctx: &Context, group: &str, resource: &str) -> Option<PsiStats> {
    let told = stats::psi(ctx.cgroups.pressure(group, resource));
    let data = |kind: &str| {
        let d = &told[kind];
        let of = |key: &str| d[key].as_f64().unwrap_or_default();
        Some(PsiData { total: d["total"].as_u64()?, avg10: of("avg10"), avg60: of("avg60"), avg300: of("avg300") })
    };
    Some(PsiStats { full: data("full"), some: Some(data("some")?) })
}

fn cpu(ctx: &Context, group: &str, u: &Usage) -> CpuUsage {
    CpuUsage {
        timestamp: now(),
        usage_core_nano_seconds: value(u.cpu_nanos),
        usage_nano_cores: value(u.cpu_nanos.and_then(|n| ctx.stats.rate(group, n))),
        psi: psi(ctx, group, "cpu"),
    }
}

fn memory(ctx: &Context, group: &str, u: &Usage) -> MemoryUsage {
    let free = u.memory_limit.zip(u.memory_working_set).map(|(limit, used)| limit.saturating_sub(used));
    MemoryUsage {
        timestamp: now(),
        working_set_bytes: value(u.memory_working_set),
        available_bytes: value(free),
        usage_bytes: value(u.memory_usage),
        rss_bytes: value(u.memory_rss),
        page_faults: value(u.page_faults),
        major_page_faults: value(u.major_page_faults),
        psi: psi(ctx, group, "memory"),
    }
}

/// A directory tree's use of its file system.
pub(super) fn file_system(mountpoint: String, bytes: u64, inodes: u64) -> FilesystemUsage {
    FilesystemUsage {
        timestamp: now(),
        fs_id: Some(FilesystemIdentifier { mountpoint }),
        used_bytes: value(Some(bytes)),
        inodes_used: value(Some(inodes)),
    }
}

/// A container's.
pub(super) fn container(ctx: &Context, c: &Container) -> ContainerStats {
    let u = ctx.cgroups.usage(&c.cgroup);
    let layer = ctx.stats.disk(c.bundle.join("upper"));
    ContainerStats {
        attributes: Some(ContainerAttributes {
            id: c.id.clone(),
            metadata: Some(c.metadata.clone()),
            labels: c.labels.clone(),
            annotations: c.annotations.clone(),
        }),
        cpu: Some(cpu(ctx, &c.cgroup, &u)),
        memory: Some(memory(ctx, &c.cgroup, &u)),
        writable_layer: Some(file_system(ctx.config.paths.pods().display().to_string(), layer.bytes, layer.inodes)),
        swap: u.swap.map(|used| SwapUsage {
            timestamp: now(),
            swap_available_bytes: value(u.swap_limit.map(|limit| limit.saturating_sub(used))),
            swap_usage_bytes: value(Some(used)),
        }),
        io: psi(ctx, &c.cgroup, "io").map(|psi| IoUsage { timestamp: now(), psi: Some(psi) }),
    }
}

/// A sandbox's, with all that runs in it.
pub(super) fn sandbox(ctx: &Context, g: &Group) -> PodSandboxStats {
    let s = &g.sandbox;
    let u = ctx.cgroups.usage(&s.cgroup);
    let running = g.containers.iter().filter(|c| c.running().is_ok());
    PodSandboxStats {
        attributes: Some(PodSandboxAttributes {
            id: s.id.clone(),
            metadata: Some(s.metadata.clone()),
            labels: s.labels.clone(),
            annotations: s.annotations.clone(),
        }),
        linux: Some(LinuxPodSandboxStats {
            cpu: Some(cpu(ctx, &s.cgroup, &u)),
            memory: Some(memory(ctx, &s.cgroup, &u)),
            network: network(ctx, s),
            process: Some(ProcessUsage { timestamp: now(), process_count: value(u.processes) }),
            containers: running.map(|c| container(ctx, c)).collect(),
        }),
    }
}

fn network(ctx: &Context, s: &Sandbox) -> Option<NetworkUsage> {
    if s.namespaces.network == i32::from(NamespaceMode::Node) {
        return None;
    }
    let text = fs::read_to_string(stats::pod_net_dev(ctx, &s.uid)?).ok()?;
    let one = |(name, n): (String, [u64; 16])| NetworkInterfaceUsage {
        name,
        rx_bytes: value(Some(n[0])),
        rx_errors: value(Some(n[2])),
        tx_bytes: value(Some(n[8])),
        tx_errors: value(Some(n[10])),
    };
    let mut interfaces: Vec<_> = stats::interfaces(&text).into_iter().map(one).collect();
    let main = interfaces.iter().position(|i| i.name == "eth0");
    let default_interface = main.map(|at| interfaces.remove(at));
    Some(NetworkUsage { timestamp: now(), default_interface, interfaces })
}
