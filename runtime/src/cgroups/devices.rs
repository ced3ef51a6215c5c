//! The device controller: rules to v1 files or to a v2 BPF program.

use std::{fs::File, os::fd::AsFd, path::Path};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{
    error::{Context, Error, Result},
    sys,
};

/// One rule; `None` is any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    allow: bool,
    kind: Option<char>,
    major: Option<i64>,
    minor: Option<i64>,
    access: String,
}

impl Rule {
    fn new(allow: bool, kind: Option<char>, major: Option<i64>, minor: Option<i64>, access: &str) -> Self {
        Self { allow, kind, major, minor, access: access.to_owned() }
    }

    fn is_all(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none()
    }

    /// The line of devices.allow and devices.deny.
    fn line(&self) -> String {
        let number = |n: Option<i64>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let kind = self.kind.unwrap_or('a');
        format!("{kind} {}:{} {}", number(self.major), number(self.minor), self.access)
    }
}

/// The rules of a container: deny all, the configured ones, then the devices every container may use.
pub(super) fn rules(configured: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    let mut rules = vec![Rule::new(false, None, None, None, "rwm")];
    for rule in configured {
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => Some('b'),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some('c'),
            _ => None,
        };
        let number = |n: Option<i64>| n.filter(|&n| n >= 0);
        let access = rule.access().as_deref().filter(|a| !a.is_empty()).unwrap_or("rwm");
        rules.push(Rule::new(rule.allow(), kind, number(rule.major()), number(rule.minor()), access));
    }
    if rules.last().is_some_and(|r| r.allow && r.is_all()) {
        return rules;
    }
    for kind in ['c', 'b'] {
        rules.push(Rule::new(true, Some(kind), None, None, "m"));
    }
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(Rule::new(true, Some('c'), Some(major), Some(minor), "rwm"));
    }
    rules.push(Rule::new(true, Some('c'), Some(136), None, "rwm"));
    rules
}

/// Writes the rules in order.
pub(super) fn apply_v1(dir: &Path, rules: &[Rule]) -> Result<()> {
    use std::io::Write;
    let open = |name: &str| {
        File::options().write(true).open(dir.join(name)).context(|| format!("open {}", dir.join(name).display()))
    };
    let (mut allow, mut deny) = (open("devices.allow")?, open("devices.deny")?);
    // A new group already allows everything its parent allows.
    let rules = if rules.iter().any(|r| r.allow && r.is_all()) && rules.len() == 2 { &[] } else { rules };
    for rule in rules {
        let file = if rule.allow { &mut allow } else { &mut deny };
        let line = if rule.is_all() { "a".to_owned() } else { rule.line() };
        file.write_all(line.as_bytes())
            .map_err(|e| Error::system(format!("device rule {:?} in {}", rule.line(), dir.display()), e))?;
    }
    Ok(())
}

/// Loads and attaches the rules as a program.
pub(super) fn apply_v2(dir: &Path, rules: &[Rule]) -> Result<()> {
    let program = sys::load_device_program(&program(rules)).context(|| "load device program".into())?;
    let cgroup = File::open(dir).context(|| format!("open {}", dir.display()))?;
    sys::attach_device_program(cgroup.as_fd(), program.as_fd())
        .context(|| format!("attach device program to {}", dir.display()))
}

/// eBPF: the context is `{ access_type: u32 (access << 16 | type), major: u32, minor: u32 }`; r0 = 1 allows.
///
/// The last matching rule decides, so rules are tested from the last to the first.
fn program(rules: &[Rule]) -> Vec<u64> {
    const LDX_W: u8 = 0x61;
    const AND32_K: u8 = 0x54;
    const RSH32_K: u8 = 0x74;
    const MOV32_X: u8 = 0xbc;
    const MOV64_K: u8 = 0xb7;
    const JNE_K: u8 = 0x55;
    const JNE_X: u8 = 0x5d;
    const EXIT: u8 = 0x95;
    let ins = |op: u8, dst: u8, src: u8, off: i16, imm: i32| -> u64 {
        u64::from(op) | u64::from(dst | src << 4) << 8 | u64::from(off as u16) << 16 | u64::from(imm as u32) << 32
    };
    // r2 = type, r3 = access, r4 = major, r5 = minor
    let mut out = vec![
        ins(LDX_W, 2, 1, 0, 0),
        ins(AND32_K, 2, 0, 0, 0xffff),
        ins(LDX_W, 3, 1, 0, 0),
        ins(RSH32_K, 3, 0, 0, 16),
        ins(LDX_W, 4, 1, 4, 0),
        ins(LDX_W, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // Conditions first collected, so that each knows how far the end is.
        let mut conditions: Vec<(u8, u8, u8, i32)> = vec![];
        if let Some(kind) = rule.kind {
            conditions.push((JNE_K, 2, 0, if kind == 'b' { 1 } else { 2 }));
        }
        let mut access = 0;
        for (letter, bit) in [('m', 1), ('r', 2), ('w', 4)] {
            if rule.access.contains(letter) {
                access |= bit;
            }
        }
        let check_access = access != 7;
        if let Some(major) = rule.major {
            conditions.push((JNE_K, 4, 0, major as i32));
        }
        if let Some(minor) = rule.minor {
            conditions.push((JNE_K, 5, 0, minor as i32));
        }
        let body = conditions.len() + if check_access { 3 } else { 0 };
        let mut left = body + 2;
        for (op, dst, src, imm) in conditions {
            left -= 1;
            out.push(ins(op, dst, src, left as i16, imm));
        }
        if check_access {
            // (access & allowed) == access for allow rules; any overlap is denied by the same test on deny rules.
            out.push(ins(MOV32_X, 6, 3, 0, 0));
            out.push(ins(AND32_K, 6, 0, 0, access));
            out.push(ins(JNE_X, 6, 3, 2, 0));
        }
        out.push(ins(MOV64_K, 0, 0, 0, i32::from(rule.allow)));
        out.push(ins(EXIT, 0, 0, 0, 0));
        if body == 0 {
            // Nothing earlier can matter, and the verifier refuses unreachable code.
            return out;
        }
    }
    out.push(ins(MOV64_K, 0, 0, 0, 0));
    out.push(ins(EXIT, 0, 0, 0, 0));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_rules_start_closed() {
        let rules = rules(&[]);
        assert_eq!(rules[0].line(), "a *:* rwm");
        assert!(!rules[0].allow);
        assert!(rules.iter().any(|r| r.line() == "c 1:3 rwm" && r.allow));
        assert!(rules.iter().any(|r| r.line() == "c 136:* rwm"));
    }

    #[test]
    fn allow_all_stays_allow_all() {
        let all: Vec<LinuxDeviceCgroup> =
            serde_json::from_value(serde_json::json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert_eq!(rules(&all).len(), 2);
    }

    #[test]
    fn the_kernel_accepts_the_program() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        if let Err(e) = sys::load_device_program(&program(&rules(&[]))) {
            assert!(matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)), "verifier: {e}");
            assert_eq!(e.raw_os_error(), Some(libc::EPERM), "the verifier refuses the program");
        }
    }
}
