//! From an OCI seccomp profile to one BPF program.
//!
//! Per architecture the call numbers are cut into ranges of equal treatment and searched as a binary tree, so that a
//! call costs about nine comparisons, not hundreds. Example: allow 0..=3 and 5, refuse the rest becomes
//! `nr >= 4 ? (nr >= 6 ? refuse : nr >= 5 ? allow : refuse) : allow`.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Operator,
};

use super::{
    profile,
    table::{NONE, SYSCALLS},
};
use crate::{
    error::{Error, Result},
    sys::SockFilter,
};

const LD_ABS: u16 = 0x20;
const JMP_JA: u16 = 0x05;
const JMP_JEQ: u16 = 0x15;
const JMP_JGT: u16 = 0x25;
const JMP_JGE: u16 = 0x35;
const ALU_AND: u16 = 0x54;
const RET: u16 = 0x06;

const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_NOTIFY: u32 = 0x7fc0_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// A compiled profile.
#[derive(Debug, Clone)]
pub struct Program {
    /// The filter.
    pub instructions: Vec<SockFilter>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
    /// Whether a call can be handed to a listener.
    pub notifies: bool,
}

/// One rule for one call: all of `args` must hold.
#[derive(Debug, Clone)]
struct Rule {
    args: Vec<LinuxSeccompArg>,
    action: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Abi {
    X86_64,
    X86,
    X32,
}

/// Compiles `profile`.
///
/// # Errors
/// When it names an argument that does not exist or is too much for one program.
pub fn compile(profile: &LinuxSeccomp) -> Result<Program> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let abis = abis(profile);
    let mut notifies = profile.default_action() == Action::ScmpActNotify;
    let mut rules: BTreeMap<&str, Vec<Rule>> = BTreeMap::new();
    for syscall in profile.syscalls().iter().flatten() {
        let action = action(syscall.action(), syscall.errno_ret());
        notifies |= syscall.action() == Action::ScmpActNotify;
        if action == default {
            continue;
        }
        let args = syscall.args().as_deref().unwrap_or_default();
        if let Some(bad) = args.iter().find(|a| a.index() > 5) {
            return Err(Error::invalid(format!("seccomp: system calls have no argument {}", bad.index())));
        }
        for name in syscall.names() {
            let entry = rules.entry(name).or_default();
            let repeated = (0..6).any(|i| args.iter().filter(|a| a.index() == i).count() > 1);
            if repeated {
                // The same argument twice means either, as every other runtime reads it.
                entry.extend(args.iter().map(|a| Rule { args: vec![*a], action }));
            } else {
                entry.push(Rule { args: args.to_vec(), action });
            }
        }
    }
    let mut instructions = program(&abis, &rules, default)?;
    if instructions.len() > 4096 {
        return Err(Error::invalid(format!("seccomp: the profile needs {} instructions of 4096", instructions.len())));
    }
    instructions.shrink_to_fit();
    Ok(Program { instructions, flags: flags(profile, notifies), notifies })
}

fn flags(profile: &LinuxSeccomp, notifies: bool) -> u64 {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            Flag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            Flag::SeccompFilterFlagWaitKillableRecv => 1 << 5,
        };
    }
    if notifies {
        // TSYNC and a listener exclude each other; a process about to execute has one thread anyway.
        flags = flags & !libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    } else {
        flags &= !(1 << 5);
    }
    flags
}

/// The machine's own always, and those named; of other machines' no call comes.
fn abis(profile: &LinuxSeccomp) -> Vec<Abi> {
    let named = |arch| profile.architectures().iter().flatten().any(|a| *a == arch);
    let mut abis = vec![Abi::X86_64];
    abis.extend(named(Arch::ScmpArchX86).then_some(Abi::X86));
    abis.extend(named(Arch::ScmpArchX32).then_some(Abi::X32));
    abis
}

fn action(action: Action, errno: Option<u32>) -> u32 {
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => RET_KILL_THREAD,
        Action::ScmpActKillProcess => RET_KILL_PROCESS,
        Action::ScmpActTrap => RET_TRAP,
        Action::ScmpActErrno => RET_ERRNO | errno.unwrap_or(libc::EPERM as u32) & 0xffff,
        Action::ScmpActNotify => RET_NOTIFY,
        Action::ScmpActTrace => RET_TRACE | errno.unwrap_or(libc::EPERM as u32) & 0xffff,
        Action::ScmpActLog => RET_LOG,
        Action::ScmpActAllow => RET_ALLOW,
    }
}

