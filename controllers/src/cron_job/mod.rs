//! CronJob: creates Jobs on a schedule.
//!
//! In: the CronJob, its Jobs, the clock. Out: a Job per due time (named after it, so that none is created twice), deletions
//! by concurrency policy and history limits, status. The next due time is a timer.

mod schedule;

use crate::context::{Context, Key, key};
use crate::job::plan::{holds, is_finished};
use crate::ownership::{controller, owner_reference};
use isopod_client::objects::{
    DeleteOptions, HasMeta, is_already_exists, is_namespace_terminating, is_not_found, message,
};
use isopod_client::record::reference;
use isopod_client::{Queue, Recorder, spawn_workers};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use schedule::Schedule;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "cronjob-controller";
const SCHEDULED: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
const TOO_MANY: usize = 100;
/// After the due time, so that the clock is certainly past it.
const SLACK: Duration = Duration::from_millis(100);

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller_ = Arc::new(Controller { ctx: ctx.clone(), recorder: ctx.recorder.component(NAME) });
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.cron_jobs.subscribe(move |change| q.add(key(&**change.object())));
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.jobs.subscribe(move |change| {
        if let Some(owner) = controller(&c.caches.cron_jobs, &**change.object()) {
            q.add(key(&*owner));
        }
    });
    spawn_workers(NAME, &queue, 5, &ctx.stop, move |key| {
        let controller = controller_.clone();
        async move { controller.sync(key).await }
    });
}

/// What the clock says: the newest due time not started yet, how many were missed, and the next one.
#[derive(Debug, PartialEq, Eq)]
struct Due {
    latest: Option<Timestamp>,
    missed: usize,
    next: Option<Timestamp>,
}

