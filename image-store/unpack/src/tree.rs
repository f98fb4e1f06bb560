//! The tree below the target: finding the directory an entry belongs in without ever leaving the target.
//!
//! Every system call names one component relative to a directory descriptor. Parents are resolved by openat2(2) with
//! the target as the root, so that a symlink of the layer leads where it will lead in the container; where a part of the
//! way is missing, [`Tree::make_parents`] walks it by hand and makes it. Nobody but us changes the target meanwhile.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, XattrFlags};
use rustix::io::Errno;

use crate::error::{Failure, Fault, Result};
use crate::names::Place;
use crate::remove::remove_tree;

/// How many symlinks may stand in one name: the kernel's MAXSYMLINKS.
const MAX_LINKS: usize = 40;
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

const DIRECTORY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub(crate) struct Tree<'a> {
    root: BorrowedFd<'a>,
    /// The parent of the latest entry: most entries follow a sibling.
    latest: Option<(Vec<u8>, Rc<OwnedFd>)>,
    inodes: u64,
    inode_limit: u64,
}

impl<'a> Tree<'a> {
    pub(crate) fn new(root: BorrowedFd<'a>, inode_limit: u64) -> Self {
        Self { root, latest: None, inodes: 0, inode_limit }
    }

    /// How many inodes were made.
    pub(crate) fn inodes(&self) -> u64 {
        self.inodes
    }

    /// Counts an inode that is about to be made; directories that are only implied count too.
    fn count_inode(&mut self) -> Result<()> {
        self.inodes += 1;
        if self.inodes > self.inode_limit {
            return Err(Fault::TooLarge { what: "the number of inodes", limit: self.inode_limit }.into());
        }
        Ok(())
    }

