//! What the upstream suite demands of a node, row by row: a pod, what becomes of it and what it says.
//!
//! One cluster per topic, all pods of a table at once. A row's name is the suite's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually, image::Image};
use serde_json::{Value, json};

/// One pod: its spec (with `busybox:1` and `restartPolicy: Never` where it does not say), its phase at the end, what its
/// first container says. A part that begins with `!` must not be there.
struct Row {
    name: &'static str,
    spec: Value,
    phase: &'static str,
    says: &'static [&'static str],
}

fn row(name: &'static str, spec: Value, says: &'static [&'static str]) -> Row {
    Row { name, spec, phase: "Succeeded", says }
}

fn sh(script: &str) -> Value {
    json!(["sh", "-c", script])
}

/// The usual case: one container with a script, and what else its spec has.
fn script(text: &str, more: Value) -> Value {
    let mut c = json!({"command": sh(text)});
    c.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"containers": [c]})
}

/// The same with volumes.
fn with_volumes(text: &str, more: Value, volumes: Value) -> Value {
    let mut spec = script(text, more);
    spec["volumes"] = volumes;
    spec
}

fn pod(name: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec.as_object_mut().unwrap().entry("restartPolicy").or_insert(json!("Never"));
    spec.as_object_mut().unwrap().entry("terminationGracePeriodSeconds").or_insert(json!(1));
    for list in ["containers", "initContainers"] {
        for (i, c) in spec[list].as_array_mut().into_iter().flatten().enumerate() {
            let c = c.as_object_mut().unwrap();
            c.entry("image").or_insert(json!("busybox:1"));
            c.entry("name").or_insert(json!(format!("c{i}")));
        }
    }
    json!({"apiVersion": "v1", "kind": "Pod", "spec": spec,
        "metadata": {"name": name, "labels": {"row": name}, "annotations": {"build": "two"}}})
}

fn list(items: Vec<Value>) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

