//! A container's checkpoint (KEP-2008): its processes as CRIU writes them down by way of the OCI runtime, and its files, in one archive
//! that CRI-O, containerd and checkpointctl read.
//!
//! The pod's monitor pauses the container, has it dumped, and keeps it paused while its files are copied. It does so over a connection of
//! this request's own: a caller that gives up, or a daemon that dies, ends the connection, and the container runs on. What was written
//! until then is below the state directory and goes with the request, or at the next start.

mod words;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use podvisor_checkpoint::{ArchiveError, BindMount, Cancel, Config, Ids, RootFs, name};
use podvisor_proto::cri;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{CheckpointContainer, ResumeContainer};
use serde_json::Value;

use crate::error::PodError;
use crate::id::random_hex;
use crate::monitor::Connection;
use crate::monitor::connection::runtime_limit;
use crate::node::{Node, find_program, now};
use crate::pod::record::{ContainerRecord, PodRecord};
use crate::selinux::label_file;

/// Everything about one checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) pod: Arc<PodRecord>,
    pub(crate) container: ContainerRecord,
    pub(crate) status: cri::ContainerStatus,
    /// Absolute.
    pub(crate) location: PathBuf,
    pub(crate) limit: Duration,
}

/// Why no container of a pod can be checkpointed; `None`: it may be tried.
pub(crate) fn impossible(node: &Node, pod: &PodRecord) -> Option<String> {
    let handler = &pod.handler;
    if pod.runtime.vm().is_some() {
        return Some(format!(
            "handler {handler} runs pods in virtual machines, whose processes CRIU cannot reach"
        ));
    }
    if pod.runtime.has_sandbox_container() {
        return Some(format!(
            "handler {handler} runs containers on a kernel of their own (sandbox_container), which CRIU does not know"
        ));
    }
    if let Some(why) = node.handlers().without_checkpoints.get(handler) {
        return Some(format!("handler {handler}: {why}"));
    }
    if find_program(Path::new("criu")).is_none() {
        return Some("CRIU is not installed: there is no criu in PATH".into());
    }
    None
}

/// Forgets what requests of an earlier daemon have left. CRIU, should it still write there, ends by that.
pub(crate) fn clear(node: &Node) {
    let directory = directory(node);
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %directory.display(), %error, "cannot remove unfinished checkpoints");
        }
        _ => {}
    }
}

fn directory(node: &Node) -> PathBuf {
    node.config().root.join("checkpoints")
}

/// Writes the archive; the container runs on in any case.
pub(crate) async fn write(node: &Node, wanted: Wanted) -> Result<(), PodError> {
    let work = Work::make(&directory(node).join(random_hex(8)))?;
    let (id, seconds) = (wanted.container.id.to_string(), wanted.limit.as_secs());
    tokio::time::timeout(wanted.limit, steps(node, Arc::new(wanted), &work))
        .await
        .unwrap_or(Err(PodError::NotCheckpointed { id, seconds }))
}

async fn steps(node: &Node, wanted: Arc<Wanted>, work: &Work) -> Result<(), PodError> {
    let (pod, container) = (&wanted.pod, &wanted.container);
    let spec = spec(node, container).await?;
    prepare(&work.path, &spec)?;
    let rootfs = rootfs(node, pod, container, &spec).await?;
    let id = container.id.to_string();

    let limit = runtime_limit(node.config().limits.runtime_timeout);
    let (connection, _) = Connection::open(&node.monitor_socket(&pod.id), limit, |_| {}).await?;
    let dump = Verb::CheckpointContainer(CheckpointContainer {
        container_id: id.clone(),
        image_path: work.path.join(name::IMAGES).display().to_string(),
        work_path: work.path.display().to_string(),
        timeout_ms: u32::try_from(wanted.limit.as_millis()).unwrap_or(u32::MAX),
    });
    if let Err(source) = connection.command(dump).await {
        let log = std::fs::read(work.path.join(name::LOG_OF_CRIU)).unwrap_or_default();
        return Err(PodError::Checkpoint { id, words: words::errors(&log), source });
    }
    let files = {
        let (work, wanted, cancel) = (work.path.clone(), wanted.clone(), work.cancel.clone());
        blocking(move || copy_files(&work, &rootfs, &wanted.container.log_path, &cancel)).await
    };
    connection.command(Verb::ResumeContainer(ResumeContainer { container_id: id })).await?;
    files?;

    let (work, cancel) = (work.path.clone(), work.cancel.clone());
    blocking(move || {
        documents(&work, &wanted, spec)?;
        podvisor_checkpoint::pack(&work, &wanted.location, &cancel)
    })
    .await
}

