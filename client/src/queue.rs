//! A work queue of keys: each key is processed by one worker at a time, a key added meanwhile is processed once more
//! afterwards, failures come back with exponential back-off per key.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What a key can be.
pub trait QueueKey: Clone + Eq + Hash + Send + Sync + std::fmt::Debug + 'static {}
impl<K: Clone + Eq + Hash + Send + Sync + std::fmt::Debug + 'static> QueueKey for K {}

/// Keys a queue may keep room for while there are none.
const BURST: usize = 256;

struct State<K> {
    ready: VecDeque<K>,
    /// Keys that need work: in `ready`, or added again while being processed.
    dirty: HashSet<K>,
    processing: HashSet<K>,
    /// Keys that become ready later; the number keeps equal times apart.
    later: BTreeMap<(Instant, u64), K>,
    due: HashMap<K, (Instant, u64)>,
    failures: HashMap<K, u32>,
    serial: u64,
}

/// The queue; share it in an `Arc`.
pub struct Queue<K> {
    state: Mutex<State<K>>,
    wake: Notify,
    base: Duration,
    max: Duration,
}

impl<K: QueueKey> Default for Queue<K> {
    fn default() -> Self {
        Self::with_backoff(Duration::from_millis(5), Duration::from_secs(1000))
    }
}

