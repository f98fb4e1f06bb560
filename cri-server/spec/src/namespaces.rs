//! Which namespaces a container joins, gets or shares with the node.
//!
//! Network and IPC belong to the pod: the sandbox's modes decide, because its namespaces were made by them. The pid mode is the container's own.
//! A mode that asks for isolation never ends in the node's namespace: without a path it gets a new one.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};
use podvisor_proto::cri;
use podvisor_proto::cri::NamespaceMode;

use crate::Input;
use crate::error::{Result, SpecError};
use crate::user_namespace::{self, UserNamespace, user_namespace};

const FIELD: &str = "config.linux.security_context.namespace_options";
const SANDBOX_FIELD: &str = "sandbox_config.linux.security_context.namespace_options";

/// Modes after validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Modes {
    pub(crate) network: NamespaceMode,
    pub(crate) ipc: NamespaceMode,
    pub(crate) pid: NamespaceMode,
    pub(crate) user: Option<UserNamespace>,
}

pub(crate) fn modes(input: &Input<'_>) -> Result<Modes> {
    let sandbox = input.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let sandbox = sandbox.and_then(|security| security.namespace_options.as_ref());
    let own = input.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let own = own.and_then(|security| security.namespace_options.as_ref());
    let user = user_namespace(SANDBOX_FIELD, sandbox)?;
    user_namespace::of_container(user, FIELD, own)?;

    let pod_wide = |name: &str, pick: fn(&cri::NamespaceOption) -> i32| -> Result<NamespaceMode> {
        let of_sandbox = mode(&format!("{SANDBOX_FIELD}.{name}"), sandbox.map(pick))?;
        let field = format!("{FIELD}.{name}");
        let of_container = mode(&field, own.map(pick))?;
        for mode in [of_sandbox, of_container] {
            if mode == NamespaceMode::Target {
                return Err(SpecError::invalid(field, "TARGET is possible for pid only"));
            }
        }
        // The other way round is an absent field: 0 is POD.
        if of_container == NamespaceMode::Node && of_sandbox != NamespaceMode::Node {
            return Err(SpecError::invalid(field, "is NODE, but the pod has a namespace of its own"));
        }
        Ok(of_sandbox)
    };
    let network = pod_wide("network", |options| options.network)?;
    let ipc = pod_wide("ipc", |options| options.ipc)?;
    let pid = mode(&format!("{FIELD}.pid"), own.map(|options| options.pid))?;
    let target = own.is_some_and(|options| !options.target_id.is_empty());
    if pid == NamespaceMode::Target && !target {
        return Err(SpecError::invalid(format!("{FIELD}.target_id"), "is empty, but the pid mode is TARGET"));
    }
    if pid == NamespaceMode::Target && input.namespaces.pid.is_none() {
        let why = "names a container that has no pid namespace to join";
        return Err(SpecError::invalid(format!("{FIELD}.target_id"), why));
    }
    Ok(Modes { network, ipc, pid, user })
}

pub(crate) fn mode(field: &str, value: Option<i32>) -> Result<NamespaceMode> {
    let value = value.unwrap_or_default();
    NamespaceMode::try_from(value)
        .map_err(|_| SpecError::invalid(field, format!("{value} is not a namespace mode")))
}

pub(crate) fn list(input: &Input<'_>, modes: Modes, privileged: bool) -> Vec<LinuxNamespace> {
    let paths = &input.namespaces;
    let mut list = vec![namespace(LinuxNamespaceType::Mount, None)];
    if modes.user.is_some() {
        list.push(namespace(LinuxNamespaceType::User, paths.user.clone()));
    }
    if modes.network != NamespaceMode::Node {
        list.push(namespace(LinuxNamespaceType::Network, paths.net.clone()));
        // The host name goes with the network: on the node's network a pod has the node's name.
        list.push(namespace(LinuxNamespaceType::Uts, paths.uts.clone()));
    }
    if modes.ipc != NamespaceMode::Node {
        list.push(namespace(LinuxNamespaceType::Ipc, paths.ipc.clone()));
    }
    match modes.pid {
        NamespaceMode::Node => {}
        NamespaceMode::Container => list.push(namespace(LinuxNamespaceType::Pid, None)),
        NamespaceMode::Pod | NamespaceMode::Target => {
            list.push(namespace(LinuxNamespaceType::Pid, paths.pid.clone()));
        }
    }
    // On version 1 a cgroup namespace would hide the paths that tools compute from /proc/self/cgroup; a privileged container manages
    // the node's cgroups (systemd in a pod, cAdvisor).
    if input.host.cgroup_v2 && !privileged {
        list.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    list
}

fn namespace(kind: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path);
    namespace
}

#[cfg(test)]
mod tests;
