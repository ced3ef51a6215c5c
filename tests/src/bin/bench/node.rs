//! A node full of pods: what agent and supervisors take, what it does when nothing is asked, and how long a killed agent needs
//! to have every pod again.

use std::{fs, time::Duration};

use isopod_tests::{Cluster, eventually};

use crate::{inside, memory, row};

/// Of all parts with a cluster: more pods than the usual 110.
pub(crate) const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                                        clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\nmaxPods: 600\n\
                                        evictionHard: {memory.available: 100Mi}\n";

pub(crate) fn run(cluster: &mut Cluster) {
    widen(cluster);
    memory::at(cluster, 0);
    let mut there = 0;
    for pods in [100, 200, 500] {
        inside(cluster, &["fill", &there.to_string(), &pods.to_string()]);
        there = pods;
        if pods == 200 {
            memory::cpu(cluster, "idle at 200 pods", Duration::from_secs(60));
            restart(cluster, pods);
        } else {
            memory::at(cluster, pods);
        }
    }
    inside(cluster, &["delete", &there.to_string()]);
}

/// Gives the node more addresses than a /24 has: a new range for a node that registers anew.
fn widen(cluster: &mut Cluster) {
    let manifest = cluster.host.path("/etc/isopod/manifests/kube-controller-manager.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    let (before, after) = text.split_once("- controller-manager\n").unwrap();
    let indent = before.rsplit('\n').next().unwrap();
    fs::write(&manifest, format!("{before}- controller-manager\n{indent}- --node-cidr-mask-size=22\n{after}")).unwrap();
    eventually("the new controllers", || {
        cluster.host.sh("pgrep -f '^/isopod controller-manager --node-cidr-mask-size=22'").ok()
    });
    cluster.k("delete node bench");
    cluster.kill_agent();
    cluster.up();
    cluster.wait_field("node bench", ".spec.podCIDR", |range| range.ends_with("/22"));
}

/// From the start of a new agent until the last pod is its own again, and what that cost.
fn restart(cluster: &mut Cluster, pods: usize) {
    let log = cluster.host.path("/var/log/isopod/agent.log");
    let before = fs::read(&log).unwrap().len();
    cluster.kill_agent();
    let started = time_of_day();
    cluster.up();
    let last = eventually("every pod is taken over", || {
        let text = fs::read(&log).unwrap();
        let text = String::from_utf8_lossy(&text[before..]).into_owned();
        let taken: Vec<&str> = text.lines().filter(|line| line.contains("pod taken over")).collect();
        if taken.len() >= pods { Ok(taken.last().unwrap().to_string()) } else { Err(taken.len()) }
    });
    let pid = cluster.agent_pid();
    let ticks = cluster.host.must(&format!("awk '{{print $14+$15}}' /proc/{pid}/stat"));
    let at = seconds(last.split_whitespace().next().unwrap());
    row(&format!("agent killed with {pods} pods: start -> all taken over"), &format!("{:.2} s", at - started));
    let (ready, cpu) = (cluster.started_in.as_secs_f64(), ticks.trim().parse::<f64>().unwrap() / 100.0);
    row(&format!("agent killed with {pods} pods: CPU of the new one"), &format!("{cpu:.2} s, {ready:.2} s to Ready"));
    let restarts = cluster.k("get pods -o jsonpath='{.items[*].status.containerStatuses[0].restartCount}'");
    assert!(restarts.split(' ').all(|n| n == "0"), "{restarts}");
}

/// Seconds of the day, as `date` says.
fn time_of_day() -> f64 {
    let output = std::process::Command::new("date").args(["-u", "+%T.%N"]).output().unwrap();
    clock(String::from_utf8(output.stdout).unwrap().trim())
}

/// Seconds of the day of a line of a log.
fn seconds(stamp: &str) -> f64 {
    clock(stamp.split_once('T').unwrap().1.trim_end_matches('Z'))
}

fn clock(text: &str) -> f64 {
    text.split(':').fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap())
}