fn due(schedule: &Schedule, zone: &TimeZone, since: Timestamp, now: Timestamp) -> Due {
    let (mut latest, mut missed, mut at) = (None, 0, since);
    while let Some(next) = schedule.next(at, zone) {
        if next > now {
            return Due { latest, missed, next: Some(next) };
        }
        missed += 1;
        latest = Some(next);
        at = next;
        // Far behind: jump close to now instead of walking there minute by minute.
        if missed > TOO_MANY * 10 {
            let near = now - SignedDuration::from_hours(24);
            at = at.max(near);
        }
        if missed > TOO_MANY * 100 {
            break;
        }
    }
    Due { latest, missed, next: None }
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(cron) = self.ctx.caches.cron_jobs.get(&key.0, &key.1) else { return Ok(None) };
        if cron.deleting() {
            return Ok(None);
        }
        let spec = &cron.spec;
        let jobs = self.ctx.caches.jobs.owned_by(cron.uid());
        let mut new = (*cron).clone();
        self.settle(&cron, &mut new, &jobs).await?;
        self.clean_history(&cron, spec, &jobs).await?;
        let again = self.run_due(&cron, &mut new, spec, &jobs).await;
        match self.ctx.objects.update(&*cron, &new, "status").await {
            Err(error) if !is_not_found(&error) => return Err(error),
            _ => {}
        }
        again
    }

    /// Takes ended Jobs off the active list.
    async fn settle(&self, cron: &CronJob, new: &mut CronJob, jobs: &[Arc<Job>]) -> Result<(), kube::Error> {
        let status = new.status.get_or_insert_default();
        let mut active = status.active.take().unwrap_or_default();
        for job in jobs {
            let listed = active.iter().any(|r| r.uid.as_deref() == Some(job.uid()));
            let done = job.status.as_ref().is_some_and(is_finished);
            if listed && done {
                active.retain(|r| r.uid.as_deref() != Some(job.uid()));
                let complete = job.status.as_ref().is_some_and(|s| holds(s, "Complete").is_some());
                let word = if complete { "Complete" } else { "Failed" };
                let text = format!("Saw completed job: {}, condition: {word}", job.name());
                self.recorder.normal(cron, "SawCompletedJob", text);
            } else if !listed && !done {
                active.push(job_reference(job));
            }
            let ended = job.status.as_ref().and_then(|s| s.completion_time.clone());
            if ended.is_some() && ended > status.last_successful_time {
                status.last_successful_time = ended;
            }
        }
        let known = |r: &ObjectReference| jobs.iter().any(|j| r.uid.as_deref() == Some(j.uid()));
        let (present, missing): (Vec<_>, Vec<_>) = active.into_iter().partition(known);
        active = present;
        for gone in missing {
            let name = gone.name.clone().unwrap_or_default();
            match self.ctx.objects.get::<Job>(cron.namespace(), &name).await? {
                // The cache does not show it yet.
                Some(job) if gone.uid.as_deref() == Some(job.uid()) => active.push(gone),
                _ => self.recorder.normal(cron, "MissingJob", format!("Active job went missing: {name}")),
            }
        }
        status.active = (!active.is_empty()).then_some(active);
        Ok(())
    }

    async fn clean_history(&self, cron: &CronJob, spec: &CronJobSpec, jobs: &[Arc<Job>]) -> Result<(), kube::Error> {
        for (kind, limit) in [
            ("Complete", spec.successful_jobs_history_limit.unwrap_or(3)),
            ("Failed", spec.failed_jobs_history_limit.unwrap_or(1)),
        ] {
            let mut ended: Vec<&Arc<Job>> =
                jobs.iter().filter(|j| j.status.as_ref().is_some_and(|s| holds(s, kind).is_some())).collect();
            ended.sort_by_key(|j| j.status.as_ref().and_then(|s| s.start_time.as_ref()).map(|t| t.0));
            let excess = ended.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
            for job in ended.into_iter().take(excess).filter(|j| !j.deleting()) {
                self.delete(cron, job).await?;
            }
        }
        Ok(())
    }

    async fn delete(&self, cron: &CronJob, job: &Job) -> Result<(), kube::Error> {
        let options = DeleteOptions { propagation: Some("Background"), ..DeleteOptions::uid(job.uid()) };
        match self.ctx.objects.delete::<Job>(job.namespace(), job.name(), &options).await {
            Ok(_) => {
                self.recorder.normal(cron, "SuccessfulDelete", format!("Deleted job {}", job.name()));
                Ok(())
            }
            Err(error) => {
                self.recorder.warning(cron, "FailedDelete", format!("Deleted job: {}", message(&error)));
                Err(error)
            }
        }
    }

    async fn run_due(
        &self,
        cron: &CronJob,
        new: &mut CronJob,
        spec: &CronJobSpec,
        jobs: &[Arc<Job>],
    ) -> Result<Option<Duration>, kube::Error> {
        let zone = match spec.time_zone.as_deref() {
            None => TimeZone::system(),
            Some(name) => match TimeZone::get(name) {
                Ok(zone) => zone,
                Err(error) => {
                    let text = format!("invalid timeZone: {name:?}: {error}");
                    self.recorder.warning(cron, "UnknownTimeZone", text);
                    return Ok(None);
                }
            },
        };
        if spec.suspend.unwrap_or(false) {
            return Ok(None);
        }
        let schedule = match Schedule::parse(&spec.schedule) {
            Ok(schedule) => schedule,
            Err(error) => {
                let text = format!("unparseable schedule: {:?} : {error}", spec.schedule);
                self.recorder.warning(cron, "UnparseableSchedule", text);
                return Ok(None);
            }
        };
        let now = Timestamp::now();
        let last = cron.status.as_ref().and_then(|s| s.last_schedule_time.as_ref()).map(|t| t.0);
        let created = cron.metadata.creation_timestamp.as_ref().map(|t| t.0);
        let mut since = last.or(created).unwrap_or(now);
        if let Some(deadline) = spec.starting_deadline_seconds {
            since = since.max(now - SignedDuration::from_secs(deadline));
        }
        let due = due(&schedule, &zone, since, now);
        let again = due.next.map(|next| {
            Duration::from_millis(u64::try_from(next.duration_since(now).as_millis()).unwrap_or(0)) + SLACK
        });
        let Some(at) = due.latest else { return Ok(again) };
        if due.missed > TOO_MANY {
            let text = format!(
                "too many missed start times: {}. Set or decrease .spec.startingDeadlineSeconds or check clock skew",
                due.missed
            );
            self.recorder.warning(cron, "TooManyMissedTimes", text);
        }
        let active: Vec<&Arc<Job>> = jobs.iter().filter(|j| !j.status.as_ref().is_some_and(is_finished)).collect();
        match spec.concurrency_policy.as_deref() {
            Some("Forbid") if !active.is_empty() => {
                let text = "Not starting job because prior execution is running and concurrency policy is Forbid";
                self.recorder.normal(cron, "JobAlreadyActive", text);
                return Ok(again);
            }
            Some("Replace") => {
                for job in active.iter().filter(|j| !j.deleting()) {
                    self.delete(cron, job).await?;
                }
            }
            _ => {}
        }
        self.create(cron, new, spec, at, &zone).await?;
        Ok(again)
    }

    async fn create(
        &self,
        cron: &CronJob,
        new: &mut CronJob,
        spec: &CronJobSpec,
        at: Timestamp,
        zone: &TimeZone,
    ) -> Result<(), kube::Error> {
        let meta = spec.job_template.metadata.clone().unwrap_or_default();
        let mut annotations = meta.annotations.unwrap_or_default();
        let stamp = at.to_zoned(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string();
        annotations.insert(SCHEDULED.to_owned(), stamp.replace("+00:00", "Z"));
        let job = Job {
            metadata: ObjectMeta {
                name: Some(format!("{}-{}", cron.name(), at.as_second() / 60)),
                namespace: Some(cron.namespace().to_owned()),
                labels: meta.labels,
                annotations: Some(annotations),
                owner_references: Some(vec![owner_reference(cron)]),
                ..ObjectMeta::default()
            },
            spec: spec.job_template.spec.clone(),
            status: None,
        };
        let status = new.status.get_or_insert_default();
        match self.ctx.objects.create(&job).await {
            Ok(job) => {
                self.recorder.normal(cron, "SuccessfulCreate", format!("Created job {}", job.name()));
                status.active.get_or_insert_default().push(job_reference(&job));
            }
            Err(error) if is_already_exists(&error) => {}
            Err(error) if is_namespace_terminating(&error) => return Ok(()),
            Err(error) => {
                self.recorder.warning(cron, "FailedCreate", format!("Error creating job: {}", message(&error)));
                return Err(error);
            }
        }
        status.last_schedule_time = Some(Time(at));
        Ok(())
    }
}