fn program(abis: &[Abi], rules: &BTreeMap<&str, Vec<Rule>>, default: u32) -> Result<Vec<SockFilter>> {
    let has = |abi| abis.contains(&abi);
    let foreign = vec![ret(RET_KILL_THREAD)];
    // x86_64 and x32 share an audit architecture; the marker bit of the number tells them apart.
    let native = if has(Abi::X86_64) { search(Abi::X86_64, rules, default)? } else { foreign.clone() };
    let x32 = if has(Abi::X32) { search(Abi::X32, rules, default)? } else { foreign.clone() };
    let x86 = if has(Abi::X86) { search(Abi::X86, rules, default)? } else { foreign.clone() };
    let mut wide = vec![load(OFFSET_NR)];
    wide.extend(branch(JMP_JGE, X32_BIT, x32, native));
    let mut narrow = vec![load(OFFSET_NR)];
    narrow.extend(x86);
    let mut out = vec![load(OFFSET_ARCH)];
    let rest = branch(JMP_JEQ, AUDIT_ARCH_I386, narrow, foreign);
    out.extend(branch(JMP_JEQ, AUDIT_ARCH_X86_64, wide, rest));
    Ok(out)
}

/// What happens to a range of numbers.
#[derive(Clone)]
enum Treatment {
    Return(u32),
    Rules(Vec<Rule>),
}

/// What 32-bit programs may also reach through one call, told by its first argument (what follows is behind a pointer).
const SOCKETCALL: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];
const IPC: [&str; 24] = [
    "semop",
    "semget",
    "semctl",
    "semtimedop",
    "",
    "",
    "",
    "",
    "",
    "",
    "msgsnd",
    "msgrcv",
    "msgget",
    "msgctl",
    "",
    "",
    "",
    "",
    "",
    "",
    "shmat",
    "shmdt",
    "shmget",
    "shmctl",
];

/// Adds to the rules for `socketcall` and `ipc` those for the calls behind them. A rule with conditions on arguments that no
/// filter can read there adds none, as with libseccomp.
fn with_gates<'a>(rules: &BTreeMap<&'a str, Vec<Rule>>) -> BTreeMap<&'a str, Vec<Rule>> {
    let mut all = rules.clone();
    for (gate, members) in [("socketcall", &SOCKETCALL[..]), ("ipc", &IPC[..])] {
        let behind = (1u64..).zip(members).filter_map(|(number, name)| {
            let action = rules.get(name)?.iter().find(|r| r.args.is_empty())?.action;
            // The upper half of ipc's first argument is a version.
            let arg = profile::arg(0, Operator::ScmpCmpMaskedEq, 0xffff, Some(number));
            Some(Rule { args: vec![arg], action })
        });
        let behind: Vec<Rule> = behind.collect();
        if !behind.is_empty() {
            all.entry(gate).or_default().extend(behind);
        }
    }
    all
}

fn search(abi: Abi, rules: &BTreeMap<&str, Vec<Rule>>, default: u32) -> Result<Vec<SockFilter>> {
    let gated = (abi == Abi::X86).then(|| with_gates(rules));
    let rules = gated.as_ref().unwrap_or(rules);
    let mut by_number: BTreeMap<u32, Treatment> = BTreeMap::new();
    for (name, rules) in rules {
        // Calls this kernel interface never had are ignored: profiles name those of all machines.
        let Some(number) = number(abi, name) else { continue };
        let treatment = match rules.iter().find(|r| r.args.is_empty()) {
            Some(always) if rules.iter().all(|r| r.action == always.action) => Treatment::Return(always.action),
            _ => Treatment::Rules(rules.clone()),
        };
        by_number.insert(number, treatment);
    }
    let base = if abi == Abi::X32 { X32_BIT } else { 0 };
    let mut ranges: Vec<(u32, Treatment)> = vec![(base, Treatment::Return(default))];
    let mut next = base;
    for (number, treatment) in by_number {
        if number > next {
            push(&mut ranges, next, Treatment::Return(default));
        }
        push(&mut ranges, number, treatment);
        next = number + 1;
    }
    push(&mut ranges, next, Treatment::Return(default));
    if default & 0xffff_0000 == RET_ERRNO {
        // Calls younger than this table are unknown to every profile. ENOSYS makes libraries fall back.
        push(&mut ranges, (base + newest(abi) + 1).max(next), Treatment::Return(RET_ERRNO | libc::ENOSYS as u32));
    }
    Ok(tree(&ranges, default))
}

