//! The command line, as runc's.

mod create;
mod exec;
mod foreground;
mod info;
mod lifecycle;
mod update;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::error::Result;

/// An OCI runtime, and the supervisor of isopod's pods.
#[derive(Debug, Parser)]
#[command(name = "isopod-runtime", version, args_override_self = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Directory for the state of containers [default: /run/isopod-runtime, or below $XDG_RUNTIME_DIR for a user]
    #[arg(long)]
    root: Option<PathBuf>,
    /// File errors are also written to
    #[arg(long)]
    log: Option<PathBuf>,
    /// How lines of the log look
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Accepted for compatibility
    #[arg(long)]
    debug: bool,
    /// Have systemd make containers' groups, as transient scopes
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted for compatibility
    #[arg(long)]
    rootless: Option<String>,
    /// systemd is --systemd-cgroup, cgroupfs the default
    #[arg(long, value_parser = ["systemd", "cgroupfs"])]
    cgroup_manager: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a container
    Create(create::CreateArgs),
    /// Run the program of a created container
    Start { id: String },
    /// Create and start a container
    Run(create::RunArgs),
    /// Show a container's state
    State { id: String },
    /// Send a signal to a container
    Kill(lifecycle::KillArgs),
    /// Remove a container
    Delete(lifecycle::DeleteArgs),
    /// Run a program in a container
    Exec(exec::ExecArgs),
    /// List containers
    List(lifecycle::ListArgs),
    /// List a container's processes
    Ps(lifecycle::PsArgs),
    /// Freeze a container
    Pause { id: String },
    /// Continue a frozen container
    Resume { id: String },
    /// Change a container's resource limits
    Update(update::UpdateArgs),
    /// Show a container's resource use
    Events(info::EventsArgs),
    /// Show what this runtime supports
    Features,
    /// Write a configuration to start from
    Spec(info::SpecArgs),
    /// Not supported
    Checkpoint(Unsupported),
    /// Not supported
    Restore(Unsupported),
    /// Supervise a pod (used by the isopod agent)
    Supervise { dir: PathBuf },
}

/// Whatever is said to a command that does nothing.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
struct Unsupported {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _args: Vec<String>,
}

/// Parses the arguments, does it, and returns the exit code.
#[must_use]
pub fn main() -> i32 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            drop(e.print());
            return if e.use_stderr() { 64 } else { 0 };
        }
    };
    match dispatch(cli.command, &cli.global) {
        Ok(code) => code,
        Err(error) => {
            cli.global.report(&error.to_string());
            error.exit_code()
        }
    }
}

fn dispatch(command: Command, global: &Global) -> Result<i32> {
    let root = &global.root();
    let makes_processes =
        matches!(command, Command::Create(_) | Command::Run(_) | Command::Exec(_) | Command::Supervise { .. });
    if makes_processes {
        crate::ensure_sealed()?;
    }
    match command {
        Command::Create(args) => create::create(global, &args).map(|()| 0),
        Command::Run(args) => create::run(global, &args),
        Command::Start { id } => lifecycle::start(root, &id).map(|()| 0),
        Command::State { id } => lifecycle::state(root, &id).map(|()| 0),
        Command::Kill(args) => lifecycle::kill(root, &args).map(|()| 0),
        Command::Delete(args) => lifecycle::delete(root, &args).map(|()| 0),
        Command::Exec(args) => exec::exec(global, &args),
        Command::List(args) => lifecycle::list(root, &args).map(|()| 0),
        Command::Ps(args) => lifecycle::ps(root, &args).map(|()| 0),
        Command::Pause { id } => lifecycle::freeze(root, &id, true).map(|()| 0),
        Command::Resume { id } => lifecycle::freeze(root, &id, false).map(|()| 0),
        Command::Update(args) => update::update(root, &args).map(|()| 0),
        Command::Events(args) => info::events(root, &args).map(|()| 0),
        Command::Features => info::features().map(|()| 0),
        Command::Spec(args) => info::spec(&args).map(|()| 0),
        Command::Checkpoint(_) | Command::Restore(_) => {
            Err(crate::error::Error::invalid("checkpoint and restore are not supported"))
        }
        Command::Supervise { dir } => {
            let (line, code) = crate::supervisor::supervise(&dir)?;
            println!("{line}");
            Ok(code)
        }
    }
}

impl Global {
    /// Whether systemd makes groups.
    fn systemd(&self) -> bool {
        self.systemd_cgroup || self.cgroup_manager.as_deref() == Some("systemd")
    }

    /// Where states are kept.
    fn root(&self) -> PathBuf {
        if let Some(root) = &self.root {
            return root.clone();
        }
        let runtime_dir =
            std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| crate::cgroups::unprivileged() && !dir.is_empty());
        runtime_dir.map_or_else(|| PathBuf::from("/run"), PathBuf::from).join("isopod-runtime")
    }

    /// Tells an error to people and to the program that called.
    fn report(&self, message: &str) {
        eprintln!("isopod-runtime: {message}");
        self.log("error", message);
    }

    /// Tells what could not be done but does not matter enough. Our stderr is the container's too: with a log of our own
    /// it stays free of this.
    fn warn(&self, message: &str) {
        if !self.log("warning", message) {
            eprintln!("isopod-runtime: warning: {message}");
        }
    }

    /// Adds a line to the log; `false` when there is none.
    fn log(&self, level: &str, message: &str) -> bool {
        let Some(path) = &self.log else { return false };
        let time = crate::time::rfc3339_nanos(crate::time::now_nanos());
        let line = if self.log_format == LogFormat::Json {
            serde_json::json!({"level": level, "msg": message, "time": time}).to_string()
        } else {
            format!("time={time:?} level={level} msg={message:?}")
        };
        let file = std::fs::File::options().create(true).append(true).open(path);
        file.and_then(|mut file| std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes())).is_ok()
    }
}
