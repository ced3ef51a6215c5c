//! `start`, `state`, `kill`, `delete`, `list`, `ps`, `pause`, `resume`.

use std::path::Path;

use clap::Args;

use super::{Global, create};
use crate::{
    error::{Error, Kind, Result},
    state::{State, StateDir, Status, all_ids},
    sys,
};

/// Arguments of `kill`.
#[derive(Debug, Args)]
pub(super) struct KillArgs {
    /// Every process of the container
    #[arg(short, long)]
    all: bool,
    /// Container id
    id: String,
    /// Name or number
    #[arg(default_value = "SIGTERM", allow_negative_numbers = true)]
    signal: String,
}

/// Arguments of `delete`.
#[derive(Debug, Args)]
pub(super) struct DeleteArgs {
    /// Also a running or an unknown one
    #[arg(short, long)]
    force: bool,
    /// Container id
    id: String,
}

/// How `list` and `ps` answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Table,
    Json,
}

impl Format {
    fn parse(text: &str) -> Result<Self, &'static str> {
        match text {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            _ => Err("invalid format option"),
        }
    }
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// table or json
    #[arg(short, long, default_value = "table", value_parser = Format::parse)]
    format: Format,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `ps`.
#[derive(Debug, Args)]
pub(super) struct PsArgs {
    /// table or json
    #[arg(short, long, default_value = "table", value_parser = Format::parse)]
    format: Format,
    /// Container id
    id: String,
    /// Arguments for ps(1)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

pub(super) fn start(global: &Global, id: &str) -> Result<()> {
    let dir = StateDir::open(&global.root(), id)?;
    let state = dir.read()?;
    match dir.status(&state) {
        Status::Created => {}
        Status::Stopped => return Err(Error::state("cannot start a container that has stopped")),
        Status::Running => return Err(Error::state("cannot start an already running container")),
        Status::Paused => return Err(Error::state("cannot start a container in the paused state")),
    }
    let config = dir.config(&state)?;
    match dir.open_gate().and_then(|()| create::started(&config, &state)) {
        Err(error) if error.kind() == Kind::Hook => {
            drop(destroy(global, dir, &state));
            Err(error)
        }
        other => other,
    }
}

pub(super) fn state(root: &Path, id: &str) -> Result<()> {
    let dir = StateDir::open(root, id)?;
    let state = dir.read()?;
    println!("{}", pretty(&describe(&dir, &state))?);
    Ok(())
}

fn describe(dir: &StateDir, state: &State) -> serde_json::Value {
    let status = dir.status(state);
    serde_json::json!({
        "ociVersion": crate::spec::VERSION,
        "id": state.id,
        "pid": if status == Status::Stopped { 0 } else { state.pid },
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "owner": if state.owner == 0 { "root".to_owned() } else { state.owner.to_string() },
        "annotations": state.annotations,
    })
}

fn pretty(value: &serde_json::Value) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|e| Error::invalid(e.to_string()))
}

pub(super) fn kill(root: &Path, args: &KillArgs) -> Result<()> {
    let signal = parse_signal(&args.signal)?;
    let dir = StateDir::open(root, &args.id)?;
    let state = dir.read()?;
    if args.all {
        return state.cgroup.as_ref().map_or(Ok(()), |c| c.signal_all(signal));
    }
    if dir.status(&state) == Status::Stopped {
        return Err(Error::state("container not running"));
    }
    sys::kill(state.pid, signal).map_err(|e| Error::system(format!("signal container {}", args.id), e))
}

