//! `linux.memoryPolicy`: which memory nodes the container's processes are served from.

use oci_spec::runtime::{LinuxMemoryPolicy, MemoryPolicyFlagType, MemoryPolicyModeType};

use crate::{
    cpu_list,
    error::{Context, Error, Result},
    sys,
};

/// The nodes of a policy as the kernel's bit mask.
fn mask(policy: &LinuxMemoryPolicy) -> Result<Vec<u64>> {
    let Some(list) = policy.nodes().as_deref().filter(|l| !l.is_empty()) else { return Ok(vec![]) };
    let nodes = cpu_list::parse(list).map_err(|e| e.within("linux.memoryPolicy.nodes"))?;
    let mut mask = vec![0; nodes.iter().max().map_or(0, |n| n / 64 + 1)];
    for node in nodes {
        mask[node / 64] |= 1 << (node % 64);
    }
    Ok(mask)
}

/// Refuses nodes that are no list, or that the mode has no use for.
pub(crate) fn validate(policy: &LinuxMemoryPolicy) -> Result<()> {
    let nodes = !mask(policy)?.is_empty();
    match policy.mode() {
        MemoryPolicyModeType::MpolDefault | MemoryPolicyModeType::MpolLocal if nodes => {
            Err(Error::invalid(format!("linux.memoryPolicy: {} takes no nodes", policy.mode())))
        }
        _ => Ok(()),
    }
}

/// Sets it for this process and what it becomes.
pub(crate) fn apply(policy: &LinuxMemoryPolicy) -> Result<()> {
    let mode = match policy.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    let flags = policy.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
                MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
                MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
            }
    });
    sys::set_memory_policy(mode | flags, &mask(policy)?).context(|| "set linux.memoryPolicy".into())
}
