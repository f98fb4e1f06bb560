//! Sources of a container's mounts on the host: what the request names, and the volumes that its image declares.

use std::path::{Path, PathBuf};

use podvisor_image_store::Image;
use podvisor_proto::cri;
use podvisor_spec::ResolvedMount;

use super::image_volumes::{self, ImageVolume};
use super::record::{ContainerRecord, PodRecord};
use crate::error::PodError;
use crate::id::ContainerId;
use crate::node::Node;

/// Where anonymous volumes (`VOLUME` of the image) of a container live.
pub(super) fn volumes(node: &Node, pod: &PodRecord, container: &ContainerId) -> PathBuf {
    node.records.pod_dir(&pod.id).join("volumes").join(container.as_str())
}

/// Sources of the mounts: links resolved, missing directories made (as every runtime does for kubelet's hostPath without type).
pub(super) fn resolve_mounts(
    mounts: &[cri::Mount],
    images: &[ImageVolume],
    bundle: &Path,
) -> Result<Vec<ResolvedMount>, PodError> {
    let mut resolved = Vec::with_capacity(mounts.len());
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("config.mounts[{index}].host_path");
        if let Some(volume) = images.iter().find(|volume| volume.mount == index) {
            resolved.push(ResolvedMount {
                source: image_volumes::source(bundle, volume, &mount.image_sub_path)?,
            });
            continue;
        }
        let path = Path::new(&mount.host_path);
        if !path.is_absolute() {
            return Err(PodError::invalid(field, format!("{:?} is no absolute path", mount.host_path)));
        }
        let source = match path.canonicalize() {
            Ok(source) => source,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                std::fs::create_dir_all(path).and_then(|()| path.canonicalize()).map_err(|error| {
                    PodError::invalid(&field, format!("cannot make {}: {error}", path.display()))
                })?
            }
            Err(error) => return Err(PodError::invalid(field, format!("{}: {error}", path.display()))),
        };
        resolved.push(ResolvedMount { source });
    }
    Ok(resolved)
}

/// `VOLUME` of the image: a directory of the container's own with the image's content, unless the request mounts something there.
pub(super) fn anonymous_volumes(
    node: &Node,
    pod: &PodRecord,
    record: &ContainerRecord,
    image: &Image,
    rootfs: &Path,
    config: &mut cri::ContainerConfig,
) -> Result<(), PodError> {
    let declared = image.config.config().as_ref().and_then(|config| config.volumes().clone());
    for (index, path) in declared.unwrap_or_default().iter().enumerate() {
        let wanted = Path::new(path);
        let usable = wanted.is_absolute()
            && !wanted.components().any(|part| part == std::path::Component::ParentDir)
            && wanted.parent().is_some();
        if !usable || config.mounts.iter().any(|mount| Path::new(&mount.container_path) == wanted) {
            continue;
        }
        let directory = volumes(node, pod, &record.id).join(index.to_string());
        let failed = |source| PodError::File { operation: "make volume", path: directory.clone(), source };
        std::fs::create_dir_all(&directory).map_err(failed)?;
        copy_inside(rootfs, wanted, &directory).map_err(failed)?;
        config.mounts.push(cri::Mount {
            container_path: path.clone(),
            host_path: directory.display().to_string(),
            selinux_relabel: true,
            ..Default::default()
        });
    }
    Ok(())
}

/// Copies owner and mode of the image's directory; its content comes with it as far as it is plain files and directories.
fn copy_inside(rootfs: &Path, wanted: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let root = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let Ok(from) = openat2(&root, wanted.strip_prefix("/").unwrap_or(wanted), flags, Mode::empty(), resolve)
    else {
        return Ok(());
    };
    let mut pending = vec![(std::fs::File::from(from), to.to_owned())];
    while let Some((from, to)) = pending.pop() {
        let metadata = from.metadata()?;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
        std::os::unix::fs::chown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
        for entry in rustix::fs::Dir::read_from(&from)?.flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let target = to.join(std::ffi::OsStr::new(name.to_str().unwrap_or_default()));
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(opened) = rustix::fs::openat(&from, name, flags, Mode::empty()) else { continue };
            let mut file = std::fs::File::from(opened);
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                std::fs::create_dir_all(&target)?;
                pending.push((file, target));
            } else if metadata.is_file() {
                std::io::copy(&mut file, &mut std::fs::File::create(&target)?)?;
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
                std::os::unix::fs::chown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
            }
        }
    }
    Ok(())
}
