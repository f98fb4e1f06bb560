//! Pods connected by CNI plugins: specification 1.1.0, with libcni's habits where it is silent.
//!
//! | module | idea |
//! |---|---|
//! | [`conflist`] | which configuration counts and what it says |
//! | [`plugin`] | one call of a plugin |
//! | [`result`] | the addresses in an answer |
//! | [`cache`] | attachments on disk |
//!
//! ADD goes through the plugins in order, each with its predecessor's result; DEL in reverse order with the final result
//! and with the configuration that the attachment was made with, whatever stands in the directory by then. A failed ADD is
//! followed by DEL.

mod cache;
mod conflist;
mod plugin;
mod result;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use self::cache::{Cache, Entry};
use self::conflist::{Conflist, Fingerprint, Version};
pub use self::plugin::PluginError;
use crate::{Attachment, CniOptions, Sandbox};

/// The interface in the pod.
const INTERFACE: &str = "eth0";
/// STATUS is asked again when somebody wants to know and the last answer is older than this.
const STATUS_AGE: Duration = Duration::from_secs(5);
/// `NSFS_MAGIC` of the kernel's `include/uapi/linux/magic.h`.
const NSFS: u64 = 0x6e73_6673;
/// Bits that may pass at once before the rate counts. Go plugins keep it in 32 bits; this is what kubelet's own network
/// code gave.
const BURST: u64 = i32::MAX as u64;

