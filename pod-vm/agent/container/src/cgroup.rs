//! The container's cgroup: made with its limits before anybody is in it, changed while it runs.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};

use crate::error::ContainerError;
use crate::{device_filter, limits, sys};

/// A cgroup of version 2 that holds one container.
#[derive(Debug)]
pub struct Cgroup {
    place: podvisor_cgroup::Cgroup,
    directory: PathBuf,
    /// Attached while a descriptor of it is open or the cgroup exists; kept to be replaced by an update.
    devices: Option<OwnedFd>,
}

impl Cgroup {
    /// Makes it and sets its limits.
    pub fn create(
        place: podvisor_cgroup::Cgroup,
        resources: &LinuxResources,
    ) -> Result<Self, ContainerError> {
        let failed = |source| {
            ContainerError::system(format!("make cgroup {}", place.path()))(io::Error::other(source))
        };
        place.create().map_err(failed)?;
        let directory = place.directory("").map(Path::to_path_buf).unwrap_or_default();
        let mut cgroup = Self { place, directory, devices: None };
        match cgroup.update(resources) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                // The first error is the one to tell.
                let _ = cgroup.place.remove();
                Err(error)
            }
        }
    }

    /// Sets the limits that `resources` names; others stay. The device rules are replaced when there are any.
    pub fn update(&mut self, resources: &LinuxResources) -> Result<(), ContainerError> {
        for (file, value) in limits::files(resources)? {
            let path = self.directory.join(&file);
            // kubelet forbids huge pages of all sizes that the node has; of one that this processor does not have there are none.
            if file.starts_with("hugetlb.") && value == "0" && !path.exists() {
                continue;
            }
            fs::write(&path, &value)
                .map_err(ContainerError::system(format!("write {value:?} to {}", path.display())))?;
        }
        if let Some(rules) = resources.devices().as_ref() {
            let program = device_filter::program(rules);
            let before = self.devices.as_ref().map(AsFd::as_fd);
            let attached = sys::attach_device_filter(self.open()?.as_fd(), &program, before)
                .map_err(ContainerError::system("attach the device rules"))?;
            self.devices = Some(attached);
        }
        Ok(())
    }

    /// Its directory, opened.
    pub(crate) fn open(&self) -> Result<OwnedFd, ContainerError> {
        rustix::fs::open(&self.directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| {
                ContainerError::system(format!("open cgroup {}", self.directory.display()))(error.into())
            })
    }

    /// For statistics, killing and removing.
    pub fn place(&self) -> &podvisor_cgroup::Cgroup {
        &self.place
    }
}
