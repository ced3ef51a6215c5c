//! An unmodified kubectl, doing what people do with it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};

#[test]
fn a_deployment_from_create_to_delete() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.k("create deployment web --image=web:1 --replicas=3 --port=8080");
    assert!(c.k("rollout status deployment/web --timeout=60s").contains("successfully rolled out"));
    c.k("expose deployment web --port=80 --target-port=8080");
    let wide = c.k("get pods -l app=web -o wide");
    assert_eq!(wide.lines().filter(|line| line.contains("Running")).count(), 3, "{wide}");
    assert!(wide.contains("one"), "{wide}");
    assert!(c.k("get deployment web -o yaml").contains("kind: Deployment"));
    let described = c.k("describe deployment web");
    assert!(described.contains("ScalingReplicaSet") && described.contains("3 available"), "{described}");
    c.k("scale deployment web --replicas=5");
    c.wait_field("deployment web", ".status.readyReplicas", |n| n == "5");
    c.k("scale deployment web --replicas=2");
    c.wait_field("deployment web", ".status.replicas", |n| n == "2");
    c.k("set image deployment/web web=busybox:1");
    c.k("rollout undo deployment/web");
    assert!(c.k("rollout status deployment/web --timeout=60s").contains("successfully rolled out"));
    assert!(c.k("rollout history deployment/web").contains("REVISION"));
    assert_eq!(c.get("deployment web")["spec"]["template"]["spec"]["containers"][0]["image"], "web:1");
    c.k("label deployment web tier=front");
    assert!(c.k("get deployments -l tier=front -o name").contains("deployment.apps/web"));
    c.k("annotate deployment web note=hello");
    c.k(r#"patch deployment web -p '{"spec":{"minReadySeconds":1}}'"#);
    assert_eq!(c.get("deployment web")["spec"]["minReadySeconds"], 1);
    assert!(c.k("get events").contains("SuccessfulCreate"));
    assert!(c.k("wait --for=condition=Available deployment/web --timeout=30s").contains("condition met"));
    c.k("delete deployment web");
    eventually("pods are gone", || {
        let pods = c.k("get pods -l app=web -o name");
        if pods.is_empty() { Ok(()) } else { Err(pods) }
    });
}

