//! The guests of a machine: `ROOT/guests/ID/{kernel,initramfs,manifest.json}`, and which one new sandboxes get.
//!
//! A guest appears whole or not at all, whatever happens meanwhile: it is written into a directory of another name, synced, and
//! renamed. It never changes afterwards, and its name is the digest of its manifest, so a sandbox is pinned by keeping the id.
//! `current` is a symbolic link that is replaced by rename. Changes take a lock; reading takes none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use crate::build::Built;
use crate::manifest::{self, Manifest};
use crate::read::read_limited;
use crate::scratch::Scratch;
use crate::verify::{Difference, differences};
use crate::{Guest, GuestId};

const CURRENT: &str = "current";
const MANIFEST: &str = "manifest.json";
/// Names of what is being made or removed begin so. What a crash left is removed by the next change.
const UNFINISHED: &str = ".unfinished-";
/// Longest manifest that is read, bytes.
const LONGEST_MANIFEST: u64 = 4 << 20;

/// What went wrong with installed guests.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A file or directory could not be read or written.
    #[error("{action} {}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// No such guest.
    #[error("there is no guest {0}: `podvisor guest list` shows those there are")]
    Unknown(GuestId),
    /// The guest that new sandboxes get.
    #[error("guest {0} is the current one: choose another one first (`podvisor guest use ID`)")]
    IsCurrent(GuestId),
    /// The link names no guest.
    #[error("{} is no link to a guest: choose one (`podvisor guest use ID`)", .0.display())]
    NoGuest(PathBuf),
    /// A manifest that this program does not understand.
    #[error("the manifest of guest {id} is damaged or of another version of podvisor: build the guest again")]
    Manifest {
        /// The guest.
        id: GuestId,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A manifest whose version is not known.
    #[error(
        "the manifest of guest {id} has version {version}, which this podvisor does not know: build the guest again"
    )]
    Version {
        /// The guest.
        id: GuestId,
        /// Its version.
        version: u32,
    },
    /// A manifest that does not belong to its directory.
    #[error("the manifest of guest {0} was changed: remove the guest and build it again")]
    Changed(GuestId),
}

/// The guests below one root.
#[derive(Debug, Clone)]
pub struct Guests {
    directory: PathBuf,
}

/// A guest in a list.
#[derive(Debug)]
pub struct Listed {
    /// Its identity.
    pub id: GuestId,
    /// Whether new sandboxes get it.
    pub is_current: bool,
    /// The guest, or why it cannot be used.
    pub guest: Result<Guest, GuestError>,
}

/// What an installation did.
#[derive(Debug)]
pub struct Installed {
    /// The guest.
    pub guest: Guest,
    /// Whether it was not there before.
    pub is_new: bool,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GuestError {
    move |source| GuestError::File { action, path: path.to_owned(), source }
}

impl Guests {
    /// The guests below `root` (the daemon's persistent directory). Nothing is made before a guest is installed.
    pub fn open(root: &Path) -> Self {
        Self { directory: root.join("guests") }
    }

    /// The guest that new sandboxes get, if one is chosen.
    pub fn current(&self) -> Result<Option<Guest>, GuestError> {
        self.current_id()?.map(|id| self.get(&id)).transpose()
    }

    fn current_id(&self) -> Result<Option<GuestId>, GuestError> {
        let link = self.directory.join(CURRENT);
        match fs::read_link(&link) {
            Ok(target) => {
                let id = target.to_str().and_then(|text| text.parse().ok());
                id.map(Some).ok_or(GuestError::NoGuest(link))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(failed("reading", &link)(source)),
        }
    }

    /// An installed guest. Its manifest is checked, its files are not: see [`Guests::verify`].
    pub fn get(&self, id: &GuestId) -> Result<Guest, GuestError> {
        let directory = self.directory.join(id.as_str());
        let path = directory.join(MANIFEST);
        let bytes = match read_limited(&path, LONGEST_MANIFEST) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !directory.exists() => {
                return Err(GuestError::Unknown(id.clone()));
            }
            Err(source) => return Err(failed("reading", &path)(source)),
        };
        // The version first: a later one may have fields that are unknown here.
        let damaged = |source| GuestError::Manifest { id: id.clone(), source };
        let version: Version = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version.version != manifest::VERSION {
            return Err(GuestError::Version { id: id.clone(), version: version.version });
        }
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(damaged)?;
        if Manifest::id(&bytes) != *id {
            return Err(GuestError::Changed(id.clone()));
        }
        Ok(Guest { id: id.clone(), directory, manifest })
    }

