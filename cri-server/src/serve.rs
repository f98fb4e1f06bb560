//! The daemon's life: start in an order in which nothing is visible before it is right, serve, reload, end.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use podvisor_cgroup::systemd::Systemd;
use podvisor_cgroup::{Driver, Layout};
use podvisor_config::{Config, LogFormat, NetworkMode};
use podvisor_image_store::ImageStore;
use podvisor_network::{BuiltinOptions, CniOptions, Kind, Network};
use podvisor_proto::cri::image_service_server::ImageServiceServer;
use podvisor_proto::cri::runtime_service_server::RuntimeServiceServer;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::reload;

use crate::deadline::Deadline;
use crate::listener;
use crate::memory;
use crate::meters::Meters;
use crate::monitor::connection::runtime_limit;
use crate::monitor::pool::{Place, Pool, Template};
use crate::node::{Node, Parts, cgroup_driver, find_program};
use crate::pod::Pods;
use crate::service::Cri;
use crate::sessions::Sessions;
use crate::telemetry;
use crate::trace::Trace;

type LogLevel = reload::Handle<EnvFilter, tracing_subscriber::Registry>;

/// Runs until SIGTERM or SIGINT.
pub(crate) fn serve(file: Option<PathBuf>, config: Config) -> anyhow::Result<()> {
    let level = logging(&config)?;
    memory::tune_allocator();
    // Two workers: the work is waiting and short system calls; what blocks runs on threads that come and go.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build()
        .context("cannot start the runtime of asynchronous tasks")?;
    let outcome = runtime.block_on(run(file, config, level));
    // Blocking threads may hang in a dead file system: the process ends without them.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

fn logging(config: &Config) -> anyhow::Result<LogLevel> {
    let filter = EnvFilter::try_new(&config.log.level).context("log.level is no filter")?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let registry = tracing_subscriber::registry().with(filter);
    match config.log.format {
        LogFormat::Text => registry.with(lines).init(),
        LogFormat::Json => registry.with(lines.json()).init(),
    }
    Ok(handle)
}

async fn run(file: Option<PathBuf>, config: Config, level: LogLevel) -> anyhow::Result<()> {
    let socket = config.socket.clone();
    let drain = Duration::from_secs(config.limits.drain_timeout.into());
    // The image store's lock is what tells a second daemon on the same directories: before anything is touched.
    let node = open(config).await?;
    let pods = Arc::new(Pods::new(node.clone()));
    let begin = Instant::now();
    crate::checkpoint::clear(&node);
    pods.recover().await.context("cannot read the records of pods")?;
    node.telemetry.recovered(pods.views().len(), begin.elapsed());
    pods.admit_plugins().await;

    let streaming = streaming(&node, &pods).await?;
    let meters = Arc::new(Meters::new(&node.config().root));
    let cri =
        Cri { node: node.clone(), pods: pods.clone(), streaming: streaming.clone(), meters: meters.clone() };
    if let Some(address) = node.config().metrics.address {
        let subjects = telemetry::Subjects { node: node.clone(), pods: pods.clone(), meters };
        let served = telemetry::serve(address, subjects).await;
        served.with_context(|| format!("cannot serve metrics at {address} (metrics.address)"))?;
    }
    let listener = listener::listen(&socket)?;
    let incoming = UnixListenerStream::new(UnixListener::from_std(listener.socket)?);
    let message = node.config().limits.grpc_message as usize;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .layer(Trace(node.clone()))
        .layer(Deadline)
        .add_service(RuntimeServiceServer::new(cri.clone()).max_decoding_message_size(message))
        .add_service(ImageServiceServer::new(cri).max_decoding_message_size(message))
        .serve_with_incoming_shutdown(incoming, async {
            let _ = stopped.await;
        });
    let mut serving = tokio::spawn(server);
    // The way here is never gone again.
    memory::give_back();
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "podvisor serves");
    notify(&[sd_notify::NotifyState::Ready]);
    crate::pause_image::keep(node.clone());
    tokio::spawn(reload_on_hangup(file, node.clone(), level));
    tokio::spawn(watchdog());
    let resting = node.clone();
    tokio::spawn(async move { memory::keep_small(&resting.changes).await });

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut serving => {
            ended.context("the server's task ended")?.context("the server failed")?;
        }
    }
    tracing::info!("podvisor ends; pods go on");
    notify(&[sd_notify::NotifyState::Stopping]);
    // Requests in flight may end (a postStart hook that is cut kills its container), new ones are refused or wait for the next daemon.
    if !listener.is_kept {
        let _ = std::fs::remove_file(&socket);
    }
    streaming.close();
    let _ = stop.send(());
    if tokio::time::timeout(drain, &mut serving).await.is_err() {
        tracing::warn!(seconds = drain.as_secs(), "requests were still in flight at the end");
    }
    node.hooks.stop().await;
    node.monitors.close().await;
    if node.driver == Driver::Cgroupfs {
        // The parent of containers whose pod names none, when there are none.
        for directory in node.cgroups.cgroup(&node.driver.parent_cgroup("")).directories() {
            let _ = std::fs::remove_dir(directory);
        }
    }
    Ok(())
}

