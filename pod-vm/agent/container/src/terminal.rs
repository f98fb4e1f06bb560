//! A terminal of the container's own devpts, as the process's standard streams and its /dev/console.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::pty::{ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::error::{During, Step};
use crate::filesystem::{attach, copy_of_open};
use crate::process::{ProcessPlan, Terminal};
use crate::sys;

/// Opens a terminal after the pivot; returns the controlling side. The other side is this session's from then on.
pub(crate) fn open(process: &ProcessPlan, console: bool) -> Step<Option<OwnedFd>> {
    let Terminal::Wanted { size } = process.terminal else { return Ok(None) };
    let failed = || "open a terminal of the container".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::openat(CWD, "/dev/pts/ptmx", flags, Mode::empty()).during(failed)?;
    unlockpt(&master).during(failed)?;
    let name = ptsname(&master, Vec::new()).during(failed)?;
    let slave = rustix::fs::openat(CWD, name.as_c_str(), flags, Mode::empty()).during(failed)?;
    if let Some((columns, rows)) = size {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).during(failed)?;
    }
    let uid = rustix::fs::Uid::from_raw(process.uid);
    rustix::fs::fchown(&slave, Some(uid), None).during(failed)?;
    if console {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = Path::new("/dev/console");
        let place = rustix::fs::openat(CWD, place, flags, Mode::from_raw_mode(0o620))
            .during(|| "make /dev/console".into())?;
        copy_of_open(&slave, false)
            .and_then(|copy| attach(&copy, &place))
            .during(|| "make the terminal /dev/console".into())?;
    }
    sys::own_terminal(slave.as_fd()).during(failed)?;
    for number in 0..=2 {
        sys::become_standard(slave.as_fd(), number).during(failed)?;
    }
    Ok(Some(master))
}
