//! CDI: devices that vendors describe in files, asked for by name. What the files mean is in `podvisor_spec::cdi`; here is where they
//! are ([`files`]), how they are written ([`yaml`]), and who asks.
//!
//! A container asks by the CRI's field and, as before there was one, by annotations; NRI plugins ask too. A device that cannot be found
//! fails the container: without it the program would fail later, and nobody would know why.

mod files;
mod yaml;

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use podvisor_proto::cri;
use podvisor_spec::cdi::{ANNOTATION_PREFIX, CdiError, HostNode, apply, is_qualified};

use crate::error::PodError;
use crate::node::Node;
use files::{Devices, Files};

/// Why a container cannot have the devices it asks for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InjectError {
    #[error("CDI device {name:?} is unknown: {}", searched(directories, problems))]
    Unknown { name: String, directories: Vec<PathBuf>, problems: Vec<String> },
    #[error("CDI device {name:?} cannot be given to the container by {path}")]
    Edits { name: String, path: PathBuf, source: CdiError },
}

/// Where devices were looked for, and what may be why they were not found.
fn searched(directories: &[PathBuf], problems: &[String]) -> String {
    if directories.is_empty() {
        return "runtime.cdi_spec_dirs is empty in podvisor's configuration".to_owned();
    }
    let names: Vec<_> = directories.iter().map(|path| path.display().to_string()).collect();
    let mut text = format!("no *.json or *.yaml in {} describes it", names.join(", "));
    for problem in problems {
        // Writing to a string cannot fail.
        let _ = write!(text, "; {problem}");
    }
    text
}

/// What was read of vendors' files.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    files: Files,
}

/// The devices that a container asks for, each once. kubelet sends those of device plugins and of claims; annotations are the
/// container's, which are kubelet's own, never the pod's, which are anybody's.
pub(crate) fn asked(config: &cri::ContainerConfig) -> Result<Vec<String>, PodError> {
    let mut asked: Vec<String> = Vec::new();
    let mut add = |field: String, name: &str| {
        if !is_qualified(name) {
            let why = format!("{name:?} is not of the form vendor.com/class=device");
            return Err(PodError::invalid(field, why));
        }
        if !asked.iter().any(|known| known == name) {
            asked.push(name.to_owned());
        }
        Ok(())
    };
    for (index, device) in config.cdi_devices.iter().enumerate() {
        add(format!("config.CDI_devices[{index}].name"), &device.name)?;
    }
    let mut annotations: Vec<_> =
        config.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX)).collect();
    annotations.sort();
    for (key, value) in annotations {
        for name in value.split(',') {
            add(format!("config.annotations[{key:?}]"), name)?;
        }
    }
    Ok(asked)
}

/// Gives the devices of these qualified names to the container that `spec` describes. Blocking: looks at files, and reads those that
/// have changed.
pub(crate) fn inject(node: &Node, spec: &mut Spec, names: &[String]) -> Result<(), InjectError> {
    if names.is_empty() {
        return Ok(());
    }
    let directories = &node.config().runtime.cdi_spec_dirs;
    edit(&node.cdi.files.devices(directories), directories, spec, names)
}

fn edit(
    devices: &Devices,
    directories: &[PathBuf],
    spec: &mut Spec,
    names: &[String],
) -> Result<(), InjectError> {
    let mut found = Vec::with_capacity(names.len());
    // All are looked up before any is applied.
    for name in names {
        let unknown = || InjectError::Unknown {
            name: name.clone(),
            directories: directories.to_vec(),
            problems: problems(devices, name),
        };
        found.push((name, devices.known.get(name).ok_or_else(unknown)?));
    }
    let mut begun: Vec<&Path> = Vec::new();
    for (name, known) in found {
        let failed = |source| InjectError::Edits { name: name.clone(), path: known.path.clone(), source };
        if !begun.contains(&known.path.as_path()) {
            begun.push(&known.path);
            apply(spec, &known.document.container_edits, host_node).map_err(failed)?;
        }
        let device = &known.document.devices[known.device];
        apply(spec, &device.container_edits, host_node).map_err(failed)?;
    }
    Ok(())
}

/// What may be why a device is unknown.
fn problems(devices: &Devices, name: &str) -> Vec<String> {
    if let Some([first, second]) = devices.conflicts.get(name) {
        return vec![format!("{} and {} both do", first.display(), second.display())];
    }
    devices.unreadable.iter().map(|(path, why)| format!("{} cannot be used: {why}", path.display())).collect()
}

/// The link itself, not what it leads to: as CDI's own library looks.
fn host_node(path: &Path) -> io::Result<HostNode> {
    let metadata = std::fs::symlink_metadata(path)?;
    let kind = match metadata.file_type() {
        kind if kind.is_block_device() => 'b',
        kind if kind.is_char_device() => 'c',
        kind if kind.is_fifo() => 'p',
        _ => return Err(io::Error::other("is no device node")),
    };
    let number = if kind == 'p' { 0 } else { metadata.rdev() };
    Ok(HostNode {
        kind,
        major: i64::from(rustix::fs::major(number)),
        minor: i64::from(rustix::fs::minor(number)),
        mode: metadata.mode() & 0o7777,
    })
}

#[cfg(test)]
mod tests;