/// Runs a table and tells all rows that went wrong at once.
#[track_caller]
fn run(c: &Cluster, rows: &[Row]) {
    c.apply(&list(rows.iter().map(|r| pod(r.name, &r.spec)).collect()));
    let mut wrong = Vec::new();
    for r in rows {
        let over = |p: &str| matches!(p, "Succeeded" | "Failed");
        let phase = c.wait_field(&format!("pod {}", r.name), ".status.phase", over);
        let said = c.kubectl(&format!("logs {}", r.name));
        let fits = |want: &&&str| match want.strip_prefix('!') {
            Some(not) => !said.out.contains(not),
            None => said.out.contains(**want),
        };
        let missing: Vec<_> = r.says.iter().filter(|w| !fits(w)).collect();
        if phase != r.phase || !missing.is_empty() {
            wrong.push(format!("{}: phase {phase}, want {}; not as wanted {missing:?} in {said:?}", r.name, r.phase));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn environment() -> Vec<Row> {
    let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
    let resource = |r: &str, d: &str| json!({"resourceFieldRef": {"resource": r, "divisor": d}});
    let limits = json!({"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "1250m", "memory": "64Mi"}});
    vec![
        row(
            "configmap-env-prefixes",
            script(
                "unused",
                json!({"command": ["env"], "envFrom": [{"prefix": "1-", "configMapRef": {"name": "conf"}}, {"prefix": "$_", "configMapRef": {"name": "conf"}},
                    {"prefix": "p.", "secretRef": {"name": "sec"}}, {"configMapRef": {"name": "none", "optional": true}}]}),
            ),
            &["1-data-1=value-1\n", "$_data-1=value-1\n", "p.data-1=secret-1\n"],
        ),
        row(
            "downward-env-fields",
            script(
                "env; echo hosts=$HOSTS-$HOST",
                json!({"env": [{"name": "NAME", "valueFrom": field("metadata.name")}, {"name": "NS", "valueFrom": field("metadata.namespace")},
                    {"name": "IP", "valueFrom": field("status.podIP")}, {"name": "HOST", "valueFrom": field("status.hostIP")},
                    {"name": "HOSTS", "valueFrom": field("status.hostIPs")}, {"name": "LABEL", "valueFrom": field("metadata.labels['row']")},
                    {"name": "ANNOTATION", "valueFrom": field("metadata.annotations['build']")},
                    {"name": "SA", "valueFrom": field("spec.serviceAccountName")}, {"name": "NODE", "valueFrom": field("spec.nodeName")}]}),
            ),
            &[
                "NAME=downward-env-fields\n",
                "NS=default\n",
                "IP=10.244.",
                "HOST=10.88.0.",
                "hosts=10.88.0.",
                "LABEL=downward-env-fields\n",
                "ANNOTATION=two\n",
                "SA=default\n",
                "NODE=one\n",
            ],
        ),
        row(
            "downward-env-resources",
            script(
                "env",
                json!({"resources": limits, "env": [{"name": "A", "valueFrom": resource("limits.cpu", "0")},
                    {"name": "B", "valueFrom": resource("limits.memory", "0")}, {"name": "C", "valueFrom": resource("requests.cpu", "1m")},
                    {"name": "D", "valueFrom": resource("requests.memory", "1Mi")}]}),
            ),
            &["A=2\n", "B=67108864\n", "C=250\n", "D=32\n"],
        ),
        row(
            "downward-env-default-resources",
            script(
                "[ $A -ge 1 ] && [ $B -gt 1000000 ] && echo fine; echo $C-$D",
                json!({"env": [{"name": "A", "valueFrom": resource("limits.cpu", "0")}, {"name": "B", "valueFrom": resource("limits.memory", "0")},
                    {"name": "C", "valueFrom": resource("requests.cpu", "0")}, {"name": "D", "valueFrom": resource("requests.memory", "0")}]}),
            ),
            &["fine", "0-0"],
        ),
        row(
            "expansion",
            json!({"containers": [{"command": ["sh", "-c"], "args": ["echo '$(BOTH) $(NONE) $$(A)'; echo \"$BOTH\""],
                "env": [{"name": "A", "value": "one"}, {"name": "B", "value": "two"}, {"name": "BOTH", "value": "$(A);;$(B)"}]}]}),
            &["one;;two $(NONE) $(A)\none;;two\n"],
        ),
        row("image-defaults", json!({"containers": [{"image": "entry:1"}]}), &["entry default /work 7\n"]),
        row(
            "image-arguments",
            json!({"containers": [{"image": "entry:1", "args": ["own"]}]}),
            &["entry own /work 7\n"],
        ),
        row(
            "image-command",
            json!({"containers": [{"image": "entry:1", "command": ["echo", "own"]}]}),
            &["own\n", "!default"],
        ),
        row(
            "image-both",
            json!({"containers": [{"image": "entry:1", "command": ["echo", "a"], "args": ["b"], "workingDir": "/tmp"}]}),
            &["a b\n"],
        ),
        row(
            "host-aliases",
            {
                let mut s = script("cat /etc/hosts", json!({}));
                s["hostAliases"] = json!([{"ip": "123.45.67.89", "hostnames": ["foo", "bar"]}]);
                s
            },
            &["123.45.67.89\tfoo\tbar\n", "# Kubernetes-managed hosts file."],
        ),
        row(
            "dns-config",
            {
                let mut s = script("cat /etc/resolv.conf; hostname -f; hostname", json!({}));
                s["dnsPolicy"] = json!("None");
                s["dnsConfig"] = json!({"nameservers": ["1.1.1.1"], "searches": ["resolv.conf.local"], "options": [{"name": "ndots", "value": "3"}]});
                s["hostname"] = json!("h");
                s["subdomain"] = json!("sub");
                s["setHostnameAsFQDN"] = json!(true);
                s
            },
            &[
                "nameserver 1.1.1.1\n",
                "search resolv.conf.local\n",
                "options ndots:3\n",
                "h.sub.default.svc.cluster.local\n",
            ],
        ),
    ]
}

fn security() -> Vec<Row> {
    let as_user = |context: Value| json!({"securityContext": context});
    let pod_context = |mut spec: Value, context: Value| {
        spec["securityContext"] = context;
        spec
    };
    vec![
        row("run-as-user-65534", script("id", as_user(json!({"runAsUser": 65534}))), &["uid=65534(nobody)"]),
        row(
            "run-as-group",
            pod_context(
                script("id", json!({})),
                json!({"runAsUser": 1001, "runAsGroup": 2002, "supplementalGroups": [3003], "fsGroup": 4004}),
            ),
            &["uid=1001 gid=2002", "3003", "4004"],
        ),
        row(
            "run-as-group-of-container",
            pod_context(
                script("id", as_user(json!({"runAsUser": 1003, "runAsGroup": 2003}))),
                json!({"runAsUser": 1001, "runAsGroup": 2002}),
            ),
            &["uid=1003 gid=2003"],
        ),
        row(
            "read-only-root",
            script(
                "touch /file || echo refused; touch /tmp/x || echo refused too",
                as_user(json!({"readOnlyRootFilesystem": true})),
            ),
            &["refused\n", "refused too\n"],
        ),
        row(
            "writable-root",
            script("touch /file && echo written", as_user(json!({"readOnlyRootFilesystem": false}))),
            &["written"],
        ),
        row(
            "no-escalation",
            script("grep NoNewPrivs /proc/self/status", as_user(json!({"allowPrivilegeEscalation": false}))),
            &["NoNewPrivs:\t1"],
        ),
        row(
            "escalation",
            script("grep NoNewPrivs /proc/self/status", as_user(json!({"allowPrivilegeEscalation": true}))),
            &["NoNewPrivs:\t0"],
        ),
        row(
            "unprivileged",
            script("ip link add x type bridge || echo refused", as_user(json!({"privileged": false}))),
            &["refused"],
        ),
        row(
            "no-capabilities",
            script(
                "grep CapEff /proc/self/status",
                as_user(json!({"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}})),
            ),
            &["CapEff:\t0000000000000400"],
        ),
        row(
            "seccomp-default",
            script("grep Seccomp: /proc/self/status", as_user(json!({"seccompProfile": {"type": "RuntimeDefault"}}))),
            &["Seccomp:\t2"],
        ),
        row(
            "seccomp-unconfined",
            script("grep Seccomp: /proc/self/status", as_user(json!({"seccompProfile": {"type": "Unconfined"}}))),
            &["Seccomp:\t0"],
        ),
        row(
            "sysctls",
            pod_context(
                script("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start", json!({})),
                json!({"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}, {"name": "net.ipv4.ip_unprivileged_port_start", "value": "7"}]}),
            ),
            &["1\n7\n"],
        ),
        row(
            "shared-processes",
            json!({"shareProcessNamespace": true, "containers": [
                {"command": sh("for i in $(seq 100); do ps | grep 'sleep 4[2]' && break; sleep 0.05; done")},
                {"command": sh("timeout 6 sleep 42; true")}]}),
            &["sleep 42"],
        ),
        row(
            "host-pid-and-network",
            json!({"hostNetwork": true, "hostPID": true, "containers": [{"command": sh("hostname; ps | grep -c agent; ip addr")}]}),
            &["one\n", "10.88.0.1"],
        ),
    ]
}

/// A volume's content and what a container sees of it.
fn volumes() -> Vec<Row> {
    let at = |name: &str| json!({"volumeMounts": [{"name": name, "mountPath": "/v"}]});
    let as_1000 = |name: &str| {
        let mut c = at(name);
        c["securityContext"] = json!({"runAsUser": 1000});
        c
    };
    let conf = |more: Value| {
        let mut v = json!({"name": "conf"});
        v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([{"name": "v", "configMap": v}])
    };
    let projected =
        |sources: Value, mode: Value| json!([{"name": "v", "projected": {"sources": sources, "defaultMode": mode}}]);
    let resources =
        json!({"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "1250m", "memory": "64Mi"}});
    let look = "cd /v; for f in $(find -L . -type f ! -path '*/..*'); do stat -L -c '%n %a' $f; cat $f; echo; done";
    let downward = json!([{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}, {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "cpu", "resourceFieldRef": {"containerName": "c0", "resource": "limits.cpu", "divisor": "1m"}},
        {"path": "rcpu", "resourceFieldRef": {"containerName": "c0", "resource": "requests.cpu", "divisor": "1m"}},
        {"path": "mem", "resourceFieldRef": {"containerName": "c0", "resource": "limits.memory"}},
        {"path": "rmem", "resourceFieldRef": {"containerName": "c0", "resource": "requests.memory", "divisor": "1Mi"}}]);
    let with = |mut c: Value, r: &Value| {
        c["resources"] = r.clone();
        c
    };
    vec![
        row(
            "configmap-text-and-binary",
            with_volumes(&format!("{look}; od -c /v/blob"), at("v"), conf(json!({}))),
            &["./data-1 644\nvalue-1\n", "336 255 276 357"],
        ),
        row("configmap-non-root", with_volumes(look, as_1000("v"), conf(json!({}))), &["./data-1 644\nvalue-1\n"]),
        row(
            "configmap-default-mode",
            with_volumes(look, at("v"), conf(json!({"defaultMode": 0o400}))),
            &["./data-1 400\nvalue-1\n"],
        ),
        row(
            "configmap-mapping-mode",
            with_volumes(
                look,
                at("v"),
                conf(json!({"items": [{"key": "data-1", "path": "path/to/data-2", "mode": 0o400}]})),
            ),
            &["./path/to/data-2 400\nvalue-1\n", "!blob"],
        ),
        row(
            "configmap-in-two-volumes",
            with_volumes(
                "cat /a/data-1 /b/data-1; touch /a/x || echo refused",
                json!({"volumeMounts": [{"name": "v", "mountPath": "/a"}, {"name": "w", "mountPath": "/b"}]}),
                json!([{"name": "v", "configMap": {"name": "conf"}}, {"name": "w", "configMap": {"name": "conf"}}]),
            ),
            &["value-1value-1", "refused"],
        ),
        row(
            "secret-mapping-mode",
            with_volumes(
                look,
                at("v"),
                json!([{"name": "v", "secret": {"secretName": "sec", "items": [{"key": "data-1", "path": "new-path", "mode": 0o400}]}}]),
            ),
            &["./new-path 400\nsecret-1\n"],
        ),
        {
            let mut spec = with_volumes(
                look,
                as_1000("v"),
                json!([{"name": "v", "secret": {"secretName": "sec", "defaultMode": 0o440}}]),
            );
            spec["securityContext"] = json!({"fsGroup": 1001});
            row("secret-non-root-with-group", spec, &["./data-1 440\nsecret-1\n"])
        },
        {
            let source = json!([{"secret": {"name": "sec"}}, {"configMap": {"name": "conf", "items": [{"key": "data-1", "path": "c"}]}},
                {"downwardAPI": {"items": downward.clone()}}]);
            row(
                "projected-all",
                with_volumes(look, with(at("v"), &resources), projected(source, json!(0o644))),
                &[
                    "./data-1 644\nsecret-1\n",
                    "./c 644\nvalue-1\n",
                    "./name 644\nprojected-all\n",
                    "./cpu 644\n1250\n",
                    "./rcpu 644\n250\n",
                    "./mem 644\n67108864\n",
                    "./rmem 644\n32\n",
                ],
            )
        },
        row(
            "projected-downward-mode",
            with_volumes(look, at("v"), projected(json!([{"downwardAPI": {"items": [downward[0]]}}]), json!(0o400))),
            &["./name 400\nprojected-downward-mode\n"],
        ),
        row(
            "downward-item-mode",
            with_volumes(
                look,
                with(at("v"), &resources),
                json!([{"name": "v", "downwardAPI": {"defaultMode": 0o600, "items": [downward[2], downward[4],
                    {"path": "own", "mode": 0o400, "fieldRef": {"fieldPath": "metadata.labels"}}]}}]),
            ),
            &["./cpu 600\n1250\n", "./mem 600\n67108864\n", "./own 400\nrow=\"downward-item-mode\"\n"],
        ),
        row(
            "downward-default-limits",
            with_volumes(
                "[ $(cat /v/cpu) -ge 1000 ] && [ $(cat /v/mem) -gt 1000000 ] && echo fine",
                at("v"),
                json!([{"name": "v", "downwardAPI": {"items": [downward[2], downward[4]]}}]),
            ),
            &["fine"],
        ),
        row(
            "empty-dir",
            with_volumes(
                "stat -c '%a' /v; touch /v/f; chmod 0644 /v/f; stat -c '%a %u' /v/f; mount | grep -c ' /v type tmpfs'; true",
                as_1000("v"),
                json!([{"name": "v", "emptyDir": {}}]),
            ),
            &["777\n644 1000\n0\n"],
        ),
        row(
            "empty-dir-memory",
            with_volumes(
                "stat -c '%a' /v; umask 0; touch /v/f; stat -c '%a %u' /v/f; mount | grep -c ' /v type tmpfs'",
                as_1000("v"),
                json!([{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]),
            ),
            &["777\n666 1000\n1\n"],
        ),
        {
            let mut spec = with_volumes(
                "touch /v/f; stat -c '%g' /v /v/f; id -G",
                as_1000("v"),
                json!([{"name": "v", "emptyDir": {}}]),
            );
            spec["securityContext"] = json!({"fsGroup": 123});
            row("empty-dir-group", spec, &["123\n123\n", "123"])
        },
        row(
            "empty-dir-shared",
            json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [
                {"command": sh("until cat /v/f; do sleep 0.05; done"), "volumeMounts": [{"name": "v", "mountPath": "/v"}]},
                {"command": sh("echo shared > /v/.f; mv /v/.f /v/f"), "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}),
            &["shared"],
        ),
        row(
            "sub-paths",
            with_volumes(
                "cat /etc/one /name /pro; echo; ls /dir",
                json!({"volumeMounts": [{"name": "v", "mountPath": "/etc/one", "subPath": "data-1"}, {"name": "w", "mountPath": "/name", "subPath": "name"},
                    {"name": "p", "mountPath": "/pro", "subPath": "data-1"}, {"name": "e", "mountPath": "/dir", "subPath": "new/dir"}]}),
                json!([{"name": "v", "configMap": {"name": "conf"}}, {"name": "w", "downwardAPI": {"items": [downward[0]]}},
                    {"name": "p", "projected": {"sources": [{"secret": {"name": "sec"}}]}}, {"name": "e", "emptyDir": {}}]),
            ),
            &["value-1sub-pathssecret-1"],
        ),
        row(
            "sub-path-expression",
            with_volumes(
                "echo here > /dir/f; cat /all/sub-path-expression/f",
                json!({"env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                    "volumeMounts": [{"name": "v", "mountPath": "/dir", "subPathExpr": "$(POD)"}, {"name": "v", "mountPath": "/all"}]}),
                json!([{"name": "v", "emptyDir": {}}]),
            ),
            &["here"],
        ),
        row(
            "image-volume",
            with_volumes(
                "head -n 1 /v/bin/entry; touch /v/x || echo refused; /v/bin/entry || echo not run; ls /w",
                json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "v", "mountPath": "/w", "subPath": "work"}]}),
                json!([{"name": "v", "image": {"reference": "entry:1", "pullPolicy": "IfNotPresent"}}]),
            ),
            &["#!/bin/sh\n", "refused\n", "not run\n"],
        ),
        {
            let names: Vec<String> = (0..20).map(|i| format!("race-{i}")).collect();
            let mounts: Vec<Value> =
                names.iter().map(|n| json!({"name": n, "mountPath": format!("/etc/{n}")})).collect();
            let volumes: Vec<Value> = names.iter().map(|n| json!({"name": n, "configMap": {"name": n}})).collect();
            row(
                "many-configmaps",
                with_volumes("cat /etc/race-*/data-1", json!({"volumeMounts": mounts}), json!(volumes)),
                &["v0v1v10v11"],
            )
        },
    ]
}

fn ends() -> Vec<Row> {
    let failed = |name, spec, says| Row { name, spec, phase: "Failed", says };
    vec![
        row("log-output", script("echo out; echo err >&2", json!({})), &["out\n", "err\n"]),
        failed("terminated-reason", script("exit 7", json!({})), &[]),
        row(
            "message-not-from-log",
            script("echo DONE", json!({"terminationMessagePolicy": "FallbackToLogsOnError"})),
            &["DONE"],
        ),
        row(
            "message-non-root",
            script(
                "echo -n DONE > /dev/termination-custom-log",
                json!({"terminationMessagePath": "/dev/termination-custom-log", "securityContext": {"runAsUser": 1000}}),
            ),
            &[],
        ),
        failed(
            "init-fails-never",
            json!({"initContainers": [{"command": ["true"]}, {"command": ["false"], "name": "i2"}],
                "containers": [{"command": ["true"], "name": "run"}]}),
            &[],
        ),
        row(
            "restart-rules",
            json!({"containers": [{"restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}],
                "command": sh("[ -e /v/f ] && exit 0; touch /v/f; exit 42"), "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
                "volumes": [{"name": "v", "emptyDir": {}}]}),
            &[],
        ),
        failed("no-such-command", json!({"containers": [{"command": ["/no/such"]}]}), &[]),
    ]
}

fn objects() -> Vec<Value> {
    let mut all = vec![
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf"}, "data": {"data-1": "value-1"},
            "binaryData": {"blob": "3q2+7w=="}}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "sec"}, "stringData": {"data-1": "secret-1"}}),
    ];
    all.extend((0..20).map(|i| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("race-{i}")}, "data": {"data-1": format!("v{i}")}})
    }));
    all
}

fn cluster(net: &mut Net) -> Cluster {
    let host = net.host("one");
    Image::busybox("entry:1")
        .file("bin/entry", 0o755, b"#!/bin/sh\necho entry \"$@\" $(pwd) $SEVEN\n")
        .file("work/.keep", 0o644, b"")
        .config("Entrypoint", json!(["/bin/entry"]))
        .config("Cmd", json!(["default"]))
        .config("Env", json!(["PATH=/bin", "SEVEN=7"]))
        .config("WorkingDir", json!("/work"))
        .save(&host.path("/var/lib/isopod/images").join("entry.tar"));
    let c = Cluster::start(&host);
    c.apply(&list(objects()));
    c
}

#[test]
fn pods_that_end() {
    let mut net = Net::new();
    let c = cluster(&mut net);
    let all: Vec<Row> = [environment(), security(), volumes(), ends()].into_iter().flatten().collect();
    run(&c, &all);
    let state = |pod: &str, list: &str, i: usize| c.get(&format!("pod {pod}"))["status"][list][i].clone();
    let ended = |pod: &str| state(pod, "containerStatuses", 0)["state"]["terminated"].clone();
    assert_eq!(ended("terminated-reason")["reason"], "Error");
    assert_eq!(ended("terminated-reason")["exitCode"], 7);
    assert_eq!(ended("message-not-from-log")["message"], Value::Null);
    assert_eq!(ended("message-non-root")["message"], "DONE");
    assert_eq!(ended("no-such-command")["reason"], "StartError");
    assert_eq!(ended("no-such-command")["exitCode"], 128);
    let init = c.get("pod init-fails-never")["status"].clone();
    assert_eq!(init["initContainerStatuses"][0]["state"]["terminated"]["exitCode"], 0);
    assert_eq!(init["initContainerStatuses"][1]["state"]["terminated"]["exitCode"], 1);
    assert_eq!(init["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
    let initialized =
        init["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Initialized").unwrap().clone();
    assert_eq!((&initialized["status"], &initialized["reason"]), (&json!("False"), &json!("ContainersNotInitialized")));
    assert_eq!(state("restart-rules", "containerStatuses", 0)["restartCount"], 1);
}

/// Pods that live while something about them changes.
fn living() -> Vec<Value> {
    let optional = json!([{"name": "made", "secret": {"secretName": "made", "optional": true}},
        {"name": "changed", "projected": {"sources": [{"secret": {"name": "changed", "optional": true}}]}},
        {"name": "removed", "configMap": {"name": "removed", "optional": true}},
        {"name": "labels", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"name": "notes", "projected": {"sources": [{"downwardAPI": {"items": [{"path": "notes", "fieldRef": {"fieldPath": "metadata.annotations"}}]}}]}}]);
    let mounts: Vec<Value> = ["made", "changed", "removed", "labels", "notes"]
        .iter()
        .map(|n| json!({"name": n, "mountPath": format!("/{n}")}))
        .collect();
    let sleep = |more: Value| script("trap 'exit 0' TERM; sleep 1000 & wait", more);
    let expression = |value: &str, mut env: Value| {
        env["name"] = json!("SUB");
        with_volumes(
            "exec sleep 1000",
            json!({"env": [env], "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": value}]}),
            json!([{"name": "v", "emptyDir": {}}]),
        )
    };
    let hook = |when: &str| json!({"lifecycle": {when: {"httpGet": {"path": format!("/hook-{when}"), "host": "WEB", "port": 8080}}}});
    vec![
        pod("updates", &with_volumes("exec sleep 1000", json!({"volumeMounts": mounts}), optional)),
        pod("absolute-sub-path", &expression("$(SUB)", json!({"value": "/tmp"}))),
        pod(
            "failed-sub-path",
            &expression(
                "$(SUB)",
                json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['mysubpath']"}}}),
            ),
        ),
        pod("deadline", &sleep(json!({}))),
        pod("debugged", &sleep(json!({}))),
        pod(
            "late-ready",
            &sleep(
                json!({"readinessProbe": {"exec": {"command": ["true"]}, "initialDelaySeconds": 4, "periodSeconds": 1}}),
            ),
        ),
        pod("probe-grace", &{
            let mut s = script(
                "trap '' TERM; while true; do sleep 0.2; done",
                json!({"livenessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1, "failureThreshold": 1, "terminationGracePeriodSeconds": 1}}),
            );
            s["terminationGracePeriodSeconds"] = json!(500);
            s["restartPolicy"] = json!("Always");
            s
        }),
        pod("gated", &{
            let mut s = sleep(json!({}));
            s["readinessGates"] = json!([{"conditionType": "example.com/gate"}]);
            s
        }),
        pod("unsafe-sysctl", &{
            let mut s = sleep(json!({}));
            s["securityContext"] = json!({"sysctls": [{"name": "kernel.msgmax", "value": "1000"}]});
            s
        }),
        pod("own-users", &{
            let mut s = sleep(json!({}));
            s["hostUsers"] = json!(false);
            s
        }),
        pod("classed", &{
            let mut s = sleep(json!({}));
            s["runtimeClassName"] = json!("ours");
            s
        }),
        pod("classed-elsewhere", &{
            let mut s = sleep(json!({}));
            s["runtimeClassName"] = json!("elsewhere");
            s
        }),
        pod("crowded-dns", &{
            let mut s = sleep(json!({}));
            s["imagePullSecrets"] = json!([{"name": "nowhere"}]);
            s["dnsConfig"] = json!({"nameservers": ["192.0.2.1", "192.0.2.2", "192.0.2.3"]});
            s
        }),
        pod("post-fails", &{
            let mut s = sleep(json!({"lifecycle": {"postStart": {"exec": {"command": ["false"]}}}}));
            s["restartPolicy"] = json!("Always");
            s
        }),
        pod("pre-fails", &sleep(json!({"lifecycle": {"preStop": {"exec": {"command": ["false"]}}}}))),
        pod(
            "redirects",
            &script(
                r"while true; do printf 'HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n' | nc -l -p 8081; done",
                json!({"readinessProbe": {"httpGet": {"port": 8081}, "periodSeconds": 1}}),
            ),
        ),
        pod("misnamed", &json!({"containers": [{"image": "NoCapitals:1"}]})),
        pod("post-http", &sleep(hook("postStart"))),
        pod("pre-http", &sleep(hook("preStop"))),
        pod("pre-sleep", &{
            let mut s = sleep(json!({"lifecycle": {"preStop": {"sleep": {"seconds": 2}}}}));
            s["terminationGracePeriodSeconds"] = json!(30);
            s
        }),
        pod("init-fails-always", &{
            let mut s = json!({"initContainers": [{"command": ["false"], "name": "i"}], "containers": [{"command": ["true"], "name": "run"}]});
            s["restartPolicy"] = json!("Always");
            s
        }),
    ]
}

#[test]
fn pods_that_live() {
    let mut net = Net::new();
    let c = cluster(&mut net);
    c.apply(&list(vec![
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "changed"}, "stringData": {"k": "before"}}),
        json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "ours"}, "handler": "isopod",
            "overhead": {"podFixed": {"cpu": "10m", "memory": "16Mi"}}}),
        json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "elsewhere"}, "handler": "gvisor"}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "removed"}, "data": {"k": "there"}}),
        pod(
            "web",
            &script(
                "mkdir /www; exec httpd -f -vv -p 8080 -h /www 2>&1",
                json!({"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}}),
            ),
        ),
    ]));
    c.wait_ready("web");
    let web = c.get("pod web")["status"]["podIP"].as_str().unwrap().to_owned();
    c.apply(&list(living()).replace("WEB", &web));
    let in_pod = |pod: &str, command: &str, want: &dyn Fn(&str) -> bool| {
        eventually(&format!("{command} in {pod}"), || {
            let ran = c.kubectl(&format!("exec {pod} -- sh -c '{command}'"));
            if want(&ran.out) { Ok(()) } else { Err(ran) }
        });
    };

    // Readiness waits for its initial delay.
    c.wait_ready("late-ready");
    let late = c.get("pod late-ready")["status"].clone();
    let stamp = |v: &Value| v.as_str().unwrap().parse::<k8s_openapi::jiff::Timestamp>().unwrap();
    let ready = late["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap();
    let began = stamp(&late["containerStatuses"][0]["state"]["running"]["startedAt"]);
    assert!((stamp(&ready["lastTransitionTime"]) - began).get_seconds() >= 3, "{late}");

    // Volumes follow objects made, changed and removed, and the pod's own labels and annotations.
    c.wait_ready("updates");
    in_pod("updates", "ls /made; cat /changed/k /removed/k; cat /labels/labels", &|s| {
        s == "beforethererow=\"updates\""
    });
    c.k("create secret generic made --from-literal=k=made");
    c.k(r#"patch secret changed -p '{"stringData":{"k":"after"}}'"#);
    c.k("delete configmap removed");
    c.k("label pod updates new=label");
    c.k("annotate pod updates --overwrite build=three");
    in_pod("updates", "cat /made/k /changed/k; ls /removed", &|s| s == "madeafter");
    in_pod("updates", "cat /labels/labels /notes/notes", &|s| {
        s.contains("new=\"label\"") && s.contains("build=\"three\"")
    });

    // Sub paths from expressions.
    for name in ["absolute-sub-path", "failed-sub-path"] {
        let reason = ".status.containerStatuses[0].state.waiting.reason";
        c.wait_field(&format!("pod {name}"), reason, |r| r == "CreateContainerConfigError");
    }
    c.k("annotate pod failed-sub-path mysubpath=mypath");
    c.wait_ready("failed-sub-path");

    // A deadline given later.
    c.wait_ready("deadline");
    c.k(r#"patch pod deadline -p '{"spec":{"activeDeadlineSeconds":1}}'"#);
    c.wait_field("pod deadline", ".status.reason", |r| r == "DeadlineExceeded");

    // Ephemeral containers, one after the other.
    c.wait_ready("debugged");
    for i in 1..=2 {
        c.k(&format!("debug debugged --image=busybox:1 -c debug-{i} --target=c0 --profile=general -- sleep 1000"));
        let path = format!(".status.ephemeralContainerStatuses[?(@.name==\"debug-{i}\")].state.running.startedAt");
        c.wait_field("pod debugged", &path, |s| !s.is_empty());
    }
    assert_eq!(c.get("pod debugged")["status"]["ephemeralContainerStatuses"].as_array().unwrap().len(), 2);

    // A probe's own grace period.
    c.wait_field("pod probe-grace", ".status.containerStatuses[0].restartCount", |n| {
        n.parse::<u32>().is_ok_and(|n| n >= 1)
    });

    // Readiness gates.
    c.wait_field("pod gated", ".status.conditions[?(@.type==\"Ready\")].reason", |r| r == "ReadinessGatesNotReady");
    c.k(r#"patch pod gated --subresource=status -p '{"status":{"conditions":[{"type":"example.com/gate","status":"True"}]}}'"#);
    c.wait_ready("gated");

    // A sysctl this node does not allow.
    c.wait_field("pod unsafe-sysctl", ".status.reason", |r| r == "SysctlForbidden");
    c.wait_field("pod unsafe-sysctl", ".status.phase", |r| r == "Failed");

    // More name servers than a libc reads, and a secret that is not there.
    in_pod("crowded-dns", "cat /etc/resolv.conf", &|s| s.contains("192.0.2.2") && !s.contains("192.0.2.3"));
    eventually("what of it is not as asked for", || {
        let events = c.get("events --field-selector involvedObject.name=crowded-dns").to_string();
        let want =
            ["DNSConfigForming", "the applied nameserver line is: ", "FailedToRetrieveImagePullSecret", "(nowhere)"];
        if want.iter().all(|part| events.contains(part)) { Ok(()) } else { Err(events) }
    });

    // What this node cannot do is said, not left out.
    c.wait_ready("classed");
    assert_eq!(c.get("pod classed")["spec"]["overhead"], json!({"cpu": "10m", "memory": "16Mi"}));
    let none = pod("unclassed", &script("true", json!({})))
        .to_string()
        .replace("\"spec\":{", "\"spec\":{\"runtimeClassName\":\"none\",");
    std::fs::write(c.host.path("/var/lib/unclassed.json"), none).unwrap();
    let refused = c.kubectl("create -f /var/lib/unclassed.json").err;
    assert!(refused.contains("forbidden: pod rejected: RuntimeClass \"none\" not found"), "{refused}");
    let why = "no runtime for \\\"gvisor\\\" is configured";
    eventually(why, || {
        let events = c.get("events --field-selector involvedObject.name=classed-elsewhere").to_string();
        if events.contains("FailedCreatePodSandBox") && events.contains(why) { Ok(()) } else { Err(events) }
    });
    if c.get("node one")["status"]["runtimeHandlers"][0]["features"]["userNamespaces"] == true {
        c.wait_ready("own-users");
    }

    // Hooks that fail, and an image that nothing can be called.
    let told = |pod: &str, want: &[&str]| {
        eventually(&format!("{want:?} of {pod}"), || {
            let events = c.k(&format!("get events --field-selector involvedObject.name={pod}"));
            if want.iter().all(|part| events.contains(part)) { Ok(()) } else { Err(events) }
        });
    };
    let waiting = ".status.containerStatuses[0].state.waiting.reason";
    c.wait_field("pod post-fails", waiting, |r| r == "CrashLoopBackOff");
    told("post-fails", &["FailedPostStartHook", "PostStartHook failed"]);
    c.wait_field("pod misnamed", waiting, |r| r == "InvalidImageName");
    told("misnamed", &["InspectFailed", "InvalidImageName"]);
    c.wait_ready("redirects");
    told("redirects", &["ProbeWarning", "Probe terminated redirects"]);
    c.wait_ready("pre-fails");
    c.k("delete pod pre-fails --timeout=20s");
    told("pre-fails", &["FailedPreStopHook", "PreStopHook failed"]);

    // Hooks.
    let asked = |what: &str| {
        eventually(what, || {
            let log = c.k("logs web");
            if log.contains(what) { Ok(()) } else { Err(log) }
        });
    };
    asked("hook-postStart");
    c.wait_ready("pre-http");
    c.k("delete pod pre-http --timeout=20s");
    asked("hook-preStop");
    c.wait_ready("pre-sleep");
    let begun = std::time::Instant::now();
    c.k("delete pod pre-sleep --timeout=30s");
    let took = begun.elapsed().as_secs_f64();
    assert!((2.0..15.0).contains(&took), "{took}");

    // An init container that never succeeds keeps the others waiting.
    c.wait_field("pod init-fails-always", ".status.initContainerStatuses[0].restartCount", |n| {
        n.parse::<u32>().is_ok_and(|n| n >= 1)
    });
    let init = c.get("pod init-fails-always")["status"].clone();
    assert_eq!(init["phase"], "Pending");
    assert_eq!(init["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");

    // Generations are told.
    let p = c.get("pod updates");
    assert_eq!(p["metadata"]["generation"], p["status"]["observedGeneration"]);
}
