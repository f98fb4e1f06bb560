//! What survives: one JSON file per pod and per container, versioned, replaced atomically.
//!
//! Records are separate from live types, so that a newer daemon can read what an older one wrote. CRI messages are
//! kept as their wire bytes: fields that this build does not know are not lost.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use podvisor_network::namespace::Namespaces;
use podvisor_proto::cri;
use podvisor_spec::selinux::Labels;
use prost::Message;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::acquired::Acquisition;
use super::huge_pages::HugePages;
use super::image_volumes::ImageVolume;
use super::resize::Sizes;
use super::state::Exit;
use crate::id::{ContainerId, PodId};

/// Version written into each record. A higher one is refused ("written by a newer podvisor").
pub(crate) const VERSION: u32 = 1;

/// A CRI message as base64 of its wire form.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wire<M>(pub(crate) M);

impl<M: Message> Serialize for Wire<M> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(self.0.encode_to_vec()))
    }
}

impl<'de, M: Message + Default> Deserialize<'de> for Wire<M> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).map_err(D::Error::custom)?;
        M::decode(bytes.as_slice()).map(Wire).map_err(D::Error::custom)
    }
}

/// Identity of a process: its number and when it started (field 22 of /proc/PID/stat).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessIdentity {
    pub(crate) pid: i32,
    pub(crate) start_time: u64,
}

/// How far a sandbox had come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Being made; rolled back when found at a start.
    Creating,
    /// Made completely.
    Ready,
    /// Not ready, but its resources are still held.
    Failed { why: String },
    /// Stopped: everything but the records and the containers' file systems is released.
    Stopped,
    /// Being removed; finished when found at a start.
    Removing,
}

/// The OCI runtime that a sandbox was created with, whatever the configuration says later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PinnedRuntime {
    pub(crate) path: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) systemd_cgroup: bool,
    /// See [`super::sandbox_container`].
    #[serde(default)]
    pub(crate) sandbox_container: bool,
    pub(crate) annotations: Vec<String>,
}

/// The virtual machine that a sandbox was created with, whatever the configuration and the installed guests say later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PinnedVm {
    /// Program that speaks the hypervisor protocol, and the one of the machine itself.
    pub(crate) hypervisor: PathBuf,
    pub(crate) machine: PathBuf,
    pub(crate) file_server: PathBuf,
    /// Id of the guest, and where its files are.
    pub(crate) guest: String,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// `uname -r` in it.
    pub(crate) kernel_release: String,
    /// The processor is translated.
    pub(crate) emulate: bool,
    /// Bytes for containers without limits, and for the guest itself.
    pub(crate) default_memory: u64,
    pub(crate) guest_reserve: u64,
    pub(crate) default_cpus: u32,
    pub(crate) max_cpus: u32,
    /// The machine is one that disks can be plugged into, and memory up to so many bytes for the containers.
    #[serde(default)]
    pub(crate) plugs: bool,
    #[serde(default)]
    pub(crate) max_memory: u64,
    /// How its guest gets images.
    #[serde(default)]
    pub(crate) rootfs: RootfsForm,
    /// Whose machines share pages of them.
    #[serde(default)]
    pub(crate) share_images: SharedPages,
    /// Bytes of the disk that a container writes to; 0: it writes through the file server.
    #[serde(default)]
    pub(crate) writable_disk: u64,
}

/// How a guest gets the images of containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RootfsForm {
    /// As persistent memory where that works, else through the file server.
    Auto,
    Pmem,
    /// As a disk.
    Block,
    #[default]
    Fs,
}

/// Whose machines read the same pages of images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SharedPages {
    #[default]
    Node,
    Namespace,
    Pod,
}

/// What runs a sandbox's containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Engine {
    Oci(PinnedRuntime),
    Vm(PinnedVm),
}

impl Engine {
    pub(crate) fn oci(&self) -> Option<&PinnedRuntime> {
        match self {
            Self::Oci(runtime) => Some(runtime),
            Self::Vm(_) => None,
        }
    }

    pub(crate) fn vm(&self) -> Option<&PinnedVm> {
        match self {
            Self::Oci(_) => None,
            Self::Vm(vm) => Some(vm),
        }
    }

    /// See [`super::sandbox_container`].
    pub(crate) fn has_sandbox_container(&self) -> bool {
        self.oci().is_some_and(|runtime| runtime.sandbox_container)
    }
}

