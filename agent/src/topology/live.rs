//! Keeping running containers on the processors that are theirs now: the shared ones change while pods come and go.

use std::{collections::HashMap, sync::Arc};

use isopod_runtime::supervisor::protocol::Op;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{context::Context, pods::sandbox, runtime::Supervisor};

/// A running container that is to be moved.
struct Move {
    supervisor: Supervisor,
    id: String,
    cpus: String,
}

/// Runs until `stop`; only where processors are given out.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    if !ctx.topology.gives_cpus() {
        return;
    }
    let mut given = ctx.topology.changes();
    let mut pods = ctx.table.changes();
    // What each running container was last put on.
    let mut known: HashMap<String, String> = HashMap::new();
    loop {
        for m in moves(&ctx, &mut known) {
            let op = Op::Update { container: m.id.clone(), resources: json!({"cpu": {"cpus": m.cpus}}) };
            if let Err(error) = m.supervisor.done(op).await {
                // A container that has just ended needs none; for any other the next change tries again.
                tracing::debug!(container = m.id, %error, "CPUs not changed");
                known.remove(&m.id);
            }
        }
        // All arms are cancel-safe: a change stays marked as unseen.
        tokio::select! {
            () = stop.cancelled() => return,
            Ok(()) = given.changed() => {}
            Ok(()) = pods.changed() => {}
        }
    }
}

fn moves(ctx: &Context, known: &mut HashMap<String, String>) -> Vec<Move> {
    let mut all = Vec::new();
    let mut seen = HashMap::new();
    for s in ctx.table.all() {
        let Some(supervisor) = &s.supervisor else { continue };
        for (name, c) in s.containers.iter().filter(|(_, c)| c.running) {
            let Some(cpus) = ctx.topology.cpus_of(sandbox::uid(&s.pod), name) else { continue };
            if known.get(&c.id) != Some(&cpus) {
                all.push(Move { supervisor: supervisor.clone(), id: c.id.clone(), cpus: cpus.clone() });
            }
            seen.insert(c.id.clone(), cpus);
        }
    }
    *known = seen;
    all
}
