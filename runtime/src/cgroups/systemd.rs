//! The systemd driver: a container's group as a transient scope that systemd made and knows of.
//!
//! systemd makes a scope only around processes that exist. A placeholder is born for that; it goes once the container's
//! init was cloned into the group. The limits are told to systemd as properties, or it would write its own over them at
//! the next reload; the control files then get the exact values.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use super::v2;
use crate::{
    cpu_list,
    dbus::{Body, Bus, Message, Value},
    error::{Context, Error, Kind, Result},
    sys::{self, Cloned},
};

const MANAGER: (&str, &str, &str) =
    ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");

/// A transient scope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scope {
    /// `NAME.scope`.
    unit: String,
    /// `NAME.slice`.
    slice: String,
}

/// Keeps a scope alive until the container's init is in it.
#[derive(Debug)]
pub(crate) struct Placeholder {
    pid: i32,
    pidfd: OwnedFd,
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        drop(sys::pidfd_kill(self.pidfd.as_fd(), libc::SIGKILL));
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
    }
}

impl Placeholder {
    fn new() -> Result<Self> {
        match sys::clone_process(0, None).context(|| "clone a placeholder".into())? {
            Cloned::Child => {
                sys::close_all_except(&mut []);
                // Not to outlive a killed runtime. If that is dead already the kernel says so by our parent.
                let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
                loop {
                    nix::unistd::pause();
                }
            }
            Cloned::Parent { pid, pidfd } => Ok(Self { pid, pidfd }),
        }
    }

    /// Its path in the v2 hierarchy.
    fn group(&self) -> Result<String> {
        let file = format!("/proc/{}/cgroup", self.pid);
        let text = std::fs::read_to_string(&file).context(|| format!("read {file}"))?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"));
        path.map(str::to_owned).ok_or_else(|| Error::invalid("--systemd-cgroup needs cgroup v2"))
    }
}

impl Scope {
    /// The scope that `cgroupsPath` names: `slice:prefix:name`, each part of which may be empty.
    pub(crate) fn parse(path: Option<&str>, id: &str) -> Result<Self> {
        let default_slice = if rustix::process::geteuid().is_root() { "system.slice" } else { "user.slice" };
        let Some(path) = path.filter(|p| !p.is_empty()) else {
            return Ok(Self { unit: format!("isopod-{id}.scope"), slice: default_slice.to_owned() });
        };
        let parts: Vec<&str> = path.split(':').collect();
        let [slice, prefix, name] = parts[..] else {
            return Err(Error::invalid(format!(
                "linux.cgroupsPath {path:?} must be slice:prefix:name with --systemd-cgroup"
            )));
        };
        let slice = if slice.is_empty() { default_slice } else { slice };
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_.@\\".contains(c);
        if !slice.ends_with(".slice") || [slice, prefix, name].iter().any(|p| !p.chars().all(fine)) || name.is_empty() {
            return Err(Error::invalid(format!("linux.cgroupsPath {path:?} names no slice and unit")));
        }
        let unit = match (name.ends_with(".slice") || name.ends_with(".scope"), prefix) {
            (true, _) => name.to_owned(),
            (false, "") => format!("{name}.scope"),
            (false, prefix) => format!("{prefix}-{name}.scope"),
        };
        Ok(Self { unit, slice: slice.to_owned() })
    }

    /// Where the system's manager will put it: `a-b.slice` lies in `a.slice`.
    pub(crate) fn expected_path(&self) -> String {
        let name = self.slice.trim_end_matches(".slice");
        let dashes = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
        let slices: String = dashes.map(|end| format!("/{}.slice", &name[..end])).collect();
        format!("{slices}/{}", self.unit)
    }

    /// Has systemd make it; its path in the hierarchy and what keeps it alive.
    pub(crate) fn start(&self, resources: Option<&LinuxResources>) -> Result<(String, Placeholder)> {
        let placeholder = Placeholder::new()?;
        self.start_around(placeholder.pid, "container", limits(resources)?)?;
        Ok((placeholder.group()?, placeholder))
    }

    /// Has systemd make it around this process; one that exists already, of a supervisor that died, stays.
    pub(crate) fn start_around_us(&self) -> Result<()> {
        match self.start_around(rustix::process::getpid().as_raw_nonzero().get(), "pod", vec![]) {
            Err(e) if e.to_string().contains(".UnitExists") => Ok(()),
            other => other,
        }
    }

