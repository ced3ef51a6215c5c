//! Network configuration lists in a directory, as every CNI runtime reads them: the first valid file by name is the one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

/// Endings of configuration files; `.conflist` holds a list, the others a single plugin.
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("no networks found in {0}")]
    None(PathBuf),
    #[error("{0}: {1}")]
    Invalid(PathBuf, String),
}

/// A chain of plugins.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct List {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) disable_check: bool,
    pub(crate) disable_gc: bool,
    pub(crate) plugins: Vec<Map<String, Value>>,
}

impl List {
    fn parse(text: &str, is_list: bool) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
        let string = |key: &str| value[key].as_str().map(str::to_owned);
        let name = string("name").filter(|n| !n.is_empty()).ok_or("missing 'name'")?;
        let whole = |n: &str| n.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        if !whole(&name) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(format!("invalid characters found in network name: {name}"));
        }
        let plugins = if is_list {
            value["plugins"].as_array().cloned().ok_or("missing 'plugins'")?
        } else {
            vec![value.clone()]
        };
        let plugins: Option<Vec<Map<String, Value>>> = plugins.iter().map(|p| p.as_object().cloned()).collect();
        let plugins = plugins.ok_or("a plugin is no object")?;
        if plugins.is_empty() {
            return Err("no plugins in list".into());
        }
        for plugin in &plugins {
            let kind = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
            if kind.is_empty() || kind.contains('/') {
                return Err(format!("a plugin's 'type' is \"{kind}\""));
            }
        }
        Ok(Self {
            name,
            version: string("cniVersion").unwrap_or_else(|| "0.1.0".into()),
            disable_check: value["disableCheck"].as_bool().unwrap_or(false),
            disable_gc: value["disableGC"].as_bool().unwrap_or(false),
            plugins,
        })
    }

    /// Whether the specification it is written for is at least this.
    pub(crate) fn is_at_least(&self, major: u32, minor: u32) -> bool {
        let mut parts = self.version.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
    }

    /// What a plugin reads: its own part, the list's name and version, the result so far, and what it asked for.
    pub(crate) fn input(&self, number: usize, previous: Option<&Value>, runtime: &Map<String, Value>) -> Value {
        let mut input = self.plugins[number].clone();
        input.insert("name".into(), json!(self.name));
        input.insert("cniVersion".into(), json!(self.version));
        let asked = input.remove("capabilities");
        let wants = |key: &str| asked.as_ref().is_some_and(|a| a[key] == json!(true));
        let given: Map<String, Value> =
            runtime.iter().filter(|(key, _)| wants(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !given.is_empty() {
            input.insert("runtimeConfig".into(), Value::Object(given));
        }
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.clone());
        }
        Value::Object(input)
    }

    /// The `type` of a plugin.
    pub(crate) fn kind(&self, number: usize) -> &str {
        self.plugins[number].get("type").and_then(Value::as_str).unwrap_or_default()
    }
}

/// The files that may hold a configuration, by name.
fn files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| Error::Read(dir.into(), e))?,
    };
    let is_config = |p: &PathBuf| p.extension().and_then(|e| e.to_str()).is_some_and(|e| ENDINGS.contains(&e));
    let mut all: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(is_config).collect();
    all.sort();
    Ok(all)
}

/// The list in force. Files that are none are told of and left out, as are podman's own networks.
pub(crate) fn load(dir: &Path) -> Result<List, Error> {
    let mut first = None;
    for path in files(dir)? {
        let text = fs::read_to_string(&path).map_err(|e| Error::Read(path.clone(), e))?;
        match List::parse(&text, path.extension().is_some_and(|e| e == "conflist")) {
            Ok(list) if list.name == "podman" => {
                tracing::debug!(path = %path.display(), "podman's own network left out")
            }
            Ok(list) => return Ok(list),
            Err(why) => {
                tracing::warn!(path = %path.display(), why, "no CNI configuration");
                first.get_or_insert(Error::Invalid(path, why));
            }
        }
    }
    Err(first.unwrap_or_else(|| Error::None(dir.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_good_file_by_name_counts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()).unwrap_err().to_string(), format!("no networks found in {}", dir.path().display()));
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("00-podman.conflist", r#"{"name": "podman", "plugins": [{"type": "bridge"}]}"#);
        write("05-bad.conflist", r#"{"name": "x", "plugins": []}"#);
        assert!(load(dir.path()).unwrap_err().to_string().ends_with("05-bad.conflist: no plugins in list"));
        write("10-net.conf", r#"{"cniVersion": "0.4.0", "name": "one", "type": "bridge"}"#);
        write("20-net.conflist", r#"{"cniVersion": "1.1.0", "name": "two", "plugins": [{"type": "ptp"}]}"#);
        write("00-readme.txt", "{}");
        let list = load(dir.path()).unwrap();
        assert_eq!((list.name.as_str(), list.kind(0), list.plugins.len()), ("one", "bridge", 1));
        assert!(list.is_at_least(0, 4) && !list.is_at_least(1, 0));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, wanted) in [
            ("{", "not JSON"),
            (r#"{"plugins": []}"#, "missing 'name'"),
            (r#"{"name": "a/b", "plugins": []}"#, "invalid characters found in network name: a/b"),
            (r#"{"name": "a"}"#, "missing 'plugins'"),
            (r#"{"name": "a", "plugins": [1]}"#, "a plugin is no object"),
            (r#"{"name": "a", "plugins": [{"type": "../x"}]}"#, "a plugin's 'type' is \"../x\""),
        ] {
            let why = List::parse(text, true).unwrap_err();
            assert!(why.starts_with(wanted), "{text}: {why}");
        }
    }

    #[test]
    fn plugins_get_what_they_ask_for() {
        let text = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [
            {"type": "bridge", "mtu": 1400}, {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;
        let list = List::parse(text, true).unwrap();
        let runtime = json!({"portMappings": [{"hostPort": 80}], "bandwidth": {"ingressRate": 1}});
        let runtime = runtime.as_object().unwrap();
        let wanted = json!({"type": "bridge", "mtu": 1400, "name": "n", "cniVersion": "1.0.0"});
        assert_eq!(list.input(0, None, runtime), wanted);
        let wanted = json!({"type": "portmap", "name": "n", "cniVersion": "1.0.0",
            "runtimeConfig": {"portMappings": [{"hostPort": 80}]}, "prevResult": {"ips": []}});
        assert_eq!(list.input(1, Some(&json!({"ips": []})), runtime), wanted);
    }
}
