//! ServiceAccount: every pod runs as one, with its pull secrets and its token in a volume.

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, status::Status};
use serde_json::{Value, json};

use super::{MIRROR_ANNOTATION, Operation, Plugin, Request, list, push};

const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const VOLUME_PREFIX: &str = "kube-api-access-";
/// An hour and a bit, by which this volume's token requests are known.
const TOKEN_SECONDS: i64 = 3607;
const MOUNTABLE: &str = "kubernetes.io/enforce-mountable-secrets";

/// The plugin.
pub(super) struct ServiceAccount;

fn is_mirror(pod: &Value) -> bool {
    meta::annotation(pod, MIRROR_ANNOTATION).is_some()
}

/// Secrets and accounts are not for pods that come from a node's own files.
fn check_mirror(request: &Request<'_>) -> Result<(), Status> {
    let spec = &request.object["spec"];
    if spec["serviceAccountName"].as_str().is_some_and(|name| !name.is_empty()) {
        return Err(request.forbidden("a mirror pod may not reference service accounts"));
    }
    for volume in list(spec, "volumes") {
        if volume["secret"].is_object() {
            return Err(request.forbidden("a mirror pod may not reference secrets"));
        }
        let tokens = |source: &Value| source["serviceAccountToken"].is_object();
        if list(&volume["projected"], "sources").iter().any(tokens) {
            return Err(request.forbidden("a mirror pod may not use ServiceAccountToken volume projections"));
        }
    }
    Ok(())
}

fn fetch(request: &Request<'_>, name: &str) -> Result<Value, Status> {
    let gvr = Gvr::new("", "v1", "serviceaccounts");
    let account = request.objects.get(&gvr, request.namespace, name);
    account.map(|account| account.value()).ok_or_else(|| {
        let place = request.namespace;
        request.forbidden(format!("error looking up service account {place}/{name}: serviceaccount {name:?} not found"))
    })
}

fn mutate(request: &mut Request<'_>) -> Result<(), Status> {
    if is_mirror(request.object) {
        return check_mirror(request);
    }
    let spec = &mut request.object["spec"];
    let mut name = spec["serviceAccountName"].as_str().unwrap_or_default().to_owned();
    if name.is_empty() {
        name = "default".to_owned();
        spec["serviceAccountName"] = "default".into();
        spec["serviceAccount"] = "default".into();
    }
    let account = fetch(request, &name)?;
    let spec = &mut request.object["spec"];
    let automount = spec["automountServiceAccountToken"]
        .as_bool()
        .or(account["automountServiceAccountToken"].as_bool())
        .unwrap_or(true);
    if automount {
        mount_token(spec);
    }
    if list(spec, "imagePullSecrets").is_empty() && !list(&account, "imagePullSecrets").is_empty() {
        let names = list(&account, "imagePullSecrets").iter().map(|secret| json!({"name": secret["name"]}));
        spec["imagePullSecrets"] = names.collect();
    }
    check_mountable(request, &account)
}

fn token_volume(name: &str) -> Value {
    json!({
        "name": name,
        "projected": { "defaultMode": 420, "sources": [
            { "serviceAccountToken": { "expirationSeconds": TOKEN_SECONDS, "path": "token" } },
            { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
            { "downwardAPI": { "items": [
                { "path": "namespace", "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } },
            ] } },
        ] },
    })
}

/// Mounts the token in every container that has nothing at that path; the volume is only there when one uses it.
fn mount_token(spec: &mut Value) {
    let existing = list(spec, "volumes").iter().find_map(|volume| {
        let name = volume["name"].as_str()?;
        name.starts_with(VOLUME_PREFIX).then(|| name.to_owned())
    });
    let name = existing.clone().unwrap_or_else(|| format!("{VOLUME_PREFIX}{}", suffix()));
    let mut used = false;
    for field in ["initContainers", "containers"] {
        for container in spec.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten() {
            if list(container, "volumeMounts").iter().any(|mount| mount["mountPath"] == MOUNT_PATH) {
                continue;
            }
            used = true;
            let mount = json!({ "name": name, "readOnly": true, "mountPath": MOUNT_PATH });
            push(container, "volumeMounts", mount);
        }
    }
    if used && existing.is_none() {
        push(spec, "volumes", token_volume(&name));
    }
}

/// Five characters nobody reads words into.
fn suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5).map(|_| ALPHABET[rand::random_range(0..ALPHABET.len())] as char).collect()
}

