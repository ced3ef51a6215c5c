//! `features`: what this runtime supports. Each list is that of the code which takes the words, or a test compares them.

use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    mount_options, spec,
};

/// Names of seccomp's architectures. Calls come of three of them; the others' names are known and change nothing.
const ARCHITECTURES: [&str; 23] = [
    "AARCH64",
    "ARM",
    "LOONGARCH64",
    "M68K",
    "MIPS",
    "MIPS64",
    "MIPS64N32",
    "MIPSEL",
    "MIPSEL64",
    "MIPSEL64N32",
    "PARISC",
    "PARISC64",
    "PPC",
    "PPC64",
    "PPC64LE",
    "RISCV64",
    "S390",
    "S390X",
    "SH",
    "SHEB",
    "X32",
    "X86",
    "X86_64",
];

/// Prints the specification's features document.
pub(super) fn features() -> Result<()> {
    println!("{}", serde_json::to_string_pretty(&document()).map_err(|e| Error::invalid(e.to_string()))?);
    Ok(())
}

fn document() -> Value {
    let seccomp_flags = [
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        "SECCOMP_FILTER_FLAG_TSYNC",
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
    ];
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": spec::VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": mount_options::words(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": caps::all().iter().map(ToString::to_string).collect::<std::collections::BTreeSet<_>>(),
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE",
                ],
                "archs": ARCHITECTURES.map(|name| format!("SCMP_ARCH_{name}")),
                "knownFlags": seccomp_flags,
                "supportedFlags": seccomp_flags,
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": true, "schemata": true, "monitoring": true},
            "memoryPolicy": {
                "modes": [
                    "MPOL_BIND", "MPOL_DEFAULT", "MPOL_INTERLEAVE", "MPOL_LOCAL", "MPOL_PREFERRED",
                    "MPOL_PREFERRED_MANY", "MPOL_WEIGHTED_INTERLEAVE",
                ],
                "flags": ["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"],
            },
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": true},
        },
        "annotations": {
            "org.isopod.runtime.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.runc.checkpoint.enabled": "false",
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use oci_spec::runtime as oci;
    use serde::de::DeserializeOwned;

    use super::*;

    /// Every word the parser of `T` takes, by what it says to one it does not.
    fn taken<T: DeserializeOwned + std::fmt::Debug>() -> BTreeSet<String> {
        let refusal = serde_json::from_str::<T>("\"nosuch\"").unwrap_err().to_string();
        let (_, expected) = refusal.split_once("expected").unwrap();
        expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    fn listed(pointer: &str) -> BTreeSet<String> {
        let document = document();
        let list = document.pointer(pointer).unwrap().as_array().unwrap();
        list.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_lists_are_what_is_taken() {
        let lists = [
            ("/linux/namespaces", taken::<oci::LinuxNamespaceType>()),
            ("/linux/seccomp/actions", taken::<oci::LinuxSeccompAction>()),
            ("/linux/seccomp/operators", taken::<oci::LinuxSeccompOperator>()),
            ("/linux/seccomp/knownFlags", taken::<oci::LinuxSeccompFilterFlag>()),
            ("/linux/memoryPolicy/modes", taken::<oci::MemoryPolicyModeType>()),
            ("/linux/memoryPolicy/flags", taken::<oci::MemoryPolicyFlagType>()),
        ];
        for (pointer, taken) in lists {
            assert_eq!(listed(pointer), taken, "{pointer}");
        }
        for name in listed("/linux/capabilities") {
            serde_json::from_value::<oci::Capability>(name.into()).unwrap();
        }
        let all: Value = listed("/hooks").into_iter().map(|name| (name, json!([{"path": "/x"}]))).collect();
        let hooks: oci::Hooks = serde_json::from_value(all.clone()).unwrap();
        assert_eq!(serde_json::to_value(hooks).unwrap(), all);
    }

    #[test]
    fn every_architecture_may_be_named() {
        let listed = listed("/linux/seccomp/archs");
        // NATIVE is no name of the specification.
        let all = taken::<oci::Arch>().into_iter().filter(|name| name != "SCMP_ARCH_NATIVE");
        assert_eq!(listed, all.collect::<BTreeSet<_>>());
        for name in listed {
            let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", name]});
            crate::seccomp::compile(&serde_json::from_value(profile).unwrap()).unwrap();
        }
    }

    #[test]
    fn the_document_is_the_specifications() {
        let parsed: oci::Features = serde_json::from_value(document()).unwrap();
        let version = |text: &String| text.split('.').map(|n| n.parse::<u32>().unwrap()).collect::<Vec<_>>();
        assert!(version(parsed.oci_version_min()) <= version(parsed.oci_version_max()));
        // Nothing of ours that the specification does not know.
        let again = serde_json::to_value(&parsed).unwrap();
        fn within(ours: &Value, known: &Value, at: &str) {
            for (key, value) in ours.as_object().into_iter().flatten() {
                assert!(!known[key].is_null(), "{at}/{key} is not in the specification");
                within(value, &known[key], &format!("{at}/{key}"));
            }
        }
        within(&document(), &again, "");
    }
}
