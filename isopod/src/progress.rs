//! Progress for a person: a spinner on a terminal, plain lines elsewhere; each step with the time it took.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Prints steps as they start and end.
pub(crate) struct Progress {
    started: Instant,
    step: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(ProgressStyle::default_spinner());
            bar.enable_steady_tick(Duration::from_millis(80));
            bar
        });
        let now = Instant::now();
        Self { started: now, step: now, bar }
    }

    /// A step begins.
    pub(crate) fn begin(&mut self, what: &str) {
        self.step = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// The step is done.
    pub(crate) fn done(&mut self, what: &str) {
        self.line(&format!("  ok {:>7}  {what}", seconds(self.step.elapsed())));
        self.step = Instant::now();
    }

    /// A line that is no step.
    pub(crate) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// No more steps; the time since the beginning.
    pub(crate) fn finish(self) -> Duration {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.started.elapsed()
    }
}

/// `0.123 s`.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}