#[test]
fn pods_are_looked_into() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.k("run web --image=web:1 --port=8080");
    c.wait_ready("web");
    assert!(c.k("logs web").contains("started web"));
    let followed = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; kubectl logs -f web > /tmp/followed & pid=$!; \
         for i in $(seq 200); do grep -q 'started web' /tmp/followed && break; sleep 0.05; done; kill $pid; cat /tmp/followed",
    );
    assert!(followed.contains("started web"), "{followed}");
    let refused = |query: &str| c.kubectl(&format!("get --raw '/api/v1/namespaces/default/pods/web/log?{query}'")).err;
    assert!(refused("sinceTime=abc").contains("cannot parse \"abc\" as \"2006\""), "{}", refused("sinceTime=abc"));
    let both = refused("sinceSeconds=1&sinceTime=2020-01-01T00:00:00Z");
    assert!(both.contains("at most one of `sinceTime` or `sinceSeconds` may be specified"), "{both}");
    assert!(c.k("logs web --since-time=2020-01-01T00:00:00+01:00 --limit-bytes=7").starts_with("started"));
    // Over a WebSocket, as the suite asks: the log is what the messages carry.
    c.k("create clusterrolebinding reads --clusterrole=view --serviceaccount=default:default");
    let token = c.k("create token default");
    let socket = c.host.must(&format!(
        r"printf 'GET /api/v1/namespaces/default/pods/web/log HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: binary.k8s.io\r\n\r\n' |
          timeout 20 openssl s_client -quiet -ign_eof -connect 10.88.0.1:6443 2> /dev/null | tr -cd '[:print:]\n'",
        token.trim()
    ));
    for part in ["101 Switching Protocols", "sec-websocket-protocol: binary.k8s.io", "started web"] {
        assert!(socket.contains(part), "{part}: {socket}");
    }
    assert_eq!(c.k("exec web -- hostname").trim(), "web");
    assert_eq!(c.kubectl("exec web -- sh -c 'exit 7'").code, 7);
    assert_eq!(c.k("exec -i web -- cat < /etc/hostname"), c.host.must("cat /etc/hostname"));
    let terminal = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; script -qec 'kubectl exec -it web -- tty' /dev/null < /dev/null",
    );
    assert!(terminal.contains("/dev/"), "{terminal}");
    c.host.must("echo content > /tmp/file-for-pod");
    c.k("cp /tmp/file-for-pod web:/tmp/there");
    assert_eq!(c.k("exec web -- cat /tmp/there").trim(), "content");
    c.k("cp web:/tmp/there /tmp/file-from-pod");
    assert_eq!(c.host.must("cat /tmp/file-from-pod; rm /tmp/file-from-pod /tmp/file-for-pod").trim(), "content");
    let forwarded = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; kubectl port-forward pod/web 18080:8080 > /dev/null & pid=$!; \
         for i in $(seq 100); do curl -s http://127.0.0.1:18080/ && break; sleep 0.1; done; kill $pid",
    );
    assert_eq!(forwarded.trim(), "web");
    let ran = c.k("run once --image=busybox:1 --rm -i --restart=Never -- echo from-the-pod");
    assert!(ran.contains("from-the-pod"), "{ran}");
    // Programs that have said all they have to say before anybody can attach.
    let quick = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; for n in 1 2 3 4 5 6; do \
         kubectl run quick-$n --image=busybox:1 --rm -i --restart=Never -- echo word-$n > /tmp/quick-$n 2>&1 & done; wait; \
         cat /tmp/quick-*; rm /tmp/quick-*",
    );
    assert!((1..=6).all(|n| quick.matches(&format!("word-{n}\n")).count() == 1), "{quick}");
    let attached = c.k("run reader --image=busybox:1 --rm -i --restart=Never -- cat < /etc/hostname");
    assert!(attached.contains(c.host.must("cat /etc/hostname").trim()), "{attached}");
    // A debugger in the pod, in a copy of it, and on its node; what it reads comes through an attachment.
    let name = c.host.must("cat /etc/hostname");
    for what in ["web --container=d", "web --container=d --copy-to=copy", "node/one"] {
        let script = "sh -c 'read line; echo \"read $line\"' < /etc/hostname";
        let debugged = c.k(&format!("debug {what} -i --image=busybox:1 --profile=general -- {script}"));
        assert!(debugged.contains(&format!("read {}", name.trim())), "{what}: {debugged}");
    }
    assert_eq!(c.get("pod web")["spec"]["ephemeralContainers"][0]["name"], "d");
    let described = c.k("describe pod web");
    for event in ["Scheduled", "Pulled", "Created", "Started"] {
        assert!(described.contains(event), "{event}: {described}");
    }
}

#[test]
fn watches_editors_and_terminals() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let watched = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; kubectl get pods -w --no-headers > /tmp/watched & pid=$!; \
         kubectl create deployment web --image=web:1 > /dev/null; \
         for i in $(seq 400); do grep -q '1/1 *Running' /tmp/watched && break; sleep 0.05; done; seen=$(wc -l < /tmp/watched); \
         kubectl label pods --all seen=yes > /dev/null; \
         for i in $(seq 400); do [ $(wc -l < /tmp/watched) -gt $seen ] && break; sleep 0.05; done; kill $pid; tail -n +$seen /tmp/watched",
    );
    assert!(watched.lines().count() > 1 && watched.contains("1/1"), "{watched}");
    c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig KUBE_EDITOR='sed -i \"s/replicas: 1/replicas: 2/\"'; kubectl edit deployment web",
    );
    assert_eq!(c.get("deployment web")["spec"]["replicas"], 2);
    c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: echo}\nspec:\n  containers:\n  - {name: c, image: 'busybox:1', stdin: true, \
         command: [sh, -c, 'while read line; do echo \"got $line\"; done']}\n",
    );
    c.wait_ready("echo");
    let attached = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; mkfifo /tmp/in; kubectl attach -i echo < /tmp/in > /tmp/attached & pid=$!; \
         exec 3> /tmp/in; echo hello >&3; \
         for i in $(seq 200); do grep -q 'got hello' /tmp/attached && break; sleep 0.05; done; kill $pid; cat /tmp/attached",
    );
    assert!(attached.contains("got hello"), "{attached}");
    // A terminal whose size changes while a program runs in it; the program ends when it has seen both sizes.
    std::fs::write(
        c.host.path("/etc/isopod/terminal.sh"),
        "exec 3<&0; stty rows 30 cols 90\n\
         (until kubectl exec echo -- test -e /tmp/first; do sleep 0.05; done; stty rows 40 cols 123 <&3) &\n\
         kubectl exec -it echo -- sh -c 'until [ \"$(stty size)\" = \"30 90\" ]; do sleep 0.05; done; touch /tmp/first; \
         until [ \"$(stty size)\" = \"40 123\" ]; do sleep 0.05; done; stty size'\n",
    )
    .unwrap();
    let resized = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; timeout 30 script -qec 'sh /etc/isopod/terminal.sh' /dev/null < /dev/null",
    );
    assert!(resized.contains("40 123"), "{resized}");
    let ran = c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; timeout 30 \
         script -qec 'kubectl run once --image=busybox:1 --rm -it --restart=Never -- tty' /dev/null < /dev/null",
    );
    assert!(ran.contains("/dev/") && ran.contains("deleted"), "{ran}");
}

