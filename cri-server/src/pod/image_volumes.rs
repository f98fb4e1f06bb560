//! Images mounted as volumes (KEP-4639): each is a read-only snapshot of its own, mounted beside the container's root file system.
//!
//! A mount for each container instead of one that they share: it costs some system calls, overlayfs without an upper layer takes the
//! pages of its layers, which all mounts have in common, and there is nobody to count. The snapshot keeps the image's layers until the
//! container is removed, whatever becomes of the image's names.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use podvisor_image_store::{ImageError, Rootfs};
use podvisor_proto::cri;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::acquired::Acquisition;
use super::build;
use super::record::{ContainerRecord, PodRecord};
use crate::error::PodError;
use crate::id::ContainerId;
use crate::node::Node;

/// One of a container's mounts that is an image, as its record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageVolume {
    /// Position in the configuration's mounts.
    pub(crate) mount: usize,
    /// The image's one identity.
    pub(crate) image_id: String,
    /// Repository digest, as ContainerStatus.image_ref has it for the container's own image.
    pub(crate) image_ref: String,
}

/// Why an image cannot be a volume. kubelet counts failures by the word at the beginning (cri-api, `ErrImageVolumeMountFailed`).
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageVolumeError {
    #[error("ImageVolumeMountFailed: config.mounts[{mount}].image: image {name:?} not found: pull it first")]
    NoSuchImage { mount: usize, name: String },
    #[error("ImageVolumeMountFailed: config.mounts[{mount}].image: cannot mount image {image}")]
    Mount { mount: usize, image: String, source: ImageError },
    #[error(
        "ImageVolumeMountFailed: config.mounts[{mount}].image_sub_path: image {image} has no file or directory {path:?}"
    )]
    NoSuchPath { mount: usize, image: String, path: String, source: std::io::Error },
    #[error(
        "ImageVolumeMountFailed: config.mounts[{mount}].image_sub_path: {path:?} in image {image} is neither a file nor a directory"
    )]
    Special { mount: usize, image: String, path: String },
}

impl ImageVolume {
    /// Name of the snapshot.
    pub(crate) fn key(&self, container: &ContainerId) -> String {
        key(container, self.mount)
    }

    /// Where it is mounted on the host.
    fn target(&self, bundle: &Path) -> PathBuf {
        target(bundle, self.mount)
    }

    pub(super) fn acquisitions(&self, container: &ContainerId, bundle: &Path) -> [Acquisition; 2] {
        [Acquisition::Snapshot(self.key(container)), Acquisition::Mount(self.target(bundle))]
    }
}

fn key(container: &ContainerId, mount: usize) -> String {
    format!("{container}.{mount}")
}

fn target(bundle: &Path, mount: usize) -> PathBuf {
    bundle.join("volumes").join(mount.to_string())
}

/// What a container may hold whose record cannot be read: the snapshots say it.
pub(super) fn of_unreadable(node: &Node, container: &ContainerId) -> Vec<Acquisition> {
    let bundle = node.bundle(container);
    let prefix = format!("{container}.");
    let snapshots = node.images.snapshots();
    let numbers = snapshots.iter().filter_map(|key| key.strip_prefix(&prefix)?.parse::<usize>().ok());
    numbers
        .flat_map(|mount| {
            [Acquisition::Snapshot(key(container, mount)), Acquisition::Mount(target(&bundle, mount))]
        })
        .collect()
}

/// Finds the images of all mounts that are one. kubelet has pulled them; nothing is pulled here.
pub(super) fn plan(node: &Node, mounts: &[cri::Mount]) -> Result<Vec<ImageVolume>, PodError> {
    let mut volumes = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        let Some(spec) = &mount.image else { continue };
        podvisor_spec::check_image_mount(index, mount)?;
        let name = &spec.image;
        if name.is_empty() {
            let field = format!("config.mounts[{index}].image.image");
            return Err(PodError::invalid(field, "must not be empty"));
        }
        let image = node
            .images
            .get(name)
            .ok_or_else(|| ImageVolumeError::NoSuchImage { mount: index, name: name.clone() })?;
        let image_ref = image.repo_digests.first().unwrap_or(&image.id).clone();
        volumes.push(ImageVolume { mount: index, image_id: image.id, image_ref });
    }
    Ok(volumes)
}

/// Takes the layers into use.
pub(super) async fn prepare(
    node: &Node,
    container: &ContainerId,
    volumes: &[ImageVolume],
) -> Result<Vec<Rootfs>, PodError> {
    let mut prepared = Vec::with_capacity(volumes.len());
    for volume in volumes {
        let snapshot = node.images.prepare(&volume.key(container), &volume.image_id, true).await;
        prepared.push(snapshot.map_err(|source| ImageVolumeError::Mount {
            mount: volume.mount,
            image: volume.image_id.clone(),
            source,
        })?);
    }
    Ok(prepared)
}