fn push(ranges: &mut Vec<(u32, Treatment)>, start: u32, treatment: Treatment) {
    match (ranges.last_mut(), &treatment) {
        (Some((_, Treatment::Return(last))), Treatment::Return(new)) if last == new => {}
        (Some((at, last)), _) if *at == start => *last = treatment,
        _ => ranges.push((start, treatment)),
    }
}

fn tree(ranges: &[(u32, Treatment)], default: u32) -> Vec<SockFilter> {
    match ranges {
        [] => vec![ret(default)],
        [(_, Treatment::Return(action))] => vec![ret(*action)],
        [(_, Treatment::Rules(rules))] => conditions(rules, default),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            branch(JMP_JGE, high[0].0, tree(high, default), tree(low, default))
        }
    }
}

/// `if (A op k) { yes } else { no }`; neither falls through.
fn branch(op: u16, k: u32, yes: Vec<SockFilter>, no: Vec<SockFilter>) -> Vec<SockFilter> {
    let mut out = Vec::with_capacity(yes.len() + no.len() + 2);
    match u8::try_from(no.len()) {
        Ok(distance) => out.push(SockFilter { code: op, jt: distance, jf: 0, k }),
        Err(_) => {
            out.push(SockFilter { code: op, jt: 0, jf: 1, k });
            out.push(SockFilter { code: JMP_JA, jt: 0, jf: 0, k: no.len() as u32 });
        }
    }
    out.extend(no);
    out.extend(yes);
    out
}

/// Rules in order; the first that holds decides.
fn conditions(rules: &[Rule], default: u32) -> Vec<SockFilter> {
    let mut out = vec![];
    for rule in rules.iter().filter(|r| !r.args.is_empty()) {
        out.extend(condition(rule));
    }
    let last = rules.iter().find(|r| r.args.is_empty()).map_or(default, |r| r.action);
    out.push(ret(last));
    out
}

/// All of a rule's comparisons, then its action; falls through past it when one fails.
fn condition(rule: &Rule) -> Vec<SockFilter> {
    let mut out = vec![ret(rule.action)];
    for arg in rule.args.iter().rev() {
        out = compare(arg, out);
    }
    out
}

/// `if (arg) { yes }`, else falls through after it.
fn compare(arg: &LinuxSeccompArg, yes: Vec<SockFilter>) -> Vec<SockFilter> {
    let at = OFFSET_ARGS + 8 * arg.index() as u32;
    let (low, high) = (load(at), load(at + 4));
    let (mask, value) = match arg.op() {
        Operator::ScmpCmpMaskedEq => (arg.value(), arg.value_two().unwrap_or(0)),
        _ => (u64::MAX, arg.value()),
    };
    let (vl, vh) = (value as u32, (value >> 32) as u32);
    let (ml, mh) = (mask as u32, (mask >> 32) as u32);
    let n = yes.len() as u8;
    let mut out = match arg.op() {
        Operator::ScmpCmpEq => vec![high, jump(JMP_JEQ, vh, 0, 2 + n), low, jump(JMP_JEQ, vl, 0, n)],
        Operator::ScmpCmpNe => vec![high, jump(JMP_JEQ, vh, 0, 2), low, jump(JMP_JEQ, vl, n, 0)],
        Operator::ScmpCmpMaskedEq => vec![
            high,
            SockFilter { code: ALU_AND, jt: 0, jf: 0, k: mh },
            jump(JMP_JEQ, vh, 0, 3 + n),
            low,
            SockFilter { code: ALU_AND, jt: 0, jf: 0, k: ml },
            jump(JMP_JEQ, vl, 0, n),
        ],
        Operator::ScmpCmpGt => {
            vec![high, jump(JMP_JGT, vh, 3, 0), jump(JMP_JEQ, vh, 0, 2 + n), low, jump(JMP_JGT, vl, 0, n)]
        }
        Operator::ScmpCmpGe => {
            vec![high, jump(JMP_JGT, vh, 3, 0), jump(JMP_JEQ, vh, 0, 2 + n), low, jump(JMP_JGE, vl, 0, n)]
        }
        // Less than is "not greater or equal": true arms and false arms swapped.
        Operator::ScmpCmpLt => {
            vec![high, jump(JMP_JGT, vh, 3 + n, 0), jump(JMP_JEQ, vh, 0, 2), low, jump(JMP_JGE, vl, n, 0)]
        }
        Operator::ScmpCmpLe => {
            vec![high, jump(JMP_JGT, vh, 3 + n, 0), jump(JMP_JEQ, vh, 0, 2), low, jump(JMP_JGT, vl, n, 0)]
        }
    };
    out.extend(yes);
    out
}

