//! The command line: what there is to say, and which command it goes to.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand, error::ErrorKind};
use isopod_agent::Paths;

use crate::{commands, error::Usage};

/// A Kubernetes node and its control plane in one program.
#[derive(Parser)]
#[command(name = "isopod", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Where etc/isopod, var/lib/isopod, var/log and run/isopod are; several nodes can live on one machine.
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    root_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster on this machine and stay in the foreground; Ctrl-C leaves pods running.
    Up(commands::up::Args),
    /// Stop the node and every pod on it; data stays.
    Down,
    /// Stop everything and remove all data, mounts, links, cgroups and nft tables of this root.
    Reset(commands::reset::Args),
    /// Print an administrator's kubeconfig with embedded certificates.
    Kubeconfig,
    /// Run the node agent (what the systemd service runs).
    Agent(commands::agent::Args),
    /// Run the service proxy alone, in kube-proxy's place beside any kubelet.
    Proxy(commands::proxy::Args),
    /// Join this machine to a cluster as a node.
    Join(commands::join::Args),
    /// Print the command that joins another machine.
    Token(commands::token::Args),
    /// Say why a pod of this machine does not run, and how long its start took.
    Why(commands::local::why::Args),
    /// List the pods of this machine, also without an API server.
    Ps(commands::local::ps::Args),
    /// Print what a container of this machine has written.
    Logs(commands::local::logs::Args),
    /// Run a command in a container of this machine.
    Exec(commands::local::exec::Args),
    /// List the images of this machine.
    Images,
    /// Watch what the pods of this machine use and wait for.
    Top(commands::local::top::Args),
    /// Show everything this machine has of a pod: spec, processes, cgroup, mounts, network.
    Inspect(commands::local::inspect::Args),
    /// Show what every service address and port leads to.
    Services(commands::services::Args),
    /// Say what would become of a connection from a pod to a service.
    Trace(commands::trace::Args),
    /// Run the API server (used by its static pod).
    Apiserver(commands::apiserver::Args),
    /// Run the scheduler (used by its static pod).
    Scheduler(commands::scheduler::Args),
    /// Run the controllers (used by their static pod).
    ControllerManager(commands::controller_manager::Args),
    /// Move the objects of a cluster between stores.
    Store(commands::store::Args),
    /// Remove the directory of a volume (used by the pods that empty volumes of StorageClass `local`).
    #[command(hide = true)]
    RemoveVolume(commands::remove_volume::Args),
    /// Print the version.
    Version,
}

/// Parses the command line; help and version end the process as clap does.
pub(crate) fn parse() -> Result<Cli> {
    match Cli::try_parse() {
        Ok(cli) => Ok(cli),
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => Err(Usage(sentence(&error)).into()),
    }
}

/// What clap has to say in one line: its first paragraph, without the usage that `--help` shows.
fn sentence(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "say what to do (see `isopod --help`)".to_owned();
    }
    let text = error.to_string();
    let first = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    format!("{} (see `isopod --help`)", first.lines().map(str::trim).collect::<Vec<_>>().join(" "))
}

/// Runs the command.
pub(crate) fn run(cli: Cli) -> Result<()> {
    let paths = Paths::new(&cli.root_dir);
    // One TLS provider for the whole process; a second call is the only way this fails.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match cli.command {
        Command::Up(args) => commands::up::run(&paths, args),
        Command::Down => commands::down::run(&paths),
        Command::Reset(args) => commands::reset::run(&paths, &args),
        Command::Kubeconfig => commands::kubeconfig::run(&paths),
        Command::Agent(args) => commands::agent::run(&paths, args),
        Command::Proxy(args) => commands::proxy::run(&paths, args),
        Command::Join(args) => commands::join::run(&paths, args),
        Command::Token(args) => commands::token::run(&paths, &args),
        Command::Why(args) => commands::local::why::run(&paths, &args),
        Command::Ps(args) => commands::local::ps::run(&paths, &args),
        Command::Logs(args) => commands::local::logs::run(&paths, args),
        Command::Exec(args) => commands::local::exec::run(&paths, args),
        Command::Images => commands::local::images::run(&paths),
        Command::Top(args) => commands::local::top::run(&paths, &args),
        Command::Inspect(args) => commands::local::inspect::run(&paths, &args),
        Command::Services(args) => commands::services::run(&paths, &args),
        Command::Trace(args) => commands::trace::run(&paths, &args),
        Command::Apiserver(args) => commands::apiserver::run(args),
        Command::Store(args) => commands::store::run(args),
        Command::Scheduler(args) => commands::scheduler::run(args),
        Command::ControllerManager(args) => commands::controller_manager::run(args),
        Command::RemoveVolume(args) => commands::remove_volume::run(&args),
        Command::Version => {
            println!("isopod {} (Kubernetes v1.36.2)", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn bad_options_get_one_line() {
        for (args, wanted) in [
            (&["isopod", "up", "--nonsense"][..], "unexpected argument '--nonsense' found"),
            (&["isopod", "fly"], "unrecognized subcommand 'fly'"),
            (&["isopod", "up", "--api-port", "x"], "invalid value 'x' for '--api-port <API_PORT>'"),
            (&["isopod"], "say what to do"),
        ] {
            let text = super::sentence(&super::Cli::try_parse_from(args).err().unwrap());
            assert!(text.starts_with(wanted) && !text.contains('\n'), "{text}");
        }
    }
}
