//! From a configuration to a running server.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use isopod_store::{Embedded, Engine, Etcd};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    Config, Error, Store, admission,
    aggregation::Aggregator,
    alloc::ServiceAllocator,
    authn::{
        TokenAuthenticator,
        chain::{StaticTokens, TokenChain},
        serviceaccount,
    },
    authz, bootstrap,
    custom::{Converter, controller::Controller},
    endpoints::{self, Services},
    objects::Objects,
    registry::Registry,
    server::{App, Counters, Health, InFlight, Server},
    webhook,
};

/// Time between two looks for history nobody will come back for.
const TIDY: Duration = Duration::from_secs(60);

/// Runs the API server until `stop` fires: opens the store, loads the caches, writes the initial objects, serves.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), Error> {
    // The address first: it is the cheapest thing that can be wrong.
    let bound = TcpListener::bind(config.bind).await;
    let listener = bound.map_err(|source| Error::Bind { address: config.bind, source })?;
    run_on(config, listener, stop).await
}

/// The same on a socket that listens already, whatever address the configuration has.
pub async fn run_on(config: Config, listener: TcpListener, stop: CancellationToken) -> Result<(), Error> {
    let config = Arc::new(config);
    let server = Server::new(&config, listener)?;
    let engine = open_store(&config.store).await?;
    let result = serve(&config, server, Arc::clone(&engine), stop).await;
    let closing = tokio::task::spawn_blocking(move || engine.close());
    if closing.await.is_err() {
        tracing::error!("closing the store panicked");
    }
    result
}

async fn open_store(store: &Store) -> Result<Arc<dyn Engine>, Error> {
    let store = store.clone();
    let open = move || -> Result<Arc<dyn Engine>, isopod_store::Error> {
        Ok(match store {
            Store::Embedded(dir) => Arc::new(Embedded::open(&dir)?),
            Store::Etcd(config) => Arc::new(Etcd::open(config)?),
        })
    };
    Ok(tokio::task::spawn_blocking(open).await.map_err(|e| Error::Other(e.to_string()))??)
}

async fn serve(
    config: &Arc<Config>,
    server: Server,
    engine: Arc<dyn Engine>,
    stop: CancellationToken,
) -> Result<(), Error> {
    let webhooks = Arc::new(webhook::Client::default());
    let plugins = admission::plugins(&webhooks);
    let services = ServiceAllocator::new(config.service_cidr, config.node_ports);
    let opened = tokio::task::spawn_blocking(move || Registry::open(engine, plugins, services)).await;
    let registry = Arc::new(opened.map_err(|e| Error::Other(e.to_string()))??);
    let objects: Arc<dyn Objects> = Arc::clone(&registry) as Arc<dyn Objects>;
    registry.convert_with(Arc::new(Converter::new(Arc::clone(&webhooks), &objects)));
    let mut tokens: Vec<Arc<dyn TokenAuthenticator>> = Vec::new();
    if let Some(path) = &config.token_file {
        tokens.push(Arc::new(StaticTokens::read(path, &config.issuer)?));
    }
    tokens.extend(serviceaccount::authenticator(config, Arc::clone(&objects))?);
    let tokens: Arc<dyn TokenAuthenticator> = Arc::new(TokenChain(tokens));
    let authorizer = authz::authorizer(Arc::clone(&objects));
    registry.authorize_with(Arc::clone(&authorizer));
    let parts = Services {
        config: Arc::clone(config),
        objects: Arc::clone(&objects),
        authorizer: Arc::clone(&authorizer),
        tokens: Arc::clone(&tokens),
    };
    let aggregator = Arc::new(Aggregator::new(config.proxy_client.clone(), Arc::clone(&objects)));
    let app = Arc::new(App {
        config: Arc::clone(config),
        aggregator: Arc::clone(&aggregator),
        endpoints: endpoints::endpoints(&parts),
        registry: Arc::clone(&registry),
        tokens,
        authorizer,
        in_flight: InFlight::default(),
        counters: Counters::default(),
        health: Health::default(),
        stop: stop.clone(),
    });
    let mut controller = Controller::new(Arc::clone(&registry), stop.clone());
    if let Err(error) = controller.pass().await {
        tracing::warn!(%error, "custom resources");
    }
    tracing::info!(address = ?server.address(), "API server listens");
    let serving = tokio::spawn(server.serve(Arc::clone(&app)));
    bootstrap::run(config, Arc::clone(&objects)).await.map_err(|status| Error::Bootstrap(status.message))?;
    app.health.bootstrapped.store(true, Ordering::Release);
    let maintaining = tokio::spawn(bootstrap::maintain(Arc::clone(config), objects, stop.clone()));
    let following = tokio::spawn(controller.run());
    let aggregating = tokio::spawn(aggregator.follow(stop.clone()));
    let tidying = tokio::spawn(tidy(registry, stop.clone()));
    stop.cancelled().await;
    app.health.stopping.store(true, Ordering::Release);
    app.registry.cache().wake_all();
    for task in [serving, maintaining, tidying, following, aggregating] {
        if task.await.is_err() {
            tracing::error!("a part of the server panicked");
        }
    }
    Ok(())
}

/// Lets go of old watch history once a minute.
async fn tidy(registry: Arc<Registry>, stop: CancellationToken) {
    loop {
        // Both arms only wait.
        tokio::select! {
            () = tokio::time::sleep(TIDY) => registry.cache().forget_old(),
            () = stop.cancelled() => return,
        }
    }
}