/// Why CNI did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CniError {
    #[error("{reason}")]
    Unavailable { reason: String },
    #[error("sandbox id {id:?} is not letters, digits, `_`, `.` and `-` after a letter or digit")]
    Id { id: String },
    #[error("{key} {value:?} cannot be part of CNI_ARGS, which are separated by `;` and `=`")]
    Argument { key: &'static str, value: String },
    #[error("{what} cached CNI result {}", .path.display())]
    Cache { what: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Plugin(#[from] PluginError),
    #[error("network {network} gave the pod no address on {INTERFACE}")]
    NoAddress { network: String },
    #[error("sandbox {id} has no cached CNI result to check")]
    NotAttached { id: String },
}

/// What is known of the directory of configurations.
#[derive(Debug)]
struct Loaded {
    fingerprint: Option<Fingerprint>,
    list: Result<Arc<Conflist>, String>,
    /// The plugins' answer to STATUS.
    status: Status,
}

#[derive(Debug)]
enum Status {
    /// Not asked since the configuration was loaded.
    Unknown,
    Asked {
        at: Instant,
        outcome: Result<(), String>,
    },
}

impl Status {
    fn is_fresh(&self) -> bool {
        matches!(self, Self::Asked { at, .. } if at.elapsed() <= STATUS_AGE)
    }
}

/// CNI with one directory of configurations.
#[derive(Debug)]
pub(crate) struct Cni {
    options: CniOptions,
    cache: Cache,
    loaded: Mutex<Loaded>,
    /// Held while STATUS is being asked.
    asking: tokio::sync::Mutex<()>,
    /// Shared by additions, held alone by GC: an attachment that is being made is not yet in its list of those to keep.
    attaching: tokio::sync::RwLock<()>,
}

/// Everything a sequence of calls has in common.
struct Session<'a> {
    cni: &'a Cni,
    list: &'a Conflist,
    variables: Vec<(&'static str, String)>,
    runtime: Map<String, Value>,
}

impl Session<'_> {
    async fn call(
        &self,
        plugin: &conflist::Plugin,
        command: &'static str,
        more: Map<String, Value>,
    ) -> Result<Vec<u8>, PluginError> {
        let CniOptions { bin_dirs, timeout, .. } = &self.cni.options;
        let call = plugin::Call {
            plugin: &plugin.kind,
            program: &plugin::find(&plugin.kind, bin_dirs)?,
            command,
            variables: &self.variables,
            input: &self.list.input(plugin, &self.runtime, more),
            limit: *timeout,
        };
        call.run().await
    }

    /// The final result.
    async fn add(&self) -> Result<Map<String, Value>, CniError> {
        let mut previous = None;
        for plugin in &self.list.plugins {
            let output = self.call(plugin, "ADD", previous_result(previous)).await?;
            let mut result =
                result::parse(&output).map_err(|reason| self.garbage(plugin, reason, &output))?;
            result.entry("cniVersion").or_insert_with(|| self.list.version_text.into());
            result::addresses(&result, INTERFACE).map_err(|reason| self.garbage(plugin, reason, &output))?;
            previous = Some(result);
        }
        previous.ok_or_else(|| CniError::NoAddress { network: self.list.name.clone() })
    }

    #[allow(clippy::unused_self)] // reads as what it is about
    fn garbage(&self, plugin: &conflist::Plugin, reason: String, output: &[u8]) -> PluginError {
        let excerpt = plugin::excerpt(output);
        PluginError::Garbage { plugin: plugin.kind.clone(), command: "ADD", reason, excerpt }
    }

    /// Every plugin is called; the first failure is reported.
    async fn delete(&self, result: Option<&Map<String, Value>>) -> Result<(), PluginError> {
        let result = result.filter(|_| self.list.version >= Version::CHECK).cloned();
        let mut outcome = Ok(());
        for plugin in self.list.plugins.iter().rev() {
            outcome = outcome.and(self.call(plugin, "DEL", previous_result(result.clone())).await.map(drop));
        }
        outcome
    }
}

fn previous_result(result: Option<Map<String, Value>>) -> Map<String, Value> {
    result.map(|result| ("prevResult".to_owned(), result.into())).into_iter().collect()
}

impl Cni {
    pub(crate) fn new(options: CniOptions) -> Self {
        let cache = Cache::new(&options.cache_dir);
        let list = Err(format!("no CNI configuration in {}", options.config_dir.display()));
        let loaded = Mutex::new(Loaded { fingerprint: None, list, status: Status::Unknown });
        Self {
            options,
            cache,
            loaded,
            asking: tokio::sync::Mutex::default(),
            attaching: tokio::sync::RwLock::default(),
        }
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration as the directory is now.
    fn current(&self) -> Result<Arc<Conflist>, String> {
        let fingerprint = Fingerprint::of(&self.options.config_dir);
        let mut loaded = self.loaded();
        if loaded.fingerprint.as_ref() != Some(&fingerprint) {
            let list = conflist::choose(&self.options.config_dir).map(Arc::new);
            match &list {
                Ok(list) => tracing::info!(network = list.name, "CNI configuration loaded"),
                Err(reason) => tracing::info!(reason, "no CNI configuration"),
            }
            *loaded = Loaded { fingerprint: Some(fingerprint), list, status: Status::Unknown };
        }
        loaded.list.clone()
    }

    /// Why no pod can be connected. Asks files only; the second value says that [`Cni::ask_status`] should be called.
    pub(crate) fn ready(&self) -> (Result<(), String>, bool) {
        let list = match self.current() {
            Ok(list) => list,
            Err(reason) => return (Err(reason), false),
        };
        let missing = |plugin: &conflist::Plugin| plugin::find(&plugin.kind, &self.options.bin_dirs).err();
        if let Some(error) = list.plugins.iter().find_map(missing) {
            return (Err(error.to_string()), false);
        }
        if list.version < Version::STATUS {
            return (Ok(()), false);
        }
        match &self.loaded().status {
            Status::Unknown => {
                (Err(format!("the plugins of CNI network {} are being asked for STATUS", list.name)), true)
            }
            asked @ Status::Asked { outcome, .. } => (outcome.clone(), !asked.is_fresh()),
        }
    }

    /// Asks the plugins of a 1.1 network for STATUS, unless that is being done already.
    pub(crate) async fn ask_status(&self) {
        let Ok(_asking) = self.asking.try_lock() else { return };
        let Ok(list) = self.current() else { return };
        // Whoever was asking until now may have had the answer.
        if list.version < Version::STATUS || self.loaded().status.is_fresh() {
            return;
        }
        let session =
            Session { cni: self, list: &list, variables: self.shared_variables(), runtime: Map::new() };
        let mut outcome = Ok(());
        for plugin in &list.plugins {
            if let Err(error) = session.call(plugin, "STATUS", Map::new()).await {
                outcome = Err(error.to_string());
                break;
            }
        }
        let mut loaded = self.loaded();
        if loaded.list.as_ref().is_ok_and(|current| Arc::ptr_eq(current, &list)) {
            loaded.status = Status::Asked { at: Instant::now(), outcome };
        }
    }

    fn shared_variables(&self) -> Vec<(&'static str, String)> {
        let directories: Vec<_> =
            self.options.bin_dirs.iter().map(|path| path.display().to_string()).collect();
        vec![("CNI_PATH", directories.join(":"))]
    }

    fn session<'a>(&'a self, list: &'a Conflist, sandbox: &Sandbox) -> Session<'a> {
        let arguments: Vec<_> =
            arguments(sandbox).iter().map(|(key, value)| format!("{key}={value}")).collect();
        let mut variables = self.shared_variables();
        variables.extend([
            ("CNI_CONTAINERID", sandbox.id.clone()),
            ("CNI_NETNS", netns(&sandbox.netns)),
            ("CNI_IFNAME", INTERFACE.to_owned()),
            ("CNI_ARGS", arguments.join(";")),
        ]);
        Session { cni: self, list, variables, runtime: runtime_configuration(sandbox) }
    }

    /// Connects a sandbox. A failure is followed by DEL.
    pub(crate) async fn add(&self, sandbox: &Sandbox) -> Result<Attachment, CniError> {
        check(sandbox)?;
        let list = self.current().map_err(|reason| CniError::Unavailable { reason })?;
        let _attaching = self.attaching.read().await;
        let session = self.session(&list, sandbox);
        let mut entry = Entry::new(&list, &sandbox.id, INTERFACE);
        entry.netns = sandbox.netns.display().to_string();
        entry.cni_args = arguments(sandbox).map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
        entry.capability_args.clone_from(&session.runtime);
        self.cache.write(&entry)?;
        let outcome = self.attach(&session, &mut entry).await;
        if outcome.is_err()
            && let Err(error) = self.delete(sandbox).await
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(sandbox = sandbox.id, error, "roll-back of the network failed");
        }
        outcome
    }

    async fn attach(&self, session: &Session<'_>, entry: &mut Entry) -> Result<Attachment, CniError> {
        let result = session.add().await?;
        let addresses = result::addresses(&result, INTERFACE).unwrap_or_default();
        if addresses.is_empty() {
            return Err(CniError::NoAddress { network: session.list.name.clone() });
        }
        entry.result = Some(result.clone());
        self.cache.write(entry)?;
        Ok(Attachment { addresses, cni_result: result.into() })
    }

    /// Disconnects a sandbox. Without a cached entry the current configuration is used: an entry written just before the
    /// power failed may be lost while the plugins' own files are not.
    pub(crate) async fn delete(&self, sandbox: &Sandbox) -> Result<(), CniError> {
        check(sandbox)?;
        let entries = self.cache.of(&sandbox.id, INTERFACE)?;
        if entries.is_empty() {
            return match self.current() {
                Ok(list) => Ok(self.session(&list, sandbox).delete(None).await?),
                // Nothing was ever made, or nothing can be done.
                Err(_) => Ok(()),
            };
        }
        let mut outcome = Ok(());
        for (path, entry) in entries {
            outcome = outcome.and(self.delete_entry(&path, &entry, sandbox).await);
        }
        outcome
    }

    async fn delete_entry(&self, path: &Path, entry: &Entry, sandbox: &Sandbox) -> Result<(), CniError> {
        let list = match entry.conflist() {
            Some(list) => Arc::new(list),
            None => self.current().map_err(|reason| CniError::Unavailable { reason })?,
        };
        self.session(&list, sandbox).delete(entry.result.as_ref()).await?;
        Cache::remove(path)
    }

    /// Asks the plugins whether the attachment is still as they made it.
    pub(crate) async fn check(&self, sandbox: &Sandbox) -> Result<(), CniError> {
        check(sandbox)?;
        let entries = self.cache.of(&sandbox.id, INTERFACE)?;
        let made = entries.iter().find_map(|(_, entry)| Some((entry.conflist()?, entry.result.as_ref()?)));
        let (list, result) = made.ok_or_else(|| CniError::NotAttached { id: sandbox.id.clone() })?;
        if list.version < Version::CHECK || list.disable_check {
            return Ok(());
        }
        let session = self.session(&list, sandbox);
        for plugin in &list.plugins {
            session.call(plugin, "CHECK", previous_result(Some(result.clone()))).await?;
        }
        Ok(())
    }

    /// DEL for every attachment of ours that belongs to none of these sandboxes, then GC where the network knows that.
    pub(crate) async fn retain(&self, ids: &HashSet<&str>) -> Result<(), CniError> {
        let mut outcome = Ok(());
        for (path, entry) in self.cache.all(|_| true)? {
            if !entry.is_ours() || ids.contains(entry.container_id.as_str()) {
                continue;
            }
            tracing::info!(sandbox = entry.container_id, "CNI attachment of an unknown sandbox is removed");
            outcome = outcome.and(self.delete_entry(&path, &entry, &sandbox_of(&entry)).await);
        }
        let Ok(list) = self.current() else { return outcome };
        if list.version < Version::STATUS || list.disable_gc {
            return outcome;
        }
        let _alone = self.attaching.write().await;
        let attachments: Vec<_> = self
            .cache
            .all(|_| true)?
            .into_iter()
            .filter(|(_, entry)| entry.network_name == list.name)
            .map(|(_, entry)| json!({"containerID": entry.container_id, "ifname": entry.if_name}))
            .collect();
        let session =
            Session { cni: self, list: &list, variables: self.shared_variables(), runtime: Map::new() };
        for plugin in &list.plugins {
            let valid =
                Map::from_iter([("cni.dev/valid-attachments".to_owned(), attachments.clone().into())]);
            outcome = outcome.and(session.call(plugin, "GC", valid).await.map(drop).map_err(CniError::from));
        }
        outcome
    }
}

/// The path while a namespace is there, else nothing: "the runtime may pass an empty CNI_NETNS when it no longer exists"
/// (section 2, DEL). After a restart of the machine the path may be missing or an ordinary file.
fn netns(path: &Path) -> String {
    let is_namespace = rustix::fs::statfs(path).is_ok_and(|found| u64::try_from(found.f_type) == Ok(NSFS));
    if is_namespace { path.display().to_string() } else { String::new() }
}

/// What kubelet's networks are told of a pod: the convention of Kubernetes' earlier runtimes.
fn arguments(sandbox: &Sandbox) -> [(&'static str, &str); 5] {
    [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &sandbox.namespace),
        ("K8S_POD_NAME", &sandbox.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &sandbox.id),
        ("K8S_POD_UID", &sandbox.uid),
    ]
}

fn check(sandbox: &Sandbox) -> Result<(), CniError> {
    if !conflist::well_formed(&sandbox.id) {
        return Err(CniError::Id { id: sandbox.id.clone() });
    }
    for (key, value) in arguments(sandbox) {
        if value.contains([';', '=', '\0']) {
            return Err(CniError::Argument { key, value: value.to_owned() });
        }
    }
    Ok(())
}

/// Runtime configuration by capability (the specification's `CONVENTIONS.md`); each plugin gets what it declares.
fn runtime_configuration(sandbox: &Sandbox) -> Map<String, Value> {
    let mut runtime = Map::new();
    if !sandbox.ports.is_empty() {
        let mappings = sandbox.ports.iter().map(|port| {
            let mut mapping = json!({
                "hostPort": port.host_port, "containerPort": port.container_port, "protocol": port.protocol.name(),
            });
            if let Some(host_ip) = port.host_ip {
                mapping["hostIP"] = host_ip.to_string().into();
            }
            mapping
        });
        runtime.insert("portMappings".into(), mappings.collect());
    }
    let mut bandwidth = Map::new();
    for (rate, rate_key, burst_key) in [
        (sandbox.ingress_bandwidth, "ingressRate", "ingressBurst"),
        (sandbox.egress_bandwidth, "egressRate", "egressBurst"),
    ] {
        if let Some(rate) = rate {
            bandwidth.insert(rate_key.into(), rate.into());
            bandwidth.insert(burst_key.into(), BURST.into());
        }
    }
    if !bandwidth.is_empty() {
        runtime.insert("bandwidth".into(), bandwidth.into());
    }
    let Sandbox { dns_servers, dns_searches, dns_options, .. } = sandbox;
    if !(dns_servers.is_empty() && dns_searches.is_empty() && dns_options.is_empty()) {
        let dns = json!({"servers": dns_servers, "searches": dns_searches, "options": dns_options});
        runtime.insert("dns".into(), dns);
    }
    if !sandbox.cgroup_parent.is_empty() {
        runtime.insert("cgroupPath".into(), sandbox.cgroup_parent.as_str().into());
    }
    runtime
}

/// As much of a sandbox as its cached entry tells.
fn sandbox_of(entry: &Entry) -> Sandbox {
    let argument = |wanted: &str| {
        entry
            .cni_args
            .iter()
            .find(|(key, _)| key == wanted)
            .map(|(_, value)| value.clone())
            .unwrap_or_default()
    };
    Sandbox {
        id: entry.container_id.clone(),
        name: argument("K8S_POD_NAME"),
        namespace: argument("K8S_POD_NAMESPACE"),
        uid: argument("K8S_POD_UID"),
        netns: PathBuf::from(&entry.netns),
        cgroup_parent: String::new(),
        ports: Vec::new(),
        ingress_bandwidth: None,
        egress_bandwidth: None,
        dns_servers: Vec::new(),
        dns_searches: Vec::new(),
        dns_options: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PortMapping, Protocol};

    #[test]
    fn the_runtime_configuration_of_a_sandbox() {
        let entry: Entry = serde_json::from_value(json!({
            "kind": "cniCacheV1", "containerId": "c1", "config": "", "ifName": "eth0", "networkName": "n",
            "cniArgs": [["K8S_POD_NAME", "web"], ["K8S_POD_NAMESPACE", "shop"]],
        }))
        .unwrap();
        let mut sandbox = sandbox_of(&entry);
        assert_eq!(
            (sandbox.name.as_str(), sandbox.namespace.as_str(), sandbox.uid.as_str()),
            ("web", "shop", "")
        );
        assert_eq!(runtime_configuration(&sandbox), Map::new());
        let port = PortMapping { protocol: Protocol::Sctp, container_port: 1, host_port: 2, host_ip: None };
        sandbox.ports = vec![
            port.clone(),
            PortMapping { host_ip: Some("::1".parse().unwrap()), protocol: Protocol::Udp, ..port },
        ];
        sandbox.egress_bandwidth = Some(1_000_000);
        sandbox.dns_searches = vec!["example".into()];
        sandbox.cgroup_parent = "/kubepods/pod1".into();
        assert_eq!(
            Value::from(runtime_configuration(&sandbox)),
            json!({
                "portMappings": [
                    {"hostPort": 2, "containerPort": 1, "protocol": "sctp"},
                    {"hostPort": 2, "containerPort": 1, "protocol": "udp", "hostIP": "::1"},
                ],
                "bandwidth": {"egressRate": 1_000_000, "egressBurst": 2_147_483_647},
                "dns": {"servers": [], "searches": ["example"], "options": []},
                "cgroupPath": "/kubepods/pod1",
            })
        );
        sandbox.name = "a;IgnoreUnknown=0".into();
        assert!(check(&sandbox).unwrap_err().to_string().starts_with("K8S_POD_NAME \"a;"));
        sandbox.id = "../x".into();
        assert!(matches!(check(&sandbox), Err(CniError::Id { .. })));
    }
}
