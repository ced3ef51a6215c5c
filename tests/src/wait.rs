//! Waiting for a condition, never for luck.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

/// Debug builds under a busy CI machine are slow; a condition that holds comes true long before.
const DEADLINE: Duration = Duration::from_secs(60);

/// Tries until `probe` gives `Ok`; panics with its last answer after a minute.
#[track_caller]
pub fn eventually<T, E: Debug>(what: &str, probe: impl FnMut() -> Result<T, E>) -> T {
    eventually_within(DEADLINE, what, probe)
}

/// Tries until `probe` gives `Ok`; panics with its last answer after `deadline`.
#[track_caller]
pub fn eventually_within<T, E: Debug>(deadline: Duration, what: &str, mut probe: impl FnMut() -> Result<T, E>) -> T {
    let started = Instant::now();
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if started.elapsed() > deadline => panic!("{what}: not within {deadline:?}; last: {last:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