/// Mounts what [`prepare`] gave. Blocking.
pub(super) fn mount(
    node: &Node,
    pod: &PodRecord,
    container: &ContainerRecord,
    prepared: &[Rootfs],
    label: Option<&str>,
) -> Result<(), PodError> {
    let bundle = node.bundle(&container.id);
    for (volume, snapshot) in container.image_volumes.iter().zip(prepared) {
        let target = volume.target(&bundle);
        std::fs::create_dir_all(&target).map_err(|source| PodError::File {
            operation: "make",
            path: target.clone(),
            source,
        })?;
        build::mount(node, pod, snapshot, &target, label).map_err(|source| ImageVolumeError::Mount {
            mount: volume.mount,
            image: volume.image_id.clone(),
            source,
        })?;
    }
    Ok(())
}

/// The file or directory of a mounted image that the container gets.
pub(super) fn source(bundle: &Path, volume: &ImageVolume, sub_path: &str) -> Result<PathBuf, PodError> {
    let target = volume.target(bundle);
    let (mount, image, path) = (volume.mount, volume.image_id.clone(), sub_path.to_owned());
    let sub_path = if sub_path.is_empty() { "." } else { sub_path };
    match below(&target, sub_path) {
        Ok(Some(source)) => Ok(source),
        Ok(None) => Err(ImageVolumeError::Special { mount, image, path }.into()),
        Err(error) => Err(ImageVolumeError::NoSuchPath { mount, image, path, source: error.into() }.into()),
    }
}

/// Where `path` is in the file system mounted at `root`, whatever links it goes through: they are the image's and lead nowhere but into
/// it. Nothing in there changes any more, so the name that is found now is right when the OCI runtime uses it. `None`: a device or such.
fn below(root: &Path, path: &str) -> Result<Option<PathBuf>, Errno> {
    // openat2(2): a mount or rename anywhere in the system may get in between, and asks to try again.
    const TRIES: usize = 128;
    let root = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let mut tries = 1;
    let found = loop {
        match openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if tries < TRIES => tries += 1,
            outcome => break outcome?,
        }
    };
    let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        return Ok(None);
    }
    let name = format!("/proc/self/fd/{}", found.as_raw_fd());
    std::fs::read_link(name).map(Some).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// The mount as ContainerStatus shows it: which image it turned out to be. kubelet's garbage collection compares `image.image` with the
/// identities of ListImages, and shows `image_ref` to people.
pub(crate) fn shown(mounts: &[cri::Mount], volumes: &[ImageVolume]) -> Vec<cri::Mount> {
    let mut mounts = mounts.to_vec();
    for volume in volumes {
        if let Some(spec) = mounts.get_mut(volume.mount).and_then(|mount| mount.image.as_mut()) {
            spec.image.clone_from(&volume.image_id);
            spec.image_ref.clone_from(&volume.image_ref);
        }
    }
    mounts
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_an_image_lead_nowhere_else() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let image = tempfile::tempdir().unwrap();
        let root = image.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("data/deep")).unwrap();
        std::fs::write(root.join("data/file"), "f").unwrap();
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(root.join("etc/passwd"), "the image's own").unwrap();
        for (name, target) in [
            ("absolute", "/data"),
            ("up", "../../../../../etc/passwd"),
            ("out", outside.path().join("secret").to_str().unwrap()),
            ("loop", "loop"),
            ("magic", "/proc/self/root"),
        ] {
            symlink(target, root.join(name)).unwrap();
        }
        rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for (path, expected) in [
            (".", Ok(Some(""))),
            ("data", Ok(Some("data"))),
            ("/data/deep/", Ok(Some("data/deep"))),
            ("data//./file", Ok(Some("data/file"))),
            ("absolute/file", Ok(Some("data/file"))),
            ("up", Ok(Some("etc/passwd"))),
            ("../../etc/passwd", Ok(Some("etc/passwd"))),
            ("fifo", Ok(None)),
            ("out", Err(Errno::NOENT)),
            ("magic", Err(Errno::NOENT)),
            ("missing/file", Err(Errno::NOENT)),
            ("data/file/below", Err(Errno::NOTDIR)),
            ("loop", Err(Errno::LOOP)),
            ("a\0b", Err(Errno::INVAL)),
        ] {
            let expected = expected.map(|found| found.map(|name| root.join(name).components().collect()));
            assert_eq!(below(&root, path), expected, "{path:?}");
        }
    }

    #[test]
    fn a_mount_shows_what_it_turned_out_to_be() {
        let image = cri::ImageSpec {
            image: "short".into(),
            user_specified_image: "app:1".into(),
            ..Default::default()
        };
        let mounts = [cri::Mount::default(), cri::Mount { image: Some(image), ..Default::default() }];
        let volume = ImageVolume { mount: 1, image_id: "sha256:1".into(), image_ref: "app@sha256:2".into() };
        let shown = shown(&mounts, &[volume]);
        assert_eq!(shown[0], mounts[0]);
        let spec = shown[1].image.as_ref().unwrap();
        assert_eq!((spec.image.as_str(), spec.image_ref.as_str()), ("sha256:1", "app@sha256:2"));
        assert_eq!(spec.user_specified_image, "app:1");
    }
}
