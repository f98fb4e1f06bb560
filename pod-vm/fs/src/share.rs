//! What the guest is promised, and the file system behind it: crate `virtiofsd`'s, told how.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use virtiofsd::read_dir::ReadDir;

use crate::private::{self, plain};

/// Descriptors that are not the guest's: the connection's, the queues', memory being mapped, one for each request being served.
const OWN_FILES: u64 = 128;

/// Bounds the descriptors of this process so that `asked` are left to the guest, or as many as it may have. Gives how many.
pub(crate) fn bound_files(asked: u64) -> io::Result<u64> {
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let bound = most.min(asked.saturating_add(OWN_FILES));
    let left = bound.checked_sub(OWN_FILES).filter(|left| *left > 0);
    let left = left.ok_or_else(|| io::Error::other(format!("{most} are too few: raise RLIMIT_NOFILE")))?;
    setrlimit(Resource::Nofile, Rlimit { current: Some(bound), maximum: Some(bound) })?;
    Ok(left)
}

/// What the file system behind is told of a request to clear set-ID bits: nothing. In a user namespace the kernel clears them at every
/// write and truncation (`setattr_should_drop_suidgid` asks for CAP_FSETID in the first one), so no capability has to be dropped for it.
const KERNEL_KILLS: bool = false;

/// The shared tree as a FUSE server.
pub(crate) struct Share {
    files: PassthroughFs,
}

impl Share {
    /// Serves the root directory. `descriptors` is /proc/self/fd, through which a file that is known is opened.
    pub(crate) fn new(descriptors: File, max_files: u64) -> io::Result<Self> {
        let config = Config {
            // With no time the guest asks for every name and attribute each time, so that it never sees an old one, and its kernel
            // forgets a file as soon as no program uses it: what this process holds is what the guest's programs hold.
            entry_timeout: Duration::ZERO,
            attr_timeout: Duration::ZERO,
            // The guest caches data, checks its age by the attributes at each read, and drops all of it at each open: shared mappings work
            // with every kernel, which they do not where nothing is cached (before 6.6).
            cache_policy: CachePolicy::Auto,
            // Sizes and times are the host's. With writeback they would be the guest's.
            writeback: false,
            // Attributes with the names of a directory: of no use where they are old at once.
            readdirplus: false,
            root_dir: "/".to_owned(),
            proc_sfd_rawfd: Some(descriptors),
            // A mount below becomes one in the guest: inode numbers are unique, and nobody mistakes one file for another.
            announce_submounts: true,
            xattr: true,
            posix_acl: NegotiationMode::Auto,
            // Set-ID bits are cleared here when a file is written, so the guest need not ask before each write.
            killpriv_v2: true,
            // O_DIRECT goes past the guest's cache, not past the host's, for which the guest's buffers would have to be aligned.
            allow_direct_io: false,
            // Handles instead of descriptors would take a capability over all files (CAP_DAC_READ_SEARCH), and have no bound.
            inode_file_handles: InodeFileHandlesMode::Never,
            guest_fd_limit: max_files,
            ..Config::default()
        };
        Ok(Self { files: PassthroughFs::new(config)? })
    }
}

/// Neither saved nor restored: a pod does not move.
impl SerializableFileSystem for Share {}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;
    type DirIter = ReadDir<Vec<u8>>;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.files.init(capable)
    }

    fn destroy(&self) {
        self.files.destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        Ok(private::entry(parent, name.to_bytes(), self.files.lookup(ctx, plain(parent), name)?))
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.files.forget(ctx, plain(inode), count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        let requests = requests.into_iter().map(|(inode, count)| (plain(inode), count)).collect();
        self.files.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(fuse::Attr, Duration)> {
        let (attributes, _) = self.files.getattr(ctx, plain(inode), handle)?;
        Ok((attributes, private::attributes_last(inode)))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: fuse::SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        let valid = valid & !SetattrValid::KILL_SUIDGID;
        let (attributes, _) = self.files.setattr(ctx, plain(inode), attr, handle, valid)?;
        Ok((attributes, private::attributes_last(inode)))
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.files.readlink(ctx, plain(inode))
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let entry = self.files.symlink(ctx, target, plain(parent), name, extensions)?;
        Ok(private::entry(parent, name.to_bytes(), entry))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let entry = self.files.mknod(ctx, plain(parent), name, mode, rdev, umask, extensions)?;
        Ok(private::entry(parent, name.to_bytes(), entry))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let entry = self.files.mkdir(ctx, plain(parent), name, mode, umask, extensions)?;
        Ok(private::entry(parent, name.to_bytes(), entry))
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.files.unlink(ctx, plain(parent), name)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.files.rmdir(ctx, plain(parent), name)
    }

    fn rename(&self, ctx: Context, from: u64, old: &CStr, to: u64, new: &CStr, flags: u32) -> io::Result<()> {
        self.files.rename(ctx, plain(from), old, plain(to), new, flags)
    }

    fn link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.files.link(ctx, plain(inode), plain(parent), name)?;
        Ok(private::entry(parent, name.to_bytes(), entry))
    }

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        _kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.files.open(ctx, plain(inode), KERNEL_KILLS, flags)?;
        Ok((handle, private::open(inode, options)))
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let (entry, handle, options) =
            self.files.create(ctx, plain(parent), name, mode, KERNEL_KILLS, flags, umask, extensions)?;
        let entry = private::entry(parent, name.to_bytes(), entry);
        let options = private::open(entry.inode, options);
        Ok((entry, handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.files.read(ctx, plain(inode), handle, to, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        _kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        self.files.write(
            ctx,
            plain(inode),
            handle,
            from,
            size,
            offset,
            lock_owner,
            delayed_write,
            KERNEL_KILLS,
            flags,
        )
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.files.flush(ctx, plain(inode), handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.files.fsync(ctx, plain(inode), datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.files.fallocate(ctx, plain(inode), handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.files.release(ctx, plain(inode), flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        self.files.statfs(ctx, plain(inode))
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        self.files.setxattr(ctx, plain(inode), name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.files.getxattr(ctx, plain(inode), name, size)
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.files.listxattr(ctx, plain(inode), size)
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.files.removexattr(ctx, plain(inode), name)
    }

    fn opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.files.opendir(ctx, plain(inode), flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.files.readdir(ctx, plain(inode), handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.files.fsyncdir(ctx, plain(inode), datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.files.releasedir(ctx, plain(inode), flags, handle)
    }

    fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()> {
        self.files.access(ctx, plain(inode), mask)
    }

    fn lseek(&self, ctx: Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.files.lseek(ctx, plain(inode), handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.files.copyfilerange(
            ctx,
            plain(inode_in),
            handle_in,
            offset_in,
            plain(inode_out),
            handle_out,
            offset_out,
            len,
            flags,
        )
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        self.files.syncfs(ctx, plain(inode))
    }
}
