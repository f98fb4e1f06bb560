//! SELinux on this node: whether the kernel enforces it, what its policy has for containers, and which labels pods and containers get.
//! How labels are put together is in `podvisor-spec`; here is what has to be looked up.
//!
//! It is on where the kernel has a policy, without a setting of podvisor's: an operator who wants containers unconfined says so to the
//! kernel. What every runtime takes from the policy is its file of contexts for containers; container-selinux brings it.

mod relabel;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use podvisor_proto::cri;
use podvisor_spec::selinux::{Confinement, Labels};

use crate::error::PodError;
pub(crate) use relabel::{LabelError, label_file, relabel};

const FIELD: &str = "config.linux.security_context.selinux_options";

/// Where a policy is looked for.
#[derive(Debug, Clone)]
struct Places {
    /// selinuxfs, which is only there when the kernel has SELinux.
    selinuxfs: PathBuf,
    /// Configuration, and one directory for each policy.
    etc: PathBuf,
    /// What container-selinux brings for all policies.
    contexts: PathBuf,
    /// The daemon's own context.
    own: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            selinuxfs: "/sys/fs/selinux".into(),
            etc: "/etc/selinux".into(),
            contexts: "/usr/share/containers/selinux/contexts".into(),
            own: "/proc/self/attr/current".into(),
        }
    }
}

/// SELinux as it was found at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SeLinux {
    /// Not in this kernel, switched off, or without a policy.
    Off,
    /// On, but its policy has nothing for containers, and why.
    WithoutContexts(String),
    On(Box<Policy>),
}

/// The policy that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// `targeted` on most machines.
    name: String,
    /// Otherwise it only logs what it would deny.
    enforcing: bool,
    labels: Labels,
    /// Takes a context and answers whether the policy knows it.
    validity: PathBuf,
}

impl SeLinux {
    pub(crate) fn open() -> Self {
        let found = Self::look(&Places::default());
        if let Self::WithoutContexts(why) = &found {
            tracing::warn!(why, "containers run without SELinux labels");
        }
        found
    }

    /// The same without a word in the log.
    pub(crate) fn find() -> Self {
        Self::look(&Places::default())
    }

    fn look(places: &Places) -> Self {
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        let enforce = places.selinuxfs.join("enforce");
        let own = read(&places.own);
        // Before a policy is loaded everything is of the kernel's.
        if !enforce.exists() || matches!(own.trim_end_matches(['\0', '\n']), "" | "kernel") {
            return Self::Off;
        }
        let name = policy_name(&read(&places.etc.join("config")));
        let own = places.etc.join(&name).join("contexts/lxc_contexts");
        let path = if places.contexts.exists() { &places.contexts } else { &own };
        let labels = match std::fs::read_to_string(path) {
            Ok(text) => Labels::of_policy(&text).map_err(|error| crate::error::chain(&error)),
            Err(error) => Err(error.to_string()),
        };
        match labels {
            Ok(labels) => Self::On(Box::new(Policy {
                name,
                enforcing: read(&enforce).trim() == "1",
                labels,
                validity: places.selinuxfs.join("context"),
            })),
            Err(why) => Self::WithoutContexts(format!(
                "policy {name} has no contexts for containers: {}: {why}; install container-selinux",
                path.display()
            )),
        }
    }

    /// What an operator has to know, if anything.
    pub(crate) fn complaint(&self) -> Option<&str> {
        match self {
            Self::WithoutContexts(why) => Some(why),
            Self::Off | Self::On(_) => None,
        }
    }

    /// Labels for a pod, still with the policy's level in place of one of its own. What was asked for and cannot be is refused.
    pub(crate) fn of_pod(&self, config: &cri::PodSandboxConfig) -> Result<Option<Labels>, PodError> {
        let options = pod_options(config);
        let Some(policy) = self.policy(options)? else { return Ok(None) };
        let labels = policy.labels.of_pod(options)?;
        if options.is_some() {
            policy.check(&[&labels.process, &labels.file])?;
        }
        Ok(Some(labels))
    }

    /// How a container of a pod with the labels `pod` is confined.
    pub(crate) fn of_container(
        &self,
        pod: Option<&Labels>,
        sandbox: &cri::PodSandboxConfig,
        config: &cri::ContainerConfig,
    ) -> Result<Confinement, PodError> {
        let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let options = given(security.and_then(|security| security.selinux_options.as_ref()));
        let Some(policy) = self.policy(options)? else { return Ok(Confinement::default()) };
        let confinement = Confinement::of_container(pod, sandbox, config)?;
        if options.is_some() {
            let labels: Vec<_> = confinement.process.iter().chain(&confinement.files).collect();
            policy.check(&labels)?;
        }
        Ok(confinement)
    }

    /// The policy that `options` are for; `None`: there is none, and nothing to refuse.
    fn policy(&self, options: Option<&cri::SeLinuxOption>) -> Result<Option<&Policy>, PodError> {
        match (self, options) {
            (Self::On(policy), _) => Ok(Some(policy)),
            (Self::Off, Some(options)) => {
                tracing::info!(?options, "SELinux is off on this node: its options have no effect");
                Ok(None)
            }
            (Self::WithoutContexts(why), Some(_)) => {
                Err(PodError::invalid(FIELD, format!("cannot be enforced: {why}")))
            }
            (Self::Off | Self::WithoutContexts(_), None) => Ok(None),
        }
    }
}

impl Policy {
    /// Refuses a context that the kernel does not know: it would only say so when the container starts.
    fn check(&self, contexts: &[&podvisor_spec::selinux::Context]) -> Result<(), PodError> {
        for context in contexts {
            let Ok(mut file) = std::fs::File::options().write(true).open(&self.validity) else { continue };
            // In one call, with a NUL at its end (security/selinux/selinuxfs.c, sel_write_context).
            if let Err(error) = file.write_all(format!("{context}\0").as_bytes()) {
                let why = format!(
                    "the kernel does not take {context} ({error}): policy {} has no such user, role, type or level, or not together",
                    self.name
                );
                return Err(PodError::invalid(FIELD, why));
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = if self.enforcing { "enforcing" } else { "permissive" };
        let Labels { process, file } = &self.labels;
        write!(
            f,
            "policy {}, {mode}: containers run as {process}, their files are {file}, with a level of each pod's own",
            self.name
        )
    }
}

/// What a pod asks for; `None`: nothing.
pub(crate) fn pod_options(config: &cri::PodSandboxConfig) -> Option<&cri::SeLinuxOption> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    given(security.and_then(|security| security.selinux_options.as_ref()))
}

fn given(options: Option<&cri::SeLinuxOption>) -> Option<&cri::SeLinuxOption> {
    options.filter(|options| **options != cri::SeLinuxOption::default())
}

/// `SELINUXTYPE` of selinux_config(5), whose name is a directory.
fn policy_name(config: &str) -> String {
    let set = config.lines().filter_map(|line| line.trim().strip_prefix("SELINUXTYPE=")).next_back();
    let name = set.map(str::trim).filter(|name| !name.is_empty() && !name.contains('/'));
    name.unwrap_or("targeted").to_owned()
}

#[cfg(test)]
mod tests;
