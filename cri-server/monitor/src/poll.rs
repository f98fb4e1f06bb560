//! epoll and timers: what the monitor's one thread sleeps in.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// What became ready. The number names the connection, container, exec or port connection; all of them are counted
/// by one counter that never gives a number twice, so an event that was fetched before its object went finds nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    /// A child ended.
    Children,
    /// The disk thread finished something.
    Disk,
    /// The pod's socket.
    Listener,
    /// A client.
    Connection(u64),
    /// Standard input of a container or exec can take more.
    Stdin(u64),
    /// Standard output, or the terminal.
    Stdout(u64),
    /// Standard error.
    Stderr(u64),
    /// The kernel's memory events of a container's cgroup.
    Oom(u64),
    /// A connection into the pod's network namespace was made or refused.
    Port(u64),
    /// The hypervisor's connection.
    Hypervisor(u64),
    /// The connection to the agent.
    Agent(u64),
    /// A connection to a port of the guest that is being made.
    Dial(u64),
    /// The file server listens.
    FilesReady(u64),
    /// A process of the machine says something on stderr.
    Words(u64),
    /// The process that is the machine has ended.
    MachineGone(u64),
    /// There is news of a volume.
    Volumes,
}

impl Token {
    fn encode(self) -> u64 {
        match self {
            Self::Children => 0,
            Self::Disk => 1,
            Self::Listener => 2,
            Self::Connection(key) => key << 4 | 0x3,
            Self::Stdin(key) => key << 4 | 0x4,
            Self::Stdout(key) => key << 4 | 0x5,
            Self::Stderr(key) => key << 4 | 0x6,
            Self::Oom(key) => key << 4 | 0x7,
            Self::Port(key) => key << 4 | 0x8,
            Self::Hypervisor(key) => key << 4 | 0x9,
            Self::Agent(key) => key << 4 | 0xa,
            Self::Dial(key) => key << 4 | 0xb,
            Self::FilesReady(key) => key << 4 | 0xc,
            Self::Words(key) => key << 4 | 0xd,
            Self::MachineGone(key) => key << 4 | 0xe,
            Self::Volumes => 0xf,
        }
    }

    fn decode(value: u64) -> Option<Self> {
        let key = value >> 4;
        Some(match value & 0xf {
            0 => Self::Children,
            1 => Self::Disk,
            2 => Self::Listener,
            0x3 => Self::Connection(key),
            0x4 => Self::Stdin(key),
            0x5 => Self::Stdout(key),
            0x6 => Self::Stderr(key),
            0x7 => Self::Oom(key),
            0x8 => Self::Port(key),
            0x9 => Self::Hypervisor(key),
            0xa => Self::Agent(key),
            0xb => Self::Dial(key),
            0xc => Self::FilesReady(key),
            0xd => Self::Words(key),
            0xe => Self::MachineGone(key),
            0xf => Self::Volumes,
            _ => return None,
        })
    }
}

/// What a descriptor is watched for. Hang-up is always reported for a watched descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interest {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Interest {
    pub(crate) const READ: Self = Self { read: true, write: false };
    pub(crate) const WRITE: Self = Self { read: false, write: true };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, self.read);
        flags.set(epoll::EventFlags::OUT, self.write);
        flags
    }
}

/// How one descriptor is registered just now; kept beside the descriptor, so that nothing is told to the kernel twice.
#[derive(Debug)]
pub(crate) struct Watch {
    token: Token,
    registered: Option<Interest>,
}

impl Watch {
    pub(crate) fn new(token: Token) -> Self {
        Self { token, registered: None }
    }

    /// Watches `fd` for `wanted`, or no more. Must be told `None` before the descriptor is closed.
    pub(crate) fn set(&mut self, poller: &Poller, fd: impl AsFd, wanted: Option<Interest>) -> io::Result<()> {
        if self.registered == wanted {
            return Ok(());
        }
        let data = epoll::EventData::new_u64(self.token.encode());
        match (self.registered, wanted) {
            (None, Some(interest)) => epoll::add(&poller.epoll, fd, data, interest.flags())?,
            (Some(_), Some(interest)) => epoll::modify(&poller.epoll, fd, data, interest.flags())?,
            (Some(_), None) => epoll::delete(&poller.epoll, fd)?,
            (None, None) => {}
        }
        self.registered = wanted;
        Ok(())
    }
}

/// One thing that became ready.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other side is gone altogether.
    pub(crate) hung_up: bool,
}

/// The epoll instance.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Sleeps until something is ready or the time is over, and puts what is ready into `ready`.
    pub(crate) fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        const AT_ONCE: usize = 32;
        ready.clear();
        let mut events = Vec::with_capacity(AT_ONCE);
        let timeout = timeout.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            // The kernel's struct is packed: copy the fields out.
            let (flags, data) = (event.flags, event.data);
            let Some(token) = Token::decode(data.u64()) else { continue };
            let hung_up = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            ready.push(Ready {
                token,
                readable: flags.contains(epoll::EventFlags::IN),
                writable: flags.contains(epoll::EventFlags::OUT),
                hung_up,
            });
        }
        Ok(())
    }
}

/// What a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timer {
    /// A run of the OCI runtime takes too long.
    Call(u64),
    /// An exec's time is over.
    Exec(u64),
    /// The output of a process that ended should have come to its end by now.
    Drain(u64),
    /// A flood of output has come on for long enough to be read again.
    Output(u64),
    /// An OOM kill that was announced may have happened by now; how often that has been looked at.
    Oom(u64, u32),
    /// A connection into the pod is not made.
    Port(u64),
    /// A checkpoint takes too long, or its container is to be resumed once more.
    Checkpoint(u64),
    /// The pod's init did not obey SIGTERM.
    Init,
    /// The machine's start takes too long, or the next thing is to be done for its end.
    Machine(u64),
    /// A connection to a port of the guest is to be tried, or takes too long.
    Dial(u64),
    /// The agent does not answer a request.
    Request(u64),
    /// The guest is to be given the time, or looked at.
    Pulse,
    /// Clients can be accepted again, perhaps.
    Accept,
    /// The last replies before the monitor ends should have been taken by now.
    Farewell,
}

/// Names a timer that was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TimerId(Instant, u64);

/// The timers that are set.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    set: BTreeMap<TimerId, Timer>,
    count: u64,
}

impl Timers {
    pub(crate) fn set(&mut self, after: Duration, timer: Timer) -> TimerId {
        // A century is as good as for ever, and fits an Instant.
        let after = after.min(Duration::from_secs(100 * 365 * 86_400));
        self.count += 1;
        let id = TimerId(Instant::now() + after, self.count);
        self.set.insert(id, timer);
        id
    }

    pub(crate) fn cancel(&mut self, id: TimerId) {
        self.set.remove(&id);
    }

    /// How long until the next one.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.set.keys().next().map(|id| id.0.saturating_duration_since(Instant::now()))
    }

    /// Takes one whose time had come at `now`.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Timer> {
        let first = self.set.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_is_set_in_a_round_waits_for_the_next() {
        let mut timers = Timers::default();
        timers.set(Duration::ZERO, Timer::Output(1));
        let now = Instant::now();
        assert!(matches!(timers.due(now), Some(Timer::Output(1))));
        timers.set(Duration::from_nanos(1), Timer::Output(2));
        assert!(timers.due(now).is_none());
        assert!(matches!(timers.due(now + Duration::from_secs(60)), Some(Timer::Output(2))));
    }
}
