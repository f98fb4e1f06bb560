//! Children that ended before their pid was known.

use std::collections::VecDeque;

use rustix::process::{Pid, WaitStatus};

/// How processes ended whose pid nobody had asked about yet: a container or exec that was quicker than its runtime.
#[derive(Debug, Default)]
pub(crate) struct Strays(VecDeque<(Pid, WaitStatus)>);

impl Strays {
    /// With the host's pid namespace every orphan of a container ends up here, so the number is bounded.
    const LIMIT: usize = 4096;

    pub(crate) fn add(&mut self, pid: Pid, status: WaitStatus) {
        if self.0.len() == Self::LIMIT {
            self.0.pop_front();
        }
        self.0.push_back((pid, status));
    }

    /// The latest with this pid.
    pub(crate) fn take(&mut self, pid: Pid) -> Option<WaitStatus> {
        let index = self.0.iter().rposition(|(stray, _)| *stray == pid)?;
        self.0.remove(index).map(|(_, status)| status)
    }
}