/// Accounts with the (old) annotation allow only the secrets they list.
fn check_mountable(request: &Request<'_>, account: &Value) -> Result<(), Status> {
    if meta::annotation(account, MOUNTABLE) != Some("true") {
        return Ok(());
    }
    let listed = |field: &str, name: &Value| list(account, field).iter().any(|secret| secret["name"] == *name);
    let spec = &request.object["spec"];
    let account_name = meta::name(account);
    for volume in list(spec, "volumes").iter().filter(|volume| volume["secret"].is_object()) {
        let secret = &volume["secret"]["secretName"];
        if !listed("secrets", secret) {
            let text = secret.as_str().unwrap_or_default();
            return Err(request.forbidden(format!(
                "volume with secret.secretName={text:?} is not allowed because service account {account_name} does not reference that secret"
            )));
        }
    }
    for secret in list(spec, "imagePullSecrets") {
        if !listed("imagePullSecrets", &secret["name"]) {
            let text = secret["name"].as_str().unwrap_or_default();
            return Err(request.forbidden(format!(
                "imagePullSecrets[0].name={text:?} is not allowed because service account {account_name} does not reference that imagePullSecret"
            )));
        }
    }
    Ok(())
}

impl Plugin for ServiceAccount {
    fn name(&self) -> &'static str {
        "ServiceAccount"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let applies = request.operation == Operation::Create && request.is("", "pods");
        let result = if applies { mutate(request) } else { Ok(()) };
        Box::pin(async { result })
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let applies = request.operation == Operation::Create && request.is("", "pods") && is_mirror(request.object);
        let result = if applies { check_mirror(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{FakeObjects, admit};

    fn account(name: &str, extra: Value) -> Value {
        let mut account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": "ns"}});
        for (field, value) in extra.as_object().unwrap() {
            account[field] = value.clone();
        }
        account
    }

    fn pod(spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "ns"}, "spec": spec})
    }

    fn cluster() -> FakeObjects {
        FakeObjects::new([
            account("default", json!({})),
            account("quiet", json!({"automountServiceAccountToken": false})),
            account("pull", json!({"imagePullSecrets": [{"name": "reg"}]})),
        ])
    }

    #[tokio::test]
    async fn the_token_is_mounted_where_nothing_is() {
        let spec = json!({"initContainers": [{"name": "i"}], "containers": [
            {"name": "a"}, {"name": "b", "volumeMounts": [{"name": "v", "mountPath": MOUNT_PATH}]}]});
        let pod = admit(&ServiceAccount, &cluster(), pod(spec)).await.unwrap();
        let volume = pod["spec"]["volumes"][0]["name"].as_str().unwrap();
        assert!(volume.starts_with(VOLUME_PREFIX) && volume.len() == VOLUME_PREFIX.len() + 5);
        assert_eq!(pod["spec"]["initContainers"][0]["volumeMounts"][0]["name"], volume);
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"][0]["mountPath"], MOUNT_PATH);
        assert_eq!(list(&pod["spec"]["containers"][1], "volumeMounts").len(), 1);
        assert_eq!(pod["spec"]["serviceAccountName"], "default");
    }

    #[tokio::test]
    async fn accounts_may_say_no_and_pods_may_insist() {
        let quiet = json!({"serviceAccountName": "quiet", "containers": [{"name": "a"}]});
        let admitted = admit(&ServiceAccount, &cluster(), pod(quiet.clone())).await.unwrap();
        assert!(admitted["spec"]["volumes"].is_null());
        let mut loud = quiet;
        loud["automountServiceAccountToken"] = true.into();
        let admitted = admit(&ServiceAccount, &cluster(), pod(loud)).await.unwrap();
        assert!(admitted["spec"]["volumes"].is_array());
    }

    #[tokio::test]
    async fn pull_secrets_come_from_the_account_and_unknown_accounts_are_refused() {
        let spec = json!({"serviceAccountName": "pull", "containers": []});
        let admitted = admit(&ServiceAccount, &cluster(), pod(spec)).await.unwrap();
        assert_eq!(admitted["spec"]["imagePullSecrets"], json!([{"name": "reg"}]));
        let error = admit(&ServiceAccount, &cluster(), pod(json!({"serviceAccountName": "zz"}))).await.unwrap_err();
        assert_eq!(
            error.message,
            "pods \"p\" is forbidden: error looking up service account ns/zz: serviceaccount \"zz\" not found"
        );
    }
}
