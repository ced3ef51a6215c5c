//! Preemption: which pods of lower priority to remove, on which node, so that a pod fits. Pure; it tries on the cluster
//! itself and puts everything back.

use crate::cluster::{Cluster, NodeIndex};
use crate::cycle::{Unfit, feasible, preemption_message};
use crate::model::{Labels, PodInfo};
use crate::plugins::Prepared;
use crate::plugins::volumes::Needs;
use isopod_client::select::Selector;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

/// A disruption budget as preemption sees it.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    pub(crate) namespace: String,
    pub(crate) selector: Selector,
    pub(crate) allowed: i64,
}

/// What preemption came to.
#[derive(Debug)]
pub(crate) enum Preemption {
    /// Remove these from this node.
    Evict(NodeIndex, Vec<Arc<PodInfo>>),
    /// Nothing to do; the words go after the failure message.
    Nothing(String),
}

struct Candidate {
    node: NodeIndex,
    victims: Vec<Arc<PodInfo>>,
    violations: usize,
}

const HELPLESS: &str = "Preemption is not helpful for scheduling";
const NO_VICTIMS: &str = "No preemption victims found for incoming pod";

/// How many nodes are tried: a tenth of them, at least 100.
fn limit(nodes: usize) -> usize {
    (nodes / 10).max(100)
}

/// The best way to make room, if there is one.
pub(crate) fn preempt(
    cluster: &mut Cluster,
    pod: &PodInfo,
    needs: &Needs,
    unfit: &Unfit,
    budgets: &[Budget],
) -> Preemption {
    if pod.never_preempts {
        let text = "no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never.";
        return Preemption::Nothing(text.to_owned());
    }
    if let Some(index) = cluster.index(&pod.nominated) {
        let leaving = cluster.nodes[index].pods.iter().any(|p| p.terminating && p.priority < pod.priority);
        if leaving {
            let text =
                "no new claims to deallocate, preemption: not eligible due to a terminating pod on the nominated node.";
            return Preemption::Nothing(text.to_owned());
        }
    }
    let mut reasons: HashMap<&'static str, usize> = HashMap::new();
    let helpless = unfit.total - unfit.preemptable.len();
    if helpless > 0 {
        reasons.insert(HELPLESS, helpless);
    }
    let mut best: Option<Candidate> = None;
    let mut found = 0;
    for index in &unfit.preemptable {
        match victims_on(cluster, pod, needs, *index, budgets) {
            Some(candidate) => {
                found += 1;
                if best.as_ref().is_none_or(|b| merit(&candidate) < merit(b)) {
                    best = Some(candidate);
                }
                if found >= limit(unfit.total) {
                    break;
                }
            }
            None => *reasons.entry(NO_VICTIMS).or_default() += 1,
        }
    }
    match best {
        Some(candidate) => Preemption::Evict(candidate.node, candidate.victims),
        None => Preemption::Nothing(preemption_message(unfit.total, &reasons)),
    }
}

/// Smaller is better: violations, highest priority, sum of priorities, number, then the latest start.
fn merit(candidate: &Candidate) -> (usize, i64, i64, usize, Reverse<Option<jiff::Timestamp>>) {
    let highest = candidate.victims.iter().map(|p| p.priority).max().unwrap_or(i64::MIN);
    // Shifted as upstream does, so that many negative priorities do not look better than few.
    let sum = candidate.victims.iter().map(|p| p.priority + i64::from(i32::MAX) + 1).sum();
    let top = candidate.victims.iter().filter(|p| p.priority == highest);
    let earliest = top.filter_map(|p| p.started).min();
    (candidate.violations, highest, sum, candidate.victims.len(), Reverse(earliest))
}

/// Whether the pod has room there beside those that were promised room before.
fn fits(cluster: &mut Cluster, pod: &PodInfo, needs: &Needs, index: NodeIndex) -> bool {
    let prepared = Prepared::new(cluster, pod, needs.clone());
    feasible(cluster, pod, &prepared, index).is_ok()
}

fn victims_on(
    cluster: &mut Cluster,
    pod: &PodInfo,
    needs: &Needs,
    index: NodeIndex,
    budgets: &[Budget],
) -> Option<Candidate> {
    let name = cluster.nodes[index].name.clone();
    let mut lower: Vec<Arc<PodInfo>> =
        cluster.nodes[index].pods.iter().filter(|p| p.priority < pod.priority).cloned().collect();
    if lower.is_empty() {
        return None;
    }
    for victim in &lower {
        cluster.unplace(&victim.uid);
    }
    if !fits(cluster, pod, needs, index) {
        for victim in &lower {
            cluster.place(victim, &name);
        }
        return None;
    }
    // The most important are spared first, and among all those whose removal would break a budget.
    lower.sort_by_key(|p| (Reverse(p.priority), p.started));
    let (breaking, harmless) = split_by_budget(&lower, budgets);
    let mut victims = Vec::new();
    let mut violations = 0;
    for (victim, breaks) in breaking.into_iter().map(|p| (p, true)).chain(harmless.into_iter().map(|p| (p, false))) {
        cluster.place(&victim, &name);
        if !fits(cluster, pod, needs, index) {
            cluster.unplace(&victim.uid);
            violations += usize::from(breaks);
            victims.push(victim);
        }
    }
    for victim in &victims {
        cluster.place(victim, &name);
    }
    (!victims.is_empty()).then_some(Candidate { node: index, victims, violations })
}

