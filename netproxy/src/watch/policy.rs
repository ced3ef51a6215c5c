//! The watches that network policies need. Pods and namespaces of the whole cluster are watched from the first policy on.

use futures::StreamExt;
use k8s_openapi::api::{
    core::v1::{Namespace, Pod as PodObject},
    networking::v1::NetworkPolicy,
};
use kube::{Api, Client, ResourceExt, runtime::watcher};
use tokio::{sync::mpsc, task::JoinSet};

use super::events;
use crate::{
    policy::objects::{Name, Pod, Policy, namespace},
    sync::{Input, PolicyInput, PolicyKind},
};

/// Watches policies until the receiver is gone.
pub(crate) async fn run(client: Client, inputs: mpsc::Sender<Input>) {
    let mut others = JoinSet::new();
    let mut events = events(Api::<NetworkPolicy>::all(client.clone()), watcher::Config::default());
    let mut told = false;
    while let Some(event) = events.next().await {
        let input = match event {
            Err(error) if !told && is_denied(&error) => {
                tracing::warn!(error = %crate::sync::Chain(&error), "network policies are not enforced: they cannot be read");
                PolicyInput::End(PolicyKind::Policies)
            }
            Err(_) => continue,
            Ok(watcher::Event::Init) => PolicyInput::Begin(PolicyKind::Policies),
            Ok(watcher::Event::InitDone) => PolicyInput::End(PolicyKind::Policies),
            Ok(watcher::Event::Delete(object)) => PolicyInput::PolicyGone(name(&object)),
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                if others.is_empty() {
                    others.spawn(pods(client.clone(), inputs.clone()));
                    others.spawn(namespaces(client.clone(), inputs.clone()));
                }
                let parsed = Policy::parse(&object).map(|p| PolicyInput::Policy(Box::new(p)));
                parsed.unwrap_or_else(|| PolicyInput::PolicyGone(name(&object)))
            }
        };
        told |= matches!(input, PolicyInput::End(_));
        if inputs.send(Input::Policy(input)).await.is_err() {
            return;
        }
    }
}

fn name<K: kube::Resource>(object: &K) -> Name {
    Name::new(object.meta().namespace.as_deref().unwrap_or_default(), &object.name_any())
}

/// Whether asking again changes nothing: this cluster does not let us, or does not have them.
pub(super) fn is_denied(error: &watcher::Error) -> bool {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error else { return false };
    status.code == 403 || status.code == 404
}

async fn pods(client: Client, inputs: mpsc::Sender<Input>) {
    let mut events = events(Api::<PodObject>::all(client), watcher::Config::default());
    while let Some(event) = events.next().await {
        let input = match event {
            Err(_) => continue,
            Ok(watcher::Event::Init) => PolicyInput::Begin(PolicyKind::Pods),
            Ok(watcher::Event::InitDone) => PolicyInput::End(PolicyKind::Pods),
            Ok(watcher::Event::Delete(object)) => PolicyInput::PodGone(name(&object)),
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => match Pod::parse(&object) {
                Some(pod) => PolicyInput::Pod(Box::new(pod)),
                None => PolicyInput::PodGone(name(&object)),
            },
        };
        if inputs.send(Input::Policy(input)).await.is_err() {
            return;
        }
    }
}

async fn namespaces(client: Client, inputs: mpsc::Sender<Input>) {
    let mut events = events(Api::<Namespace>::all(client), watcher::Config::default());
    while let Some(event) = events.next().await {
        let input = match event {
            Err(_) => continue,
            Ok(watcher::Event::Init) => PolicyInput::Begin(PolicyKind::Namespaces),
            Ok(watcher::Event::InitDone) => PolicyInput::End(PolicyKind::Namespaces),
            Ok(watcher::Event::Delete(object)) => PolicyInput::NamespaceGone(object.name_any().into()),
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                let Some((name, labels)) = namespace(&object) else { continue };
                PolicyInput::Namespace(name, labels)
            }
        };
        if inputs.send(Input::Policy(input)).await.is_err() {
            return;
        }
    }
}
