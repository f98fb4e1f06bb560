//! The container's spec, put together from its parts.

use oci_spec::runtime::{Linux, LinuxNamespaceType, Root, Spec};

use crate::error::{Result, SpecError, absolute_path};
use crate::{
    Input, annotations, devices, mounts, namespaces, process, resources, security, user, user_namespace,
};

/// The version that says least: crun before 1.9 takes only 1.0.x, and every field here was in 1.0 or is ignored where it is not known.
const OCI_VERSION: &str = "1.0.2";

/// The container's spec.
pub fn container(input: &Input<'_>) -> Result<Spec> {
    let config = input.config;
    if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty()) {
        return Err(SpecError::invalid("config.metadata.name", "is empty"));
    }
    if input.sandbox.metadata.is_none() {
        return Err(SpecError::invalid("sandbox_config.metadata", "is missing"));
    }
    let none = podvisor_proto::cri::LinuxContainerSecurityContext::default();
    let security = security(config).unwrap_or(&none);
    let privileged = security.privileged;
    let sandbox = input.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if privileged && !sandbox.is_some_and(|sandbox| sandbox.privileged) {
        let why = "a privileged container needs a privileged pod";
        return Err(SpecError::invalid("config.linux.security_context.privileged", why));
    }
    let modes = namespaces::modes(input)?;
    let image_user =
        input.image.config().as_ref().and_then(|image| image.user().as_deref()).unwrap_or_default();
    let user = user::resolve(Some(security), image_user, input.passwd, input.group)?;
    user_namespace::check(modes.user, &user, security)?;
    let (mounts, root_propagation) = mounts::of_container(input, privileged, modes.user)?;
    let (nodes, rules) = devices::of_container(input, privileged)?;
    let requested = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let mut resources = resources::of_container(requested, input.host, input.default_pids)?;
    resources.set_devices(Some(rules));

    let namespaces = namespaces::list(input, modes, privileged);
    let new_uts = namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Uts && namespace.path().is_none());
    let new_user = namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User && namespace.path().is_none());
    // One that is joined has its mappings, and runtimes warn when they are told again.
    let mapped = modes.user.filter(|_| new_user);
    let mut linux = Linux::default();
    linux
        .set_uid_mappings(mapped.map(|user| mounts::whole(user.uids)))
        .set_gid_mappings(mapped.map(|user| mounts::whole(user.gids)))
        .set_resources(Some(resources))
        .set_cgroups_path(Some(input.cgroups_path.clone().into()))
        .set_namespaces(Some(namespaces))
        .set_devices(Some(nodes))
        .set_seccomp(input.seccomp.filter(|_| !privileged).cloned())
        .set_rootfs_propagation(root_propagation)
        .set_mount_label(input.selinux.files.as_ref().map(ToString::to_string))
        // Exactly what was asked for: kubelet sends the default list, and none for `procMount: Unmasked`.
        .set_masked_paths(Some(hidden_paths("masked_paths", &security.masked_paths, privileged)?))
        .set_readonly_paths(Some(hidden_paths("readonly_paths", &security.readonly_paths, privileged)?));

    let mut root = Root::default();
    root.set_path(input.rootfs.clone()).set_readonly(Some(security.readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts))
        .set_process(Some(process::first(input, &user)?))
        // A namespace that is joined has its name already.
        .set_hostname(new_uts.then(|| process::hostname(input.sandbox)))
        .set_annotations(Some(annotations::of_container(input)))
        .set_linux(Some(linux));
    Ok(spec)
}

fn hidden_paths(name: &str, paths: &[String], privileged: bool) -> Result<Vec<String>> {
    let field = |index: usize| format!("config.linux.security_context.{name}[{index}]");
    let checked = paths.iter().enumerate().map(|(index, path)| absolute_path(|| field(index), path));
    let checked: Vec<String> = checked.collect::<Result<_>>()?;
    Ok(if privileged { Vec::new() } else { checked })
}

#[cfg(test)]
mod tests;