impl<K: QueueKey> Queue<K> {
    /// A queue with upstream's back-off of 5 ms to 1000 s.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A queue with its own back-off.
    pub fn with_backoff(base: Duration, max: Duration) -> Self {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            processing: HashSet::new(),
            later: BTreeMap::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
            serial: 0,
        };
        Self { state: Mutex::new(state), wake: Notify::new(), base, max }
    }

    /// Adds a key; a key already waiting is not added twice.
    pub fn add(&self, key: K) {
        if self.state.lock().add(key) {
            self.wake.notify_one();
        }
    }

    /// Adds a key after a delay; the earliest of several delays counts.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let mut state = self.state.lock();
        let at = Instant::now() + delay;
        if let Some(due) = state.due.get(&key).copied() {
            if due.0 <= at {
                return;
            }
            state.later.remove(&due);
        }
        state.serial += 1;
        let slot = (at, state.serial);
        state.later.insert(slot, key.clone());
        state.due.insert(key, slot);
        drop(state);
        self.wake.notify_one();
    }

    /// Adds a key after its back-off, which doubles with every call until [`Queue::forget`].
    pub fn add_rate_limited(&self, key: K) {
        let delay = {
            let mut state = self.state.lock();
            let failures = state.failures.entry(key.clone()).or_insert(0);
            let delay = self.base.saturating_mul(1u32.checked_shl(*failures).unwrap_or(u32::MAX)).min(self.max);
            *failures = (*failures + 1).min(31);
            delay
        };
        self.add_after(key, delay);
    }

    /// How often a key failed since it was last forgotten.
    pub fn failures(&self, key: &K) -> u32 {
        self.state.lock().failures.get(key).copied().unwrap_or(0)
    }

    /// Forgets a key's failures.
    pub fn forget(&self, key: &K) {
        self.state.lock().failures.remove(key);
    }

    /// How many keys are ready.
    pub fn len(&self) -> usize {
        self.state.lock().ready.len()
    }

    /// Whether no key is ready.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next key; the caller owns it until [`Queue::done`]. Cancel-safe: a key is taken only on return.
    pub async fn next(&self) -> K {
        loop {
            let wake = self.wake.notified();
            let earliest = {
                let mut state = self.state.lock();
                state.promote(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.dirty.remove(&key);
                    state.processing.insert(key.clone());
                    let more = !state.ready.is_empty();
                    drop(state);
                    if more {
                        self.wake.notify_one();
                    }
                    return key;
                }
                state.rest();
                state.later.keys().next().map(|(at, _)| *at)
            };
            match earliest {
                Some(at) => {
                    tokio::select! {
                        // Cancel-safe: both only wait.
                        () = wake => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => wake.await,
            }
        }
    }

    /// Ends the processing of a key; it becomes ready again when it was added meanwhile.
    pub fn done(&self, key: &K) {
        let mut state = self.state.lock();
        state.processing.remove(key);
        if state.dirty.contains(key) {
            state.ready.push_back(key.clone());
            drop(state);
            self.wake.notify_one();
        }
    }
}

impl<K: QueueKey> State<K> {
    fn add(&mut self, key: K) -> bool {
        if !self.dirty.insert(key.clone()) || self.processing.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        true
    }

    /// Gives back the room a burst of keys needed.
    fn rest(&mut self) {
        if self.ready.capacity() > BURST {
            self.ready.shrink_to_fit();
            self.dirty.shrink_to_fit();
            self.due.shrink_to_fit();
            self.failures.shrink_to_fit();
        }
    }

    fn promote(&mut self, now: Instant) {
        while let Some(entry) = self.later.first_entry() {
            if entry.key().0 > now {
                return;
            }
            let key = entry.remove();
            self.due.remove(&key);
            self.add(key);
        }
    }
}

/// Runs `count` workers until `stop`. `Ok(Some(delay))` runs the key again later, an error after its back-off.
pub fn spawn_workers<K, F, Fut, E>(
    name: &'static str,
    queue: &Arc<Queue<K>>,
    count: usize,
    stop: &CancellationToken,
    work: F,
) where
    K: QueueKey,
    F: Fn(K) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Option<Duration>, E>> + Send,
    E: Display + Send,
{
    for _ in 0..count {
        let (queue, stop, work) = (queue.clone(), stop.clone(), work.clone());
        tokio::spawn(async move {
            loop {
                let key = tokio::select! {
                    // Cancel-safe: next() takes a key only when it returns.
                    key = queue.next() => key,
                    () = stop.cancelled() => return,
                };
                match work(key.clone()).await {
                    Ok(again) => {
                        queue.forget(&key);
                        if let Some(delay) = again {
                            queue.add_after(key.clone(), delay);
                        }
                    }
                    Err(error) => {
                        tracing::debug!(controller = name, ?key, %error, "sync failed, will retry");
                        queue.add_rate_limited(key.clone());
                    }
                }
                queue.done(&key);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    #[test]
    fn a_key_added_while_processed_runs_once_more() {
        runtime().block_on(async {
            let queue = Queue::new();
            queue.add("a");
            queue.add("a");
            let key = queue.next().await;
            queue.add("a");
            queue.add("a");
            assert_eq!(queue.len(), 0, "not ready while it is processed");
            queue.done(&key);
            assert_eq!(queue.next().await, "a");
            queue.done(&"a");
            assert_eq!(queue.len(), 0);
        });
    }

    #[test]
    fn room_for_a_burst_is_given_back() {
        runtime().block_on(async {
            let queue = Queue::new();
            (0..10 * BURST).for_each(|key| queue.add(key));
            for _ in 0..10 * BURST {
                let key = queue.next().await;
                queue.done(&key);
            }
            assert!(tokio::time::timeout(Duration::from_millis(1), queue.next()).await.is_err(), "nothing is left");
            let state = queue.state.lock();
            assert_eq!((state.ready.capacity(), state.dirty.capacity()), (0, 0));
        });
    }

    #[test]
    fn backoff_doubles_and_the_earliest_delay_counts() {
        runtime().block_on(async {
            let queue = Queue::with_backoff(Duration::from_millis(1), Duration::from_millis(4));
            let start = Instant::now();
            for _ in 0..4 {
                queue.add_rate_limited("a");
                let key = queue.next().await;
                queue.done(&key);
            }
            assert!(start.elapsed() >= Duration::from_millis(1 + 2 + 4 + 4));
            assert_eq!(queue.failures(&"a"), 4);
            queue.forget(&"a");
            assert_eq!(queue.failures(&"a"), 0);
            queue.add_after("b", Duration::from_secs(3600));
            queue.add_after("b", Duration::from_millis(1));
            assert_eq!(queue.next().await, "b");
        });
    }
}
