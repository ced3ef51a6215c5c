//! The command line, as runc's.

mod commands;
mod create;
mod exec;
mod features;
mod foreground;
mod info;
mod lifecycle;
mod update;

use std::path::PathBuf;

use clap::{Args, Parser};

use self::commands::{Command, Nothing, may_make_processes};
use crate::error::{Context, Result};

/// An OCI runtime, and the supervisor of isopod's pods.
#[derive(Debug, Parser)]
#[command(name = "isopod-runtime", version, args_override_self = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
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
    /// Accepted for compatibility
    #[arg(long, hide = true)]
    criu: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Parses the arguments, does it, and returns the exit code.
#[must_use]
pub fn main() -> i32 {
    // Before the arguments are parsed: that happens again in the sealed runtime.
    let sealed = if may_make_processes(std::env::args_os().skip(1)) { crate::ensure_sealed() } else { Ok(()) };
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            drop(e.print());
            return if e.use_stderr() { 64 } else { 0 };
        }
    };
    let Some(command) = cli.command else {
        drop(<Cli as clap::CommandFactory>::command().print_help());
        return 0;
    };
    // What cannot be logged later is better known now.
    let logs = cli.global.open_log().transpose().map(drop);
    let executes = matches!(command, Command::Exec(_));
    match sealed.and(logs).and_then(|()| dispatch(command, &cli.global)) {
        Ok(code) => code,
        Err(error) => {
            cli.global.report(&error.to_string());
            match error.exit_code() {
                // As any code may be the program's, runc's is the last there is.
                1 if executes => 255,
                code => code,
            }
        }
    }
}

fn dispatch(command: Command, global: &Global) -> Result<i32> {
    let root = &global.root();
    match command {
        Command::Create(args) => create::create(global, &args).map(|()| 0),
        Command::Run(args) => create::run(global, &args),
        Command::Start(of) => lifecycle::start(global, &of.id).map(|()| 0),
        Command::State(of) => lifecycle::state(root, &of.id).map(|()| 0),
        Command::Kill(args) => lifecycle::kill(root, &args).map(|()| 0),
        Command::Delete(args) => lifecycle::delete(global, &args).map(|()| 0),
        Command::Exec(args) => exec::exec(global, &args),
        Command::List(args) => lifecycle::list(root, &args).map(|()| 0),
        Command::Ps(args) => lifecycle::ps(root, &args).map(|()| 0),
        Command::Pause(of) => lifecycle::freeze(root, &of.id, true).map(|()| 0),
        Command::Resume(of) => lifecycle::freeze(root, &of.id, false).map(|()| 0),
        Command::Update(args) => update::update(global, &args).map(|()| 0),
        Command::Events(args) => info::events(root, &args).map(|()| 0),
        Command::Features(Nothing {}) => features::features().map(|()| 0),
        Command::Spec(args) => info::spec(&args).map(|()| 0),
        Command::Checkpoint(args) | Command::Restore(args) => Err(args.refusal()),
        Command::Supervise(args) => {
            let (line, code) = crate::supervisor::supervise(&args.dir)?;
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

    /// Tells what could not be done but does not matter enough, once nothing can fail any more: callers look for the cause
    /// in the first line. Our stderr is the container's too: with a log of our own it stays free of this.
    fn warn(&self, messages: &[String]) {
        for message in messages {
            if !self.log("warning", message) {
                eprintln!("isopod-runtime: warning: {message}");
            }
        }
    }

    /// Adds a line to the log; `false` when there is none.
    fn log(&self, level: &str, message: &str) -> bool {
        let Some(Ok(mut file)) = self.open_log() else { return false };
        let time = crate::time::rfc3339_nanos(crate::time::now_nanos());
        let line = if self.log_format == LogFormat::Json {
            serde_json::json!({"level": level, "msg": message, "time": time}).to_string()
        } else {
            format!("time={time:?} level={level} msg={message:?}")
        };
        std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes()).is_ok()
    }

    fn open_log(&self) -> Option<Result<std::fs::File>> {
        let path = self.log.as_ref()?;
        let opened = std::fs::File::options().create(true).append(true).open(path);
        Some(opened.context(|| format!("open log {}", path.display())))
    }
}