pub(super) fn parse_signal(text: &str) -> Result<i32> {
    let unknown = || Error::invalid(format!("unknown signal {text:?}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    for (prefix, base, sign) in [("RTMIN", 34, 1), ("RTMAX", 64, -1)] {
        if let Some(rest) = name.strip_prefix(prefix) {
            let offset: i32 = if rest.is_empty() { 0 } else { rest[1..].parse().map_err(|_| unknown())? };
            let number = base + sign * offset;
            return if (34..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
        }
    }
    format!("SIG{name}").parse::<nix::sys::signal::Signal>().map(|s| s as i32).map_err(|_| unknown())
}

pub(super) fn delete(global: &Global, args: &DeleteArgs) -> Result<()> {
    let dir = match StateDir::open(&global.root(), &args.id) {
        Err(e) if args.force && e.kind() == Kind::NotFound => return Ok(()),
        other => other?,
    };
    let state = match dir.read() {
        Ok(state) => state,
        // Killed before it could write: there is only the directory, and perhaps a group by the default name.
        Err(_) if args.force => {
            if let Ok(cgroup) = crate::cgroups::Cgroup::plan(&format!("/isopod-runtime-{}", args.id), None) {
                drop(cgroup.kill_and_wait().and_then(|()| cgroup.remove()));
            }
            return dir.remove();
        }
        Err(e) => return Err(e),
    };
    let status = dir.status(&state);
    if status != Status::Stopped && status != Status::Created && !args.force {
        return Err(Error::state(format!("cannot delete container {} that is not stopped: {status:?}", args.id)));
    }
    if status == Status::Stopped { create::finish(global, dir, &state) } else { destroy(global, dir, &state) }
}

/// Ends a container and removes it.
fn destroy(global: &Global, dir: StateDir, state: &State) -> Result<()> {
    drop(sys::kill(state.pid, libc::SIGKILL));
    if let Some(cgroup) = &state.cgroup {
        cgroup.kill_and_wait()?;
    }
    wait_for_end(state);
    create::finish(global, dir, state)
}

fn wait_for_end(state: &State) {
    let Some(pid) = rustix::process::Pid::from_raw(state.pid) else { return };
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { return };
    if state.is_alive() {
        let timeout = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
    }
}

pub(super) fn list(root: &Path, args: &ListArgs) -> Result<()> {
    let mut rows = vec![];
    for id in all_ids(root) {
        // A container may go while the others are listed.
        let Ok(dir) = StateDir::open(root, &id) else { continue };
        let Ok(state) = dir.read() else { continue };
        rows.push(describe(&dir, &state));
    }
    let text = |row: &serde_json::Value, key: &str| match &row[key] {
        serde_json::Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    if args.quiet {
        rows.iter().for_each(|row| println!("{}", text(row, "id")));
    } else if args.format == Format::Json {
        println!("{}", serde_json::Value::Array(rows));
    } else {
        let columns = ["id", "pid", "status", "bundle", "created", "owner"];
        let mut table = vec![columns.map(str::to_uppercase).to_vec()];
        table.extend(rows.iter().map(|row| columns.iter().map(|c| text(row, c)).collect::<Vec<_>>()));
        print_table(&table);
    }
    Ok(())
}

fn print_table(table: &[Vec<String>]) {
    let width = |column: usize| table.iter().map(|row| row[column].len()).max().unwrap_or(0);
    for row in table {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(i, cell)| format!("{cell:<width$}", width = width(i) + 3)).collect();
        println!("{}", cells.concat().trim_end());
    }
}

pub(super) fn ps(root: &Path, args: &PsArgs) -> Result<()> {
    let dir = StateDir::open(root, &args.id)?;
    let state = dir.read()?;
    let pids = state.cgroup.as_ref().map_or_else(|| Ok(vec![state.pid]), |c| c.processes())?;
    if args.format == Format::Json {
        println!("{}", serde_json::json!(pids));
        return Ok(());
    }
    let ps_args = if args.args.is_empty() { vec!["-ef".to_owned()] } else { args.args.clone() };
    let output = std::process::Command::new("ps").args(&ps_args).output().map_err(|e| Error::system("run ps", e))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split_whitespace().position(|c| c == "PID");
    let column = column.ok_or_else(|| Error::invalid("the output of ps has no PID column"))?;
    println!("{header}");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|p| p.parse::<i32>().ok());
        if pid.is_some_and(|p| pids.contains(&p)) {
            println!("{line}");
        }
    }
    Ok(())
}

pub(super) fn freeze(root: &Path, id: &str, frozen: bool) -> Result<()> {
    let dir = StateDir::open(root, id)?;
    let mut state = dir.read()?;
    match (dir.status(&state), frozen) {
        (Status::Running | Status::Created, true) | (Status::Paused, false) => {}
        (status, true) => return Err(Error::state(format!("cannot pause a container that is {status:?}"))),
        (status, false) => return Err(Error::state(format!("cannot resume a container that is {status:?}"))),
    }
    let cgroup = state.cgroup.as_mut().ok_or_else(|| Error::state("the container has no cgroup"))?;
    cgroup.freeze(frozen)?;
    dir.write(&state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        let cases =
            [("9", 9), ("KILL", 9), ("SIGTERM", 15), ("sigusr1", 10), ("RTMIN+3", 37), ("SIGRTMAX-1", 63), ("0", 0)];
        for (text, number) in cases {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for bad in ["SIGNOPE", "65", "-1", "RTMIN+99", ""] {
            assert!(parse_signal(bad).is_err(), "{bad}");
        }
    }
}
