//! Apply and update as upstream's own scenarios have them.

use serde_json::{Value, json};

use super::*;
use crate::schema::{decode, default, lookup};

struct Cluster {
    gvk: Gvk,
    live: Option<Value>,
    clock: u32,
}

impl Cluster {
    fn new(api_version: &str, kind: &str) -> Self {
        Self { gvk: Gvk::from_api_version(api_version, kind), live: None, clock: 0 }
    }

    fn run(
        &mut self,
        manager: &str,
        f: impl FnOnce(&Request<'_>, Option<&Value>) -> Result<Value, Status>,
    ) -> Result<Value, Status> {
        self.clock += 1;
        let now = format!("2024-01-01T00:00:{:02}Z", self.clock);
        let def = lookup(&self.gvk).unwrap();
        let req = Request { def, gvk: &self.gvk, manager, subresource: "", has_status: true, now: &now };
        let mut out = f(&req, self.live.as_ref())?;
        decode(def, &mut out, &[]).unwrap();
        default(def, &mut out);
        self.live = Some(out.clone());
        Ok(out)
    }

    fn object(&self, mut body: Value) -> Value {
        body["apiVersion"] = self.gvk.api_version().into();
        body["kind"] = self.gvk.kind.as_str().into();
        body["metadata"]["name"] = "c".into();
        body
    }

    fn apply(&mut self, manager: &str, body: Value, force: bool) -> Result<Value, Status> {
        let body = self.object(body);
        self.run(manager, |req, live| apply(req, live, &body, force))
    }

    fn update(&mut self, manager: &str, body: Value) -> Value {
        let mut body = self.object(body);
        let def = lookup(&self.gvk).unwrap();
        decode(def, &mut body, &[]).unwrap();
        default(def, &mut body);
        self.run(manager, |req, live| {
            update(req, live, &mut body);
            Ok(body)
        })
        .unwrap()
    }

    fn owners(&self) -> Vec<(String, Value)> {
        let live = self.live.as_ref().unwrap();
        let owner = |e: &Value| (e["manager"].as_str().unwrap().to_owned(), e["fieldsV1"].clone());
        meta::managed_fields(live).iter().map(owner).collect()
    }
}

fn owner(manager: &str, fields: Value) -> (String, Value) {
    (manager.to_owned(), fields)
}

#[test]
fn conflicts_and_force() {
    let mut c = Cluster::new("v1", "ConfigMap");
    c.apply("one", json!({"data": {"a": "1", "b": "1"}}), false).unwrap();
    let error = c.apply("two", json!({"data": {"a": "2", "b": "2"}}), false).unwrap_err();
    assert_eq!(error.message, "Apply failed with 2 conflicts: conflicts with \"one\":\n- .data.a\n- .data.b");
    assert_eq!(error.details.unwrap().causes[0].message, "conflict with \"one\"");
    let got = c.apply("two", json!({"data": {"a": "2"}}), true).unwrap();
    assert_eq!(got["data"], json!({"a": "2", "b": "1"}));
    assert_eq!(
        c.owners(),
        [owner("one", json!({"f:data": {"f:b": {}}})), owner("two", json!({"f:data": {"f:a": {}}}))]
    );
    let error = c.apply("one", json!({"data": {"a": "1", "b": "1"}}), false).unwrap_err();
    assert_eq!(error.message, "Apply failed with 1 conflict: conflict with \"two\": .data.a");
    c.apply("one", json!({"data": {"a": "2", "b": "1"}}), false).unwrap();
    assert!(c.owners().contains(&owner("one", json!({"f:data": {"f:a": {}, "f:b": {}}}))));
}

#[test]
fn removes_what_is_no_longer_applied() {
    let mut c = Cluster::new("v1", "ConfigMap");
    c.apply("a", json!({"data": {"a": "1", "b": "2"}}), false).unwrap();
    let got = c.apply("a", json!({"data": {"a": "1"}}), false).unwrap();
    assert_eq!(got["data"], json!({"a": "1"}));
    let got = c.apply("a", json!({"data": {}}), false).unwrap();
    assert_eq!(got.get("data"), None);
    assert_eq!(c.owners(), [owner("a", json!({"f:data": {}}))]);
}

#[test]
fn associative_lists() {
    let mut c = Cluster::new("apps/v1", "Deployment");
    let one = |image: &str, ports: Value| {
        json!({"spec": {"selector": {"matchLabels": {"app": "a"}}, "template": {"metadata": {"labels": {"app": "a"}},
            "spec": {"containers": [{"name": "a", "image": image, "ports": ports, "env": [{"name": "X", "value": "1"}]}]}}}})
    };
    c.apply("one", one("a:1", json!([{"containerPort": 80}])), false).unwrap();
    assert_eq!(
        c.owners()[0].1["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"a\"}"],
        json!({".": {}, "f:env": {"k:{\"name\":\"X\"}": {".": {}, "f:name": {}, "f:value": {}}}, "f:image": {}, "f:name": {},
            "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}})
    );
    let two = json!({"spec": {"template": {"spec": {"containers": [
        {"name": "b", "image": "b:1"}, {"name": "a", "env": [{"name": "Y", "value": "2"}]}]}}}});
    let got = c.apply("two", two, false).unwrap();
    let containers = &got["spec"]["template"]["spec"]["containers"];
    assert_eq!((&containers[0]["name"], &containers[1]["name"]), (&json!("b"), &json!("a")));
    assert_eq!(containers[1]["env"].as_array().unwrap().len(), 2);

    let mut without_ports = one("a:2", json!([]));
    without_ports["spec"]["template"]["spec"]["containers"][0].as_object_mut().unwrap().shift_remove("ports");
    let got = c.apply("one", without_ports, false).unwrap();
    assert_eq!(got["spec"]["template"]["spec"]["containers"][1].get("ports"), None);

    let clash = json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "x"}]}}}});
    assert_eq!(
        c.apply("two", clash, false).unwrap_err().message,
        "Apply failed with 1 conflict: conflict with \"one\": .spec.template.spec.containers[name=\"a\"].image"
    );
    let got = c.apply("two", json!({}), false).unwrap();
    assert_eq!(got["spec"]["template"]["spec"]["containers"].as_array().unwrap().len(), 1);
    assert_eq!(c.owners().len(), 1);
}

