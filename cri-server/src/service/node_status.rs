//! Status, Version, RuntimeConfig, UpdateRuntimeConfig: what the node is and whether it can run pods.

use std::collections::HashMap;

use podvisor_cgroup::Driver;
use podvisor_proto::cri;
use tonic::Status;

use crate::node::Node;

/// The version of the CRI's own API, as kubelet compares it.
const API_VERSION: &str = "v1";

pub(super) fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        // The version of this very message, fixed since the CRI began.
        version: "0.1.0".into(),
        runtime_name: "podvisor".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: API_VERSION.into(),
    }
}

pub(super) fn status(node: &Node, verbose: bool) -> cri::StatusResponse {
    let handlers = node.handlers();
    let config = node.config();
    let trusted = &config.runtime.trusted_handler;
    let runtime = match handlers.unusable.get(trusted) {
        Some(why) => condition("RuntimeReady", false, "HandlerNotUsable", &format!("{trusted}: {why}")),
        None => condition("RuntimeReady", true, "", ""),
    };
    let network = match node.network.ready() {
        Ok(()) => condition("NetworkReady", true, "", ""),
        Err(why) => condition("NetworkReady", false, "NetworkNotReady", &why),
    };
    let usable = || handlers.configured.keys().filter(|name| !handlers.unusable.contains_key(*name));
    let mut runtime_handlers: Vec<_> = usable()
        .map(|name| cri::RuntimeHandler {
            name: name.clone(),
            features: handlers.features.get(name).copied(),
        })
        .collect();
    // Kubelet asks the nameless handler for pods without RuntimeClass.
    let untrusted = config.runtime.untrusted_handler.as_deref();
    runtime_handlers.push(cri::RuntimeHandler {
        name: String::new(),
        features: Some(crate::features::of_nameless(&handlers, trusted, untrusted)),
    });
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions: vec![runtime, network] }),
        info: if verbose { info(node) } else { HashMap::new() },
        runtime_handlers,
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
            mount_options: true,
        }),
    }
}

fn condition(r#type: &str, status: bool, reason: &str, message: &str) -> cri::RuntimeCondition {
    cri::RuntimeCondition { r#type: r#type.into(), status, reason: reason.into(), message: message.into() }
}

/// `config` is where kubeadm looks for `sandboxImage`; without a pause image there is none to name.
fn info(node: &Node) -> HashMap<String, String> {
    let config = node.config();
    let handlers = node.handlers();
    let mut shown = serde_json::json!({
        "root": config.root,
        // Where critest looks for the file system that must have id-mapped mounts: for us that of the layers.
        "stateDir": config.root.join("images"),
        "run": config.run,
        "cgroupDriver": node.driver.name(),
        "trustedHandler": config.runtime.trusted_handler,
        "untrustedHandler": config.runtime.untrusted_handler,
        "defaultWorkloadTrust": config.runtime.default_workload_trust.to_string(),
    });
    if let Some(why) = node.apparmor.complaint() {
        shown["appArmor"] = why.into();
    }
    if let Some(why) = node.selinux.complaint() {
        shown["seLinux"] = why.into();
    }
    if !config.image.pause_image.is_empty() {
        shown["sandboxImage"] = config.image.pause_image.clone().into();
    }
    let handlers = serde_json::json!({
        "versions": handlers.versions,
        "unusable": handlers.unusable,
        "withoutUserNamespaces": handlers.without_user_namespaces,
    });
    HashMap::from([("config".to_owned(), shown.to_string()), ("handlers".to_owned(), handlers.to_string())])
}

pub(super) fn runtime_config(node: &Node) -> cri::RuntimeConfigResponse {
    let driver = match node.driver {
        Driver::Systemd => cri::CgroupDriver::Systemd,
        Driver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
    };
    cri::RuntimeConfigResponse {
        linux: Some(cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() }),
    }
}

pub(super) async fn update_runtime_config(
    node: &Node,
    request: cri::UpdateRuntimeConfigRequest,
) -> Result<cri::UpdateRuntimeConfigResponse, Status> {
    let cidr = request
        .runtime_config
        .and_then(|config| config.network_config)
        .map(|network| network.pod_cidr)
        .unwrap_or_default();
    if !cidr.is_empty() {
        node.network
            .set_pod_cidr(&cidr)
            .await
            .map_err(|error| Status::invalid_argument(crate::error::chain(&error)))?;
    }
    Ok(cri::UpdateRuntimeConfigResponse {})
}
