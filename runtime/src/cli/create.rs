//! `create` and `run`.

use std::{os::fd::AsFd, path::PathBuf};

use clap::Args;
use oci_spec::runtime::LinuxResources;

use super::{Global, foreground};
use crate::{
    cgroups::{self, Cgroup, Placeholder, Scope},
    config::Config,
    error::{Error, Kind, Result},
    hooks,
    launch::{Console, Gate, Launch, Launched, Wiring},
    resctrl::{self, Resctrl},
    state::{State, StateDir, process_start_time, replace},
    supervisor::protocol::Rootfs,
    tty,
};

/// Arguments of `create`.
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Bundle directory
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
    /// Unix socket that receives the master of the terminal
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// File for the pid of the container's init
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Move the root instead of pivoting
    #[arg(long)]
    no_pivot: bool,
    /// Stay in the caller's session keyring
    #[arg(long)]
    no_new_keyring: bool,
    /// Descriptors from 3 on to pass on
    #[arg(long, default_value_t = 0)]
    preserve_fds: u32,
    /// Container id
    id: String,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    create: CreateArgs,
    /// Return once the container runs
    #[arg(short, long)]
    detach: bool,
    /// Do not remove the container when it ends
    #[arg(long)]
    keep: bool,
    /// Accepted for compatibility
    #[arg(long)]
    no_subreaper: bool,
}

struct Made {
    dir: StateDir,
    state: State,
    config: Config,
    launched: Launched,
}

/// Creates a container that waits for `start`.
pub(super) fn create(global: &Global, args: &CreateArgs) -> Result<()> {
    let made = make(global, args, true)?;
    global.warn(&made.launched.warnings);
    Ok(())
}

/// Creates a container and runs it; its exit code, or 0 when detached.
pub(super) fn run(global: &Global, args: &RunArgs) -> Result<i32> {
    let signals = (!args.detach).then(foreground::Signals::block).transpose()?;
    let Made { dir, state, config, launched } = make(global, &args.create, false)?;
    if let Err(error) = launched.start().and_then(|()| started(&config, &state)) {
        launched.end();
        drop(finish(global, dir, &state));
        return Err(error);
    }
    global.warn(&launched.warnings);
    let Some(signals) = signals else { return Ok(0) };
    // Other commands must not wait for this one.
    let id = state.id.clone();
    drop(dir);
    let code = foreground::attend(&signals, launched.pid, launched.master.as_ref().map(AsFd::as_fd))?;
    if !args.keep
        && let Ok(dir) = StateDir::open(&global.root(), &id)
    {
        finish(global, dir, &state)?;
    }
    Ok(code)
}

/// The hooks of a container whose program runs.
pub(super) fn started(config: &Config, state: &State) -> Result<()> {
    let Some(all) = config.spec.hooks() else { return Ok(()) };
    hooks::run("poststart", all.poststart().as_ref(), &hook_state(state, "running", state.pid))
}

/// Removes an ended container's traces and runs its last hooks.
pub(super) fn finish(global: &Global, dir: StateDir, state: &State) -> Result<()> {
    let config = dir.config(state);
    let removed = remove(dir, state);
    if let Some(all) = config.ok().and_then(|c| c.spec.hooks().clone()) {
        global.warn(&hooks::run_all("poststop", all.poststop().as_ref(), &hook_state(state, "stopped", 0)));
    }
    removed
}

fn remove(dir: StateDir, state: &State) -> Result<()> {
    let group = state.cgroup.as_ref().map_or(Ok(()), |c| c.kill_and_wait().and_then(|()| c.remove()));
    let resctrl = state.resctrl.as_ref().map_or(Ok(()), Resctrl::remove);
    group.and(resctrl).and(dir.remove())
}

fn make(global: &Global, args: &CreateArgs, wait_for_start: bool) -> Result<Made> {
    // Sockets a service manager passes on come after those asked for.
    let passed: u32 = std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let preserve = args.preserve_fds + passed;
    crate::protect_descriptors(preserve)?;
    let config = Config::load(&args.bundle)?;
    let process = config.process()?;
    let terminal = process.terminal() == Some(true);
    let console = match (&args.console_socket, terminal) {
        (Some(path), true) => Console::Socket(tty::connect(path)?),
        (Some(_), false) => return Err(Error::invalid("--console-socket is given, but process.terminal is false")),
        (None, true) if wait_for_start => {
            return Err(Error::invalid("process.terminal needs --console-socket when the container is created"));
        }
        (None, _) => Console::Launcher,
    };
    let wiring = Wiring { console, preserve, keep_keyring: args.no_new_keyring, ..Wiring::default() };
    let dir = StateDir::create(&global.root(), &args.id)?;
    let mut state = State {
        id: args.id.clone(),
        bundle: config.bundle.clone(),
        rootfs: config.rootfs(),
        pid: 0,
        start_time: 0,
        created: crate::time::rfc3339_nanos(crate::time::now_nanos()),
        owner: rustix::process::getuid().as_raw(),
        cgroup: None,
        resctrl: None,
        annotations: config.spec.annotations().clone().unwrap_or_default(),
    };
    match fill(&dir, &mut state, &config, args, global, wiring, wait_for_start) {
        Ok(launched) => Ok(Made { dir, state, config, launched }),
        Err(error) => {
            // Where hooks have run the last ones follow.
            drop(if error.kind() == Kind::Hook { finish(global, dir, &state) } else { remove(dir, &state) });
            Err(error)
        }
    }
}

