//! An unmodified kubectl, as far as it needs no node.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use isopod_api::resources;
use serde_json::{Value, json};

use super::{PATIENCE, Server, TOKEN};

/// kubectl with a home of its own.
pub(super) struct Kubectl(pub(super) PathBuf);

impl Kubectl {
    pub(super) fn new(server: &Server) -> Self {
        let dir = server.dir.path();
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": server.url(""), "certificate-authority": dir.join("ca.crt")}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}]});
        fs::write(dir.join("kubeconfig"), config.to_string()).unwrap();
        let kubectl = Self(dir.to_owned());
        // Made by a controller elsewhere.
        kubectl.k("create serviceaccount default");
        kubectl
    }

    fn command(&self, line: &str) -> Command {
        // A shell, so that lines read as people type them.
        let mut command = Command::new("sh");
        command.args(["-c", &format!("kubectl {line}")]).current_dir(&self.0).stdin(Stdio::null());
        command.env("KUBECONFIG", self.0.join("kubeconfig")).env("HOME", &self.0);
        command.env("KUBE_EDITOR", self.0.join("editor"));
        command
    }

    pub(super) fn output(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// What it prints; it must succeed.
    pub(super) fn k(&self, line: &str) -> String {
        let output = self.output(line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {line}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it complains of; it must fail.
    pub(super) fn refused(&self, line: &str) -> String {
        let output = self.output(line);
        assert!(!output.status.success(), "kubectl {line} succeeds");
        String::from_utf8(output.stderr).unwrap()
    }

    pub(super) fn file(&self, name: &str, content: &Value) {
        fs::write(self.0.join(name), content.to_string()).unwrap();
    }

    fn get(&self, what: &str) -> Value {
        serde_json::from_str(&self.k(&format!("get {what} -o json"))).unwrap()
    }
}

fn deployment(image: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image,
                "ports": [{"containerPort": 80}]}]}}}})
}

fn pod(name: &str, app: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": app}},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "i"}]}})
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_writes() {
    let server = Server::start().await;
    let k = Kubectl::new(&server);
    tokio::task::block_in_place(|| {
        applied(&k);
        edited(&k);
        patched(&k);
        customized(&k);
        deleted(&k);
    });
}

fn customized(k: &Kubectl) {
    let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
        "size": {"type": "integer"}, "words": {"type": "array", "items": {"type": "string"}}}}}});
    k.file("crd.json", &json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.k.example.com"}, "spec": {"group": "k.example.com", "scope": "Namespaced",
            "names": {"plural": "things", "kind": "Thing", "shortNames": ["thg"]}, "versions": [{"name": "v1",
                "served": true, "storage": true, "schema": {"openAPIV3Schema": schema},
                "subresources": {"scale": {"specReplicasPath": ".spec.size", "statusReplicasPath": ".status.size"}}}]}}));
    k.k("apply -f crd.json");
    k.k("wait --for=condition=Established crd/things.k.example.com --timeout=2m");
    let thing = |size: i32, words: Value| json!({"apiVersion": "k.example.com/v1", "kind": "Thing", "metadata": {"name": "t"}, "spec": {"size": size, "words": words}});
    k.file("thing.json", &thing(1, json!(["a", "b"])));
    assert_eq!(k.k("apply -f thing.json"), "thing.k.example.com/t created\n");
    assert_eq!(k.k("apply -f thing.json"), "thing.k.example.com/t unchanged\n");
    k.file("thing.json", &thing(2, json!(["b"])));
    let difference = k.output("diff -f thing.json");
    assert_eq!(difference.status.code(), Some(1), "{}", String::from_utf8_lossy(&difference.stderr));
    assert_eq!(k.k("apply -f thing.json"), "thing.k.example.com/t configured\n");
    assert_eq!(k.get("thg t")["spec"], json!({"size": 2, "words": ["b"]}));
    fs::write(k.0.join("editor"), "#!/bin/sh\nsed -i 's/size: 2/size: 3/' \"$1\"\n").unwrap();
    assert_eq!(k.k("edit thg t"), "thing.k.example.com/t edited\n");
    k.k("scale thg t --replicas=4");
    k.k("label thg t x=y");
    k.k(r#"patch thg t --type=merge -p '{"spec":{"words":["c"]}}'"#);
    assert_eq!(k.get("thg -l x=y")["items"][0]["spec"], json!({"size": 4, "words": ["c"]}));
    let refused = k.refused(r#"patch thg t --type=strategic -p '{"spec":{"words":["c"]}}'"#);
    assert!(refused.contains("accepted media types include"), "{refused}");
    k.k("replace -f thing.json");
    k.k("delete -f crd.json");
}

fn applied(k: &Kubectl) {
    k.file("web.json", &deployment("i:1"));
    assert_eq!(k.k("apply -f web.json"), "deployment.apps/web created\n");
    assert_eq!(k.k("apply -f web.json"), "deployment.apps/web unchanged\n");
    assert_eq!(k.k("diff -f web.json"), "");
    k.file("web.json", &deployment("i:2"));
    let difference = k.output("diff -f web.json");
    let shown = String::from_utf8_lossy(&difference.stdout).into_owned();
    assert_eq!(difference.status.code(), Some(1), "{shown}");
    assert!(shown.contains("-      - image: i:1") && shown.contains("+      - image: i:2"), "{shown}");
    assert_eq!(k.k("apply -f web.json"), "deployment.apps/web configured\n");
    assert_eq!(k.get("deployment web")["spec"]["template"]["spec"]["containers"][0]["image"], "i:2");
    k.file("side.json", &deployment("i:3"));
    let conflict = k.refused("apply --server-side -f side.json --field-manager=other");
    assert!(conflict.contains("Apply failed with 1 conflict"), "{conflict}");
    k.k("apply --server-side --force-conflicts -f side.json --field-manager=other");
    assert_eq!(k.k("apply --dry-run=server -f side.json"), "deployment.apps/web configured (server dry run)\n");
    let wrong = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "w"}, "dat": {}});
    k.file("wrong.json", &wrong);
    let strict = k.refused("apply -f wrong.json");
    assert!(strict.contains("unknown field \"dat\""), "{strict}");
}

