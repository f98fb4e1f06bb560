//! What is mounted in a container: the kernel's file systems, the pod's files, the request's volumes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount};
use podvisor_proto::cri;
use podvisor_proto::cri::MountPropagation;

use crate::Input;
use crate::error::{Result, SpecError, absolute_path};
use crate::user_namespace::{Ids, UserNamespace};

/// All mounts in the order they are made, and `linux.rootfsPropagation` where a volume needs one.
pub(crate) fn of_container(
    input: &Input<'_>,
    privileged: bool,
    user: Option<UserNamespace>,
) -> Result<(Vec<Mount>, Option<String>)> {
    if input.mounts.len() != input.config.mounts.len() {
        let why = format!("{} of {} host paths were resolved", input.mounts.len(), input.config.mounts.len());
        return Err(SpecError::invalid("config.mounts", why));
    }
    let mut volumes = Vec::with_capacity(input.mounts.len());
    let mut widest = MountPropagation::PropagationPrivate;
    for (index, (mount, resolved)) in input.config.mounts.iter().zip(&input.mounts).enumerate() {
        let propagation = propagation(index, mount)?;
        widest = widest.max(propagation);
        let mut volume = volume(index, mount, &resolved.source, propagation)?;
        id_mapped(index, mount, &mut volume, user)?;
        volumes.push(volume);
    }

    let taken: BTreeSet<PathBuf> = volumes.iter().map(|volume| volume.destination().clone()).collect();
    let mut mounts = default_mounts(privileged, user);
    mounts.extend(pod_files(input));
    // A volume replaces what would be mounted there; one on /dev brings its own of everything below.
    let own_dev = taken.contains(Path::new("/dev"));
    mounts.retain(|mount| {
        let path = mount.destination();
        let below_dev = path.starts_with("/dev") && path != Path::new("/dev");
        !(taken.contains(path) || own_dev && below_dev)
    });
    // Parents before children, else a parent would hide them; otherwise in the order of the request.
    volumes.sort_by_key(|volume| volume.destination().components().count());
    mounts.extend(volumes);
    Ok((mounts, root_propagation(widest)))
}

/// config-linux.md, "Rootfs Mount Propagation": a mount in the container can only be as shared as the root is.
fn root_propagation(widest: MountPropagation) -> Option<String> {
    match widest {
        MountPropagation::PropagationPrivate => None,
        MountPropagation::PropagationHostToContainer => Some("rslave".to_owned()),
        MountPropagation::PropagationBidirectional => Some("rshared".to_owned()),
    }
}

fn default_mounts(privileged: bool, user: Option<UserNamespace>) -> Vec<Mount> {
    let mut terminals = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    // The group tty, where there is one.
    if user.is_none_or(|user| user.gids.length > 5) {
        terminals.push("gid=5");
    }
    // The host's network needs no other sysfs: one that is mounted anew shows the network namespace that the container is in. (Binding the
    // host's /sys would bring debugfs, tracefs and bpf along, which a read-only bind leaves writable.)
    let access = if privileged { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &terminals),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ]
}