async fn blocking(work: impl FnOnce() -> Result<(), ArchiveError> + Send + 'static) -> Result<(), PodError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PodError::TaskGone)?.map_err(PodError::from)
}

/// The directory of one request. When it is dropped whoever works for it ends, and it goes.
#[derive(Debug)]
struct Work {
    path: PathBuf,
    cancel: Arc<Cancel>,
}

impl Work {
    fn make(path: &Path) -> Result<Self, PodError> {
        let images = path.join(name::IMAGES);
        // There are pages of memory in it.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&images)
            .map_err(|source| PodError::File { operation: "make", path: images, source })?;
        Ok(Self { path: path.to_owned(), cancel: Arc::default() })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.cancel.cancel();
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || {
            // CRIU may still be making files in it; without the directory it cannot.
            const TRIES: usize = 5;
            for _ in 0..TRIES {
                match std::fs::remove_dir_all(&path) {
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return tracing::warn!(path = %path.display(), %error, "a checkpoint's directory stays until the next start");
                    }
                    _ => return,
                }
            }
            tracing::warn!(path = %path.display(), "a checkpoint's directory stays until the next start");
        });
    }
}

/// As the container was made, plugins' adjustments included.
async fn spec(node: &Node, container: &ContainerRecord) -> Result<Value, PodError> {
    let path = node.bundle(&container.id).join("config.json");
    let failed = |source| PodError::File { operation: "read", path: path.clone(), source };
    let text = tokio::fs::read(&path).await.map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| failed(error.into()))
}

/// CRIU's parasite, which is in the container, writes to its log: where there are labels it needs the container's.
fn prepare(work: &Path, spec: &Value) -> Result<(), PodError> {
    let Some(label) = spec["linux"]["mountLabel"].as_str().filter(|label| !label.is_empty()) else {
        return Ok(());
    };
    let path = work.join(name::LOG_OF_CRIU);
    File::create(&path).map_err(|source| PodError::File { operation: "make", path: path.clone(), source })?;
    Ok(label_file(&path, label)?)
}