fn edited(k: &Kubectl) {
    fs::write(k.0.join("editor"), "#!/bin/sh\nsed -i 's/replicas: 2/replicas: 4/' \"$1\"\n").unwrap();
    Command::new("chmod").arg("+x").arg(k.0.join("editor")).status().unwrap();
    let shown = k.k("edit deployment web");
    assert!(shown.contains("edited"), "{shown}");
    let mut whole = k.get("deployment web");
    assert_eq!(whole["spec"]["replicas"], 4);
    whole["metadata"]["annotations"]["note"] = "replaced".into();
    k.file("whole.json", &whole);
    assert_eq!(k.k("replace -f whole.json"), "deployment.apps/web replaced\n");
    let stale = k.refused("replace -f whole.json");
    assert!(stale.contains("the object has been modified"), "{stale}");
    k.k("label deployment web tier=front");
    k.k("annotate deployment web note-");
    k.k("scale deployment web --replicas=5 --current-replicas=4");
    k.k("set image deployment/web c=i:4");
    k.k("set env deployment/web A=b");
    k.k("autoscale deployment web --min=1 --max=3 --name=web");
    k.k("expose deployment web --port=80 --name=web");
    let new = k.get("deployment web");
    assert_eq!((&new["spec"]["replicas"], &new["metadata"]["labels"]["tier"]), (&json!(5), &json!("front")));
    assert!(k.k("rollout pause deployment/web").contains("paused"));
    let described = k.k("describe deployment web");
    assert!(described.contains("Environment:\n      A:"), "{described}");
}

