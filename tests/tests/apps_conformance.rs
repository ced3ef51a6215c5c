//! What upstream's conformance suite demands of the controllers and the scheduler, in the words of its own rows, with real
//! pods: jobs, workloads, garbage collection, quotas, disruption, preemption, taints.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};

/// Waits until `kubectl WHAT` prints `want`.
#[track_caller]
fn prints(c: &Cluster, what: &str, want: &str) {
    eventually(what, || {
        let ran = c.kubectl(what);
        if ran.code == 0 && ran.out.trim() == want { Ok(()) } else { Err(ran) }
    });
}

/// A pod template whose container runs a script.
fn template(labels: &str, script: &str, more: &str) -> String {
    format!(
        "{{metadata: {{labels: {labels}}}, spec: {{terminationGracePeriodSeconds: 0, {more} containers: [{{name: c, image: \
         'busybox:1', command: [sh, -c, '{script}']}}]}}}}"
    )
}

fn job(name: &str, spec: &str, script: &str, pod: &str) -> String {
    format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: {name}}}\nspec: {{{spec}, template: {}}}\n---\n",
        template("{}", script, pod)
    )
}

fn workload(kind: &str, name: &str, spec: &str, script: &str) -> String {
    let (version, selector) = match kind {
        "ReplicationController" => ("v1", format!("{{app: {name}}}")),
        _ => ("apps/v1", format!("{{matchLabels: {{app: {name}}}}}")),
    };
    format!(
        "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {{{spec} selector: {selector}, template: {}}}\n---\n",
        template(&format!("{{app: {name}}}"), script, "")
    )
}

const FOREVER: &str = "sleep 100000";

#[test]
fn jobs() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let never = "restartPolicy: Never,";
    let policy = |action: &str| {
        format!("podFailurePolicy: {{rules: [{{action: {action}, onExitCodes: {{operator: In, values: [42]}}}}]}}")
    };
    let odd = "test $((JOB_COMPLETION_INDEX % 2)) = 0";
    c.apply(&[
        job("fail-early", &format!("backoffLimit: 6, {}", policy("FailJob")), "exit 42", never),
        job("ignored", &format!("backoffLimit: 0, {}", policy("Ignore")), "test -e /w/f || { touch /w/f; exit 42; }",
            "restartPolicy: Never, volumes: [{name: w, hostPath: {path: /var/lib/w, type: DirectoryOrCreate}}],")
            .replace("command:", "volumeMounts: [{name: w, mountPath: /w}], command:"),
        job("per-index", "completions: 4, parallelism: 4, completionMode: Indexed, backoffLimitPerIndex: 1", odd, never),
        job("fail-index", &format!("completions: 2, parallelism: 2, completionMode: Indexed, backoffLimitPerIndex: 1, {}",
            policy("FailIndex")), "test $JOB_COMPLETION_INDEX = 0 || exit 42", never),
        job("max-failed", "completions: 10, parallelism: 2, completionMode: Indexed, backoffLimitPerIndex: 0, maxFailedIndexes: 1",
            "exit 1", never),
        job("success", "completions: 3, parallelism: 3, completionMode: Indexed, successPolicy: {rules: [{succeededCount: 1}]}",
            "test $JOB_COMPLETION_INDEX = 0 || sleep 100000", never),
        job("success-of-all", "completions: 2, parallelism: 2, completionMode: Indexed, successPolicy: {rules: [{succeededCount: 2}]}",
            "true", never),
        job("retries", "completions: 2", "test -e /w/f || { touch /w/f; exit 1; }",
            "restartPolicy: OnFailure, volumes: [{name: w, emptyDir: {}}],")
            .replace("command:", "volumeMounts: [{name: w, mountPath: /w}], command:"),
        job("late", "activeDeadlineSeconds: 1", FOREVER, never),
        job("paused", "suspend: true", "true", never),
        job("forgotten", "ttlSecondsAfterFinished: 1", "true", never),
        job("ended", "parallelism: 2", FOREVER, never),
    ]
    .concat());
    let condition = |name: &str, kind: &str, reason: &str| {
        let path = format!("get job {name} -o jsonpath='{{.status.conditions[?(@.type==\"{kind}\")].reason}}'");
        prints(&c, &path, reason);
    };
    let field =
        |name: &str, path: &str, want: &str| prints(&c, &format!("get job {name} -o jsonpath='{{{path}}}'"), want);
    condition("fail-early", "FailureTarget", "PodFailurePolicy");
    condition("fail-early", "Failed", "PodFailurePolicy");
    field("fail-early", ".status.failed", "1");
    condition("ignored", "Complete", "CompletionsReached");
    condition("per-index", "Failed", "FailedIndexes");
    field("per-index", ".status.failedIndexes", "1,3");
    field("per-index", ".status.completedIndexes", "0,2");
    field("per-index", ".status.failed", "4");
    condition("fail-index", "Failed", "FailedIndexes");
    field("fail-index", ".status.failedIndexes", "1");
    field("fail-index", ".status.failed", "1");
    condition("max-failed", "Failed", "MaxFailedIndexesExceeded");
    condition("success", "SuccessCriteriaMet", "SuccessPolicy");
    condition("success", "Complete", "SuccessPolicy");
    field("success", ".status.completedIndexes", "0");
    condition("success-of-all", "Complete", "SuccessPolicy");
    condition("retries", "Complete", "CompletionsReached");
    condition("late", "Failed", "DeadlineExceeded");
    condition("paused", "Suspended", "JobSuspended");
    prints(&c, "get pods -l job-name=paused -o name", "");
    c.k("patch job paused --type=merge -p '{\"spec\":{\"suspend\":false}}'");
    condition("paused", "Complete", "CompletionsReached");
    prints(&c, "get job forgotten --ignore-not-found -o name", "");
    field("ended", ".status.active", "2");
    c.k("delete job ended");
    prints(&c, "get pods -l job-name=ended -o name", "");
    // A job can be listed, patched and deleted with others by label.
    c.k("label job late per-index group=x");
    c.k("delete jobs -l group=x");
    prints(&c, "get jobs -l group=x -o name", "");
}

