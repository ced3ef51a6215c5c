//! `exec`.

use std::{os::fd::AsFd, path::PathBuf};

use clap::Args;
use oci_spec::runtime::{Capability, Process};

use super::{Global, foreground};
use crate::{
    config::{self, Config},
    error::{Error, Result},
    launch::{Console, Exec, Wiring},
    spec,
    state::{StateDir, Status, replace},
    tty,
};

/// Arguments of `exec`.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// Unix socket that receives the master of the terminal
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// Working directory
    #[arg(long)]
    cwd: Option<PathBuf>,
    /// NAME=VALUE
    #[arg(short, long)]
    env: Vec<String>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// user[:group], names or numbers
    #[arg(short, long)]
    user: Option<String>,
    /// More groups
    #[arg(short = 'g', long)]
    additional_gids: Vec<u32>,
    /// File with a process as in config.json
    #[arg(short, long)]
    process: Option<PathBuf>,
    /// Return once it runs
    #[arg(short, long)]
    detach: bool,
    /// File for its pid
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Set no_new_privs
    #[arg(long)]
    no_new_privs: bool,
    /// One more capability
    #[arg(short, long)]
    cap: Vec<String>,
    /// Descriptors from 3 on to pass on
    #[arg(long, default_value_t = 0)]
    preserve_fds: u32,
    /// Also in a frozen container
    #[arg(long)]
    ignore_paused: bool,
    /// Group below the container's own to run in; it must exist
    #[arg(long)]
    cgroup: Option<String>,
    /// AppArmor profile
    #[arg(long)]
    apparmor: Option<String>,
    /// SELinux label
    #[arg(long)]
    process_label: Option<String>,
    /// Container id
    id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs a program in a container; its exit code, or 0 when detached.
pub(super) fn exec(global: &Global, args: &ExecArgs) -> Result<i32> {
    crate::protect_descriptors(args.preserve_fds)?;
    let dir = StateDir::open(&global.root(), &args.id)?;
    let state = dir.read()?;
    match dir.status(&state) {
        Status::Stopped => return Err(Error::state("cannot exec in a stopped container")),
        Status::Paused if !args.ignore_paused => {
            return Err(Error::state("cannot exec in a paused container (--ignore-paused does it all the same)"));
        }
        _ => {}
    }
    let config = dir.config(&state)?;
    drop(dir);
    let (process, mut warnings) = process(args, &config)?;
    config::validate_process(&process)?;
    let terminal = process.terminal() == Some(true);
    let console = match (&args.console_socket, terminal) {
        (Some(path), true) => Console::Socket(tty::connect(path)?),
        (None, true) if args.detach => return Err(Error::invalid("a detached terminal needs --console-socket")),
        _ => Console::Launcher,
    };
    let signals = (!args.detach).then(foreground::Signals::block).transpose()?;
    let init = rustix::process::Pid::from_raw(state.pid).ok_or_else(|| Error::state("the container has no process"))?;
    let pidfd = rustix::process::pidfd_open(init, rustix::process::PidfdFlags::empty())
        .map_err(|e| Error::system("open the container's init", e))?;
    if !state.is_alive() {
        return Err(Error::state("cannot exec in a stopped container"));
    }
    let below = match (&args.cgroup, &state.cgroup) {
        (None, _) => None,
        (Some(path), Some(cgroup)) => Some(cgroup.below(path)?),
        (Some(_), None) => return Err(Error::state("--cgroup: the container has no cgroup")),
    };
    let launched = Exec {
        process: &process,
        init: pidfd.as_fd(),
        init_pid: state.pid,
        cgroup: below.as_ref().or(state.cgroup.as_ref()),
        seccomp: config.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()),
        user: args.user.as_deref().filter(|_| args.process.is_none()),
        wiring: Wiring { console, preserve: args.preserve_fds, ..Wiring::default() },
    }
    .run()?;
    let entered = state.resctrl.as_ref().map_or(Ok(()), |groups| groups.enter(launched.pid));
    let recorded = entered.and_then(|()| match &args.pid_file {
        Some(file) => replace(file, launched.pid.to_string().as_bytes()),
        None => Ok(()),
    });
    if let Err(error) = recorded.and_then(|()| launched.start()) {
        launched.end();
        return Err(error);
    }
    warnings.extend(launched.warnings.iter().cloned());
    global.warn(&warnings);
    match signals {
        Some(signals) => foreground::attend(&signals, launched.pid, launched.master.as_ref().map(AsFd::as_fd)),
        None => Ok(0),
    }
}

/// What to run, and what of it is left out.
fn process(args: &ExecArgs, config: &Config) -> Result<(Process, Vec<String>)> {
    if let Some(file) = &args.process {
        let raw = config::read_limited(file)?;
        return spec::parse(&raw, "").map_err(|e| Error::invalid(format!("parse {}: {e}", file.display())));
    }
    let (mut process, mut warnings) = (config.process()?.clone(), vec![]);
    process.set_args(Some(args.command.clone())).set_terminal(Some(args.tty)).set_console_size(None);
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process.set_env(Some(env));
    if args.apparmor.is_some() {
        process.set_apparmor_profile(args.apparmor.clone());
    }
    if args.process_label.is_some() {
        process.set_selinux_label(args.process_label.clone());
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if !args.additional_gids.is_empty() {
        let mut groups = process.user().additional_gids().clone().unwrap_or_default();
        groups.extend(&args.additional_gids);
        process.user_mut().set_additional_gids(Some(groups));
    }
    for name in &args.cap {
        let Ok(cap) = serde_json::from_value::<Capability>(name.clone().into()) else {
            warnings.push(format!("--cap {name} is unknown and left out"));
            continue;
        };
        let mut all = process.capabilities().clone().unwrap_or_default();
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(cap);
            Some(set)
        };
        let (bounding, effective, permitted) = (with(all.bounding()), with(all.effective()), with(all.permitted()));
        all.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
        process.set_capabilities(Some(all));
    }
    Ok((process, warnings))
}