fn patched(k: &Kubectl) {
    k.k(r#"patch deployment web --type=strategic -p '{"spec":{"template":{"spec":{"containers":[{"name":"d","image":"j"}]}}}}'"#);
    // A uid in a patch means this object, also for those who write its status.
    for sub in ["", "--subresource=status"] {
        let refused = k.refused(&format!(r#"patch deployment web {sub} -p '{{"metadata":{{"uid":"another"}}}}'"#));
        assert!(refused.contains(r#"metadata.uid: Invalid value: "another": field is immutable"#), "{refused}");
    }
    let containers =
        |k: &Kubectl| k.get("deployment web")["spec"]["template"]["spec"]["containers"].as_array().unwrap().len();
    assert_eq!(containers(k), 2);
    k.k(r#"patch deployment web --type=json -p '[{"op":"remove","path":"/spec/template/spec/containers/0"}]'"#);
    assert_eq!(containers(k), 1);
    k.k(r#"patch deployment web --type=merge -p '{"metadata":{"labels":{"tier":null}}}'"#);
    assert!(k.get("deployment web")["metadata"]["labels"].get("tier").is_none());
    k.k(r#"patch deployment web --subresource=scale --type=merge -p '{"spec":{"replicas":7}}'"#);
    assert_eq!(k.k("get deployment web -o jsonpath={.spec.replicas}"), "7");
    let scale = k.k("get deployment web --subresource=scale");
    assert!(scale.starts_with("NAME   DESIRED   AVAILABLE   AGE\nweb    7         0 "), "{scale}");
    assert!(k.k("get deployment web --subresource=status -o name").contains("deployment.apps/web"));
    k.k("create configmap late --from-literal=state=no");
    let mut waiting = k.command("wait --for=jsonpath='{.data.state}'=yes configmap/late --timeout=2m").spawn().unwrap();
    k.k(r#"patch configmap late -p '{"data":{"state":"yes"}}'"#);
    assert!(waiting.wait().unwrap().success());
    let mut waiting = k.command("wait --for=delete configmap/late --timeout=2m").spawn().unwrap();
    k.k("delete configmap late");
    assert!(waiting.wait().unwrap().success());
}

fn deleted(k: &Kubectl) {
    for (cascade, policy) in [("orphan", "orphan"), ("foreground", "foregroundDeletion"), ("background", "")] {
        k.file("p.json", &deployment("i"));
        k.k("delete deployment web --cascade=background --ignore-not-found --now");
        k.k("create -f p.json");
        k.k(&format!("delete deployment web --cascade={cascade} --wait=false"));
        // Nobody collects garbage here: the finalizer waits for a controller.
        let left = k.k("get deployment web --ignore-not-found -o jsonpath={.metadata.finalizers}");
        assert!(left.contains(policy), "{cascade}: {left}");
        if !policy.is_empty() {
            assert!(!left.is_empty(), "{cascade}");
            k.k(r#"patch deployment web --type=merge -p '{"metadata":{"finalizers":null}}'"#);
        }
        assert_eq!(k.k("get deployment web --ignore-not-found"), "");
    }
    k.file("p1.json", &pod("p1", "del"));
    k.file("p2.json", &pod("p2", "del"));
    k.k("apply -f p1.json -f p2.json --validate=strict");
    assert_eq!(k.k("delete pods -l app=del --force 2>/dev/null").lines().count(), 2);
    k.k("create namespace gone");
    k.k("create configmap c -n gone");
    k.k("delete configmaps --all -n gone");
    k.k("delete namespace gone --wait=false");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_reads() {
    let server = Server::start().await;
    let k = Kubectl::new(&server);
    tokio::task::block_in_place(|| {
        for (name, app) in [("zeta", "a"), ("alpha", "b"), ("mid", "a")] {
            k.file("pod.json", &pod(name, app));
            k.k("create -f pod.json");
        }
        printed(&k);
        selected(&k);
        asked(&k);
        watched(&k);
        resources_are_all_there(&k);
        everything_is_explained(&k);
    });
}

fn printed(k: &Kubectl) {
    let has = |line: &str, part: &str| {
        let shown = k.k(line);
        assert!(shown.contains(part), "kubectl {line}: {shown}");
    };
    has("get pod zeta", "NAME   READY   STATUS    RESTARTS   AGE\nzeta   0/1     Pending   0          ");
    has("get pod zeta -o wide", "NOMINATED NODE   READINESS GATES");
    has("get pod zeta -o yaml", "kind: Pod\nmetadata:\n");
    has("get pod zeta -o json", "\"kind\": \"Pod\"");
    has("get pods -o name", "pod/alpha\npod/mid\npod/zeta\n");
    has("get pods -o jsonpath='{range .items[*]}{.metadata.name},{end}'", "alpha,mid,zeta,");
    has("get pods -o jsonpath-as-json='{.items[0].metadata.name}'", "\"alpha\"");
    has("get pods -o go-template='{{range .items}}{{.metadata.name}} {{end}}'", "alpha mid zeta ");
    has("get pods -o custom-columns=N:.metadata.name,P:.status.phase", "N       P\nalpha   Pending\n");
    has("get pods --show-labels", "app=b");
    has("get pods -L app", "APP\n");
    has("get pods --show-kind", "pod/alpha ");
    has("get pods --no-headers -A", "default   alpha");
    has("get all", "service/kubernetes");
    has("get pods zeta alpha -o name", "pod/zeta\npod/alpha\n");
    has("get cs 2>/dev/null", "etcd-0               Healthy     ok");
    has("get pods --chunk-size=1 -o name", "pod/alpha\npod/mid\npod/zeta\n");
    has("get --raw /version", "v1.36");
    has("describe pod zeta", "QoS Class:                   BestEffort");
    has("get pod zeta --output-watch-events=false -o yaml --show-managed-fields", "manager: kubectl-create");
    has("cluster-info", "Kubernetes control plane");
    has("version", "Server Version: v1.36");
    has("api-versions", "apps/v1\n");
}

fn selected(k: &Kubectl) {
    let names = |line: &str| k.k(&format!("get pods -o name {line}")).replace("pod/", "").replace('\n', " ");
    assert_eq!(names("--sort-by=.metadata.name"), "alpha mid zeta ");
    assert_eq!(names("--sort-by='{.metadata.labels.app}' -l app"), "mid zeta alpha ");
    assert_eq!(names("-l app=a"), "mid zeta ");
    assert_eq!(names("-l 'app in (b),app!=a'"), "alpha ");
    assert_eq!(names("--field-selector=metadata.name!=mid,status.phase=Pending"), "alpha zeta ");
    assert_eq!(names("--field-selector=spec.nodeName=none"), "");
    let unknown = k.refused("get pods --field-selector=spec.colour=red");
    assert!(unknown.contains("field label not supported: spec.colour"), "{unknown}");
}

fn asked(k: &Kubectl) {
    assert_eq!(k.k("auth can-i delete nodes").trim(), "yes");
    assert_eq!(k.output("auth can-i delete nodes --as=nobody").stdout, b"no\n");
    assert!(k.k("auth can-i --list --as=nobody").contains("selfsubjectaccessreviews.authorization.k8s.io"));
    assert!(k.k("auth whoami").contains("system:masters"));
    k.k("create serviceaccount robot");
    let token = k.k("create token robot --duration=20m");
    assert_eq!(token.trim().split('.').count(), 3);
    let mine = k.k(&format!("auth whoami --token={} -o json --kubeconfig=/dev/null --server=$(kubectl config view -o jsonpath='{{.clusters[0].cluster.server}}') --certificate-authority=ca.crt", token.trim()));
    assert!(mine.contains("system:serviceaccount:default:robot"), "{mine}");
    let made = Command::new("sh").current_dir(&k.0).args(["-c",
        "openssl req -new -newkey rsa:2048 -nodes -keyout u.key -subj /CN=jane -out u.csr 2>/dev/null && base64 -w0 u.csr"]).output().unwrap();
    let request = String::from_utf8(made.stdout).unwrap();
    k.file(
        "csr.json",
        &json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"name": "jane"}, "spec": {"request": request, "signerName": "kubernetes.io/kube-apiserver-client",
        "usages": ["client auth"]}}),
    );
    k.k("create -f csr.json");
    assert!(k.k("get csr").contains("Pending"));
    k.k("certificate approve jane");
    assert!(k.k("get csr jane").contains("Approved"));
    assert!(k.k("wait csr/jane --for=condition=Approved --timeout=2m").contains("condition met"));
    k.file("csr.json", &json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"name": "john"}, "spec": {"request": request, "signerName": "example.com/none", "usages": ["client auth"]}}));
    k.k("create -f csr.json");
    k.k("certificate deny john");
    assert!(k.k("get csr john").contains("Denied"));
    // The debugged pod needs no node to get its container.
    k.k("debug zeta --image=tools --target=c --container=d --attach=false --profile=general");
    assert_eq!(k.get("pod zeta")["spec"]["ephemeralContainers"][0]["name"], "d");
    k.k("debug mid --image=tools --copy-to=copy --container=d --attach=false --profile=general");
    assert_eq!(k.get("pod copy")["spec"]["containers"].as_array().unwrap().len(), 2);
    k.k("delete pod copy --now");
}

fn watched(k: &Kubectl) {
    let mut watch =
        k.command("get configmaps --watch-only -o name --output-watch-events").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(watch.stdout.take().unwrap()));
    // The watch has no sign of its own: objects are made until it has seen one.
    let stop = AtomicBool::new(false);
    let first = std::thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            for i in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if started.elapsed() > PATIENCE {
                    return watch.kill().unwrap();
                }
                k.k(&format!("create configmap seen-{i}"));
            }
        });
        let first = lines.next();
        stop.store(true, Ordering::Relaxed);
        first
    });
    let _ = watch.kill();
    watch.wait().unwrap();
    let first = first.expect("the watch shows something").unwrap();
    assert!(first.contains("configmap/seen-"), "{first}");
}

