//! A vendor's file as it is written, and what makes it one that cannot be used.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

use super::name::{is_device, is_kind};

/// Why a file or its devices cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{place}: {why}")]
pub struct CdiError {
    /// Part of the file.
    pub(crate) place: String,
    pub(crate) why: String,
}

impl CdiError {
    pub(crate) fn new(place: impl Into<String>, why: impl Into<String>) -> Self {
        Self { place: place.into(), why: why.into() }
    }
}

/// One file: devices of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Document {
    pub cdi_version: String,
    /// `vendor/class`.
    pub kind: String,
    #[serde(default, deserialize_with = "null")]
    pub annotations: BTreeMap<String, Text>,
    #[serde(default, deserialize_with = "null")]
    pub devices: Vec<Device>,
    /// For every container that gets any of the devices.
    #[serde(default, deserialize_with = "null")]
    pub container_edits: ContainerEdits,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Device {
    pub name: Text,
    #[serde(default, deserialize_with = "null")]
    pub annotations: BTreeMap<String, Text>,
    #[serde(default, deserialize_with = "null")]
    pub container_edits: ContainerEdits,
}

/// What is done to a container's spec.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct ContainerEdits {
    #[serde(deserialize_with = "null")]
    pub env: Vec<Text>,
    #[serde(deserialize_with = "null")]
    pub device_nodes: Vec<DeviceNode>,
    /// Since 1.1.0.
    #[serde(deserialize_with = "null")]
    pub net_devices: Vec<NetDevice>,
    #[serde(deserialize_with = "null")]
    pub hooks: Vec<Hook>,
    #[serde(deserialize_with = "null")]
    pub mounts: Vec<Mount>,
    /// Since 0.7.0.
    pub intel_rdt: Option<IntelRdt>,
    /// Since 0.7.0.
    #[serde(deserialize_with = "null", rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

/// A device node in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs)]
pub struct DeviceNode {
    pub path: String,
    /// Since 0.5.0. Empty: the same as `path`.
    #[serde(default, deserialize_with = "null")]
    pub host_path: String,
    /// `b`, `c`, `u` or `p`; empty: as on the host.
    #[serde(default, deserialize_with = "null", rename = "type")]
    pub kind: String,
    #[serde(default, deserialize_with = "null")]
    pub major: i64,
    #[serde(default, deserialize_with = "null")]
    pub minor: i64,
    pub file_mode: Option<u32>,
    #[serde(default, deserialize_with = "null")]
    pub permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// A network device of the host that moves into the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs)]
pub struct NetDevice {
    pub host_interface_name: String,
    pub name: String,
}

/// A mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Mount {
    pub host_path: String,
    pub container_path: String,
    #[serde(default, deserialize_with = "null")]
    pub options: Vec<String>,
    /// Since 0.4.0. Empty: a bind mount.
    #[serde(default, deserialize_with = "null", rename = "type")]
    pub kind: String,
}

/// A program that the OCI runtime calls.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Hook {
    #[serde(rename = "hookName")]
    pub name: String,
    pub path: String,
    #[serde(default, deserialize_with = "null")]
    pub args: Vec<Text>,
    #[serde(default, deserialize_with = "null")]
    pub env: Vec<Text>,
    pub timeout: Option<i64>,
}

/// Cache and memory bandwidth.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct IntelRdt {
    #[serde(rename = "closID")]
    pub clos_id: String,
    pub l3_cache_schema: String,
    pub mem_bw_schema: String,
    /// Since 1.1.0.
    #[serde(deserialize_with = "null")]
    pub schemata: Vec<String>,
    /// Since 1.1.0.
    pub enable_monitoring: bool,
}

/// A string that YAML may take for something else: `name: 0` means the device "0".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text(pub String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Scalar {
            Text(String),
            Number(serde_json::Number),
            Switch(bool),
        }
        Ok(Self(match Scalar::deserialize(deserializer)? {
            Scalar::Text(text) => text,
            Scalar::Number(number) => number.to_string(),
            Scalar::Switch(on) => on.to_string(),
        }))
    }
}

/// `null`, as YAML has it behind a key without a value, is as good as no key.
fn null<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Versions of SPEC.md that are understood.
const VERSIONS: [&str; 8] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];

