//! What every process tells of itself.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};

use crate::server::exposition::Exposition;

/// When the machine and this process began, in seconds since 1970.
pub(crate) fn began() -> Option<(f64, f64)> {
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = boot.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok())?;
    Some((boot, boot + fields().get(18)? / 100.0))
}

/// /proc/self/stat from the field after the state on.
fn fields() -> Vec<f64> {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let rest = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(1));
    rest.map(|rest| rest.map(|f| f.parse().unwrap_or(0.0)).collect()).unwrap_or_default()
}

/// All of it; `brief` is when it began only.
pub(super) fn write(e: &mut Exposition, brief: bool) {
    let started = began().map(|(_, process)| process);
    e.single("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", started);
    if brief {
        return;
    }
    let fields = fields();
    let at = |i: usize| fields.get(i).copied();
    let cpu = at(10).zip(at(11)).map(|(u, s)| (u + s) / 100.0);
    e.single("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", cpu);
    e.single("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", at(19));
    let limit = |of| getrlimit(of).ok().map(|(soft, _)| soft);
    // As Go's collector has it: no limit is the largest number.
    let most = limit(Resource::RLIMIT_AS).map(|n| n as f64);
    let help = "Maximum amount of virtual memory available in bytes.";
    e.single("process_virtual_memory_max_bytes", "gauge", help, most);
    let resident = at(20).map(|pages| pages * 4096.0);
    e.single("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident);
    let open = fs::read_dir("/proc/self/fd").ok().map(|d| d.count() as f64);
    let most = limit(Resource::RLIMIT_NOFILE).map(|n| n as f64);
    e.single("process_max_fds", "gauge", "Maximum number of open file descriptors.", most);
    e.single("process_open_fds", "gauge", "Number of open file descriptors.", open);
    let links = crate::stats::interfaces(&fs::read_to_string("/proc/self/net/dev").unwrap_or_default());
    let sum = |column: usize| Some(links.iter().map(|(_, n)| n[column] as f64).sum());
    let help = "Number of bytes received by the process over the network.";
    e.single("process_network_receive_bytes_total", "counter", help, sum(0));
    let help = "Number of bytes sent by the process over the network.";
    e.single("process_network_transmit_bytes_total", "counter", help, sum(8));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_has_begun() {
        let mut e = Exposition::default();
        write(&mut e, false);
        let text = e.finish();
        for name in [
            "process_start_time_seconds",
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_virtual_memory_max_bytes",
            "process_network_receive_bytes_total",
            "process_open_fds",
        ] {
            assert!(text.lines().any(|l| l.starts_with(&format!("{name} "))), "{name}: {text}");
        }
        let (boot, process) = began().unwrap();
        assert!(boot > 0.0 && process >= boot);
    }
}