    /// Has systemd make it around the process, with a delegated group.
    fn start_around(&self, pid: i32, what: &str, limits: Vec<(&str, Value)>) -> Result<()> {
        let mut properties = vec![
            ("Description", Value::Text(format!("isopod {what} {}", self.unit))),
            ("Slice", Value::Text(self.slice.clone())),
            ("Delegate", Value::Flag(true)),
            ("DefaultDependencies", Value::Flag(false)),
            ("CollectMode", Value::Text("inactive-or-failed".into())),
            ("PIDs", Value::Numbers(vec![pid as u32])),
        ];
        properties.extend(limits);
        start_unit(&mut connect()?, &self.unit, &properties)
    }

    /// The scope at a path of the v2 hierarchy, as systemd lays it out: `.../a-b.slice/UNIT.scope`.
    pub(crate) fn at(path: &str) -> Option<Self> {
        let mut parts = path.rsplit('/');
        let (unit, slice) = (parts.next()?, parts.next()?);
        let units = unit.ends_with(".scope") && slice.ends_with(".slice");
        units.then(|| Self { unit: unit.to_owned(), slice: slice.to_owned() })
    }

    /// Tells systemd of changed limits.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<()> {
        set_limits(&self.unit, &limits(Some(resources))?)
    }

    /// Has systemd forget it. One that is gone already is fine.
    pub(crate) fn stop(&self) -> Result<()> {
        stop_unit(&self.unit)
    }
}

