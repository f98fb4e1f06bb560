//! One connection, from the socket to its end.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Mode;
use rustix::process::umask;
use vhost::vhost_user::{Error as ConnectionError, Listener};
use vhost_user_backend::{Error as DeviceError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::confine::{self, ConfineError};
use crate::device::Device;
use crate::options::Options;
use crate::share::{self, Share};
use crate::sys;

/// Why nothing was served, or no longer is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("use --ready-fd {0}: it is not open")]
    Ready(i32),
    #[error("close what was inherited")]
    Inherited(#[source] io::Error),
    #[error("listen on {0}")]
    Listen(PathBuf, #[source] io::Error),
    #[error("bound the number of files")]
    Files(#[source] io::Error),
    #[error("confine this process")]
    Confine(#[from] ConfineError),
    #[error("open the shared tree")]
    Share(#[source] io::Error),
    #[error("start threads")]
    Threads(#[source] io::Error),
    // These are no `Error`, and name their cause themselves.
    #[error("make the device: {0}")]
    Device(DeviceError),
    #[error("serve the connection: {0}")]
    Connection(DeviceError),
}

/// Listens, says so, serves whoever connects first, and returns when that has gone.
pub(crate) fn run(options: Options) -> Result<(), ServeError> {
    let ready = sys::inherited(options.ready_fd).ok_or(ServeError::Ready(options.ready_fd))?;
    sys::close_all_but(&ready).map_err(ServeError::Inherited)?;
    let listener = listen(&options.socket_path)
        .map_err(|error| ServeError::Listen(options.socket_path.clone(), error))?;
    let max_files = share::bound_files(options.max_files).map_err(ServeError::Files)?;
    let descriptors = confine::enter(&options.shared_dir)?;

    let share = Share::new(descriptors, max_files).map_err(ServeError::Share)?;
    let device = Device::new(share, options.threads, options.tag).map_err(ServeError::Threads)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("requests".to_owned(), Arc::new(device), memory).map_err(ServeError::Device)?;
    drop(ready);

    // Made of a socket alone: one that knows its path would remove a file of that path, and paths are the shared tree's by now.
    let mut listener = Listener::from(listener);
    daemon.start(&mut listener).map_err(ServeError::Connection)?;
    // Nobody else is served, and learns that at once.
    drop(listener);
    let ended = daemon.wait();
    // Its threads end with the process; waiting for them would be waiting for whatever disk they wait for.
    std::mem::forget(daemon);
    match ended {
        // The hypervisor has gone, perhaps in the middle of a message.
        Ok(())
        | Err(DeviceError::HandleRequest(ConnectionError::Disconnected | ConnectionError::PartialMessage)) => {
            Ok(())
        }
        Err(error) => Err(ServeError::Connection(error)),
    }
}

/// A socket that only its owner can connect to; the parent may give it to the hypervisor's user.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let before = umask(Mode::RWXG | Mode::RWXO);
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}