/// One row of `kubectl api-resources -o wide`: name, short names, version, whether in namespaces, kind, verbs, categories.
type Row = [String; 7];

fn resources_are_all_there(k: &Kubectl) {
    let shown = k.k("api-resources -o wide");
    let head = shown.lines().next().unwrap();
    let starts = ["NAME ", "SHORTNAMES", "APIVERSION", "NAMESPACED", "KIND", "VERBS", "CATEGORIES"]
        .map(|name| head.find(name).unwrap());
    let row = |line: &str| -> Row {
        std::array::from_fn(|n| {
            let end = starts.get(n + 1).copied().unwrap_or(line.len()).min(line.len());
            line.get(starts[n]..end).unwrap_or_default().trim().to_owned()
        })
    };
    let listed: BTreeSet<Row> = shown.lines().skip(1).map(row).collect();
    let wanted = |r: &resources::Resource| -> Row {
        let (mut verbs, mut categories) = (r.verbs.clone(), r.categories.clone());
        verbs.sort();
        categories.sort();
        let namespaced = r.namespaced.to_string();
        [
            r.plural.clone(),
            r.short_names.join(","),
            r.api_version(),
            namespaced,
            r.kind.clone(),
            verbs.join(","),
            categories.join(","),
        ]
    };
    // kubectl shows the preferred version of each group.
    let preferred = resources::all()
        .iter()
        .filter(|r| resources::preferred(&r.group_resource()).is_some_and(|p| p.version == r.version));
    assert_eq!(listed, preferred.map(wanted).collect::<BTreeSet<_>>());
}

fn everything_is_explained(k: &Kubectl) {
    let resources: BTreeSet<(String, String)> =
        resources::all().iter().map(|r| (r.plural.clone(), r.api_version())).collect();
    // The first call fills kubectl's caches for the others.
    assert!(k.k("explain pods.spec.containers.image").contains("FIELD: image <string>"));
    let explain = |(plural, version): &(String, String)| {
        let shown = k.k(&format!("explain {plural} --api-version={version} --recursive"));
        assert!(shown.contains("FIELDS:\n") && shown.contains("apiVersion\t<string>"), "{plural} {version}: {shown}");
    };
    let all: Vec<_> = resources.iter().collect();
    let explain = &explain;
    std::thread::scope(|scope| {
        for part in all.chunks(all.len().div_ceil(4)) {
            scope.spawn(move || part.iter().for_each(|one| explain(one)));
        }
    });
}