fn load(offset: u32) -> SockFilter {
    SockFilter { code: LD_ABS, jt: 0, jf: 0, k: offset }
}

fn ret(action: u32) -> SockFilter {
    SockFilter { code: RET, jt: 0, jf: 0, k: action }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> SockFilter {
    SockFilter { code, jt, jf, k }
}

fn number(abi: Abi, name: &str) -> Option<u32> {
    let row = SYSCALLS[SYSCALLS.binary_search_by(|r| r.0.cmp(name)).ok()?];
    let (number, bit) = match abi {
        Abi::X86_64 => (row.1, 0),
        Abi::X86 => (row.2, 0),
        Abi::X32 => (row.3, X32_BIT),
    };
    (number != NONE).then(|| u32::from(number) | bit)
}

fn newest(abi: Abi) -> u32 {
    let column = |r: &(&str, u16, u16, u16)| match abi {
        Abi::X86_64 => r.1,
        Abi::X86 => r.2,
        Abi::X32 => r.3,
    };
    SYSCALLS.iter().map(column).filter(|&n| n != NONE).max().unwrap_or(0).into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::seccomp::default_profile;

    fn profile(value: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(value).unwrap()
    }

    /// libseccomp adds the machine's own architecture to every filter, and lets those of other machines be.
    #[test]
    fn architectures_are_those_named_and_the_machines_own() {
        for (named, x86, x32) in [
            (json!(null), RET_KILL_THREAD, RET_KILL_THREAD),
            (json!([]), RET_KILL_THREAD, RET_KILL_THREAD),
            (json!(["SCMP_ARCH_X86"]), RET_ERRNO | 1, RET_KILL_THREAD),
            (json!(["SCMP_ARCH_X32"]), RET_KILL_THREAD, RET_ERRNO | 1),
            (json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]), RET_KILL_THREAD, RET_KILL_THREAD),
            (
                json!(["SCMP_ARCH_S390X", "SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
                RET_ERRNO | 1,
                RET_ERRNO | 1,
            ),
        ] {
            let calls = json!([{"names": ["mount", "no_such_call_anywhere"], "action": "SCMP_ACT_ERRNO"}]);
            let mut value = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": calls});
            value["architectures"] = named.clone();
            let program = compile(&profile(value)).unwrap().instructions;
            let mount = |arch, abi| run(&program, arch, number(abi, "mount").unwrap(), [0; 6]);
            assert_eq!(mount(AUDIT_ARCH_X86_64, Abi::X86_64), RET_ERRNO | 1, "{named}");
            assert_eq!(mount(AUDIT_ARCH_I386, Abi::X86), x86, "{named}");
            assert_eq!(mount(AUDIT_ARCH_X86_64, Abi::X32), x32, "{named}");
            // No such machine: no call of it is let through either.
            assert_eq!(mount(0xc000_00b7, Abi::X86_64), RET_KILL_THREAD, "{named}");
        }
    }

    #[test]
    fn a_call_is_refused_behind_socketcall_and_ipc_too() {
        let program = compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["socket", "shmget"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7},
                {"names": ["bind"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 2, "op": "SCMP_CMP_EQ", "value": 1}]},
            ],
        })))
        .unwrap()
        .instructions;
        let gate =
            |name, first| run(&program, AUDIT_ARCH_I386, number(Abi::X86, name).unwrap(), [first, 0, 0, 0, 0, 0]);
        assert_eq!(
            (gate("socketcall", 1), gate("socketcall", 2), gate("socketcall", 3)),
            (RET_ERRNO | 7, RET_ALLOW, RET_ALLOW)
        );
        assert_eq!(
            (gate("ipc", 23), gate("ipc", 23 | 1 << 16), gate("ipc", 24)),
            (RET_ERRNO | 7, RET_ERRNO | 7, RET_ALLOW)
        );
        // 64-bit programs have no such gates.
        assert_eq!(run(&program, AUDIT_ARCH_X86_64, 41, [0; 6]), RET_ERRNO | 7);
    }

    /// A small interpreter: what the kernel would do with a call.
    fn run(program: &[SockFilter], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let mut data = vec![];
        data.extend(nr.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        for a in args {
            data.extend(a.to_le_bytes());
        }
        let (mut pc, mut a) = (0, 0u32);
        loop {
            let i = program[pc];
            pc += 1;
            let mut cond = |c: bool| pc += usize::from(if c { i.jt } else { i.jf });
            match i.code {
                LD_ABS => a = u32::from_le_bytes(data[i.k as usize..i.k as usize + 4].try_into().unwrap()),
                JMP_JA => pc += i.k as usize,
                JMP_JEQ => cond(a == i.k),
                JMP_JGT => cond(a > i.k),
                JMP_JGE => cond(a >= i.k),
                ALU_AND => a &= i.k,
                RET => return i.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn table_is_sorted() {
        assert!(SYSCALLS.is_sorted_by_key(|r| r.0));
    }

    #[test]
    fn default_profile_names_only_known_calls() {
        for syscall in default_profile().syscalls().iter().flatten() {
            for name in syscall.names() {
                assert!(SYSCALLS.binary_search_by(|r| r.0.cmp(name)).is_ok(), "{name}");
            }
        }
    }

    #[test]
    fn default_profile_decides_like_other_runtimes() {
        let program = compile(&default_profile()).unwrap().instructions;
        let errno = |n: i32| RET_ERRNO | n as u32;
        let x64 = |name, args: [u64; 6]| run(&program, AUDIT_ARCH_X86_64, number(Abi::X86_64, name).unwrap(), args);
        let zero = [0; 6];
        assert_eq!(x64("read", zero), RET_ALLOW);
        assert_eq!(x64("file_setattr", zero), errno(libc::EPERM));
        assert_eq!(x64("mount", zero), errno(libc::EPERM));
        assert_eq!(x64("keyctl", zero), errno(libc::EPERM));
        assert_eq!(x64("clone3", zero), errno(libc::ENOSYS));
        assert_eq!(x64("clone", zero), RET_ALLOW);
        assert_eq!(x64("clone", [0x1000_0000, 0, 0, 0, 0, 0]), errno(libc::EPERM));
        assert_eq!(x64("socket", [40, 0, 0, 0, 0, 0]), errno(libc::EPERM));
        assert_eq!(x64("socket", [2, 0, 0, 0, 0, 0]), RET_ALLOW);
        assert_eq!(x64("personality", [0xffff_ffff, 0, 0, 0, 0, 0]), RET_ALLOW);
        assert_eq!(x64("personality", [0x40000, 0, 0, 0, 0, 0]), errno(libc::EPERM));
        assert_eq!(run(&program, AUDIT_ARCH_X86_64, 9999, zero), errno(libc::ENOSYS));
        assert_eq!(run(&program, AUDIT_ARCH_X86_64, X32_BIT, zero), RET_ALLOW);
        assert_eq!(run(&program, AUDIT_ARCH_I386, number(Abi::X86, "write").unwrap(), zero), RET_ALLOW);
        assert_eq!(run(&program, AUDIT_ARCH_I386, number(Abi::X86, "mount").unwrap(), zero), errno(libc::EPERM));
        assert_eq!(run(&program, 0xc000_00b7, 0, zero), RET_KILL_THREAD);
    }

    #[test]
    fn operators_compare_all_64_bits() {
        use Operator::*;
        let big = 0x1_0000_0005u64;
        let cases = [
            (ScmpCmpEq, big, None, vec![(big, true), (5, false), (big + 1, false)]),
            (ScmpCmpNe, big, None, vec![(big, false), (5, true), (big + 1, true)]),
            (ScmpCmpGt, big, None, vec![(big, false), (5, false), (big + 1, true), (0x2_0000_0000, true)]),
            (ScmpCmpGe, big, None, vec![(big, true), (big - 1, false), (0x2_0000_0000, true), (6, false)]),
            (ScmpCmpLt, big, None, vec![(big, false), (big - 1, true), (6, true), (0x2_0000_0000, false)]),
            (ScmpCmpLe, big, None, vec![(big, true), (big + 1, false), (6, true), (0x2_0000_0000, false)]),
            (ScmpCmpMaskedEq, 0x1_0000_000f, Some(big), vec![(big, true), (big | 0xf0, true), (5, false)]),
        ];
        for (op, value, two, expectations) in cases {
            let mut arg = json!({"index": 2, "value": value, "op": op});
            if let Some(two) = two {
                arg["valueTwo"] = two.into();
            }
            let program = compile(&profile(json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7, "args": [arg]}],
            })))
            .unwrap()
            .instructions;
            for (given, refused) in expectations {
                let got = run(&program, AUDIT_ARCH_X86_64, 39, [0, 0, given, 0, 0, 0]);
                assert_eq!(got == RET_ERRNO | 7, refused, "{op:?} {value:#x} given {given:#x}");
            }
        }
    }
}
