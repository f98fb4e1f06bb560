//! A pod's user namespace (KEP-127): which ids it has, and who may be asked for in it.

use podvisor_proto::cri::{self, NamespaceMode};

use crate::error::{Result, SpecError};
use crate::namespaces::mode;
use crate::user::User;

/// Ids of a pod with a user namespace: inside they begin at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserNamespace {
    /// Users.
    pub uids: Ids,
    /// Groups.
    pub gids: Ids,
}

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// What 0 inside is on the node. Never 0.
    pub first: u32,
    /// How many; at least one.
    pub length: u32,
}

impl Ids {
    /// What an id inside is on the node.
    pub fn outside(self, id: u32) -> Option<u32> {
        (id < self.length).then(|| self.first + id)
    }
}

/// The user namespace that a pod asks for; `None`: the node's. `field` is the path of its namespace options.
pub fn user_namespace(field: &str, options: Option<&cri::NamespaceOption>) -> Result<Option<UserNamespace>> {
    let Some(options) = options else { return Ok(None) };
    let Some(user) = &options.userns_options else { return Ok(None) };
    let field = format!("{field}.userns_options");
    match mode(&format!("{field}.mode"), Some(user.mode))? {
        NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => return Ok(None),
        NamespaceMode::Node => {
            let why = "mappings are given, but the mode is NODE";
            return Err(SpecError::invalid(format!("{field}.uids"), why));
        }
        NamespaceMode::Pod => {}
        NamespaceMode::Container | NamespaceMode::Target => {
            return Err(SpecError::invalid(format!("{field}.mode"), "only POD and NODE are possible"));
        }
    }
    let uids = ids(&format!("{field}.uids"), &user.uids)?;
    let gids = ids(&format!("{field}.gids"), &user.gids)?;
    // A namespace of the node belongs to the node's user namespace, where the pod's root may do nothing: no sysfs, mqueue or /proc
    // could be mounted (mount_namespaces(7)).
    let node = NamespaceMode::Node as i32;
    for (name, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        if mode == node {
            let why = format!("a pod with a user namespace cannot use the node's {name} namespace");
            return Err(SpecError::invalid(field, why));
        }
    }
    Ok(Some(UserNamespace { uids, gids }))
}

fn ids(field: &str, mappings: &[cri::IdMapping]) -> Result<Ids> {
    let [mapping] = mappings else {
        let why = format!("has {} ranges; exactly one is possible", mappings.len());
        return Err(SpecError::invalid(field, why));
    };
    let field = |name: &str| format!("{field}[0].{name}");
    if mapping.container_id != 0 {
        return Err(SpecError::invalid(field("container_id"), "must be 0: a pod needs a root"));
    }
    if mapping.host_id == 0 {
        return Err(SpecError::invalid(field("host_id"), "would make the pod's root the node's"));
    }
    // (uid_t) -1 is no id.
    if mapping.length == 0 || mapping.host_id.checked_add(mapping.length).is_none() {
        return Err(SpecError::invalid(field("length"), "is empty or goes beyond the last id"));
    }
    Ok(Ids { first: mapping.host_id, length: mapping.length })
}

/// A container's user namespace is its pod's. One that says nothing means the pod's, too.
pub(crate) fn of_container(
    pod: Option<UserNamespace>,
    field: &str,
    options: Option<&cri::NamespaceOption>,
) -> Result<()> {
    // The pid mode of a container may differ, and is checked with the pod's.
    let asked = options.map(|options| cri::NamespaceOption {
        userns_options: options.userns_options.clone(),
        ..cri::NamespaceOption::default()
    });
    if let (Some(_), Some(options)) = (pod, options)
        && options.pid == NamespaceMode::Node as i32
    {
        let why = "a pod with a user namespace cannot use the node's pid namespace";
        return Err(SpecError::invalid(format!("{field}.pid"), why));
    }
    let said = asked.as_ref().is_some_and(|options| options.userns_options.is_some());
    if user_namespace(field, asked.as_ref())? != pod && (said || pod.is_none()) {
        let why = "differs from the pod's: all containers of a pod share one user namespace";
        return Err(SpecError::invalid(format!("{field}.userns_options"), why));
    }
    Ok(())
}

/// Refuses ids that the namespace does not have: nobody could become them.
pub(crate) fn check(
    namespace: Option<UserNamespace>,
    user: &User,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<()> {
    let Some(namespace) = namespace else { return Ok(()) };
    let field = |requested: bool, name: &str| {
        if requested { format!("config.linux.security_context.{name}") } else { "image user".to_owned() }
    };
    let refused = |field: String, kind: &str, id: u32, ids: Ids| {
        let last = ids.length - 1;
        Err(SpecError::invalid(
            field,
            format!("{kind} {id} is not in the pod's user namespace, which has 0 to {last}"),
        ))
    };
    if user.uid >= namespace.uids.length {
        let named = security.run_as_user.is_some() || !security.run_as_username.is_empty();
        return refused(field(named, "run_as_user"), "user", user.uid, namespace.uids);
    }
    if user.gid >= namespace.gids.length {
        let named = security.run_as_group.is_some();
        return refused(field(named, "run_as_group"), "group", user.gid, namespace.gids);
    }
    match user.supplemental_groups.iter().find(|group| **group >= namespace.gids.length) {
        Some(group) => {
            let requested = security.supplemental_groups.contains(&i64::from(*group));
            refused(field(requested, "supplemental_groups"), "group", *group, namespace.gids)
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