fn job_reference(job: &Job) -> ObjectReference {
    let mut reference = reference(job);
    reference.api_version = Some("batch/v1".into());
    reference
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due() {
        let schedule = Schedule::parse("*/10 * * * *").unwrap();
        let at = |text: &str| -> Timestamp { text.parse().unwrap() };
        let now = at("2026-01-01T00:25:00Z");
        let next = Some(at("2026-01-01T00:30:00Z"));
        for (since, latest, missed) in [
            ("2026-01-01T00:20:00Z", None, 0),
            ("2026-01-01T00:10:00Z", Some("2026-01-01T00:20:00Z"), 1),
            ("2025-12-31T23:55:00Z", Some("2026-01-01T00:20:00Z"), 3),
        ] {
            let want = Due { latest: latest.map(at), missed, next };
            assert_eq!(due(&schedule, &TimeZone::UTC, at(since), now), want, "{since}");
        }
    }

    #[test]
    fn far_behind_still_ends_at_now() {
        let schedule = Schedule::parse("* * * * *").unwrap();
        let now: Timestamp = "2026-01-01T00:00:30Z".parse().unwrap();
        let found = due(&schedule, &TimeZone::UTC, now - SignedDuration::from_hours(24 * 365), now);
        assert_eq!(found.latest.map(|t| t.to_string()).as_deref(), Some("2026-01-01T00:00:00Z"));
        assert!(found.missed > TOO_MANY);
    }
}