#[test]
fn the_api_explains_itself() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let resources = c.k("api-resources");
    for kind in ["Pod", "Deployment", "StatefulSet", "EndpointSlice", "NetworkPolicy", "ClusterRole"] {
        assert!(resources.contains(kind), "{kind}: {resources}");
    }
    assert!(c.k("api-versions").contains("apps/v1"));
    assert!(c.k("explain pod.spec.containers").contains("FIELD"));
    assert_eq!(c.k("auth can-i create pods").trim(), "yes");
    assert_eq!(c.kubectl("auth can-i create pods --as=nobody").out.trim(), "no");
    let manifest = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\ndata: {a: b}\n---\n\
                    apiVersion: v1\nkind: Secret\nmetadata: {name: two}\ndata: {c: ZA==}\n---\n\
                    apiVersion: v1\nkind: Namespace\nmetadata: {name: three}\n";
    let applied = c.apply(manifest);
    assert_eq!(applied.lines().count(), 3, "{applied}");
    assert!(c.apply(manifest).lines().all(|line| line.ends_with("unchanged")));
    std::fs::write(c.host.path("/etc/isopod/changed.yaml"), manifest.replace("a: b", "a: changed")).unwrap();
    let diff = c.kubectl("diff -f /etc/isopod/changed.yaml");
    assert_eq!(diff.code, 1, "{diff:?}");
    assert!(diff.out.contains("+  a: changed"), "{diff:?}");
    c.k("apply --server-side --force-conflicts -f /etc/isopod/changed.yaml");
    assert_eq!(c.get("configmap one")["data"]["a"], "changed");
    let unknown =
        c.kubectl("create -f - <<'E'\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: bad}\nnonsense: 1\nE");
    assert_ne!(unknown.code, 0);
    assert!(unknown.err.contains("unknown field \"nonsense\""), "{unknown:?}");
    c.apply(
        "apiVersion: admissionregistration.k8s.io/v1\nkind: ValidatingAdmissionPolicy\nmetadata: {name: typed}\nspec:\n  \
         matchConstraints: {resourceRules: [{apiGroups: [apps], apiVersions: [v1], operations: [CREATE], resources: [deployments]}]}\n  \
         validations: [{expression: \"object.spec.replicas > '1'\"}]\n",
    );
    c.wait_field("validatingadmissionpolicy typed", ".status.typeChecking.expressionWarnings[0].warning", |warning| {
        warning.starts_with("apps/v1, Kind=Deployment: ERROR: <input>:1:22: found no matching overload for '_>_'")
    });
    // Addresses of another range; it stays until the last of them is given back.
    c.apply(
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: more}\nspec: {cidrs: [10.97.0.0/28]}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: more}\nspec: {clusterIP: 10.97.0.5, ports: [{port: 80}]}\n",
    );
    c.wait_field("servicecidr more", ".metadata.finalizers[0]", |f| f == "networking.k8s.io/service-cidr-finalizer");
    c.k("wait --for=create ipaddress/10.97.0.5 --timeout=20s");
    c.k("delete servicecidr more --wait=false");
    c.wait_field("servicecidr more", ".status.conditions[0].reason", |reason| reason == "Terminating");
    c.k("delete service more");
    c.k("wait --for=delete servicecidr/more --timeout=40s");
    c.k("delete namespace three --timeout=30s");
    assert!(c.kubectl("get namespace three").err.contains("NotFound"));
}