    /// The directory that `path` (as in [`Place::parent`]) names; what is missing is made, root's, 0755.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>> {
        if let Some((latest, directory)) = &self.latest
            && latest == path
        {
            return Ok(Rc::clone(directory));
        }
        let directory = match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(directory) => directory,
            // ENOTDIR may be a whiteout of this layer, which a directory may replace.
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_parents(path)?,
            Err(error) => return Err(Failure::call("find the directory of")(error)),
        };
        let directory = Rc::new(directory);
        self.latest = Some((path.to_vec(), Rc::clone(&directory)));
        Ok(directory)
    }

    /// Opens what `path` leads to with the target as its root. A symlink in the last place is followed; use
    /// [`OFlags::NOFOLLOW`] against that.
    pub(crate) fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { &b"."[..] } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            match rustix::fs::openat2(self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // EAGAIN: a rename anywhere in the system came between (openat2(2), RESOLVE_IN_ROOT).
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Walks `path` one component after the other, links included, and makes the directories that are missing.
    fn make_parents(&mut self, path: &[u8]) -> Result<OwnedFd> {
        const ACTION: &str = "make the directories above";
        let open_root = |root: BorrowedFd<'_>| {
            rustix::fs::openat(root, c".", DIRECTORY, Mode::empty()).map_err(Failure::call(ACTION))
        };
        let mut current = open_root(self.root)?;
        // `..` in a link must not climb over the target: nothing is moved here, so the depth says where we are.
        let mut depth = 0_usize;
        let mut links = 0;
        let mut pending: VecDeque<Vec<u8>> = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
        while let Some(component) = pending.pop_front() {
            match component.as_slice() {
                b"" | b"." => continue,
                b".." if depth == 0 => continue,
                b".." => {
                    current = rustix::fs::openat(&current, c"..", DIRECTORY, Mode::empty())
                        .map_err(Failure::call(ACTION))?;
                    depth -= 1;
                    continue;
                }
                _ => {}
            }
            match FileKind::of(&current, &component)? {
                FileKind::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Failure::call(ACTION)(Errno::LOOP));
                    }
                    let link = rustix::fs::readlinkat(&current, &component, Vec::new())
                        .map_err(Failure::call(ACTION))?;
                    let link = link.as_bytes();
                    if link.starts_with(b"/") {
                        current = open_root(self.root)?;
                        depth = 0;
                    }
                    for part in link.split(|&byte| byte == b'/').rev() {
                        pending.push_front(part.to_vec());
                    }
                    continue;
                }
                FileKind::Directory => {}
                FileKind::Missing => self.make_directory(current.as_fd(), &component, false)?,
                FileKind::Whiteout => self.make_directory(current.as_fd(), &component, true)?,
                FileKind::Other => return Err(Failure::call(ACTION)(Errno::NOTDIR)),
            }
            current = rustix::fs::openat(&current, &component, DIRECTORY, Mode::empty())
                .map_err(Failure::call(ACTION))?;
            depth += 1;
        }
        Ok(current)
    }

    /// Makes a directory, root's, 0755. One that takes the place of a whiteout becomes opaque: what the layers below
    /// have there stays hidden.
    fn make_directory(&mut self, parent: BorrowedFd<'_>, name: &[u8], over_whiteout: bool) -> Result<()> {
        const ACTION: &str = "make directory";
        self.count_inode()?;
        if over_whiteout {
            self.clear(parent, name)?;
        }
        rustix::fs::mkdirat(parent, name, Mode::RWXU).map_err(Failure::call(ACTION))?;
        let directory = open_directory(parent, name)?;
        // A parent with the setgid bit or a default ACL must not leak into it, nor the umask.
        rustix::fs::fchown(&directory, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(Failure::call(ACTION))?;
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o755)).map_err(Failure::call(ACTION))?;
        if over_whiteout { set_opaque(&directory) } else { Ok(()) }
    }

    /// Makes sure that `place` is a directory, replacing anything else. Returns its inode number.
    pub(crate) fn directory(&mut self, place: &Place) -> Result<u64> {
        let parent = self.parent(&place.parent)?;
        let over_whiteout = match FileKind::of(&parent, &place.name)? {
            FileKind::Directory => return inode(&parent, &place.name),
            FileKind::Missing => false,
            FileKind::Whiteout => true,
            FileKind::Symlink | FileKind::Other => {
                self.clear(parent.as_fd(), &place.name)?;
                false
            }
        };
        self.make_directory(parent.as_fd(), &place.name, over_whiteout)?;
        inode(&parent, &place.name)
    }

    /// Makes something that must not exist yet with `make`; what stands in its place is removed first.
    pub(crate) fn make<T>(
        &mut self,
        place: &Place,
        action: &'static str,
        mut make: impl FnMut(BorrowedFd<'_>, &[u8]) -> rustix::io::Result<T>,
    ) -> Result<(Rc<OwnedFd>, T)> {
        self.count_inode()?;
        let parent = self.parent(&place.parent)?;
        let made = match make(parent.as_fd(), &place.name) {
            Err(Errno::EXIST) => {
                self.clear(parent.as_fd(), &place.name)?;
                make(parent.as_fd(), &place.name)
            }
            result => result,
        };
        Ok((parent, made.map_err(Failure::call(action))?))
    }

    /// Links `place` to `target`, both inside; a symlink is linked itself, not what it points to.
    pub(crate) fn hard_link(&mut self, target: &Place, place: &Place) -> Result<()> {
        const ACTION: &str = "make hard link";
        let from = self
            .open(&target.parent, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(Failure::call("find the target of hard link"))?;
        let stat = rustix::fs::statat(&from, &target.name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Failure::call("find the target of hard link"))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(Fault::Misplaced("a hard link to a directory").into());
        }
        let to = self.parent(&place.parent)?;
        let link = || rustix::fs::linkat(&from, &target.name, &to, &place.name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) => {
                let existing = rustix::fs::statat(&to, &place.name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(Failure::call(ACTION))?;
                if (existing.st_dev, existing.st_ino) == (stat.st_dev, stat.st_ino) {
                    return Ok(());
                }
                self.clear(to.as_fd(), &place.name)?;
                link()
            }
            result => result,
        }
        .map_err(Failure::call(ACTION))
    }

    /// Hides `place` of the layers below. What this layer itself has put there stays (whiteouts concern lower layers
    /// only), a directory of it no longer merging with what is below.
    pub(crate) fn whiteout(&mut self, place: &Place) -> Result<()> {
        let parent = self.parent(&place.parent)?;
        match FileKind::of(&parent, &place.name)? {
            FileKind::Missing => {
                self.count_inode()?;
                rustix::fs::mknodat(&parent, &place.name, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(Failure::call("make whiteout"))
            }
            FileKind::Directory => set_opaque(&open_directory(parent.as_fd(), &place.name)?),
            FileKind::Whiteout | FileKind::Symlink | FileKind::Other => Ok(()),
        }
    }

    /// Hides everything that the layers below have in directory `path`.
    pub(crate) fn opaque(&mut self, path: &[u8]) -> Result<()> {
        set_opaque(&open_directory(self.parent(path)?.as_fd(), b".")?)
    }

    /// Removes whatever `name` is.
    fn clear(&mut self, parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        // A component of the remembered way may be what goes.
        self.latest = None;
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => remove_tree(parent, std::os::unix::ffi::OsStrExt::from_bytes(name))
                .map_err(|error| Failure::System("replace", error.errno())),
            result => result.map_err(Failure::call("replace")),
        }
    }
}

/// What stands at a name, as far as it matters for what may come there.
enum FileKind {
    Missing,
    Directory,
    Symlink,
    Whiteout,
    Other,
}

impl FileKind {
    fn of(parent: impl AsFd, name: &[u8]) -> Result<Self> {
        let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(Self::Missing),
            result => result.map_err(Failure::call("look up"))?,
        };
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            FileType::CharacterDevice if stat.st_rdev == 0 => Self::Whiteout,
            _ => Self::Other,
        })
    }
}

fn inode(parent: impl AsFd, name: &[u8]) -> Result<u64> {
    let stat =
        rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(Failure::call("look up"))?;
    Ok(stat.st_ino)
}

fn open_directory(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(Failure::call("open directory"))
}

fn set_opaque(directory: &OwnedFd) -> Result<()> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
        .map_err(Failure::call("mark as opaque directory"))
}