#[test]
fn workloads() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let field = |what: &str, path: &str, want: &str| prints(&c, &format!("get {what} -o jsonpath='{{{path}}}'"), want);
    // Proportional scaling: what is added goes to both sets of a rollout that is stuck.
    c.apply(&workload(
        "Deployment",
        "wide",
        "replicas: 10, strategy: {rollingUpdate: {maxSurge: 3, maxUnavailable: 2}},",
        FOREVER,
    ));
    field("deployment wide", ".status.availableReplicas", "10");
    c.k("set image deployment/wide c=none:404");
    prints(
        &c,
        "get rs -l app=wide --sort-by=.metadata.creationTimestamp -o jsonpath='{.items[*].spec.replicas}'",
        "8 5",
    );
    c.k("scale deployment wide --replicas=30");
    prints(
        &c,
        "get rs -l app=wide --sort-by=.metadata.creationTimestamp -o jsonpath='{.items[*].spec.replicas}'",
        "20 13",
    );
    // Rollover: a rollout that never ends is left for the next one.
    c.k("scale deployment wide --replicas=2");
    c.k("set image deployment/wide c=busybox:1");
    c.k("set env deployment/wide A=1");
    c.k("rollout status deployment/wide --timeout=60s");
    field("deployment wide --subresource=scale", ".spec.replicas", "2");
    c.k("delete deployment wide --wait=false");

    // ReplicaSets and ReplicationControllers take pods that match, and let go of those that no longer do.
    for (kind, name) in [("ReplicaSet", "set"), ("ReplicationController", "rc")] {
        let pod = template(&format!("{{app: {name}}}"), FOREVER, "");
        let pod =
            pod.replacen("{metadata: {", &format!("{{apiVersion: v1, kind: Pod, metadata: {{name: {name}-orphan, "), 1);
        // Something before the brace, lest kubectl take it for JSON.
        let pod = format!("---\n{pod}");
        c.apply(&pod);
        c.apply(&workload(kind, name, "replicas: 1,", FOREVER));
        field(&format!("pod {name}-orphan"), ".metadata.ownerReferences[0].kind", kind);
        field(&format!("{kind} {name}"), ".status.readyReplicas", "1");
        c.k(&format!("label pod {name}-orphan app=free --overwrite"));
        field(&format!("pod {name}-orphan"), ".metadata.ownerReferences", "");
        field(&format!("{kind} {name}"), ".status.readyReplicas", "1");
        c.k(&format!("scale {kind} {name} --replicas=2"));
        field(&format!("{kind} {name}"), ".status.readyReplicas", "2");
        c.k(&format!("delete {kind} -l app!=none --cascade=background"));
    }

    // A DaemonSet follows its node selector and rolls out; its revisions are numbered.
    c.apply(&workload("DaemonSet", "ds", "", FOREVER));
    field("ds ds", ".status.numberReady", "1");
    c.k("patch ds ds -p '{\"spec\":{\"template\":{\"spec\":{\"nodeSelector\":{\"color\":\"blue\"}}}}}'");
    field("ds ds", ".status.desiredNumberScheduled", "0");
    prints(&c, "get pods -l app=ds -o name", "");
    c.k("label node one color=blue");
    field("ds ds", ".status.numberReady", "1");
    c.k("set env ds/ds A=2");
    c.k("rollout status ds/ds --timeout=60s");
    prints(&c, "get controllerrevisions -l app=ds --sort-by=.revision -o jsonpath='{.items[*].revision}'", "1 2 3");
    c.k("rollout undo ds/ds --to-revision=2");
    c.k("rollout status ds/ds --timeout=60s");
    prints(&c, "get controllerrevisions -l app=ds --sort-by=.revision -o jsonpath='{.items[*].revision}'", "1 3 4");

    // A StatefulSet goes in order, and waits for a pod that is not well.
    let probe = |text: String| {
        text.replace("command:", "readinessProbe: {exec: {command: [test, -e, /ok]}, periodSeconds: 1}, command:")
    };
    c.apply(&probe(workload("StatefulSet", "db", "replicas: 3, serviceName: db,", "touch /ok; sleep 100000")));
    field("sts db", ".status.readyReplicas", "3");
    prints(
        &c,
        "get pods -l app=db --sort-by=.metadata.creationTimestamp -o jsonpath='{.items[*].metadata.name}'",
        "db-0 db-1 db-2",
    );
    for n in 0..3 {
        c.k(&format!("exec db-{n} -- rm /ok"));
    }
    c.wait_field("sts db", ".status.readyReplicas", |n| n.is_empty() || n == "0");
    c.k("scale sts db --replicas=1");
    c.wait_field("sts db", ".status.observedGeneration", |n| n == "2");
    field("sts db", ".status.replicas", "3");
    // From the top: a pod that is well again goes, and the lowest that is not well would go too.
    for n in (0..3).rev() {
        c.k(&format!("exec db-{n} -- touch /ok"));
    }
    field("sts db", ".status.replicas", "1");
    c.k("scale sts db --replicas=3");
    field("sts db", ".status.readyReplicas", "3");
    // A canary by partition, then all, then back to the first revision, which is found again.
    let first = c.k("get sts db -o jsonpath={.status.currentRevision}");
    c.k("patch sts db -p '{\"spec\":{\"updateStrategy\":{\"rollingUpdate\":{\"partition\":2}}}}'");
    c.k("set env sts/db A=1");
    field("sts db", ".status.updatedReplicas", "1");
    field("sts db", ".status.readyReplicas", "3");
    prints(&c, "get pods -l app=db -o jsonpath='{.items[*].spec.containers[0].env[0].value}'", "1");
    c.k("delete pod db-0");
    field("sts db", ".status.readyReplicas", "3");
    field("pod db-0", ".metadata.labels.controller-revision-hash", &first);
    c.k("patch sts db -p '{\"spec\":{\"updateStrategy\":{\"rollingUpdate\":{\"partition\":0}}}}'");
    c.k("rollout status sts/db --timeout=60s");
    c.k("set env sts/db A-");
    c.k("rollout status sts/db --timeout=60s");
    field("sts db", ".status.currentRevision", &first);
    // A pod that the node refuses is made again.
    c.apply(&format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: holder}}\nspec: {{nodeName: one, terminationGracePeriodSeconds: 0, containers: [{{name: c, \
        image: 'busybox:1', command: [sh, -c, '{FOREVER}'], ports: [{{containerPort: 80, hostPort: 8099}}]}}]}}\n"));
    c.wait_ready("holder");
    c.apply(
        &workload("StatefulSet", "port", "serviceName: port,", FOREVER)
            .replace("containers:", "nodeName: one, containers:")
            .replace("command:", "ports: [{containerPort: 80, hostPort: 8099}], command:"),
    );
    eventually("port-0 is refused and made again", || {
        let ran = c.kubectl("get events --field-selector involvedObject.name=port -o jsonpath='{.items[*].reason}'");
        if ran.out.contains("RecreatingFailedPod") { Ok(()) } else { Err(ran) }
    });
    c.k("delete pod holder");
    field("sts port", ".status.readyReplicas", "1");
    c.apply(&workload(
        "StatefulSet",
        "burst",
        "replicas: 3, serviceName: burst, podManagementPolicy: Parallel,",
        FOREVER,
    ));
    field("sts burst", ".status.readyReplicas", "3");
}

