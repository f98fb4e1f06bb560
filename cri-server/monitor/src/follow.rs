//! What kubelet's atomic writer writes (`pkg/volume/util/atomic_writer.go`), followed by a thread: it waits until `..data` has been exchanged
//! and reads the version that it points to, so that the loop never waits for a file.
//!
//! Exchanging `..data` is the only moment at which a version becomes true. The watch is set before a version is read; and an overflow of
//! the kernel's queue, a failure and the passing of time lead to the same: the names are compared, and what is not there yet is read. One
//! version of each volume is under way at a time; what changes meanwhile makes one more.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use podvisor_proto::agent::Attributes;
use podvisor_proto::monitor::FollowedVolume;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};

use crate::version::{self, Shift, Unreadable, Version};

/// Seconds after which names are compared, whatever was heard; and after something has failed.
const INTERVAL: i64 = 60;
const AGAIN: i64 = 1;

#[derive(Debug)]
enum Command {
    Follow {
        key: u64,
        path: PathBuf,
        shift: Shift,
    },
    /// The version that was told of has been written to the guest, or could not be.
    Written {
        key: u64,
        done: bool,
    },
    Leave {
        key: u64,
    },
}

/// What there is to tell of a volume.
#[derive(Debug)]
pub(crate) enum News {
    /// A version, with the attributes of the volume itself.
    Version { key: u64, root: Attributes, version: Box<Version> },
    /// What is there cannot be read.
    Trouble { key: u64, why: String },
}

/// The loop's end.
#[derive(Debug)]
pub(crate) struct Follower {
    commands: Sender<Command>,
    news: Receiver<News>,
    /// Wakes the thread, and the loop.
    theirs: Arc<OwnedFd>,
    ours: Arc<OwnedFd>,
}

impl Follower {
    pub(crate) fn start() -> io::Result<Self> {
        let wake = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Arc::new);
        let (theirs, ours) = (wake()?, wake()?);
        let (commands, queue) = channel();
        let (tell, news) = channel();
        let thread = Thread {
            events: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?,
            queue,
            woken: Arc::clone(&theirs),
            tell,
            wake: Arc::clone(&ours),
            volumes: BTreeMap::new(),
        };
        std::thread::Builder::new()
            .name("follow".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || thread.run())?;
        Ok(Self { commands, news, theirs, ours })
    }

    /// From now on there is news of it, the present version first.
    pub(crate) fn follow(&self, key: u64, wanted: &FollowedVolume) {
        let shift = Shift { uid: wanted.uid, gid: wanted.gid, ids: wanted.ids };
        self.send(Command::Follow { key, path: (&wanted.host_path).into(), shift });
    }

    /// No further version comes before the last one has been written.
    pub(crate) fn written(&self, key: u64, done: bool) {
        self.send(Command::Written { key, done });
    }

    pub(crate) fn leave(&self, key: u64) {
        self.send(Command::Leave { key });
    }

    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&*self.theirs, &1u64.to_ne_bytes());
    }

    /// Readable when there is news.
    pub(crate) fn waker(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    /// Forgets that it was woken. To be called before [`Follower::next`], or a wake-up could be lost.
    pub(crate) fn quiet(&self) {
        let _ = rustix::io::read(&*self.ours, &mut [0u8; 8]);
    }

    pub(crate) fn next(&self) -> Option<News> {
        self.news.try_recv().ok()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // The thread ends when it finds nobody at the other end.
        self.commands = channel().0;
        let _ = rustix::io::write(&*self.theirs, &1u64.to_ne_bytes());
    }
}

/// A volume as the thread knows it.
#[derive(Debug)]
struct Volume {
    path: PathBuf,
    shift: Shift,
    watch: Option<i32>,
    /// Name of the version that was told of last.
    told: Option<String>,
    under_way: bool,
    /// To be compared.
    due: bool,
    /// To be tried again soon.
    failed: bool,
    /// What was said of it last: not said again.
    trouble: Option<String>,
}

#[derive(Debug)]
struct Thread {
    events: OwnedFd,
    queue: Receiver<Command>,
    woken: Arc<OwnedFd>,
    tell: Sender<News>,
    wake: Arc<OwnedFd>,
    volumes: BTreeMap<u64, Volume>,
}