async fn rootfs(
    node: &Node,
    pod: &PodRecord,
    container: &ContainerRecord,
    spec: &Value,
) -> Result<RootFs, PodError> {
    // For a snapshot that is there this is a look at it.
    let snapshot = node
        .images
        .prepare(container.id.as_str(), &container.image_id, false)
        .await
        .map_err(PodError::Image)?;
    let mounts = spec["mounts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let covered: BTreeSet<PathBuf> =
        mounts.iter().filter_map(|mount| mount["destination"].as_str().map(PathBuf::from)).collect();
    let user = crate::pod::request::user_namespace(&pod.config.0)?;
    Ok(RootFs {
        mounted: node.bundle(&container.id).join("rootfs"),
        upper: snapshot.upper.unwrap_or_default(),
        lower: snapshot.lower,
        covered,
        ids: user.map(|user| Ids {
            uids: (user.uids.first, user.uids.length),
            gids: (user.gids.first, user.gids.length),
        }),
    })
}

/// What has to be as it was when the processes were written down.
fn copy_files(work: &Path, rootfs: &RootFs, log: &str, cancel: &Cancel) -> Result<(), ArchiveError> {
    let path = work.join(name::ROOTFS);
    let mut output = BufWriter::with_capacity(1 << 20, create(&path)?);
    let deleted = podvisor_checkpoint::changes(rootfs, &mut output, cancel)?;
    output.flush().map_err(|error| failed("write", &path, error))?;
    if !deleted.is_empty() {
        let deleted: Vec<_> = deleted.iter().map(|path| path.to_string_lossy()).collect();
        document(work, name::DELETED, &deleted)?;
    }
    if log.is_empty() {
        return Ok(());
    }
    // The directory is kubelet's and the pod's: no link in the place of the log is followed.
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(log);
    match opened {
        Ok(mut from) if from.metadata().is_ok_and(|found| found.is_file()) => {
            let path = work.join(name::LOG);
            io::copy(&mut from, &mut create(&path)?).map_err(|error| failed("write", &path, error))?;
        }
        // It may be on its way to another name, and is not what a checkpoint is about.
        _ => tracing::debug!(log, "a checkpoint has no log"),
    }
    Ok(())
}

fn documents(work: &Path, wanted: &Wanted, mut spec: Value) -> Result<(), ArchiveError> {
    let (container, status) = (&wanted.container, &wanted.status);
    let metadata = status.metadata.clone().unwrap_or_default();
    let image = status.image.clone().unwrap_or_default();
    // What the container asks for: kubelet itself asks for what PullImage has answered.
    let asked = Some(image.user_specified_image).filter(|name| !name.is_empty()).unwrap_or(image.image);
    let config = Config {
        id: container.id.to_string(),
        name: metadata.name.clone(),
        rootfs_image: asked.clone(),
        rootfs_image_ref: status.image_ref.clone(),
        rootfs_image_name: asked.clone(),
        runtime: wanted.pod.handler.clone(),
        created_time: time(container.created_at),
        checkpointed_time: time(now()),
        // Go's zero time.
        restored_time: "0001-01-01T00:00:00Z".to_owned(),
        restored: false,
    };
    document(work, name::CONFIG, &config)?;
    let mounts: Vec<BindMount> = podvisor_checkpoint::bind_mounts(&spec);
    if !mounts.is_empty() {
        document(work, name::BIND_MOUNTS, &mounts)?;
    }
    let metadata = serde_json::json!({ "name": metadata.name, "attempt": metadata.attempt });
    // Where CRI-O looks for them. The spec has containerd's already.
    for (name, value) in [
        ("Metadata", metadata.to_string()),
        ("Labels", serde_json::json!(status.labels).to_string()),
        ("Annotations", serde_json::json!(status.annotations).to_string()),
        ("LogPath", status.log_path.clone()),
    ] {
        spec["annotations"][format!("io.kubernetes.cri-o.{name}")] = value.into();
    }
    document(work, name::SPEC, &spec)?;
    // The CRI's message with the names that its Go type has in JSON.
    let shown = serde_json::json!({
        "id": status.id,
        "metadata": metadata,
        "state": status.state,
        "created_at": status.created_at,
        "started_at": status.started_at,
        "image": { "image": asked },
        "image_ref": status.image_ref,
        "image_id": status.image_id,
        "labels": status.labels,
        "annotations": status.annotations,
        "log_path": status.log_path,
    });
    document(work, name::STATUS, &shown)
}

/// RFC 3339.
fn time(nanoseconds: i64) -> String {
    const SECOND: i64 = 1_000_000_000;
    let (seconds, rest) = (nanoseconds.div_euclid(SECOND), nanoseconds.rem_euclid(SECOND));
    prost_types::Timestamp { seconds, nanos: i32::try_from(rest).unwrap_or_default() }.to_string()
}

fn document(work: &Path, name: &str, content: &impl serde::Serialize) -> Result<(), ArchiveError> {
    let path = work.join(name);
    serde_json::to_writer_pretty(create(&path)?, content)
        .map_err(|error| failed("write", &path, io::Error::from(error)))
}

fn create(path: &Path) -> Result<File, ArchiveError> {
    let mut options = File::options();
    let opened = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    opened.map_err(|error| failed("make", path, error))
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> ArchiveError {
    ArchiveError::Io { operation, path: path.to_owned(), source }
}