/// The machine that a sandbox runs in, as it was when it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Which hypervisor it is, with its version.
    pub(crate) hypervisor: String,
    pub(crate) emulated: bool,
    /// `uname -r`, as the agent says.
    pub(crate) kernel_release: String,
    pub(crate) agent: String,
    /// Its agent, and its monitor, can have volumes in the guest's memory.
    #[serde(default)]
    pub(crate) keeps_volumes: bool,
    /// Bytes, and virtual CPUs.
    pub(crate) memory: u64,
    pub(crate) cpus: u32,
    /// Bytes that it began with, and cannot be without.
    #[serde(default)]
    pub(crate) least_memory: u64,
    /// Its agent, and its monitor, can set huge pages aside.
    #[serde(default)]
    pub(crate) has_huge_pages: bool,
    /// What of its memory is huge pages.
    #[serde(default)]
    pub(crate) huge_pages: HugePages,
    /// Disks can be plugged into it.
    #[serde(default)]
    pub(crate) adds_disks: bool,
    /// Images can be put into its memory.
    #[serde(default)]
    pub(crate) maps_images: bool,
    /// They can be plugged into it as disks.
    #[serde(default)]
    pub(crate) plugs_images: bool,
    pub(crate) hypervisor_pid: i32,
    pub(crate) file_server: ProcessIdentity,
}

/// Durable record of a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    pub(crate) version: u32,
    pub(crate) id: PodId,
    /// Of the machine, see [`crate::node::boot_id`]: another one means that nothing in here runs any more.
    pub(crate) boot_id: String,
    /// ns since the epoch.
    pub(crate) created_at: i64,
    /// What RunPodSandbox asked for by name (may be empty).
    pub(crate) requested_handler: String,
    /// What it got.
    pub(crate) handler: String,
    pub(crate) runtime: Engine,
    pub(crate) config: Wire<cri::PodSandboxConfig>,
    pub(crate) phase: Phase,
    /// Addresses, the primary one first.
    pub(crate) addresses: Vec<String>,
    pub(crate) cni_result: serde_json::Value,
    pub(crate) monitor: Option<ProcessIdentity>,
    /// PID 1 of the pod's shared pid namespace, or its virtual machine: when it ends, so does the sandbox.
    pub(crate) init: Option<ProcessIdentity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) machine: Option<Machine>,
    /// What kubelet has resized it to.
    #[serde(default)]
    pub(crate) sizes: Sizes,
    /// SELinux labels; their level is its own until it is removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) selinux: Option<Labels>,
    /// In the order in which they were acquired (and recorded before they were).
    pub(crate) acquired: Vec<Acquisition>,
}

impl PodRecord {
    /// The pod's pinned namespaces; none of those that it shares with the node.
    pub(crate) fn namespaces(&self) -> Namespaces {
        let pinned = self.acquired.iter().find_map(|acquisition| match acquisition {
            Acquisition::Namespaces(namespaces) => Some(namespaces.clone()),
            _ => None,
        });
        pinned.unwrap_or_default()
    }
}

/// How far a container had come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ContainerPhase {
    /// Being made; rolled back when found at a start.
    Creating,
    Created,
    /// Start was asked for: it may or may not have happened.
    Started,
    Exited(Exit),
    /// Being removed; finished when found at a start.
    Removing,
}

/// Durable record of a container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) version: u32,
    pub(crate) id: ContainerId,
    pub(crate) config: Wire<cri::ContainerConfig>,
    pub(crate) phase: ContainerPhase,
    /// ns since the epoch.
    pub(crate) created_at: i64,
    /// ns since the epoch; 0: never.
    pub(crate) started_at: i64,
    /// The image's one identity.
    pub(crate) image_id: String,
    /// Repository digest, for ContainerStatus.image_ref.
    pub(crate) image_ref: String,
    /// Mounts that are images. Records of podvisor 0.1.0 do not have it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) image_volumes: Vec<ImageVolume>,
    pub(crate) log_path: String,
    /// Number of the signal that stops it.
    pub(crate) stop_signal: i32,
    /// Path of its cgroup below the mount point.
    pub(crate) cgroup: String,
    /// Its first process. Of one in a virtual machine it is not known here: what a guest says about its pids concerns no process of the
    /// host.
    pub(crate) process: Option<ProcessIdentity>,
    /// (uid, gid, supplemental groups) of its first process.
    pub(crate) user: Option<(u32, u32, Vec<u32>)>,
    /// OCI `LinuxResources` in force.
    pub(crate) resources: serde_json::Value,
    pub(crate) acquired: Vec<Acquisition>,
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("cannot write record {path}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot remove record {path}")]
    Remove { path: PathBuf, source: std::io::Error },
    #[error("cannot read record {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("record {path} is damaged")]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("record {path} has version {version}, this podvisor knows up to {VERSION}")]
    Newer { path: PathBuf, version: u32 },
}

