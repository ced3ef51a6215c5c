//! Running one plugin: environment and standard input in, a result or an error object out.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

/// Why a plugin did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("failed to find plugin \"{0}\" in path [{1}]")]
    Missing(String, String),
    #[error("run {0}")]
    Run(PathBuf, #[source] io::Error),
    /// Its own words.
    #[error("{0}")]
    Said(String),
    #[error("{0} said something that is no result: {1}")]
    Result(PathBuf, #[source] serde_json::Error),
}

/// One attachment of a pod's namespace to a network.
#[derive(Debug, Clone)]
pub(crate) struct Attachment {
    pub(crate) id: String,
    /// `None`: the namespace is gone.
    pub(crate) netns: Option<PathBuf>,
    /// Semicolon-separated pairs.
    pub(crate) args: String,
}

/// Where plugins are.
#[derive(Debug, Clone)]
pub(crate) struct Plugins {
    pub(crate) dirs: Vec<PathBuf>,
}

/// Interface of every pod.
const INTERFACE: &str = "eth0";

impl Plugins {
    fn path(&self) -> String {
        let dirs: Vec<String> = self.dirs.iter().map(|d| d.display().to_string()).collect();
        dirs.join(":")
    }

    fn find(&self, kind: &str) -> Result<PathBuf, Error> {
        let all = self.dirs.iter().map(|dir| dir.join(kind));
        let found = all.into_iter().find(|path| path.is_file());
        found.ok_or_else(|| Error::Missing(kind.into(), self.path().replace(':', " ")))
    }

    /// Whether there is such a plugin.
    pub(crate) fn has(&self, kind: &str) -> bool {
        self.find(kind).is_ok()
    }

    /// Runs a plugin and waits for it; `None` for a command that has no result.
    pub(crate) fn run(
        &self,
        kind: &str,
        command: &str,
        attachment: Option<&Attachment>,
        input: &Value,
    ) -> Result<Option<Value>, Error> {
        let program = self.find(kind)?;
        let mut process = Command::new(&program);
        process.env("CNI_COMMAND", command).env("CNI_PATH", self.path());
        if let Some(attachment) = attachment {
            let netns = attachment.netns.as_deref().unwrap_or(Path::new(""));
            process.env("CNI_CONTAINERID", &attachment.id).env("CNI_NETNS", netns);
            process.env("CNI_IFNAME", INTERFACE).env("CNI_ARGS", &attachment.args);
        }
        process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = process.spawn().map_err(|e| Error::Run(program.clone(), e))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that reads nothing says what is wrong on its output.
            let _ = stdin.write_all(input.to_string().as_bytes());
        }
        let output = child.wait_with_output().map_err(|e| Error::Run(program.clone(), e))?;
        if !output.status.success() {
            return Err(Error::Said(complaint(&output)));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        if text.trim().is_empty() {
            return Ok(None);
        }
        serde_json::from_str(&text).map(Some).map_err(|e| Error::Result(program, e))
    }
}

/// What a plugin that failed has to say: its error object, else whatever it wrote.
fn complaint(output: &std::process::Output) -> String {
    let object: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    let field = |key: &str| object.as_ref().and_then(|o| o[key].as_str()).filter(|t| !t.is_empty());
    match (field("msg"), field("details")) {
        (Some(message), Some(details)) => format!("{message}; {details}"),
        (Some(message), None) => message.to_owned(),
        _ => {
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let said = if err.trim().is_empty() { out } else { err };
            format!("netplugin failed: {} ({})", said.trim(), output.status)
        }
    }
}