    /// All guests, sorted by kernel and id; also those that cannot be used.
    pub fn list(&self) -> Result<Vec<Listed>, GuestError> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed("reading", &self.directory)(source)),
        };
        // A broken link is no reason to show nothing.
        let current = self.current_id().ok().flatten();
        let mut guests = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("reading", &self.directory))?;
            let id = entry.file_name().to_str().and_then(|name| name.parse::<GuestId>().ok());
            if let Some(id) = id {
                let is_current = current.as_ref() == Some(&id);
                guests.push(Listed { guest: self.get(&id), id, is_current });
            }
        }
        let release =
            |listed: &Listed| listed.guest.as_ref().ok().map(|guest| guest.kernel_release().to_owned());
        guests.sort_by_cached_key(|listed| (release(listed), listed.id.clone()));
        Ok(guests)
    }

    /// An empty directory for what a guest is built from. One at a time: another program waits.
    pub fn scratch(&self) -> Result<Scratch, GuestError> {
        fs::create_dir_all(&self.directory).map_err(failed("making", &self.directory))?;
        Scratch::new(&self.directory)
            .map_err(failed("making a directory for what is fetched in", &self.directory))
    }

    /// Installs a guest. The first one becomes the current one, others when `choose` says so.
    pub fn install(&self, built: &Built, choose: bool) -> Result<Installed, GuestError> {
        fs::create_dir_all(&self.directory).map_err(failed("making", &self.directory))?;
        let _lock = self.lock()?;
        let manifest = built.manifest.to_bytes();
        let id = Manifest::id(&manifest);
        let directory = self.directory.join(id.as_str());
        let is_good = self.get(&id).is_ok_and(|guest| differences(&guest).is_empty());
        if !is_good {
            // A damaged one of the same name is replaced; its files cannot be repaired in place.
            self.discard(&id)?;
            let unfinished = self.directory.join(format!("{UNFINISHED}{id}"));
            fs::create_dir(&unfinished).map_err(failed("making", &unfinished))?;
            let files =
                [("kernel", built.kernel.as_slice()), ("initramfs", &built.initramfs), (MANIFEST, &manifest)];
            for (name, content) in files {
                let path = unfinished.join(name);
                write_synced(&path, content).map_err(failed("writing", &path))?;
            }
            sync_directory(&unfinished)?;
            fs::rename(&unfinished, &directory).map_err(failed("making", &directory))?;
            sync_directory(&self.directory)?;
        }
        if choose || self.current_id().ok().flatten().is_none() {
            self.link(&id)?;
        }
        Ok(Installed { guest: self.get(&id)?, is_new: !is_good })
    }

    /// Makes a guest the one that new sandboxes get.
    pub fn choose(&self, id: &GuestId) -> Result<Guest, GuestError> {
        let guest = self.get(id)?;
        let _lock = self.lock()?;
        self.link(id)?;
        Ok(guest)
    }

    /// Compares a guest's files with its manifest.
    pub fn verify(&self, id: &GuestId) -> Result<Vec<Difference>, GuestError> {
        Ok(differences(&self.get(id)?))
    }

    /// Removes a guest, also a damaged one, but not the current one.
    pub fn remove(&self, id: &GuestId) -> Result<(), GuestError> {
        if !self.directory.join(id.as_str()).exists() {
            return Err(GuestError::Unknown(id.clone()));
        }
        let _lock = self.lock()?;
        if self.current_id().ok().flatten().as_ref() == Some(id) {
            return Err(GuestError::IsCurrent(id.clone()));
        }
        self.discard(id)
    }

    /// Takes a guest's directory away in one step, then deletes it.
    fn discard(&self, id: &GuestId) -> Result<(), GuestError> {
        let directory = self.directory.join(id.as_str());
        let unfinished = self.directory.join(format!("{UNFINISHED}{id}"));
        match fs::rename(&directory, &unfinished) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(failed("removing", &directory))?,
        }
        sync_directory(&self.directory)?;
        fs::remove_dir_all(&unfinished).map_err(failed("removing", &unfinished))
    }

    fn link(&self, id: &GuestId) -> Result<(), GuestError> {
        let unfinished = self.directory.join(format!("{UNFINISHED}{CURRENT}"));
        let link = self.directory.join(CURRENT);
        symlink(id.as_str(), &unfinished).map_err(failed("making", &unfinished))?;
        fs::rename(&unfinished, &link).map_err(failed("replacing", &link))?;
        sync_directory(&self.directory)
    }

    /// Waits until nobody else changes the guests, and removes what a crash left.
    fn lock(&self) -> Result<File, GuestError> {
        let path = self.directory.join(".lock");
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(failed("opening", &path))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(failed("locking", &path))?;
        for entry in fs::read_dir(&self.directory).map_err(failed("reading", &self.directory))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let path = entry.path();
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(failed("removing", &path))?;
            }
        }
        Ok(file)
    }
}

