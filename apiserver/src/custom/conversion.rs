//! Conversion between the versions of a custom resource by a webhook.
//!
//! Reads are synchronous, so what a read needs is converted ahead: [`Custom::prepare`] asks the webhook about all objects
//! that are not there yet in the served version, and keeps the answers with the objects. They go when the object does.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use isopod_api::{gvk::Gvk, meta, status::Status};
use serde_json::{Value, json};

use super::{Custom, STORED};
use crate::{
    cache::{Draft, Object},
    objects::Objects,
    webhook::{Client, Target},
};

/// How long a webhook may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Objects in one question.
const BATCH: usize = 500;

/// How webhooks are called.
pub(crate) struct Converter {
    client: Arc<Client>,
    objects: Weak<dyn Objects>,
}

impl Converter {
    /// Over a client; the objects know where services are.
    pub(crate) fn new(client: Arc<Client>, objects: &Arc<dyn Objects>) -> Self {
        Self { client, objects: Arc::downgrade(objects) }
    }
}

/// The conversion of one definition.
pub(crate) struct Conversion {
    target: Result<Arc<Target>, String>,
    /// apiVersion of its reviews.
    review: &'static str,
    converter: Arc<Converter>,
}

impl Conversion {
    /// From `spec.conversion`; `None` when only the apiVersion changes.
    pub(crate) fn new(spec: &Value, converter: Option<Arc<Converter>>) -> Option<Self> {
        if spec["strategy"] != "Webhook" {
            return None;
        }
        let webhook = &spec["webhook"];
        let versions = webhook["conversionReviewVersions"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let review = versions.filter_map(|version| match version {
            "v1" => Some("apiextensions.k8s.io/v1"),
            "v1beta1" => Some("apiextensions.k8s.io/v1beta1"),
            _ => None,
        });
        Some(Self {
            target: Target::new(&webhook["clientConfig"]).map(Arc::new),
            review: review.into_iter().next().unwrap_or("apiextensions.k8s.io/v1"),
            converter: converter?,
        })
    }

    /// The objects in another version, in their order.
    async fn convert(&self, objects: &[Value], to: &Gvk) -> Result<Vec<Value>, Status> {
        let Some(first) = objects.first() else { return Ok(Vec::new()) };
        let from = shown(&Gvk::of(first));
        let failed = |error: &str| Status::unknown(format!("conversion webhook for {from} failed: {error}"));
        let target = self.target.as_ref().map_err(|e| failed(e))?;
        let known = self.converter.objects.upgrade().ok_or_else(|| failed("the server stops"))?;
        let uid = uuid::Uuid::new_v4().to_string();
        let question = json!({"kind": "ConversionReview", "apiVersion": self.review, "request": {
            "uid": uid, "desiredAPIVersion": to.api_version(), "objects": objects}});
        let answer = self.converter.client.post(&*known, target, &question, TIMEOUT).await.map_err(|e| failed(&e))?;
        let converted = self.converted(&answer, &uid).map_err(|e| failed(&e))?;
        if converted.len() != objects.len() {
            return Err(Status::unknown(format!(
                "conversion webhook for {from} returned {} objects, expected {}",
                converted.len(),
                objects.len()
            )));
        }
        let pairs = objects.iter().zip(converted).enumerate();
        let checked = pairs.map(|(index, (before, after))| {
            let invalid = |error: String| {
                Status::unknown(format!(
                    "conversion webhook for {from} returned invalid object at index {index}: {error}"
                ))
            };
            restored(before, after, to).map_err(invalid)
        });
        checked.collect()
    }

    /// The objects of an answer.
    fn converted(&self, answer: &Value, uid: &str) -> Result<Vec<Value>, String> {
        let found = Gvk::of(answer);
        if found.api_version() != self.review || found.kind != "ConversionReview" {
            return Err(format!(
                "expected webhook response of {}, Kind=ConversionReview, got {}",
                self.review,
                shown(&found)
            ));
        }
        let response = &answer["response"];
        if !response.is_object() {
            return Err("no response provided".into());
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        if text(&response["uid"]) != uid {
            return Err(format!("expected response.uid={uid:?}, got {:?}", text(&response["uid"])));
        }
        let result = &response["result"];
        if result["status"] != "Success" {
            return Err(match text(&result["message"]) {
                message if message.is_empty() => {
                    format!("response.result.status was '{}', not 'Success'", text(&result["status"]))
                }
                message => message,
            });
        }
        Ok(response["convertedObjects"].as_array().cloned().unwrap_or_default())
    }
}

/// `group/version, Kind=Kind`.
fn shown(gvk: &Gvk) -> String {
    format!("{}/{}, Kind={}", gvk.group, gvk.version, gvk.kind)
}

/// A converted object with the metadata of the original: only labels and annotations are the webhook's to change.
fn restored(before: &Value, mut after: Value, to: &Gvk) -> Result<Value, String> {
    let found = Gvk::of(&after);
    if found.api_version() != to.api_version() {
        return Err(format!("invalid groupVersion (expected {}, received {})", to.api_version(), found.api_version()));
    }
    if found.kind != to.kind {
        return Err(format!("invalid kind (expected {}, received {})", to.kind, found.kind));
    }
    if !after["metadata"].is_object() {
        return Err("invalid metadata of type <nil> in converted object".into());
    }
    for field in ["name", "namespace", "uid"] {
        let (wanted, found) = (meta::text(before, field), meta::text(&after, field));
        if wanted != found {
            return Err(format!("metadata.{field} must not change, expected {wanted:?}, got {found:?}"));
        }
    }
    let mut metadata = before["metadata"].clone();
    for field in ["labels", "annotations"] {
        match after["metadata"].get(field).filter(|v| !v.is_null()) {
            Some(own) => metadata[field] = own.clone(),
            None => drop(metadata.as_object_mut().and_then(|m| m.shift_remove(field))),
        }
    }
    after["metadata"] = metadata;
    Ok(after)
}

impl Custom {
    /// Whether only the webhook knows what an object is in the served version.
    pub(super) fn foreign(&self, object: &Object) -> bool {
        self.definition.conversion.is_some() && !object.bytes.starts_with(&self.prefix)
    }

    /// Converts what is not there yet in the served version.
    pub(crate) async fn prepare(&self, objects: &[Arc<Object>]) -> Result<(), Status> {
        let Some(conversion) = &self.definition.conversion else { return Ok(()) };
        let missing: Vec<_> =
            objects.iter().filter(|o| self.foreign(o) && o.forms.get(self.format).is_none()).cloned().collect();
        for batch in missing.chunks(BATCH) {
            let stored = |object: &Arc<Object>| {
                let mut value = object.value();
                if let Some(version) = self.definition.version(&Gvk::of(&value).version) {
                    version.schema.default(&mut value);
                }
                value
            };
            let values: Vec<Value> = batch.iter().map(stored).collect();
            let converted = conversion.convert(&values, &self.version.gvk).await?;
            for (object, mut value) in batch.iter().zip(converted) {
                self.version.settle(&mut value);
                let form = Draft::new(value, &STORED).finish(object.revision);
                object.forms.put(self.format, form.bytes);
            }
        }
        Ok(())
    }

    /// The stored form of an object of the served version.
    pub(crate) async fn draft(&self, value: Value) -> Result<Draft, Status> {
        Ok(Draft::new(self.convert(value, &self.definition.storage().gvk).await?, &STORED))
    }

    /// An object of one of the versions in another one.
    pub(crate) async fn convert(&self, value: Value, gvk: &Gvk) -> Result<Value, Status> {
        let (Some(version), Some(conversion)) = (self.definition.version(&gvk.version), &self.definition.conversion)
        else {
            return Ok(self.in_version(value, gvk));
        };
        if Gvk::of(&value) == *gvk {
            return Ok(value);
        }
        let converted = conversion.convert(std::slice::from_ref(&value), gvk).await?;
        let mut value = converted.into_iter().next().unwrap_or_default();
        version.settle(&mut value);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admission::testing::FakeObjects, custom::Definition, webhook::testing::WebhookServer};

    fn definition(config: Value, objects: &Arc<dyn Objects>) -> Arc<Definition> {
        let version = |name: &str, field: &str, storage: bool| {
            let mut properties = json!({});
            properties[field] = json!({"type": "string"});
            json!({"name": name, "served": true, "storage": storage, "schema": {"openAPIV3Schema": {"type": "object",
                "properties": {"spec": {"type": "object", "properties": properties}}}}})
        };
        let crd = json!({"metadata": {"name": "things.x.io"}, "status": {"acceptedNames": {"plural": "things", "kind": "Thing"}},
            "spec": {"group": "x.io", "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"},
                "versions": [version("v1", "old", true), version("v2", "new", false)],
                "conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": config}}}});
        Arc::new(Definition::new(&crd, Some(Arc::new(Converter::new(Arc::default(), objects)))))
    }

    fn custom(definition: &Arc<Definition>, version: &str) -> Custom {
        let served = Arc::clone(definition.version(version).unwrap());
        Custom::new(Arc::clone(definition), served, 0)
    }

    fn answer(review: &Value) -> (u16, Value) {
        let to = review["request"]["desiredAPIVersion"].as_str().unwrap();
        let rename = if to == "x.io/v2" { ("old", "new") } else { ("new", "old") };
        let convert = |object: &Value| {
            let mut object = object.clone();
            object["apiVersion"] = to.into();
            let value = object["spec"][rename.0].take();
            object["spec"] = json!({"extra": 1});
            object["spec"][rename.1] = value;
            object["metadata"]["labels"] = json!({"by": "hook"});
            object["metadata"]["finalizers"] = json!(["mine"]);
            object
        };
        let objects: Vec<Value> = review["request"]["objects"].as_array().unwrap().iter().map(convert).collect();
        (
            200,
            json!({"kind": "ConversionReview", "apiVersion": "apiextensions.k8s.io/v1", "response": {
            "uid": review["request"]["uid"], "result": {"status": "Success"}, "convertedObjects": objects}}),
        )
    }

    #[tokio::test]
    async fn there_and_back() {
        let server = WebhookServer::start(&["127.0.0.1"], |review| answer(&review)).await;
        let objects: Arc<dyn Objects> = Arc::new(FakeObjects::new([]));
        let definition = definition(server.config("/convert"), &objects);
        let (v1, v2) = (custom(&definition, "v1"), custom(&definition, "v2"));
        let new = json!({"kind": "Thing", "apiVersion": "x.io/v2",
            "metadata": {"name": "a", "namespace": "n", "uid": "u"}, "spec": {"new": "x"}});
        let stored = Arc::new(v2.draft(new).await.unwrap().finish(7));
        let value = stored.value();
        assert_eq!((&value["apiVersion"], &value["spec"]), (&json!("x.io/v1"), &json!({"old": "x"})), "pruned too");
        assert_eq!(value["metadata"]["labels"], json!({"by": "hook"}));
        assert!(value["metadata"].get("finalizers").is_none(), "that is not the webhook's to change");
        v1.prepare(std::slice::from_ref(&stored)).await.unwrap();
        assert!(!v1.foreign(&stored));
        v2.prepare(&[Arc::clone(&stored), Arc::clone(&stored)]).await.unwrap();
        let served = v2.value(&stored);
        assert_eq!((&served["apiVersion"], &served["spec"]), (&json!("x.io/v2"), &json!({"new": "x"})));
        assert_eq!(served["metadata"]["resourceVersion"], "7");
        assert_eq!(v2.value(&stored.at_revision(9))["metadata"]["resourceVersion"], "9");
        assert_eq!(server.connections(), 1);
    }

    #[tokio::test]
    async fn bad_answers_are_named() {
        let server = WebhookServer::start(&["127.0.0.1"], |review| {
            let (code, mut good) = answer(&review);
            match review["@path"].as_str().unwrap().split('?').next().unwrap() {
                "/failed" => good["response"]["result"] = json!({"status": "Failure", "message": "cannot"}),
                "/few" => good["response"]["convertedObjects"] = json!([]),
                "/version" => good["response"]["convertedObjects"][0]["apiVersion"] = json!("x.io/v1"),
                "/name" => good["response"]["convertedObjects"][0]["metadata"]["name"] = json!("b"),
                _ => good["response"] = Value::Null,
            }
            (code, good)
        })
        .await;
        let objects: Arc<dyn Objects> = Arc::new(FakeObjects::new([]));
        let old = json!({"kind": "Thing", "apiVersion": "x.io/v1", "metadata": {"name": "a"}, "spec": {"old": "x"}});
        let stored = Arc::new(Draft::new(old, &STORED).finish(7));
        for (path, want) in [
            ("/failed", "failed: cannot"),
            ("/few", "returned 0 objects, expected 1"),
            (
                "/version",
                "returned invalid object at index 0: invalid groupVersion (expected x.io/v2, received x.io/v1)",
            ),
            ("/name", "returned invalid object at index 0: metadata.name must not change, expected \"a\", got \"b\""),
            ("/none", "failed: no response provided"),
        ] {
            let definition = definition(server.config(path), &objects);
            let status = custom(&definition, "v2").prepare(std::slice::from_ref(&stored)).await.unwrap_err();
            assert_eq!(status.message, format!("conversion webhook for x.io/v1, Kind=Thing {want}"), "{path}");
            assert_eq!(status.code, 500);
        }
    }
}