impl Thread {
    fn run(mut self) {
        loop {
            let waited_in_vain = !self.wait();
            let _ = rustix::io::read(&*self.woken, &mut [0u8; 8]);
            self.read_events();
            loop {
                match self.queue.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            for volume in self.volumes.values_mut() {
                volume.due |= waited_in_vain;
            }
            let due: Vec<u64> =
                self.volumes.iter().filter(|(_, it)| it.due && !it.under_way).map(|(key, _)| *key).collect();
            for key in due {
                self.look(key);
            }
        }
    }

    /// `false`: for as long as there was to wait.
    fn wait(&self) -> bool {
        let mut watched =
            [PollFd::new(&self.events, PollFlags::IN), PollFd::new(&*self.woken, PollFlags::IN)];
        let soon = self.volumes.values().any(|volume| volume.failed && !volume.under_way);
        let limit = Timespec { tv_sec: if soon { AGAIN } else { INTERVAL }, tv_nsec: 0 };
        let limit = (!self.volumes.is_empty()).then_some(&limit);
        !matches!(poll(&mut watched, limit), Ok(0))
    }

    fn read_events(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.events, &mut buffer);
        while let Ok(event) = events.next() {
            let (watch, what) = (event.wd(), event.events());
            let exchanged = event.file_name().is_some_and(|name| name.to_bytes() == version::DATA.as_bytes());
            let gone = what.intersects(ReadFlags::IGNORED | ReadFlags::UNMOUNT | ReadFlags::DELETE_SELF);
            let lost = what.contains(ReadFlags::QUEUE_OVERFLOW);
            for volume in self.volumes.values_mut().filter(|volume| lost || volume.watch == Some(watch)) {
                volume.due |= exchanged || gone || lost;
                if gone {
                    volume.watch = None;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Follow { key, path, shift } => {
                let volume = Volume {
                    path,
                    shift,
                    watch: None,
                    told: None,
                    under_way: false,
                    due: true,
                    failed: false,
                    trouble: None,
                };
                self.volumes.insert(key, volume);
            }
            Command::Written { key, done } => {
                let Some(volume) = self.volumes.get_mut(&key) else { return };
                volume.under_way = false;
                volume.failed = !done;
                if done {
                    // It may have changed meanwhile.
                    volume.due = true;
                } else {
                    volume.told = None;
                }
            }
            Command::Leave { key } => {
                let Some(volume) = self.volumes.remove(&key) else { return };
                let shared = self.volumes.values().any(|other| other.watch == volume.watch);
                if let (Some(watch), false) = (volume.watch, shared) {
                    let _ = inotify::remove_watch(&self.events, watch);
                }
            }
        }
    }

    /// Compares what is there with what was told, and tells of a new version.
    fn look(&mut self, key: u64) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        (volume.due, volume.failed) = (false, false);
        if volume.watch.is_none() {
            let flags = WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR;
            volume.watch = inotify::add_watch(&self.events, &volume.path, flags).ok();
        }
        let news = match read(&volume.path, volume.told.as_deref(), volume.shift) {
            Ok(None) => return,
            Ok(Some((root, version))) => {
                volume.told = Some(version.name.clone());
                volume.under_way = true;
                volume.trouble = None;
                News::Version { key, root, version: Box::new(version) }
            }
            Err(error) => {
                volume.failed = true;
                let why = crate::disk::chain(error);
                if volume.trouble.as_ref() == Some(&why) {
                    return;
                }
                volume.trouble = Some(why.clone());
                News::Trouble { key, why }
            }
        };
        let _ = self.tell.send(news);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// The present version, unless it is the one that was `told`. The volume is not kept open: kubelet is to be able to unmount it.
fn read(path: &Path, told: Option<&str>, shift: Shift) -> Result<Option<(Attributes, Version)>, Unreadable> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty()).map_err(Unreadable::at(path))?;
    if told.is_some_and(|told| version::present(&root).is_ok_and(|present| present == told)) {
        return Ok(None);
    }
    let root = File::from(root);
    let metadata = root.metadata().map_err(|source| Unreadable::Io { path: path.to_owned(), source })?;
    let version = version::read(root.as_fd(), path, shift)?;
    Ok(Some((version::attributes(&metadata, shift), version)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::{Duration, Instant};

    use super::*;

    fn publish(volume: &Path, name: &str, text: &str) {
        fs::create_dir(volume.join(name)).unwrap();
        fs::write(volume.join(name).join("value"), text).unwrap();
        symlink(name, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    }

    fn next(follower: &Follower) -> News {
        let began = Instant::now();
        loop {
            follower.quiet();
            if let Some(news) = follower.next() {
                return news;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "nothing is heard");
            let _ = poll(
                &mut [PollFd::from_borrowed_fd(follower.waker(), PollFlags::IN)],
                Some(&Timespec { tv_sec: 1, tv_nsec: 0 }),
            );
        }
    }

    fn named(news: News) -> (u64, String) {
        match news {
            News::Version { key, version, .. } => (key, version.name),
            News::Trouble { why, .. } => panic!("{why}"),
        }
    }

    #[test]
    fn each_version_is_told_once_and_the_next_when_it_has_been_written() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path();
        publish(volume, "..1", "one");
        let follower = Follower::start().unwrap();
        let wanted = FollowedVolume { host_path: volume.display().to_string(), ..FollowedVolume::default() };
        follower.follow(7, &wanted);
        assert_eq!(named(next(&follower)), (7, "..1".to_owned()));
        publish(volume, "..2", "two");
        publish(volume, "..3", "three");
        fs::remove_dir_all(volume.join("..1")).unwrap();
        follower.written(7, true);
        assert_eq!(named(next(&follower)), (7, "..3".to_owned()));
        // What could not be written comes again.
        follower.written(7, false);
        assert_eq!(named(next(&follower)), (7, "..3".to_owned()));
        follower.written(7, true);
        publish(volume, "..4", "four");
        assert_eq!(named(next(&follower)), (7, "..4".to_owned()));
        follower.leave(7);
    }

    #[test]
    fn trouble_is_told_once_and_ends() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("volume");
        let follower = Follower::start().unwrap();
        let wanted = FollowedVolume { host_path: volume.display().to_string(), ..FollowedVolume::default() };
        follower.follow(1, &wanted);
        assert!(matches!(next(&follower), News::Trouble { key: 1, .. }));
        let prepared = directory.path().join("prepared");
        fs::create_dir(&prepared).unwrap();
        publish(&prepared, "..1", "one");
        fs::rename(&prepared, &volume).unwrap();
        assert_eq!(named(next(&follower)), (1, "..1".to_owned()));
    }
}
