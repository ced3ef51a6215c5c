//! Creating and deleting the pods of a controller: from a template, in growing batches, with events on the owner.

use crate::context::{Context, Key};
use crate::expectations::Expectations;
use crate::ownership::owner_reference;
use futures::future::join_all;
use isopod_client::Recorder;
use isopod_client::objects::{DeleteOptions, HasMeta, Object, is_namespace_terminating, message};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::sync::Arc;

/// At most this many pods are created or deleted in one sync.
pub(crate) const BURST: usize = 500;

/// A pod from a template, owned by `owner`.
pub(crate) fn from_template<O: Object>(template: &PodTemplateSpec, owner: &O) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(generate_prefix(owner.name())),
            namespace: Some(owner.namespace().to_owned()),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner_reference(owner)]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// `<owner>-`, shortened to what still leaves room for a random end.
pub(crate) fn generate_prefix(owner: &str) -> String {
    let prefix = format!("{owner}-");
    if prefix.len() <= 253 { prefix } else { owner.to_owned() }
}

/// Creates a pod and says so.
pub(crate) async fn create<O: Object>(
    ctx: &Context,
    recorder: &Recorder,
    owner: &O,
    pod: &Pod,
) -> Result<Pod, kube::Error> {
    match ctx.objects.create(pod).await {
        Ok(pod) => {
            recorder.normal(owner, "SuccessfulCreate", format!("Created pod: {}", pod.name()));
            Ok(pod)
        }
        Err(error) => {
            if !is_namespace_terminating(&error) {
                recorder.warning(owner, "FailedCreate", format!("Error creating: {}", message(&error)));
            }
            Err(error)
        }
    }
}

/// Deletes a pod and says so; a pod that is gone already is fine.
pub(crate) async fn delete<O: Object>(
    ctx: &Context,
    recorder: &Recorder,
    owner: &O,
    pod: &Pod,
) -> Result<(), kube::Error> {
    match ctx.objects.delete::<Pod>(pod.namespace(), pod.name(), &DeleteOptions::uid(pod.uid())).await {
        Ok(_) => {
            recorder.normal(owner, "SuccessfulDelete", format!("Deleted pod: {}", pod.name()));
            Ok(())
        }
        Err(error) => {
            recorder.warning(owner, "FailedDelete", format!("Error deleting: {}", message(&error)));
            Err(error)
        }
    }
}

/// Deletes and creates pods of `owner`, and expects both to be seen in the cache under `key`. Where a namespace is going
/// nothing can be created, and nothing needs to be.
pub(crate) async fn change<O: Object>(
    ctx: &Context,
    recorder: &Recorder,
    expectations: &Expectations,
    key: &Key,
    owner: &O,
    create: &[Pod],
    delete: &[Arc<Pod>],
) -> Result<(), kube::Error> {
    expectations.expect(key, create.len(), delete.iter().map(|pod| pod.uid().to_owned()));
    let deletions = delete.iter().map(|pod| async {
        let result = self::delete(ctx, recorder, owner, pod).await;
        if result.is_err() {
            expectations.deleted(key, pod.uid());
        }
        result
    });
    let deleted: Result<Vec<()>, _> = join_all(deletions).await.into_iter().collect();
    let (done, created) = slow_start(create.len(), |i| async move {
        match self::create(ctx, recorder, owner, &create[i]).await {
            Err(error) if is_namespace_terminating(&error) => {
                expectations.created(key);
                Ok(())
            }
            result => result.map(|_| ()),
        }
    })
    .await;
    for _ in done..create.len() {
        expectations.created(key);
    }
    deleted?;
    created
}

/// Runs `count` creations in batches of 1, 2, 4, ... and stops after the first batch with a failure, so that a template
/// which cannot work costs one request instead of hundreds. Returns how many succeeded.
async fn slow_start<F, Fut>(count: usize, work: F) -> (usize, Result<(), kube::Error>)
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Result<(), kube::Error>>,
{
    let (mut done, mut next, mut batch) = (0, 0, 1);
    while next < count {
        let size = batch.min(count - next);
        let results = join_all((next..next + size).map(&work)).await;
        next += size;
        let mut failure = None;
        for result in results {
            match result {
                Ok(()) => done += 1,
                Err(error) => failure = Some(error),
            }
        }
        if let Some(error) = failure {
            return (done, Err(error));
        }
        batch *= 2;
    }
    (done, Ok(()))
}