impl RecordError {
    /// There is no room for it.
    pub(crate) fn is_full(&self) -> bool {
        use std::io::ErrorKind;
        matches!(self, Self::Write { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    }
}

/// The directory of all pods' records: `<root>/pods/<pod>/{pod.json,containers/<id>.json,exits/}`.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    root: PathBuf,
}

impl Records {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn pod_dir(&self, pod: &PodId) -> PathBuf {
        self.root.join(pod.as_str())
    }

    /// Where the monitor leaves exit records.
    pub(crate) fn exits(&self, pod: &PodId) -> PathBuf {
        self.pod_dir(pod).join("exits")
    }

    fn container_path(&self, pod: &PodId, container: &ContainerId) -> PathBuf {
        self.pod_dir(pod).join("containers").join(format!("{container}.json"))
    }

    /// Writes a sandbox's record durably. Blocking: two fsyncs.
    pub(crate) fn write_pod(&self, record: &PodRecord) -> Result<(), RecordError> {
        let directory = self.pod_dir(&record.id);
        let path = directory.join("pod.json");
        let fresh = !directory.exists();
        for sub in ["containers", "exits"] {
            let sub = directory.join(sub);
            std::fs::create_dir_all(&sub).map_err(|source| RecordError::Write { path: sub, source })?;
        }
        podvisor_fault::point("record.directory");
        replace(&path, record)?;
        if fresh {
            sync_directory(&self.root).map_err(|source| RecordError::Write { path, source })?;
        }
        Ok(())
    }

    /// Writes a container's record durably. Blocking.
    pub(crate) fn write_container(&self, pod: &PodId, record: &ContainerRecord) -> Result<(), RecordError> {
        replace(&self.container_path(pod, &record.id), record)
    }

    /// Forgets a container. Idempotent.
    pub(crate) fn remove_container(&self, pod: &PodId, container: &ContainerId) -> Result<(), RecordError> {
        let exit = self.exits(pod).join(format!("{container}.exit.json"));
        for path in [self.container_path(pod, container), exit] {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(RecordError::Remove { path, source });
                }
                _ => {}
            }
            podvisor_fault::point("remove.record-gone");
        }
        Ok(())
    }

    /// Forgets a pod with everything of it. Idempotent.
    pub(crate) fn remove_pod(&self, pod: &PodId) -> Result<(), RecordError> {
        let path = self.pod_dir(pod);
        // The record goes first: a crash in between leaves a directory without one, which the next start clears away.
        for path in [path.join("pod.json"), path.clone()] {
            let removed =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            match removed {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(RecordError::Remove { path, source });
                }
                _ => {}
            }
            podvisor_fault::point("remove-pod.record-gone");
        }
        Ok(())
    }

    /// Ids of all pods that have a record. A directory in which nothing is recorded is one that a crash left, before the first record
    /// or after the last: it is taken away.
    pub(crate) fn pods(&self) -> std::io::Result<Vec<PodId>> {
        std::fs::create_dir_all(&self.root)?;
        let mut pods = Vec::new();
        for entry in std::fs::read_dir(&self.root)? {
            let Some(id) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            if self.pod_dir(&id).join("pod.json").exists() || !self.containers(&id).is_empty() {
                pods.push(id);
            } else if let Err(error) = self.remove_pod(&id) {
                tracing::warn!(pod = %id, error = crate::error::chain(&error), "cannot remove a directory without records");
            }
        }
        Ok(pods)
    }

    /// Pods whose machines started from a guest and have not been stopped.
    pub(crate) fn users_of_guest(&self, guest: &str) -> std::io::Result<Vec<PodId>> {
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let uses = |id: &PodId| {
            self.read_pod(id).is_ok_and(|record| {
                record.runtime.vm().is_some_and(|vm| vm.guest == guest)
                    && !matches!(record.phase, Phase::Stopped | Phase::Removing)
            })
        };
        Ok(ids.filter(uses).collect())
    }

    pub(crate) fn read_pod(&self, pod: &PodId) -> Result<PodRecord, RecordError> {
        read(&self.pod_dir(pod).join("pod.json"))
    }

    /// Ids of all containers that have a record, readable or not.
    pub(crate) fn containers(&self, pod: &PodId) -> Vec<ContainerId> {
        let Ok(entries) = std::fs::read_dir(self.pod_dir(pod).join("containers")) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok())
            .collect()
    }

    pub(crate) fn read_container(
        &self,
        pod: &PodId,
        container: &ContainerId,
    ) -> Result<ContainerRecord, RecordError> {
        read(&self.container_path(pod, container))
    }

    /// What the monitor wrote about the end of a container.
    pub(crate) fn read_exit(&self, pod: &PodId, container: &str) -> Option<Exit> {
        #[derive(Deserialize)]
        struct Written {
            code: i32,
            finished_at: i64,
            #[serde(default)]
            oom_killed: bool,
            #[serde(default)]
            reason: String,
        }
        let bytes = std::fs::read(self.exits(pod).join(format!("{container}.exit.json"))).ok()?;
        let written: Written = serde_json::from_slice(&bytes).ok()?;
        Some(exit_of(written.code, written.finished_at, written.oom_killed, &written.reason))
    }
}