#[test]
fn garbage_quotas_and_disruption() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let field = |what: &str, path: &str, want: &str| prints(&c, &format!("get {what} -o jsonpath='{{{path}}}'"), want);
    c.apply(&["a", "b", "c"].map(|name| workload("Deployment", name, "replicas: 2,", FOREVER)).concat());
    for name in ["a", "b", "c"] {
        field(&format!("deployment {name}"), ".status.readyReplicas", "2");
    }
    c.k("delete deployment a --cascade=background");
    prints(&c, "get rs,pods -l app=a -o name", "");
    c.k("delete deployment b --cascade=foreground");
    assert_eq!(c.k("get rs,pods -l app=b -o name").trim(), "", "nothing is left when the command returns");
    c.k("delete deployment c --cascade=orphan");
    field("rs -l app=c", ".items[0].metadata.ownerReferences", "");
    assert_eq!(c.k("get pods -l app=c -o name").lines().count(), 2);
    // A pod with a second owner stays.
    c.apply(
        &(workload("ReplicationController", "rc1", "replicas: 2,", FOREVER)
            + &workload("ReplicationController", "rc2", "replicas: 0,", FOREVER)),
    );
    field("rc rc1", ".status.readyReplicas", "2");
    let kept = c.k("get pods -l app=rc1 -o jsonpath='{.items[0].metadata.name}'");
    let uid = c.k("get rc rc2 -o jsonpath={.metadata.uid}");
    c.k(&format!(
        "patch pod {kept} --type=json -p '[{{\"op\":\"add\",\"path\":\"/metadata/ownerReferences/-\",\"value\":\
        {{\"apiVersion\":\"v1\",\"kind\":\"ReplicationController\",\"name\":\"rc2\",\"uid\":\"{uid}\"}}}}]'"
    ));
    c.k("delete rc rc1 --cascade=foreground");
    assert_eq!(c.k("get pods -l app=rc1 -o jsonpath='{.items[*].metadata.name}'"), kept);
    field(&format!("pod {kept}"), ".metadata.ownerReferences[*].name", "rc2");

    // Quotas count what is there, by scope, and refuse what is too much.
    c.k("create namespace q");
    c.k("create quota all -n q --hard=pods=2,requests.cpu=1,count/replicasets.apps=1,resourcequotas=3,services=1");
    c.k("create quota brief -n q --hard=pods=5 --scopes=Terminating");
    c.k("create quota long -n q --hard=pods=5 --scopes=NotTerminating");
    field("quota all -n q", ".status.used.resourcequotas", "3");
    let pod = |name: &str, cpu: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: q}}\nspec: {{terminationGracePeriodSeconds: 0, {more} containers: [{{name: c, \
            image: 'busybox:1', command: [sh, -c, '{FOREVER}'], resources: {{requests: {{cpu: {cpu}}}}}}}]}}\n---\n"
        )
    };
    c.apply(&(pod("long", "100m", "") + &pod("brief", "100m", "activeDeadlineSeconds: 3600,")));
    field("quota all -n q", ".status.used.pods", "2");
    field("quota all -n q", ".status.used.requests\\.cpu", "200m");
    field("quota brief -n q", ".status.used.pods", "1");
    field("quota long -n q", ".status.used.pods", "1");
    let refused = c.try_apply(&pod("third", "2", "")).unwrap_err().err;
    assert!(refused.contains("exceeded quota: all, requested: pods=1,requests.cpu=2, used: pods=2,requests.cpu=200m, limited: pods=2,requests.cpu=1"), "{refused}");
    c.k("delete pod -n q long");
    field("quota all -n q", ".status.used.pods", "1");
    c.apply(&workload("ReplicaSet", "rs", "replicas: 0,", FOREVER).replacen("name: rs", "name: rs, namespace: q", 1));
    field("quota all -n q", ".status.used.count/replicasets\\.apps", "1");
    c.k("delete rs rs -n q");
    field("quota all -n q", ".status.used.count/replicasets\\.apps", "0");
    c.k("patch quota all -n q -p '{\"spec\":{\"hard\":{\"pods\":\"7\"}}}'");
    field("quota all -n q", ".status.hard.pods", "7");
    // A namespace takes everything along.
    c.k("delete namespace q");
    assert!(c.kubectl("get pods,quota -n q -o name").out.is_empty());

    // The cluster's CA is in every namespace and comes back.
    let ca = c.k("get cm kube-root-ca.crt -o jsonpath={.data}");
    c.k("delete cm kube-root-ca.crt");
    field("cm kube-root-ca.crt", ".data", &ca);
    c.k("patch cm kube-root-ca.crt -p '{\"data\":{\"ca.crt\":\"x\"}}'");
    field("cm kube-root-ca.crt", ".data", &ca);

    // A budget stops evictions until it allows them.
    c.apply(&workload("Deployment", "guarded", "replicas: 2,", FOREVER));
    c.k("create pdb guarded --selector=app=guarded --min-available=2");
    field("pdb guarded", ".status.currentHealthy", "2");
    field("pdb guarded", ".status.disruptionsAllowed", "0");
    let victim = c.k("get pods -l app=guarded -o jsonpath='{.items[0].metadata.name}'");
    let eviction =
        format!("{{\"apiVersion\":\"policy/v1\",\"kind\":\"Eviction\",\"metadata\":{{\"name\":\"{victim}\"}}}}");
    std::fs::write(c.host.path("/etc/isopod/eviction.json"), eviction).unwrap();
    let evict = format!("create --raw /api/v1/namespaces/default/pods/{victim}/eviction -f /etc/isopod/eviction.json");
    let refused = c.kubectl(&evict).err;
    assert!(refused.contains("Cannot evict pod as it would violate the pod's disruption budget."), "{refused}");
    c.k("patch pdb guarded -p '{\"spec\":{\"minAvailable\":1}}'");
    field("pdb guarded", ".status.disruptionsAllowed", "1");
    c.k(&evict);
    prints(&c, &format!("get pod {victim} --ignore-not-found -o name"), "");
    field("deployment guarded", ".status.readyReplicas", "2");
}

