//! So many per second and a burst: a token bucket.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The bucket.
#[derive(Debug)]
pub(crate) struct Rate {
    per_second: f64,
    burst: f64,
    state: Mutex<(f64, Instant)>,
}

impl Rate {
    /// `None` when there is no limit.
    pub(crate) fn new(per_second: i32, burst: i32) -> Option<Self> {
        let burst = f64::from(burst.max(1));
        (per_second > 0).then(|| Self {
            per_second: per_second.into(),
            burst,
            state: Mutex::new((burst, Instant::now())),
        })
    }

    /// Takes one if it is there; else how long until it is.
    pub(crate) fn take(&self) -> Result<(), Duration> {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let have = (state.0 + (now - state.1).as_secs_f64() * self.per_second).min(self.burst);
        *state = (have, now);
        if have >= 1.0 {
            state.0 -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - have) / self.per_second))
    }

    /// Takes one when it is there.
    pub(crate) async fn wait(&self) {
        while let Err(pause) = self.take() {
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_and_then_one_by_one() {
        let rate = Rate::new(50, 2).unwrap();
        assert_eq!((rate.take(), rate.take()), (Ok(()), Ok(())));
        assert!(rate.take().is_err());
        let begun = Instant::now();
        for _ in 0..5 {
            rate.wait().await;
        }
        assert!(begun.elapsed() >= Duration::from_millis(90), "{:?}", begun.elapsed());
        assert!(Rate::new(0, 10).is_none());
    }
}
