//! The commands and their arguments. Only those of the command that was called are made: a call is short, and the
//! arguments of all commands are most of what it would need memory for.

use std::path::PathBuf;

use clap::{ArgMatches, Args, FromArgMatches, Subcommand, error::ErrorKind};

use super::{create, exec, info, lifecycle, update};
use crate::error::Error;

macro_rules! commands {
    ($(#[doc = $about:literal] $name:literal $variant:ident($args:ty),)*) => {
        #[derive(Debug)]
        pub(super) enum Command {
            $(#[doc = $about] $variant($args),)*
        }

        impl FromArgMatches for Command {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
                match matches.subcommand() {
                    $(Some(($name, matches)) => <$args>::from_arg_matches(matches).map(Self::$variant),)*
                    _ => Err(clap::Error::new(ErrorKind::MissingSubcommand)),
                }
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
                *self = Self::from_arg_matches(matches)?;
                Ok(())
            }
        }

        impl Subcommand for Command {
            fn augment_subcommands(command: clap::Command) -> clap::Command {
                command$(.subcommand(clap::Command::new($name).about($about.trim()).defer(<$args>::augment_args)))*
            }

            fn augment_subcommands_for_update(command: clap::Command) -> clap::Command {
                Self::augment_subcommands(command)
            }

            fn has_subcommand(name: &str) -> bool {
                [$($name),*].contains(&name)
            }
        }
    };
}

commands! {
    /// Create a container
    "create" Create(create::CreateArgs),
    /// Run the program of a created container
    "start" Start(Container),
    /// Create and start a container
    "run" Run(create::RunArgs),
    /// Show a container's state
    "state" State(Container),
    /// Send a signal to a container
    "kill" Kill(lifecycle::KillArgs),
    /// Remove a container
    "delete" Delete(lifecycle::DeleteArgs),
    /// Run a program in a container
    "exec" Exec(exec::ExecArgs),
    /// List containers
    "list" List(lifecycle::ListArgs),
    /// List a container's processes
    "ps" Ps(lifecycle::PsArgs),
    /// Freeze a container
    "pause" Pause(Container),
    /// Continue a frozen container
    "resume" Resume(Container),
    /// Change a container's resource limits
    "update" Update(update::UpdateArgs),
    /// Show a container's resource use
    "events" Events(info::EventsArgs),
    /// Show what this runtime supports
    "features" Features(Nothing),
    /// Write a configuration to start from
    "spec" Spec(info::SpecArgs),
    /// Not supported
    "checkpoint" Checkpoint(Unsupported),
    /// Not supported
    "restore" Restore(Unsupported),
    /// Supervise a pod (used by the isopod agent)
    "supervise" Supervise(SuperviseArgs),
}

/// The container a command is about.
#[derive(Debug, Args)]
pub(super) struct Container {
    /// Container id
    pub(super) id: String,
}

#[derive(Debug, Args)]
pub(super) struct Nothing {}

#[derive(Debug, Args)]
pub(super) struct SuperviseArgs {
    /// The pod's directory
    pub(super) dir: PathBuf,
}

/// Whatever is said to a command that does nothing.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(super) struct Unsupported {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _args: Vec<String>,
}

impl Unsupported {
    pub(super) fn refusal(&self) -> Error {
        Error::invalid("checkpoint and restore are not supported")
    }
}

/// Whether these arguments, not parsed yet, may be of a command that makes processes.
pub(super) fn may_make_processes(mut args: impl Iterator<Item = std::ffi::OsString>) -> bool {
    args.any(|arg| arg.to_str().is_some_and(|arg| ["create", "run", "exec", "supervise"].contains(&arg)))
}