/// An exit with the reason that kubelet shows, and the monitor's words about it.
pub(crate) fn exit_of(code: i32, at: i64, oom_killed: bool, why: &str) -> Exit {
    let reason = match (code, oom_killed) {
        (_, true) => "OOMKilled",
        (0, false) => "Completed",
        _ => "Error",
    };
    Exit { code, at, reason: reason.into(), message: why.into() }
}

fn read<R: DeserializeOwned>(path: &Path) -> Result<R, RecordError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let bytes = std::fs::read(path).map_err(|source| RecordError::Read { path: path.to_owned(), source })?;
    let damaged = |source| RecordError::Damaged { path: path.to_owned(), source };
    let Versioned { version } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if version > VERSION {
        return Err(RecordError::Newer { path: path.to_owned(), version });
    }
    serde_json::from_slice(&bytes).map_err(damaged)
}

fn replace<R: Serialize>(path: &Path, record: &R) -> Result<(), RecordError> {
    let write = || -> std::io::Result<()> {
        let temporary = path.with_extension("json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_data()?;
        podvisor_fault::point("record.written");
        std::fs::rename(&temporary, path)?;
        podvisor_fault::point("record.replaced");
        sync_directory(path.parent().unwrap_or(Path::new("/")))
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(path.with_extension("json.new"));
        RecordError::Write { path: path.to_owned(), source }
    })
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> ContainerRecord {
        ContainerRecord {
            version: VERSION,
            id: ContainerId::random(),
            config: Wire(cri::ContainerConfig { working_dir: "/x".into(), ..Default::default() }),
            phase: ContainerPhase::Created,
            created_at: 5,
            started_at: 0,
            image_id: "sha256:00".into(),
            image_ref: String::new(),
            image_volumes: Vec::new(),
            log_path: String::new(),
            stop_signal: 15,
            cgroup: "/a/b".into(),
            process: Some(ProcessIdentity { pid: 4, start_time: 9 }),
            user: None,
            resources: serde_json::Value::Null,
            acquired: vec![Acquisition::Directory("/nowhere".into())],
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path().into());
        let pod = PodId::random();
        std::fs::create_dir_all(records.pod_dir(&pod).join("containers")).unwrap();
        let record = container();
        records.write_container(&pod, &record).unwrap();
        assert_eq!(records.read_container(&pod, &record.id).unwrap(), record);
        assert_eq!(records.containers(&pod), std::slice::from_ref(&record.id));
        records.remove_container(&pod, &record.id).unwrap();
        records.remove_container(&pod, &record.id).unwrap();
        assert!(records.containers(&pod).is_empty());
    }

    #[test]
    fn a_record_cut_at_any_byte_is_damaged_and_never_a_panic() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        let whole = serde_json::to_vec(&container()).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(read::<ContainerRecord>(&path), Err(RecordError::Damaged { .. })), "{length}");
        }
    }

    #[test]
    fn a_newer_record_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        std::fs::write(&path, br#"{"version": 99, "something": "else"}"#).unwrap();
        assert!(matches!(read::<ContainerRecord>(&path), Err(RecordError::Newer { version: 99, .. })));
    }
}