fn split_by_budget(pods: &[Arc<PodInfo>], budgets: &[Budget]) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut left: Vec<i64> = budgets.iter().map(|b| b.allowed).collect();
    let covers = |budget: &Budget, namespace: &str, labels: &Labels| {
        budget.namespace == namespace && !labels.is_empty() && budget.selector.matches(labels)
    };
    pods.iter().cloned().partition(|pod| {
        let mut breaks = false;
        for (budget, left) in budgets.iter().zip(left.iter_mut()) {
            if covers(budget, &pod.namespace, &pod.labels) {
                *left -= 1;
                breaks |= *left < 0;
            }
        }
        breaks
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cycle::schedule;
    use crate::testing::{node, pod};
    use serde_json::json;

    fn with(name: &str, cpu: &str, priority: i64) -> Arc<PodInfo> {
        pod(
            name,
            json!({"priority": priority,
            "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}),
        )
    }

    fn run(cluster: &mut Cluster, pod: &PodInfo, budgets: &[Budget]) -> Result<(String, Vec<String>), String> {
        let unfit = schedule(cluster, pod, Ok(Needs::default()), || None).unwrap_err();
        match preempt(cluster, pod, &Needs::default(), &unfit, budgets) {
            Preemption::Evict(index, victims) => {
                let names = victims.iter().map(|v| v.name.clone()).collect();
                Ok((cluster.nodes[index].name.clone(), names))
            }
            Preemption::Nothing(text) => Err(text),
        }
    }

    #[test]
    fn only_what_is_needed_and_the_least_important() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("a", json!({"cpu": "4", "pods": "10", "memory": "1Gi"})));
        cluster.place(&with("low", "2", 1), "a");
        cluster.place(&with("mid", "2", 5), "a");
        assert_eq!(run(&mut cluster, &with("p", "2", 10), &[]), Ok(("a".into(), vec!["low".into()])));
        assert_eq!(cluster.nodes[0].pods.len(), 2, "everything is back in its place");
        assert_eq!(
            run(&mut cluster, &with("p", "2", 0), &[]),
            Err("no new claims to deallocate, preemption: 0/1 nodes are available: \
                1 No preemption victims found for incoming pod."
                .into())
        );
    }

    #[test]
    fn budgets_decide_between_nodes() {
        let mut cluster = Cluster::default();
        for name in ["a", "b"] {
            cluster.set_node(&node(name, json!({"cpu": "2", "pods": "10", "memory": "1Gi"})));
        }
        cluster.place(&with("guarded", "2", 1), "a");
        cluster.place(&with("free", "2", 3), "b");
        let labels: Labels = [("app".to_owned(), "a".to_owned())].into();
        let budget = Budget { namespace: "ns".into(), selector: Selector::from_labels(&labels), allowed: 0 };
        assert_eq!(run(&mut cluster, &with("p", "2", 10), &[]), Ok(("a".into(), vec!["guarded".into()])));
        let other = Budget { namespace: "other".into(), ..budget.clone() };
        assert_eq!(run(&mut cluster, &with("p", "2", 10), &[other]).map(|r| r.0), Ok("a".into()));
        // Both break the budget now, so the lower priority decides again.
        assert_eq!(run(&mut cluster, &with("p", "2", 10), &[budget]).map(|r| r.0), Ok("a".into()));
    }

    #[test]
    fn room_that_was_promised_is_not_given_twice() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("a", json!({"cpu": "4", "pods": "10", "memory": "1Gi"})));
        cluster.place(&with("one", "2", 1), "a");
        cluster.place(&with("two", "2", 2), "a");
        let first = with("first", "2", 10);
        assert_eq!(run(&mut cluster, &first, &[]), Ok(("a".into(), vec!["one".into()])));
        let promised = Arc::new(PodInfo { nominated: "a".into(), ..(*first).clone() });
        cluster.nominated.insert(first.uid.clone(), promised);
        let second = run(&mut cluster, &with("second", "2", 10), &[]).unwrap().1;
        assert!(second.contains(&"two".to_owned()), "{second:?}");
        // The first victim is gone: the second pod needs the other one's room all the same.
        cluster.unplace("one");
        assert_eq!(run(&mut cluster, &with("second", "2", 10), &[]), Ok(("a".into(), vec!["two".into()])));
    }

    #[test]
    fn taints_cannot_be_preempted_away() {
        let mut cluster = Cluster::default();
        let mut tainted = node("a", json!({}));
        tainted.spec.get_or_insert_default().taints =
            serde_json::from_value(json!([{"key": "k", "effect": "NoSchedule"}])).unwrap();
        cluster.set_node(&tainted);
        assert_eq!(
            run(&mut cluster, &with("p", "1", 10), &[]),
            Err("no new claims to deallocate, preemption: 0/1 nodes are available: \
                1 Preemption is not helpful for scheduling."
                .into())
        );
    }
}
