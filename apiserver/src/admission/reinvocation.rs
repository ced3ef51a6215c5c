//! Whether the mutating plugins run a second time, and who of them is asked again.

use std::collections::BTreeSet;

use serde_json::Value;

/// The state of one request.
#[derive(Debug, Default)]
pub(crate) struct Reinvocation {
    /// Something changed the object: the plugins run once more.
    pub(crate) needed: bool,
    /// This is that second run.
    pub(crate) again: bool,
    /// Of mutating policies.
    pub(crate) policies: Progress,
    /// Of mutating webhooks.
    pub(crate) webhooks: Progress,
}

/// What one plugin remembers between the two runs.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    output: Option<Value>,
    reinvocable: BTreeSet<String>,
    wanted: BTreeSet<String>,
}

impl Progress {
    /// At the start of a run: whoever changed the object since makes everyone be asked again.
    pub(crate) fn start(&mut self, again: bool, object: &Value) {
        if again && self.output.as_ref().is_some_and(|output| output != object) {
            self.changed();
        }
    }

    /// Whether one is asked in this run.
    pub(crate) fn asks(&self, again: bool, key: &str) -> bool {
        !again || self.wanted.contains(key)
    }

    /// The object was changed: those before are asked again.
    pub(crate) fn changed(&mut self) {
        self.wanted.append(&mut self.reinvocable);
    }

    /// One that wants to be asked again was asked.
    pub(crate) fn asked(&mut self, key: String) {
        self.reinvocable.insert(key);
    }

    /// At the end of a run.
    pub(crate) fn end(&mut self, object: &Value) {
        self.output = Some(object.clone());
    }
}