/// Has systemd stop and forget a unit. One that is gone already is fine.
pub(super) fn stop_unit(unit: &str) -> Result<()> {
    let mut bus = connect()?;
    for (method, body) in
        [("StopUnit", Body::default().text(unit).text("replace")), ("ResetFailedUnit", Body::default().text(unit))]
    {
        match bus.call(MANAGER, method, body) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Tells systemd of a unit's changed limits.
pub(super) fn set_limits(unit: &str, limits: &[(&str, Value)]) -> Result<()> {
    if limits.is_empty() {
        return Ok(());
    }
    let body = Body::default().text(unit).flag(true).properties(limits);
    connect()?.call(MANAGER, "SetUnitProperties", body).map(drop)
}

/// Signals are sent to subscribers only.
fn subscribe(bus: &mut Bus) -> Result<()> {
    bus.call(MANAGER, "Subscribe", Body::default())?;
    let rule = "type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'";
    let bus_itself = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
    bus.call(bus_itself, "AddMatch", Body::default().text(rule)).map(drop)
}

/// Has systemd stop a unit and waits until it has. One that is gone already is fine.
pub(super) fn stop_and_wait(unit: &str) -> Result<()> {
    let mut bus = connect()?;
    subscribe(&mut bus)?;
    match bus.call(MANAGER, "StopUnit", Body::default().text(unit).text("replace")) {
        Ok(reply) => wait_for(&mut bus, &reply, unit),
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Starts a transient unit and waits until it is there.
pub(super) fn start_unit(bus: &mut Bus, unit: &str, properties: &[(&str, Value)]) -> Result<()> {
    subscribe(bus)?;
    let body = Body::default().text(unit).text("replace").properties(properties).no_further_units();
    let reply = bus.call(MANAGER, "StartTransientUnit", body)?;
    wait_for(bus, &reply, unit)
}

/// Waits for the end of the job a method began.
fn wait_for(bus: &mut Bus, reply: &Message, unit: &str) -> Result<()> {
    let job = reply.arguments().into_iter().next().unwrap_or_default();
    loop {
        let signal = bus.signal()?;
        let arguments = signal.arguments();
        if signal.member != "JobRemoved" || arguments.get(1) != Some(&job) {
            continue;
        }
        return match arguments.get(3).map(String::as_str) {
            Some("done") => Ok(()),
            other => {
                let result = other.unwrap_or("no result");
                Err(Error::new(Kind::System, format!("systemd has not done its job for {unit}: {result}")))
            }
        };
    }
}

/// The bus of the system, or of the user who is not root.
pub(super) fn connect() -> Result<Bus> {
    let path = if rustix::process::geteuid().is_root() && !in_user_namespace() {
        PathBuf::from("/run/dbus/system_bus_socket")
    } else {
        let address = std::env::var("DBUS_SESSION_BUS_ADDRESS").unwrap_or_default();
        match address.strip_prefix("unix:path=").map(|p| p.split([',', ';']).next().unwrap_or(p)) {
            Some(path) => PathBuf::from(path),
            None => match std::env::var_os("XDG_RUNTIME_DIR") {
                Some(dir) => Path::new(&dir).join("bus"),
                None => return Err(Error::invalid("--systemd-cgroup: no user bus: XDG_RUNTIME_DIR is not set")),
            },
        }
    };
    Bus::connect(&path)
}

/// Whether root here is an ordinary user outside.
pub(crate) fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let fields: Vec<&str> = map.split_whitespace().collect();
    !map.is_empty() && fields != ["0", "0", "4294967295"]
}

/// Limits as properties of a unit.
pub(super) fn limits(resources: Option<&LinuxResources>) -> Result<Vec<(&'static str, Value)>> {
    let mut out = vec![];
    let Some(resources) = resources else { return Ok(out) };
    let unlimited = |value: i64| if value < 0 { u64::MAX } else { value as u64 };
    if let Some(memory) = resources.memory() {
        let limit = memory.limit().unwrap_or(0);
        if limit != 0 {
            out.push(("MemoryMax", Value::Number(unlimited(limit))));
        }
        if let Some(reservation) = memory.reservation().filter(|&r| r != 0) {
            out.push(("MemoryLow", Value::Number(unlimited(reservation))));
        }
        if let Some(swap) = v2::swap_of(memory.swap().unwrap_or(0), limit)? {
            out.push(("MemorySwapMax", Value::Number(unlimited(swap))));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|&s| s != 0) {
            out.push(("CPUWeight", Value::Number(v2::weight_of_shares(shares))));
        }
        let period = cpu.period().filter(|&p| p > 0).unwrap_or(100_000);
        if let Some(quota) = cpu.quota().filter(|&q| q != 0) {
            out.push(("CPUQuotaPeriodUSec", Value::Number(period)));
            out.push(("CPUQuotaPerSecUSec", Value::Number(per_second(quota, period))));
        }
        for (name, list) in [("AllowedCPUs", cpu.cpus()), ("AllowedMemoryNodes", cpu.mems())] {
            if let Some(list) = list.as_deref().filter(|l| !l.is_empty()) {
                out.push((name, Value::Bytes(bits(list)?)));
            }
        }
    }
    if let Some(pids) = resources.pids() {
        let limit = pids.limit();
        out.push(("TasksMax", Value::Number(if limit <= 0 { u64::MAX } else { limit as u64 })));
    }
    Ok(out)
}

/// Microseconds in each second; systemd counts in hundredths of a processor, rounded up so that nobody gets less.
fn per_second(quota: i64, period: u64) -> u64 {
    match u64::try_from(quota) {
        Ok(quota) => (quota.saturating_mul(1_000_000) / period.max(1)).next_multiple_of(10_000),
        Err(_) => u64::MAX,
    }
}

/// A list as a set of bits, the lowest first.
fn bits(list: &str) -> Result<Vec<u8>> {
    let mut bits: Vec<u8> = vec![];
    for bit in cpu_list::parse(list)? {
        if bits.len() <= bit / 8 {
            bits.resize(bit / 8 + 1, 0);
        }
        bits[bit / 8] |= 1 << (bit % 8);
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_slices_and_units() {
        let scope = |path| Scope::parse(Some(path), "id").map(|s| (s.slice, s.unit)).map_err(|e| e.to_string());
        let own = |a: &str, b: &str| Ok((a.to_owned(), b.to_owned()));
        assert_eq!(scope("machine.slice:libpod:abc"), own("machine.slice", "libpod-abc.scope"));
        assert_eq!(scope("a-b.slice::abc"), own("a-b.slice", "abc.scope"));
        assert_eq!(scope("a.slice:x:y.slice"), own("a.slice", "y.slice"));
        assert_eq!(Scope::parse(None, "id").unwrap().unit, "isopod-id.scope");
        let nested = Scope::parse(Some("a-b.slice:p:c"), "id").unwrap();
        assert_eq!(nested.expected_path(), "/a.slice/a-b.slice/p-c.scope");
        for bad in ["/a/b", "a.slice:b", "a:b:c", "a.slice:b:", "a.slice:b:../c", "a/b.slice:c:d"] {
            assert!(scope(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_become_properties() {
        let resources: LinuxResources = serde_json::from_value(serde_json::json!({
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500},
            "cpu": {"shares": 1024, "quota": 33_333, "period": 100_000, "cpus": "0-2,8"},
            "pids": {"limit": -1},
        }))
        .unwrap();
        let expected = vec![
            ("MemoryMax", Value::Number(1000)),
            ("MemoryLow", Value::Number(500)),
            ("MemorySwapMax", Value::Number(500)),
            ("CPUWeight", Value::Number(39)),
            ("CPUQuotaPeriodUSec", Value::Number(100_000)),
            ("CPUQuotaPerSecUSec", Value::Number(340_000)),
            ("AllowedCPUs", Value::Bytes(vec![0b111, 1])),
            ("TasksMax", Value::Number(u64::MAX)),
        ];
        assert_eq!(limits(Some(&resources)).unwrap(), expected);
    }
}
