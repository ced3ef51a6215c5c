//! When a node is short of something: thresholds, how long they have been crossed, and the conditions that follow. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::info;
use crate::config::{KubeletConfiguration, parse_duration};

/// What a node can be short of, as its conditions say it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub(crate) memory: bool,
    pub(crate) disk: bool,
    pub(crate) pids: bool,
}

impl Pressure {
    /// Types of the conditions that hold.
    pub(crate) fn names(self) -> Vec<&'static str> {
        let all = [("MemoryPressure", self.memory), ("DiskPressure", self.disk), ("PIDPressure", self.pids)];
        all.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect()
    }
}

/// What is left of a signal's resource, and how much there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) available: i64,
    pub(crate) capacity: i64,
}

/// Observations by signal.
pub(crate) type Observations = BTreeMap<&'static str, Observed>;

/// One limit below which a node acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Threshold {
    pub(crate) signal: String,
    /// As written: a quantity or a percentage.
    pub(crate) value: String,
    /// How long it has to be crossed; nothing for a hard one.
    pub(crate) grace: Option<Duration>,
    /// What is to be free beyond the value before it counts as over.
    reclaim: String,
}

impl Threshold {
    /// The value in units of the signal.
    pub(crate) fn amount(&self, capacity: i64) -> i64 {
        info::amount(&self.value, capacity)
    }

    /// The resource's name in messages and requests.
    pub(crate) fn resource(&self) -> &'static str {
        match self.signal.as_str() {
            "memory.available" | "allocatableMemory.available" => "memory",
            "pid.available" => "pids",
            s if s.ends_with("inodesFree") => "inodes",
            _ => "ephemeral-storage",
        }
    }

    fn of(self_signal: &str) -> usize {
        match self_signal {
            "memory.available" | "allocatableMemory.available" => 0,
            "pid.available" => 2,
            _ => 1,
        }
    }
}

/// Every threshold of a configuration, those of memory first: they hurt soonest.
pub(crate) fn thresholds(k: &KubeletConfiguration) -> Vec<Threshold> {
    let reclaim = |signal: &String| k.eviction_minimum_reclaim.get(signal).cloned().unwrap_or_else(|| "0".into());
    let one = |signal: &String, value: &String, grace| Threshold {
        signal: signal.clone(),
        value: value.clone(),
        grace,
        reclaim: reclaim(signal),
    };
    let soft = |signal: &String| k.eviction_soft_grace_period.get(signal).and_then(|g| parse_duration(g));
    let mut all: Vec<Threshold> = k.eviction_hard.iter().map(|(s, v)| one(s, v, None)).collect();
    all.extend(k.eviction_soft.iter().map(|(s, v)| one(s, v, Some(soft(s).unwrap_or_default()))));
    all.sort_by_key(|t| (Threshold::of(&t.signal), t.grace.is_some()));
    all
}

/// Watches thresholds over time.
#[derive(Debug)]
pub(crate) struct Monitor {
    thresholds: Vec<Threshold>,
    transition: Duration,
    /// Since when a threshold is crossed, by its place.
    since: HashMap<usize, Instant>,
    /// When memory, disk and pids were last short.
    last: [Option<Instant>; 3],
}

impl Monitor {
    /// Nothing observed yet.
    pub(crate) fn new(k: &KubeletConfiguration) -> Self {
        let transition = k.eviction_pressure_transition_period;
        Self { thresholds: thresholds(k), transition, since: HashMap::new(), last: [None; 3] }
    }

    /// Takes observations in: the node's conditions, and the thresholds to act on, the most pressing first.
    pub(crate) fn observe(&mut self, seen: &Observations, now: Instant) -> (Pressure, Vec<Threshold>) {
        let mut act = Vec::new();
        for (i, t) in self.thresholds.iter().enumerate() {
            let crossed = seen.get(t.signal.as_str()).is_some_and(|o| {
                let more = if self.since.contains_key(&i) { info::amount(&t.reclaim, o.capacity) } else { 0 };
                o.available < t.amount(o.capacity) + more
            });
            if !crossed {
                self.since.remove(&i);
                continue;
            }
            let since = *self.since.entry(i).or_insert(now);
            self.last[Threshold::of(&t.signal)] = Some(now);
            if now - since >= t.grace.unwrap_or_default() {
                act.push(t.clone());
            }
        }
        let short = |i: usize| self.last[i].is_some_and(|at| at == now || now - at < self.transition);
        (Pressure { memory: short(0), disk: short(1), pids: short(2) }, act)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(hard: &[(&str, &str)], soft: &[(&str, &str, &str)]) -> Monitor {
        let own = |s: &str| s.to_string();
        let k = KubeletConfiguration {
            eviction_hard: hard.iter().map(|(s, v)| (own(s), own(v))).collect(),
            eviction_soft: soft.iter().map(|(s, v, _)| (own(s), own(v))).collect(),
            eviction_soft_grace_period: soft.iter().map(|(s, _, g)| (own(s), own(g))).collect(),
            eviction_minimum_reclaim: [(own("memory.available"), own("50"))].into(),
            eviction_pressure_transition_period: Duration::from_secs(60),
            ..KubeletConfiguration::default()
        };
        Monitor::new(&k)
    }

    fn seen(signal: &'static str, available: i64) -> Observations {
        [(signal, Observed { available, capacity: 1000 })].into()
    }

    #[test]
    fn conditions_outlast_a_crossing_and_a_crossing_outlasts_its_value() {
        let mut m = monitor(&[("memory.available", "10%")], &[]);
        let t0 = Instant::now();
        let at = |s: u64| t0 + Duration::from_secs(s);
        let mut step = |available, s| {
            let (p, act) = m.observe(&seen("memory.available", available), at(s));
            (p.memory, act.len())
        };
        assert_eq!(step(100, 0), (false, 0));
        assert_eq!(step(99, 1), (true, 1));
        // Above the value, below value and least reclaim together.
        assert_eq!(step(149, 2), (true, 1));
        assert_eq!(step(150, 3), (true, 0));
        assert_eq!(step(150, 61), (true, 0));
        assert_eq!(step(150, 62), (false, 0));
    }

    #[test]
    fn soft_thresholds_wait_for_their_grace() {
        let mut m = monitor(&[], &[("nodefs.available", "200", "30s")]);
        let t0 = Instant::now();
        let mut step = |available, s| {
            let (p, act) = m.observe(&seen("nodefs.available", available), t0 + Duration::from_secs(s));
            (p.disk, act.len())
        };
        assert_eq!(step(100, 0), (true, 0));
        assert_eq!(step(100, 29), (true, 0));
        assert_eq!(step(100, 30), (true, 1));
        assert_eq!(step(300, 31), (true, 0));
        // It begins anew.
        assert_eq!(step(100, 40), (true, 0));
    }

    #[test]
    fn memory_comes_first() {
        let m = monitor(&[("imagefs.available", "1"), ("memory.available", "1"), ("pid.available", "1")], &[]);
        let names: Vec<&str> = m.thresholds.iter().map(|t| t.signal.as_str()).collect();
        assert_eq!(names, ["memory.available", "imagefs.available", "pid.available"]);
    }
}