#[test]
fn invalid_configurations() {
    let mut c = Cluster::new("v1", "ConfigMap");
    for (body, want) in [
        (
            json!({"bogus": 1}),
            "failed to create typed patch object (/c; /v1, Kind=ConfigMap): .bogus: field not declared in schema",
        ),
        (
            json!({"data": {"a": 5}}),
            "failed to create typed patch object (/c; /v1, Kind=ConfigMap): .data.a: expected string, got &value.valueUnstructured{Value:5}",
        ),
        (
            json!({"metadata": {"finalizers": ["x", "x"]}}),
            "failed to create typed patch object (/c; /v1, Kind=ConfigMap): .metadata.finalizers: duplicate entries for key [=\"x\"]",
        ),
        (json!({"metadata": {"managedFields": []}}), "metadata.managedFields must be nil"),
    ] {
        assert_eq!(c.apply("a", body, false).unwrap_err().message, want);
    }
}

#[test]
fn updates_take_ownership() {
    let mut c = Cluster::new("v1", "ConfigMap");
    c.update("creator", json!({"data": {"k": "v"}}));
    assert_eq!(c.owners(), [owner("creator", json!({"f:data": {".": {}, "f:k": {}}}))]);
    let same = c.live.clone().unwrap();
    assert_eq!(c.update("creator", json!({"data": {"k": "v"}})), same, "a no-op keeps time stamps");
    c.update("upd", json!({"data": {"k": "u", "p": "1"}}));
    assert_eq!(
        c.owners(),
        [owner("creator", json!({"f:data": {}})), owner("upd", json!({"f:data": {"f:k": {}, "f:p": {}}}))]
    );
    let error = c.apply("one", json!({"data": {"k": "x"}}), false).unwrap_err();
    assert_eq!(error.message, "Apply failed with 1 conflict: conflict with \"upd\" using v1: .data.k");
    c.update("creator", json!({"metadata": {"managedFields": [{}]}, "data": {"k": "u"}}));
    assert!(c.owners().is_empty());
    c.apply("one", json!({"data": {"a": "1"}}), false).unwrap();
    assert_eq!(
        c.owners(),
        [
            owner("one", json!({"f:data": {"f:a": {}}})),
            owner("before-first-apply", json!({"f:data": {".": {}, "f:k": {}}}))
        ]
    );
}

#[test]
fn create_owns_what_differs_from_the_empty_object() {
    let mut c = Cluster::new("v1", "Service");
    c.update("golden", json!({"spec": {"ports": [{"port": 80}]}}));
    assert_eq!(
        c.owners()[0].1,
        json!({"f:spec": {"f:internalTrafficPolicy": {}, "f:ports": {".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}":
            {".": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}}, "f:sessionAffinity": {}, "f:type": {}}})
    );
}

#[test]
fn many_updaters_are_merged() {
    let mut c = Cluster::new("v1", "ConfigMap");
    let mut data = json!({});
    for i in 0..13 {
        data[format!("k{i}")] = "v".into();
        c.update(&format!("m{i}"), json!({"data": data.clone()}));
    }
    let owners = c.owners();
    assert_eq!(owners.len(), 10);
    let ancient = owners.iter().find(|(m, _)| m == "ancient-changes").unwrap();
    assert_eq!(ancient.1["f:data"].as_object().unwrap().len(), 5);
}

#[test]
fn kubectl_takes_over_from_client_side_apply() {
    let mut c = Cluster::new("v1", "ConfigMap");
    let last = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c"},"data":{"k":"v"}}"#;
    c.update(
        "kubectl-client-side-apply",
        json!({"metadata": {"annotations": {LAST_APPLIED: last}}, "data": {"k": "v"}}),
    );
    let got = c.apply("kubectl", json!({"data": {"k": "new"}}), false).unwrap();
    assert_eq!(got["data"]["k"], "new");
    assert!(meta::annotation(&got, LAST_APPLIED).unwrap().contains("new"));
}