/// The version alone.
#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> Result<(), GuestError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(failed("syncing", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{Inputs, build};
    use crate::fake;

    fn built(directory: &Path, change: impl FnOnce(&mut Inputs)) -> Built {
        let mut inputs = fake::inputs(directory);
        change(&mut inputs);
        build(&inputs, &mut |_| {}).unwrap()
    }

    #[test]
    fn the_same_inputs_make_the_same_guest() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = built(one.path(), |_| {});
        let second = built(other.path(), |_| {});
        assert_eq!(first.kernel, second.kernel);
        assert_eq!(first.initramfs, second.initramfs);
        assert_eq!(first.manifest.to_bytes(), second.manifest.to_bytes());
        let manifest = &first.manifest;
        assert_eq!(manifest.agent.protocol, 3);
        assert_eq!(manifest.kernel.release, fake::RELEASE);
        let modules: Vec<(&str, bool)> =
            manifest.modules.iter().map(|module| (module.name.as_str(), module.start)).collect();
        assert_eq!(modules, [("overlay", true), ("virtio", true), ("virtio_rng", true), ("veth", false)]);
        assert_eq!(manifest.missing, ["absent"]);
    }

    #[test]
    fn agents_that_cannot_run_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let inputs = fake::inputs(directory.path());
        let dynamic = fake::elf(&[(crate::elf::PT_INTERP, 0, b"/lib/ld.so\0", 0)], &[]);
        let silent = fake::elf(&[(crate::elf::PT_LOAD, 0, b"code", 0)], &[]);
        for (agent, expected) in [
            (b"#!/bin/sh".to_vec(), "no ELF file"),
            (dynamic, "linked dynamically"),
            (silent, "no podvisor-agent"),
        ] {
            fs::write(&inputs.agent, agent).unwrap();
            let reason = fake::chain(&build(&inputs, &mut |_| {}).unwrap_err());
            assert!(reason.contains(expected), "{reason}");
        }
    }

    #[test]
    fn guests_are_installed_chosen_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let guests = Guests::open(directory.path());
        assert!(guests.current().unwrap().is_none());
        assert!(guests.list().unwrap().is_empty());

        let first = guests.install(&built(directory.path(), |_| {}), false).unwrap();
        assert!(first.is_new);
        // There is no reason to have none.
        let first = first.guest;
        assert_eq!(guests.current().unwrap().unwrap().id(), first.id());
        assert!(!guests.install(&built(directory.path(), |_| {}), false).unwrap().is_new);

        let change = |inputs: &mut Inputs| fs::write(&inputs.agent, fake::agent(4)).unwrap();
        let second = guests.install(&built(directory.path(), change), false).unwrap().guest;
        assert_ne!(second.id(), first.id());
        assert_eq!(second.protocol(), 4);
        assert_eq!(guests.current().unwrap().unwrap().id(), first.id());
        assert_eq!(guests.list().unwrap().len(), 2);

        assert!(matches!(guests.remove(first.id()), Err(GuestError::IsCurrent(_))));
        guests.choose(second.id()).unwrap();
        guests.remove(first.id()).unwrap();
        assert!(matches!(guests.remove(first.id()), Err(GuestError::Unknown(_))));
        assert!(matches!(guests.get(first.id()), Err(GuestError::Unknown(_))));
        assert!(matches!(guests.choose(first.id()), Err(GuestError::Unknown(_))));
        assert_eq!(guests.list().unwrap().len(), 1);
        assert!(guests.verify(second.id()).unwrap().is_empty());
    }

    #[test]
    fn what_a_crash_left_goes_with_the_next_change() {
        let directory = tempfile::tempdir().unwrap();
        let guests = Guests::open(directory.path());
        let below = directory.path().join("guests");
        fs::create_dir_all(below.join(".unfinished-0123456789abcdef/x")).unwrap();
        symlink("0123456789abcdef", below.join(".unfinished-current")).unwrap();
        fs::create_dir_all(below.join(".scratch/package")).unwrap();
        assert!(guests.list().unwrap().is_empty());
        guests.install(&built(directory.path(), |_| {}), true).unwrap();
        let path = guests.scratch().unwrap().path().to_owned();
        assert!(!path.exists());
        let names: Vec<String> = fs::read_dir(&below)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with("lock"))
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn every_change_is_found_and_installing_again_repairs_it() {
        let directory = tempfile::tempdir().unwrap();
        let guests = Guests::open(directory.path());
        let built = built(directory.path(), |_| {});
        let guest = guests.install(&built, true).unwrap().guest;
        let found = |guests: &Guests| -> Vec<String> {
            guests.verify(guest.id()).unwrap().iter().map(|difference| difference.file.clone()).collect()
        };
        let changed = |content: &[u8], what: &[u8]| {
            let mut content = content.to_vec();
            let at = content.windows(what.len()).position(|window| window == what).unwrap();
            content[at] ^= 1;
            content
        };
        fs::write(guest.kernel(), &built.kernel[1..]).unwrap();
        assert_eq!(found(&guests), ["kernel"]);
        fs::remove_file(guest.kernel()).unwrap();
        assert_eq!(found(&guests), ["kernel"]);
        assert!(guests.install(&built, true).unwrap().is_new);
        assert_eq!(found(&guests), Vec::<String>::new());

        fs::write(guest.initramfs(), changed(&built.initramfs, b"fs-overlay")).unwrap();
        assert_eq!(found(&guests), ["initramfs: /lib/modules/overlay.ko", "initramfs"]);
        fs::write(guest.initramfs(), changed(&built.initramfs, b"podvisor-modules")).unwrap();
        assert_eq!(found(&guests), ["initramfs"]);
        fs::write(guest.initramfs(), changed(&built.initramfs, b"init\0")).unwrap();
        assert_eq!(found(&guests), ["initramfs: /hnit", "initramfs: /init", "initramfs"]);
        fs::write(guest.initramfs(), &built.initramfs[..1000]).unwrap();
        assert_eq!(found(&guests), ["initramfs", "initramfs"]);

        let manifest = guest.directory().join(MANIFEST);
        let text = fs::read_to_string(&manifest).unwrap();
        let write = |from: &str, to: &str| fs::write(&manifest, text.replacen(from, to, 1)).unwrap();
        write("6.1.0", "6.1.1");
        assert!(matches!(guests.get(guest.id()), Err(GuestError::Changed(_))));
        write("\"version\": 1", "\"version\": 2, \"new\": true");
        assert!(matches!(guests.get(guest.id()), Err(GuestError::Version { version: 2, .. })));
        write("\"version\": 1", "\"version\": 1, \"new\": true");
        assert!(matches!(guests.get(guest.id()), Err(GuestError::Manifest { .. })));
        // It is still listed, and can be replaced.
        assert!(guests.list().unwrap()[0].guest.is_err());
        assert!(guests.install(&built, true).unwrap().is_new);
        assert_eq!(found(&guests), Vec::<String>::new());
    }

    #[test]
    fn ids_are_16_hex_digits() {
        assert!("0123456789abcdef".parse::<GuestId>().is_ok());
        for bad in ["", "current", "0123456789ABCDEF", "0123456789abcdef0", "../456789abcdef00"] {
            assert!(bad.parse::<GuestId>().is_err(), "{bad}");
        }
    }
}
