//! Shares of the file server and root file systems, below a place that only the agent sees.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use podvisor_proto::agent::{AddRoot, AddShare, add_root};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::boot::RUN;
use crate::container::check_id;
use crate::failure::Failure;

/// What is mounted.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    shares: BTreeSet<String>,
    roots: BTreeSet<String>,
    /// Directories that are mounted in place of shares, where there is no file server.
    pub(crate) stand_ins: BTreeMap<String, PathBuf>,
}

/// Where a container's root file system is mounted.
pub(crate) fn root_of(container: &str) -> PathBuf {
    Path::new(RUN).join("roots").join(container)
}

fn share(tag: &str) -> PathBuf {
    Path::new(RUN).join("shares").join(tag)
}

/// What belongs to a root file system besides its place.
fn parts_of(container: &str) -> PathBuf {
    Path::new(RUN).join("parts").join(container)
}

fn make(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|error| Failure::system(&format!("make {}", path.display()), error))
}

fn mounted(kind: &str, source: &Path, place: &Path, flags: MountFlags, data: &str) -> Result<(), Failure> {
    let data = CString::new(data).map_err(|_| Failure::invalid("a path contains NUL"))?;
    mount(source, place, kind, flags, data.as_c_str())
        .map_err(|error| Failure::system(&format!("mount {kind} at {}", place.display()), error))
}

impl Storage {
    pub(crate) fn add_share(&mut self, wanted: &AddShare) -> Result<(), Failure> {
        check_id(&wanted.tag)?;
        if self.shares.contains(&wanted.tag) {
            return Err(Failure::exists(format!("share {:?} is mounted already", wanted.tag)));
        }
        let place = share(&wanted.tag);
        make(&place)?;
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::RDONLY, wanted.read_only);
        match self.stand_ins.get(&wanted.tag) {
            Some(directory) => mounted("none", directory, &place, MountFlags::BIND | MountFlags::REC, "")?,
            None => mounted("virtiofs", Path::new(&wanted.tag), &place, flags, "")?,
        }
        self.shares.insert(wanted.tag.clone());
        Ok(())
    }

    pub(crate) fn remove_share(&mut self, tag: &str) -> Result<(), Failure> {
        if !self.shares.contains(tag) {
            return Ok(());
        }
        release(&share(tag))?;
        self.shares.remove(tag);
        Ok(())
    }

    /// A path `TAG/…` of a share that is mounted.
    fn in_share(&self, path: &str) -> Result<PathBuf, Failure> {
        let (tag, rest) = path.split_once('/').unwrap_or((path, ""));
        let plain = Path::new(rest).components().all(|part| matches!(part, Component::Normal(_)));
        if !self.shares.contains(tag) || !plain {
            return Err(Failure::invalid(format!("{path:?} is not in a share that is mounted")));
        }
        Ok(share(tag).join(rest))
    }

    pub(crate) fn add_root(&mut self, wanted: &AddRoot) -> Result<(), Failure> {
        use add_root::{Lower, Upper};
        let id = &wanted.container_id;
        check_id(id)?;
        if self.roots.contains(id) {
            return Err(Failure::exists(format!("container {id:?} has a root file system already")));
        }
        let place = root_of(id);
        make(&place)?;
        match (&wanted.lower, &wanted.upper) {
            // The host has joined the layers already.
            (_, Some(Upper::SharedUpper(path))) => {
                let source = self.in_share(path)?;
                mounted("none", &source, &place, MountFlags::BIND | MountFlags::REC, "")?;
            }
            (Some(Lower::SharePath(lower)), Some(Upper::Tmpfs(upper))) => {
                let lower = self.in_share(lower)?;
                let parts = parts_of(id);
                make(&parts)?;
                let size = format!("size={},mode=0755", upper.size.max(4096));
                mounted("tmpfs", Path::new("upper"), &parts, MountFlags::NODEV, &size)?;
                let joined = (|| {
                    make(&parts.join("upper"))?;
                    make(&parts.join("work"))?;
                    let [lower, parts] = [lower.display().to_string(), parts.display().to_string()];
                    if lower.contains([',', ':', '\\']) {
                        return Err(Failure::invalid(format!("{lower:?} cannot be a layer of an overlay")));
                    }
                    let data = format!("lowerdir={lower},upperdir={parts}/upper,workdir={parts}/work");
                    mounted("overlay", Path::new("overlay"), &place, MountFlags::empty(), &data)
                })();
                if joined.is_err() {
                    let _ = release(&parts);
                }
                joined?;
            }
            (None, _) | (_, None) => {
                return Err(Failure::invalid("a root file system needs a lower and an upper part"));
            }
            _ => return Err(Failure::unsupported("this agent does not mount images from devices yet")),
        }
        self.roots.insert(id.clone());
        Ok(())
    }

    pub(crate) fn remove_root(&mut self, id: &str) -> Result<(), Failure> {
        if !self.roots.contains(id) {
            return Ok(());
        }
        release(&root_of(id))?;
        release(&parts_of(id))?;
        self.roots.remove(id);
        Ok(())
    }
}

/// Unmounts and removes a place; fine when nothing is there.
fn release(place: &Path) -> Result<(), Failure> {
    match unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(Failure::system(&format!("unmount {}", place.display()), error)),
    }
    match fs::remove_dir(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::system(&format!("remove {}", place.display()), error))
        }
        _ => Ok(()),
    }
}
