//! What the configuration asks of the machine and of this process before anything runs.

use std::fs;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::KubeletConfiguration;

/// Kernel settings upstream wants, below /proc/sys.
const KERNEL: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Refuses a machine that the configuration forbids.
pub(crate) fn check(k: &KubeletConfiguration) -> Result<(), String> {
    let swap = fs::read_to_string("/proc/swaps").unwrap_or_default().lines().count() > 1;
    if k.fail_swap_on && swap {
        return Err("swap is on and failSwapOn is true: turn swap off or set failSwapOn: false".into());
    }
    if k.fail_cgroup_v1 && !fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap_or(false) {
        return Err(
            "this machine has cgroup v1 and failCgroupV1 is true: boot with cgroup v2 or set failCgroupV1: false"
                .into(),
        );
    }
    if k.protect_kernel_defaults {
        differing(|name| fs::read_to_string(format!("/proc/sys/{name}")).ok())?;
    }
    Ok(())
}

fn differing(read: impl Fn(&str) -> Option<String>) -> Result<(), String> {
    let wrong = KERNEL.iter().find_map(|(name, want)| {
        let is = read(name)?;
        (is.trim() != *want).then(|| format!("{} is {}, want {want}", name.replace('/', "."), is.trim()))
    });
    match wrong {
        Some(what) => Err(format!("protectKernelDefaults is true and {what}: set it with sysctl")),
        None => Ok(()),
    }
}

/// Gives this process its limits; what the kernel refuses is told once.
pub(crate) fn settle(k: &KubeletConfiguration) {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", k.oom_score_adj.to_string()) {
        tracing::info!(%error, wanted = k.oom_score_adj, "the agent keeps its oom_score_adj");
    }
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < k.max_open_files
        && setrlimit(Resource::RLIMIT_NOFILE, k.max_open_files, hard.max(k.max_open_files)).is_err()
    {
        // What is allowed without privilege.
        let reached = k.max_open_files.min(hard);
        if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, reached, hard) {
            tracing::info!(%error, soft, "the agent keeps its limit of open files");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_settings_are_compared() {
        let right = |name: &str| KERNEL.iter().find(|(n, _)| *n == name).map(|(_, v)| format!("{v}\n"));
        assert_eq!(differing(right), Ok(()));
        let error = differing(|name| if name == "kernel/panic" { Some("0".into()) } else { right(name) }).unwrap_err();
        assert_eq!(error, "protectKernelDefaults is true and kernel.panic is 0, want 10: set it with sysctl");
        // A setting that this kernel does not have cannot be wrong.
        assert_eq!(differing(|_| None), Ok(()));
    }

    #[test]
    fn a_machine_is_refused_by_the_name_of_the_field() {
        let k = KubeletConfiguration { fail_cgroup_v1: true, ..KubeletConfiguration::default() };
        let v1 = !fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap();
        assert_eq!(check(&k).is_err_and(|e| e.contains("failCgroupV1")), v1);
        assert_eq!(check(&KubeletConfiguration::default()), Ok(()));
    }
}
