//! How much containers have written: measured by one thread in the background, at a fraction of its time, when somebody has asked.
//!
//! The tree belongs to a container that goes on changing it while it is read, so it is walked by descriptors: no link
//! is followed, no other file system entered, and a directory that was moved away ends the walk instead of leading it
//! out.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, statat};
use rustix::io::Errno;

/// Older measurements are renewed when somebody asks. kubelet asks every 10 s.
const FRESH: Duration = Duration::from_secs(8);
/// After so much work the thread rests three times as long: a quarter of a processor at most.
const WORK: Duration = Duration::from_millis(20);
const REST: u32 = 3;
/// What stat(2) counts in, whatever the file system's block is.
const STAT_BLOCK: u64 = 512;

/// Bytes on disk and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// Measurements by key.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    known: Arc<Mutex<HashMap<String, Entry>>>,
    /// Ends the thread when it is dropped.
    thread: Mutex<Option<Sender<(String, PathBuf)>>>,
}

#[derive(Debug, Default)]
struct Entry {
    usage: Option<Usage>,
    at: Option<Instant>,
    queued: bool,
}

impl Meter {
    /// What a directory is known to hold, `None` before the first measurement. Asks for a new one if that is old.
    pub(crate) fn usage(&self, key: &str, directory: &Path) -> Option<Usage> {
        let mut known = lock(&self.known);
        let entry = known.entry(key.to_owned()).or_default();
        let usage = entry.usage;
        if !entry.queued && entry.at.is_none_or(|at| at.elapsed() > FRESH) {
            entry.queued = true;
            drop(known);
            self.ask(key, directory.to_owned());
        }
        usage
    }

    /// Says what is known without measuring, e.g. because the directory was just made.
    pub(crate) fn set(&self, key: &str, usage: Usage) {
        let entry = Entry { usage: Some(usage), at: Some(Instant::now()), queued: false };
        lock(&self.known).insert(key.to_owned(), entry);
    }

    /// Forgets a directory that is gone.
    pub(crate) fn forget(&self, key: &str) {
        lock(&self.known).remove(key);
    }

    fn ask(&self, key: &str, directory: PathBuf) {
        let mut thread = lock(&self.thread);
        let sender = thread.get_or_insert_with(|| {
            let (sender, asked) = channel();
            let known = self.known.clone();
            let started =
                std::thread::Builder::new().name("usage".into()).spawn(move || serve(&asked, &known));
            if let Err(error) = started {
                tracing::warn!(%error, "cannot start the thread that measures writable layers");
            }
            sender
        });
        if sender.send((key.to_owned(), directory)).is_err() {
            // The thread did not start: the next who asks tries again.
            *thread = None;
            if let Some(entry) = lock(&self.known).get_mut(key) {
                entry.queued = false;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(asked: &Receiver<(String, PathBuf)>, known: &Mutex<HashMap<String, Entry>>) {
    while let Ok((key, directory)) = asked.recv() {
        let usage = measure(&directory);
        if let Some(entry) = lock(known).get_mut(&key) {
            match usage {
                Ok(usage) => entry.usage = Some(usage),
                // Gone, or changed under our feet: what was known stays.
                Err(error) => tracing::debug!(key, %error, "a writable layer cannot be measured now"),
            }
            entry.at = Some(Instant::now());
            entry.queued = false;
        }
    }
}

struct Level {
    identity: (u64, u64),
    below: Vec<CString>,
}

/// Walks a directory; hard links count once.
fn measure(directory: &Path) -> Result<Usage, Errno> {
    let mut current: OwnedFd =
        File::open(directory).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?.into();
    let mut walk = Walk { usage: Usage::default(), linked: HashSet::new(), since: Instant::now() };
    let top = fstat(&current)?;
    walk.count(&top);
    let mut levels = vec![Level { identity: identity(&top), below: walk.read(current.as_fd())? }];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.below.pop() {
            let below = match enter(current.as_fd(), &name) {
                Ok(below) => below,
                // Removed or replaced meanwhile.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => continue,
                Err(error) => return Err(error),
            };
            levels.push(Level { identity: identity(&fstat(&below)?), below: walk.read(below.as_fd())? });
            current = below;
            continue;
        }
        levels.pop();
        if let Some(above) = levels.last() {
            current = openat(&current, c"..", DIRECTORY, Mode::empty())?;
            if identity(&fstat(&current)?) != above.identity {
                return Err(Errno::STALE);
            }
        }
    }
    Ok(walk.usage)
}

struct Walk {
    usage: Usage,
    /// Inodes with several names that were counted.
    linked: HashSet<u64>,
    since: Instant,
}

impl Walk {
    /// Counts what is in a directory and returns the directories in it.
    fn read(&mut self, directory: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
        let mut below = Vec::new();
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            self.count(&stat);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                below.push(name.to_owned());
            }
            let worked = self.since.elapsed();
            if worked > WORK {
                std::thread::sleep(worked * REST);
                self.since = Instant::now();
            }
        }
        Ok(below)
    }

    fn count(&mut self, stat: &Stat) {
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if stat.st_nlink > 1 && !is_directory && !self.linked.insert(stat.st_ino) {
            return;
        }
        self.usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK;
        self.usage.inodes += 1;
    }
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn enter(directory: BorrowedFd<'_>, name: &CString) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(directory, name, DIRECTORY, Mode::empty(), resolve)
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_blocks_and_inodes_and_follows_nothing() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("large"), vec![1; 1 << 20]).unwrap();
        let inside = tempfile::tempdir().unwrap();
        let empty = measure(inside.path()).unwrap();
        assert_eq!(empty.inodes, 1);
        std::fs::create_dir(inside.path().join("d")).unwrap();
        std::fs::write(inside.path().join("d/f"), vec![1; 8192]).unwrap();
        std::fs::hard_link(inside.path().join("d/f"), inside.path().join("g")).unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
        let full = measure(inside.path()).unwrap();
        assert_eq!(full.inodes, 4);
        assert!(full.bytes >= empty.bytes + 8192 && full.bytes < empty.bytes + 65536, "{full:?}");
    }

    #[test]
    fn deeper_than_any_path() {
        let top = tempfile::tempdir().unwrap();
        let mut here: OwnedFd = File::open(top.path()).unwrap().into();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&here, c"d", Mode::RWXU).unwrap();
            here = openat(&here, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
        assert_eq!(measure(top.path()).unwrap().inodes, 3001);
        let parent = File::open(top.path().parent().unwrap()).unwrap();
        podvisor_unpack::remove_tree(parent.as_fd(), top.path().file_name().unwrap()).unwrap();
    }

    #[test]
    fn the_first_answer_comes_later_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let meter = Meter::default();
        let deadline = Instant::now() + Duration::from_secs(60);
        let usage = loop {
            if let Some(usage) = meter.usage("a", directory.path()) {
                break usage;
            }
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        };
        assert_eq!(usage.inodes, 1);
        assert_eq!(meter.usage("a", directory.path()), Some(usage));
        meter.forget("a");
        meter.set("b", Usage { bytes: 1, inodes: 2 });
        assert_eq!(meter.usage("b", directory.path()), Some(Usage { bytes: 1, inodes: 2 }));
    }
}