fn configured_path(config: &Config) -> Option<&str> {
    let linux = config.spec.linux().as_ref();
    linux.and_then(|l| l.cgroups_path().as_ref()).and_then(|p| p.to_str()).filter(|p| !p.is_empty())
}

fn resources(config: &Config) -> Option<&LinuxResources> {
    config.spec.linux().as_ref().and_then(|l| l.resources().as_ref())
}

/// The group the container will have; nothing is made yet.
fn plan_cgroup(config: &Config, id: &str, systemd: bool) -> Result<Cgroup> {
    let configured = configured_path(config);
    if systemd {
        return Cgroup::plan_scope(Scope::parse(configured, id)?);
    }
    Cgroup::plan(configured.unwrap_or(&format!("/isopod-runtime-{id}")), resources(config))
}

/// Makes the planned group; `None` where an ordinary user to whom nothing is delegated must do without.
fn make_cgroup(config: &Config, state: &mut State, warnings: &mut Vec<String>) -> Result<Option<Placeholder>> {
    let Some(cgroup) = &mut state.cgroup else { return Ok(None) };
    let resources = resources(config);
    let placeholder = cgroup.start_scope(resources)?;
    let made = cgroup.create().and_then(|()| {
        resources.map_or(Ok(()), |r| cgroup.apply(r))?;
        cgroup.apply_devices(resources)
    });
    match made {
        Err(e)
            if configured_path(config).is_none()
                && matches!(e.errno(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) =>
        {
            warnings.push(format!("no cgroup: {e}"));
            drop(cgroup.remove());
            state.cgroup = None;
            Ok(None)
        }
        other => other.map(|()| placeholder),
    }
}

/// Makes everything. What fails is left for the caller to clean up, by the state.
fn fill(
    dir: &StateDir,
    state: &mut State,
    config: &Config,
    args: &CreateArgs,
    global: &Global,
    mut wiring: Wiring,
    wait_for_start: bool,
) -> Result<Launched> {
    state.cgroup = Some(plan_cgroup(config, &args.id, global.systemd())?);
    let rdt = config.spec.linux().as_ref().and_then(|l| l.intel_rdt().as_ref());
    state.resctrl = rdt.map(|rdt| Resctrl::plan(&resctrl::root()?, rdt, &args.id)).transpose()?;
    dir.keep_config(&config.raw)?;
    // From here on a `delete --force` finds what there is, also when this process is killed.
    dir.write(state)?;
    // The placeholder goes when this function ends: the container's init, or nobody, is in the group then.
    let mut warnings = resources(config).map(cgroups::without_effect).unwrap_or_default();
    if let (Some(groups), Some(rdt)) = (&state.resctrl, rdt) {
        groups.make(rdt)?;
        warnings.extend(resctrl::without_effect(&config.raw));
    }
    let _placeholder = make_cgroup(config, state, &mut warnings)?;
    if wait_for_start {
        let (fifo, errors) = dir.make_gate()?;
        wiring.gate = Gate::Fifo { fifo, errors };
    }
    let mut launched = Launch {
        config,
        rootfs: &Rootfs::Directory,
        cgroup: state.cgroup.as_ref(),
        wiring,
        no_pivot: args.no_pivot,
        pid_namespace: None,
        state: &|pid| hook_state(state, "creating", pid),
    }
    .run()?;
    launched.warnings.extend(warnings);
    state.pid = launched.pid;
    state.start_time = process_start_time(launched.pid).unwrap_or(0);
    let entered = state.resctrl.as_ref().map_or(Ok(()), |groups| groups.enter(launched.pid));
    let recorded = entered.and_then(|()| dir.write(state)).and_then(|()| match &args.pid_file {
        Some(file) => replace(file, launched.pid.to_string().as_bytes()),
        None => Ok(()),
    });
    if let Err(error) = recorded {
        launched.end();
        return Err(error);
    }
    Ok(launched)
}

/// The state in the words of the specification.
pub(super) fn hook_state(state: &State, status: &str, pid: i32) -> Vec<u8> {
    let value = serde_json::json!({
        "ociVersion": crate::spec::VERSION,
        "id": state.id,
        "status": status,
        "pid": pid,
        "bundle": state.bundle,
        "annotations": state.annotations,
    });
    value.to_string().into_bytes()
}