#[test]
fn scheduling_preemption_and_taints() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let field = |what: &str, path: &str, want: &str| prints(&c, &format!("get {what} -o jsonpath='{{{path}}}'"), want);
    let pod = |name: &str, more: &str, container: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{terminationGracePeriodSeconds: 0, {more} containers: [{{name: c, \
            image: 'busybox:1', command: [sh, -c, '{FOREVER}'], {container}}}]}}\n---\n"
        )
    };
    let unscheduled = |name: &str, why: &str| {
        let message =
            c.wait_field(&format!("pod {name}"), ".status.conditions[?(@.type==\"PodScheduled\")].message", |m| {
                !m.is_empty()
            });
        assert!(message.contains(why), "{name}: {message}");
    };
    c.apply(
        &(pod("huge", "", "resources: {requests: {cpu: 1000}}")
            + &pod("picky", "nodeSelector: {color: blue},", "")
            + &pod("held", "", "ports: [{containerPort: 80, hostPort: 54323, hostIP: 0.0.0.0}]")),
    );
    unscheduled("huge", "Insufficient cpu");
    unscheduled("picky", "didn't match Pod's node affinity/selector");
    c.wait_ready("held");
    c.apply(
        &(pod("other", "", "ports: [{containerPort: 80, hostPort: 54323, hostIP: 127.0.0.1}]")
            + &pod("udp", "", "ports: [{containerPort: 80, hostPort: 54323, protocol: UDP}]")),
    );
    unscheduled("other", "didn't have free ports for the requested pod ports");
    c.wait_ready("udp");
    c.k("label node one color=blue");
    c.wait_ready("picky");
    c.k("delete pod huge other picky held udp");

    // Preemption by an extended resource, so that nothing else on the node counts.
    c.k("patch node one --subresource=status --type=merge -p '{\"status\":{\"capacity\":{\"example.com/slot\":\"2\"},\"allocatable\":{\"example.com/slot\":\"2\"}}}'");
    c.apply("apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: low}\nvalue: 10\n---\napiVersion: scheduling.k8s.io/v1\n\
        kind: PriorityClass\nmetadata: {name: high}\nvalue: 1000\n");
    let refused = c.kubectl("patch priorityclass low --type=merge -p '{\"value\":11}'").err;
    assert!(refused.contains("value: Forbidden: may not be changed in an update."), "{refused}");
    let slot = "resources: {requests: {example.com/slot: 1}, limits: {example.com/slot: 1}}";
    c.apply(
        &(pod("low-0", "priorityClassName: low,", slot)
            + &pod("low-1", "priorityClassName: low,", slot)
                .replace("name: low-1", "name: low-1, finalizers: [example.com/keep]")),
    );
    c.wait_ready("low-0");
    c.wait_ready("low-1");
    c.k("label pod low-0 spare=no");
    c.apply(&(pod("high-0", "priorityClassName: high,", slot) + &pod("high-1", "priorityClassName: high,", slot)));
    c.wait_ready("high-0");
    c.wait_ready("high-1");
    prints(&c, "get pod low-0 --ignore-not-found -o name", "");
    field("pod low-1", ".status.conditions[?(@.type==\"DisruptionTarget\")].reason", "PreemptionByScheduler");
    c.k("patch pod low-1 --type=merge -p '{\"metadata\":{\"finalizers\":null}}'");
    prints(&c, "get pod low-1 --ignore-not-found -o name", "");
    c.k("delete pod high-0 high-1");

    // Taints: who tolerates it for a while goes after that while, unless the taint goes first.
    let tolerates = |seconds: &str| format!("tolerations: [{{key: k, operator: Exists, effect: NoExecute{seconds}}}],");
    c.apply(
        &(pod("never", "", "")
            + &pod("soon", &tolerates(", tolerationSeconds: 1"), "")
            + &pod("later", &tolerates(", tolerationSeconds: 600"), "")
            + &pod("always", &tolerates(""), "")),
    );
    for name in ["never", "soon", "later", "always"] {
        c.wait_ready(name);
    }
    c.k("taint node one k=v:NoExecute");
    prints(&c, "get pods -o jsonpath='{.items[*].metadata.name}'", "always later");
    c.k("taint node one k:NoExecute-");
    c.apply(&pod("again", "", ""));
    c.wait_ready("again");
    c.k("drain one --ignore-daemonsets --force --delete-emptydir-data --timeout=60s");
    assert_eq!(c.k("get pods -o name").trim(), "");
    c.apply(&pod("cordoned", "", ""));
    unscheduled("cordoned", "were unschedulable");
    c.k("uncordon one");
    c.wait_ready("cordoned");
}