impl Document {
    /// Refuses what contradicts the specification, so that every other runtime sees the same devices.
    pub fn check(&self) -> Result<(), CdiError> {
        let version = self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version);
        let Some(version) = VERSIONS.iter().position(|known| *known == version) else {
            let why = format!("{version:?} is none of the known versions ({})", VERSIONS.join(", "));
            return Err(CdiError::new("cdiVersion", why));
        };
        if !is_kind(&self.kind) {
            return Err(CdiError::new("kind", format!("{:?} is not of the form vendor/class", self.kind)));
        }
        if self.devices.is_empty() {
            return Err(CdiError::new("devices", "there are none"));
        }
        self.container_edits.check("containerEdits")?;
        let mut names = BTreeSet::new();
        for (index, device) in self.devices.iter().enumerate() {
            let place = format!("devices[{index}]");
            let name = &device.name.0;
            if !is_device(name) {
                return Err(CdiError::new(format!("{place}.name"), format!("{name:?} is no device name")));
            }
            if !names.insert(name) {
                return Err(CdiError::new(format!("{place}.name"), format!("{name:?} is there twice")));
            }
            if device.container_edits == ContainerEdits::default() {
                return Err(CdiError::new(format!("{place}.containerEdits"), "there are none"));
            }
            device.container_edits.check(&format!("{place}.containerEdits"))?;
        }
        let (needed, what) = self.needs();
        if VERSIONS.iter().position(|known| *known == needed) > Some(version) {
            return Err(CdiError::new("cdiVersion", format!("must be at least {needed} for {what}")));
        }
        Ok(())
    }

    /// The earliest version that has everything that is used.
    fn needs(&self) -> (&'static str, &'static str) {
        let edits = || {
            self.devices
                .iter()
                .map(|device| &device.container_edits)
                .chain(std::iter::once(&self.container_edits))
        };
        let rdt = || edits().filter_map(|edits| edits.intel_rdt.as_ref());
        let class = self.kind.split_once('/').map_or("", |(_, class)| class);
        let digit = |device: &Device| device.name.0.starts_with(|first: char| first.is_ascii_digit());
        if edits().any(|edits| !edits.net_devices.is_empty()) {
            ("1.1.0", "netDevices")
        } else if rdt().any(|rdt| !rdt.schemata.is_empty() || rdt.enable_monitoring) {
            ("1.1.0", "intelRdt.schemata and enableMonitoring")
        } else if rdt().next().is_some() {
            ("0.7.0", "intelRdt")
        } else if edits().any(|edits| !edits.additional_gids.is_empty()) {
            ("0.7.0", "additionalGids")
        } else if !self.annotations.is_empty()
            || self.devices.iter().any(|device| !device.annotations.is_empty())
        {
            ("0.6.0", "annotations")
        } else if class.contains('.') {
            ("0.6.0", "a class with a dot")
        } else if self.devices.iter().any(digit) {
            ("0.5.0", "a device name that begins with a digit")
        } else if edits().flat_map(|edits| &edits.device_nodes).any(|node| !node.host_path.is_empty()) {
            ("0.5.0", "hostPath of a device node")
        } else if edits().flat_map(|edits| &edits.mounts).any(|mount| !mount.kind.is_empty()) {
            ("0.4.0", "the type of a mount")
        } else {
            ("0.3.0", "")
        }
    }
}

/// When a hook may be called (OCI runtime spec, config.md, "POSIX-platform Hooks").
const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

impl ContainerEdits {
    fn check(&self, place: &str) -> Result<(), CdiError> {
        let error = |at: String, why: String| Err(CdiError::new(format!("{place}.{at}"), why));
        let environment = |at: &str, env: &[Text]| match env.iter().find(|text| is_no_variable(&text.0)) {
            Some(Text(text)) => error(at.to_owned(), format!("{text:?} is not of the form NAME=value")),
            None => Ok(()),
        };
        environment("env", &self.env)?;
        for (index, node) in self.device_nodes.iter().enumerate() {
            let at = |name: &str| format!("deviceNodes[{index}].{name}");
            if !is_absolute(&node.path) {
                return error(at("path"), format!("{:?} is no absolute path", node.path));
            }
            if !["", "b", "c", "u", "p"].contains(&node.kind.as_str()) {
                return error(at("type"), format!("{:?} is none of b, c, u and p", node.kind));
            }
            if !node.permissions.chars().all(|letter| "rwm".contains(letter)) {
                return error(
                    at("permissions"),
                    format!("{:?} has letters other than r, w and m", node.permissions),
                );
            }
        }
        for (index, mount) in self.mounts.iter().enumerate() {
            let at = |name: &str| format!("mounts[{index}].{name}");
            if mount.host_path.is_empty() {
                return error(at("hostPath"), "is empty".into());
            }
            if !is_absolute(&mount.container_path) {
                return error(at("containerPath"), format!("{:?} is no absolute path", mount.container_path));
            }
        }
        for (index, hook) in self.hooks.iter().enumerate() {
            let at = |name: &str| format!("hooks[{index}].{name}");
            if !HOOKS.contains(&hook.name.as_str()) {
                let why = format!("{:?} is none of {}", hook.name, HOOKS.join(", "));
                return error(at("hookName"), why);
            }
            if !is_absolute(&hook.path) {
                return error(at("path"), format!("{:?} is no absolute path", hook.path));
            }
            if hook.timeout.is_some_and(|seconds| seconds <= 0) {
                return error(at("timeout"), "is not more than 0 seconds".into());
            }
            environment(&at("env"), &hook.env)?;
        }
        let (mut hosts, mut names) = (BTreeSet::new(), BTreeSet::new());
        for (index, device) in self.net_devices.iter().enumerate() {
            let at = |name: &str| format!("netDevices[{index}].{name}");
            for (field, name, seen) in [
                ("hostInterfaceName", &device.host_interface_name, &mut hosts),
                ("name", &device.name, &mut names),
            ] {
                if name.is_empty() {
                    return error(at(field), "is empty".into());
                }
                if !seen.insert(name) {
                    return error(at(field), format!("{name:?} is there twice"));
                }
            }
        }
        if let Some(rdt) = &self.intel_rdt {
            let id = rdt.clos_id.as_str();
            if id != "/" && (id.len() >= 4096 || [".", ".."].contains(&id) || id.contains(['/', '\n'])) {
                return error("intelRdt.closID".into(), format!("{id:?} is no name of a directory"));
            }
        }
        Ok(())
    }
}

fn is_no_variable(text: &str) -> bool {
    text.contains('\0') || text.find('=').is_none_or(|at| at == 0)
}

fn is_absolute(path: &str) -> bool {
    path.starts_with('/') && !path.contains('\0')
}

#[cfg(test)]
mod tests;