fn pod_files(input: &Input<'_>) -> Vec<Mount> {
    let read_only = crate::security(input.config).is_some_and(|security| security.readonly_rootfs);
    let files = &input.pod_files;
    let access = if read_only { "ro" } else { "rw" };
    let pairs = [
        ("/etc/hostname", &files.hostname, access),
        ("/etc/hosts", &files.hosts, access),
        ("/etc/resolv.conf", &files.resolv_conf, access),
        ("/dev/shm", &files.shm, "rw"),
    ];
    let mut mounts = Vec::new();
    for (destination, source, access) in pairs {
        match source {
            Some(source) => mounts.push(bind(destination, source.clone(), &["rbind", "rprivate", access])),
            None if destination == "/dev/shm" => mounts.push(mount(
                destination,
                "tmpfs",
                "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            )),
            None => {}
        }
    }
    mounts
}

fn volume(index: usize, mount: &cri::Mount, source: &Path, propagation: MountPropagation) -> Result<Mount> {
    let field = |name: &str| format!("config.mounts[{index}].{name}");
    let destination = absolute_path(|| field("container_path"), &mount.container_path)?;
    if destination == "/" {
        return Err(SpecError::invalid(field("container_path"), "is the container's root"));
    }
    if mount.image.is_some() {
        check_image_mount(index, mount)?;
    } else {
        if !mount.image_sub_path.is_empty() {
            return Err(SpecError::invalid(field("image_sub_path"), "is set, but no image"));
        }
        absolute_path(|| field("host_path"), &mount.host_path)?;
    }
    if mount.recursive_read_only && !mount.readonly {
        return Err(SpecError::invalid(field("recursive_read_only"), "needs readonly"));
    }
    if mount.recursive_read_only && propagation != MountPropagation::PropagationPrivate {
        return Err(SpecError::invalid(field("recursive_read_only"), "needs private propagation"));
    }
    let mut options = vec!["rbind"];
    options.push(match propagation {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional => "rshared",
    });
    options.push(match (mount.readonly, mount.recursive_read_only) {
        (false, _) => "rw",
        (true, false) => "ro",
        (true, true) => "rro",
    });
    if mount.image.is_some() {
        // What an image brings are files: its devices and set-user-id programs gain nothing in another image's container.
        options.extend(["nosuid", "nodev"]);
    }
    for (at, option) in mount.mount_options.iter().enumerate() {
        // KEP-5855 has these three, all of which only take something away.
        if !["nodev", "noexec", "nosuid"].contains(&option.as_str()) {
            let why = format!("{option:?} is none of nodev, noexec and nosuid");
            return Err(SpecError::invalid(format!("config.mounts[{index}].mount_options[{at}]"), why));
        }
        if !options.contains(&option.as_str()) {
            options.push(option);
        }
    }
    Ok(bind(&destination, source.to_path_buf(), &options))
}

/// KEP-127: kubelet sends the pod's mappings with each volume, so that its files have the ids inside. Mounts below the volume keep theirs.
fn id_mapped(
    index: usize,
    mount: &cri::Mount,
    volume: &mut Mount,
    user: Option<UserNamespace>,
) -> Result<()> {
    let field = |name: &str| format!("config.mounts[{index}].{name}");
    volume
        .set_uid_mappings(mappings(|| field("uidMappings"), &mount.uid_mappings)?)
        .set_gid_mappings(mappings(|| field("gidMappings"), &mount.gid_mappings)?);
    if volume.uid_mappings().is_some() != volume.gid_mappings().is_some() {
        return Err(SpecError::invalid(field("uidMappings"), "and gidMappings have to be given together"));
    }
    if volume.uid_mappings().is_some() && user.is_none() {
        return Err(SpecError::invalid(field("uidMappings"), "need a pod with a user namespace"));
    }
    if mount.image.is_some() {
        // An image is mounted with the pod's ids, and overlayfs cannot be mapped once more.
        volume.set_uid_mappings(None).set_gid_mappings(None);
    }
    Ok(())
}

/// Refuses a mount of an image that contradicts itself (KEP-4639: always read-only, never a path of the host).
pub fn check_image_mount(index: usize, mount: &cri::Mount) -> Result<()> {
    let field = |name: &str| format!("config.mounts[{index}].{name}");
    if !mount.host_path.is_empty() {
        return Err(SpecError::invalid(field("host_path"), "only one of host_path and image can be given"));
    }
    if !mount.readonly {
        let why = "must be true: an image is only ever mounted read-only";
        return Err(SpecError::invalid(field("readonly"), why));
    }
    if mount.image_sub_path.len() >= 4096 || mount.image_sub_path.contains('\0') {
        let why = "contains a NUL byte or has more than 4095 bytes";
        return Err(SpecError::invalid(field("image_sub_path"), why));
    }
    Ok(())
}

fn propagation(index: usize, mount: &cri::Mount) -> Result<MountPropagation> {
    MountPropagation::try_from(mount.propagation).map_err(|_| {
        let why = format!("{} is not a propagation mode", mount.propagation);
        SpecError::invalid(format!("config.mounts[{index}].propagation"), why)
    })
}

fn mappings(field: impl Fn() -> String, requested: &[cri::IdMapping]) -> Result<Option<Vec<LinuxIdMapping>>> {
    let mut mappings = Vec::with_capacity(requested.len());
    for (index, mapping) in requested.iter().enumerate() {
        let past_end = |start: u32| start.checked_add(mapping.length).is_none();
        if mapping.length == 0 || past_end(mapping.host_id) || past_end(mapping.container_id) {
            let why = "is empty or goes beyond the last id";
            return Err(SpecError::invalid(format!("{}[{index}]", field()), why));
        }
        let built = LinuxIdMappingBuilder::default()
            .host_id(mapping.host_id)
            .container_id(mapping.container_id)
            .size(mapping.length)
            .build();
        mappings.extend(built);
    }
    Ok(Some(mappings).filter(|mappings| !mappings.is_empty()))
}

/// A range of ids from 0.
pub(crate) fn whole(ids: Ids) -> Vec<LinuxIdMapping> {
    let built =
        LinuxIdMappingBuilder::default().container_id(0u32).host_id(ids.first).size(ids.length).build();
    built.into_iter().collect()
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = bind(destination, source.into(), options);
    mount.set_typ(Some(kind.to_owned()));
    mount
}

fn bind(destination: &str, source: PathBuf, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    mount
}

#[cfg(test)]
mod tests;