async fn open(config: Config) -> anyhow::Result<Arc<Node>> {
    for directory in [&config.root, &config.run] {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o711))
            .with_context(|| format!("cannot set the mode of {}", directory.display()))?;
    }
    let images = ImageStore::open(podvisor_image_store::Options {
        root: config.root.join("images"),
        run: config.run.join("images"),
        registry: podvisor_registry::Options {
            registries_conf: config.image.registries_conf.clone(),
            certs_dir: config.image.certs_dir.clone(),
            auth_files: config.image.auth_files.clone(),
            default_registries: config.image.default_registries.clone(),
            progress_timeout: Duration::from_secs(config.image.progress_timeout.into()),
            user_agent: concat!("podvisor/", env!("CARGO_PKG_VERSION")).into(),
        },
        parallel_layers: config.image.parallel_layers as usize,
        // Images of a namespace or a pod are not made before somebody wants them.
        machine_images: config.handlers.values().any(|handler| {
            matches!(&handler.kind, podvisor_config::HandlerKind::Vm(vm)
                if vm.rootfs == podvisor_config::Rootfs::Pmem && vm.share_images == podvisor_config::ShareImages::Node)
        }),
    })
    .await
    .context("cannot open the image store")?;
    let network = Network::open(podvisor_network::Options {
        mode: match config.network.mode {
            NetworkMode::Cni => Kind::Cni,
            NetworkMode::Builtin => Kind::Builtin,
        },
        cni: CniOptions {
            config_dir: config.network.cni_config_dir.clone(),
            bin_dirs: config.network.cni_bin_dirs.clone(),
            cache_dir: config.network.cni_cache_dir.clone(),
            timeout: Duration::from_secs(config.network.cni_timeout.into()),
        },
        builtin: BuiltinOptions {
            bridge: config.network.bridge.clone(),
            subnets: config.network.subnets.clone(),
            state_dir: config.root.join("network"),
        },
    })
    .await
    .context("cannot prepare the pod network")?;
    let cgroups = Layout::detect().context("cannot find the cgroup hierarchies")?;
    let driver = cgroup_driver(config.runtime.cgroup_driver);
    let systemd = Arc::new(Systemd::new());
    let place = monitors_place(&config, &cgroups, driver, &systemd).await?;
    let template = Template {
        program: monitor_program(&config)?,
        place,
        runtime_limit: runtime_limit(config.limits.runtime_timeout),
    };
    let monitors = Pool::start(template, config.runtime.monitor_pool);
    Node::new(Parts { config, images, network, monitors, cgroups, driver, systemd })
        .context("cannot look at this machine")
}

/// The monitors' common cgroup, made.
async fn monitors_place(
    config: &Config,
    cgroups: &Layout,
    driver: Driver,
    systemd: &Arc<Systemd>,
) -> anyhow::Result<Place> {
    let cgroup = cgroups.cgroup(&driver.parent_cgroup(&config.runtime.monitor_cgroup));
    match driver {
        Driver::Cgroupfs => {
            cgroup.create().context("cannot make the monitors' cgroup")?;
            Ok(Place::Below(cgroup))
        }
        Driver::Systemd => {
            let name = driver.parent(&config.runtime.monitor_cgroup).context("runtime.monitor_cgroup")?;
            systemd.ensure_slice(&name).await.context(
                "the systemd cgroup driver cannot be used: start D-Bus, or set runtime.cgroup_driver to \"cgroupfs\" here and in kubelet",
            )?;
            Ok(Place::Slice { systemd: systemd.clone(), name, cgroup })
        }
    }
}

/// The monitor's program: as configured, else beside this one.
fn monitor_program(config: &Config) -> anyhow::Result<PathBuf> {
    let program = match &config.runtime.monitor {
        Some(path) => path.clone(),
        None => std::env::current_exe()
            .context("cannot find this program's own file")?
            .with_file_name("podvisor-monitor"),
    };
    find_program(&program).with_context(|| {
        format!(
            "{} is no executable file: install podvisor-monitor beside podvisor, or set runtime.monitor",
            program.display()
        )
    })
}

async fn streaming(node: &Arc<Node>, pods: &Arc<Pods>) -> anyhow::Result<Arc<podvisor_streaming::Server>> {
    let config = node.config();
    let tls = match (&config.streaming.tls_cert, &config.streaming.tls_key) {
        (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
        _ => None,
    };
    let options = podvisor_streaming::Options {
        address: config.streaming.address,
        tls,
        token_lifetime: Duration::from_secs(config.streaming.token_lifetime.into()),
        idle_timeout: Duration::from_secs(config.streaming.idle_timeout.into()),
    };
    let backend = Arc::new(Sessions { node: node.clone(), pods: pods.clone() });
    let server = podvisor_streaming::Server::start(options, backend)
        .await
        .context("cannot start the streaming server")?;
    Ok(Arc::new(server))
}

async fn reload_on_hangup(file: Option<PathBuf>, node: Arc<Node>, level: LogLevel) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    while hangup.recv().await.is_some() {
        let read = tokio::task::spawn_blocking({
            let file = file.clone();
            move || crate::cli::load(file.as_deref())
        });
        match read.await {
            Ok(Ok(config)) => {
                match EnvFilter::try_new(&config.log.level) {
                    Ok(filter) => drop(level.reload(filter)),
                    Err(error) => tracing::error!(%error, "the log level stays as it was"),
                }
                // Handlers are probed by calling them.
                let reloading = node.clone();
                let left = tokio::task::spawn_blocking(move || reloading.reload(config)).await;
                let left = left.unwrap_or_default();
                crate::pause_image::keep(node.clone());
                tracing::info!("took over the changed configuration");
                if !left.is_empty() {
                    tracing::warn!(keys = left.join(", "), "these changes need a restart");
                }
            }
            Ok(Err(error)) => {
                tracing::error!(error = format!("{error:#}"), "the configuration stays as it was");
            }
            Err(_) => return,
        }
    }
}

/// systemd's watchdog (sd_watchdog_enabled(3)): answered from the runtime that serves, so that a hang is noticed.
async fn watchdog() {
    let Some(interval) = sd_notify::watchdog_enabled() else { return };
    loop {
        tokio::time::sleep(interval / 2).await;
        notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(state);
}
