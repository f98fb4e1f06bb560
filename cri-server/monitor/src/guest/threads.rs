//! What the host's scheduler says of a machine's threads: whether they ran, slept or were kept from running.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// The threads of the machine's processes at one moment, by their ids.
#[derive(Debug)]
pub(super) struct Threads(BTreeMap<i32, Thread>);

#[derive(Debug, Clone, Copy)]
struct Thread {
    /// proc_pid_stat(5), field 3.
    state: u8,
    /// ns on a processor, and ns of waiting for one since it began (kernel, `Documentation/scheduler/sched-stats.rst`).
    ran: u64,
    waited: u64,
}

/// What happened between two moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// For so long at least no thread was kept from running.
    pub(super) unhindered: Duration,
    /// So long they have run, all together.
    pub(super) ran: Duration,
}

impl Threads {
    /// `None`: a process is not there any more, or the kernel does not tell.
    pub(super) fn of(pids: impl IntoIterator<Item = i32>) -> Option<Self> {
        let mut threads = BTreeMap::new();
        for pid in pids {
            for entry in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
                let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
                // A thread may end at any moment.
                let Some(thread) =
                    read("stat").zip(read("schedstat")).map(|(stat, times)| parse(&stat, &times))
                else {
                    continue;
                };
                threads.insert(id, thread?);
            }
        }
        (!threads.is_empty()).then_some(Self(threads))
    }

    /// How long they have run since `before`, all together.
    pub(super) fn ran_since(&self, before: &Self) -> Duration {
        let ran =
            |(id, now): (&i32, &Thread)| now.ran.saturating_sub(before.0.get(id).map_or(0, |then| then.ran));
        Duration::from_nanos(self.0.iter().map(ran).sum())
    }

    /// What has happened since `before`, which is `interval` ago.
    pub(super) fn since(&self, before: &Self, interval: Duration) -> Seen {
        let mut seen = Seen { unhindered: interval, ran: self.ran_since(before) };
        for (id, now) in &self.0 {
            let then = before.0.get(id);
            let ran = now.ran.saturating_sub(then.map_or(0, |then| then.ran));
            let waited = now.waited.saturating_sub(then.map_or(0, |then| then.waited));
            let (ran, waited) = (Duration::from_nanos(ran), Duration::from_nanos(waited));
            let unhindered = match now.state {
                b'S' | b'I' => interval.saturating_sub(waited),
                // Perhaps it waits, for how long is known only afterwards.
                b'R' => ran,
                // A disk, a debugger, SIGSTOP.
                _ => Duration::ZERO,
            };
            seen.unhindered = seen.unhindered.min(unhindered);
        }
        seen
    }
}

fn parse(stat: &str, times: &str) -> Option<Thread> {
    let state = *stat.rsplit_once(") ")?.1.as_bytes().first()?;
    let mut times = times.split_ascii_whitespace().map(str::parse);
    let (ran, waited) = (times.next()?.ok()?, times.next()?.ok()?);
    Some(Thread { state, ran, waited })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn thread(state: u8, ran: Duration, waited: Duration) -> Thread {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap();
        Thread { state, ran: ns(ran), waited: ns(waited) }
    }

    pub(crate) fn sleeping() -> Threads {
        Threads([(1, thread(b'S', Duration::ZERO, Duration::ZERO))].into())
    }

    /// One sleeps, one has run for so long.
    pub(crate) fn spinning(ran: Duration) -> Threads {
        let mut threads = sleeping();
        threads.0.insert(2, thread(b'R', ran, Duration::ZERO));
        threads
    }

    #[test]
    fn what_keeps_a_thread_from_running_hinders_the_machine() {
        let second = Duration::from_secs(1);
        let ms = Duration::from_millis;
        let unhindered = |threads: &[Thread]| {
            let all = Threads((3..).zip(threads.iter().copied()).collect());
            all.since(&sleeping(), second)
        };
        assert_eq!(unhindered(&[thread(b'S', ms(5), ms(1))]), Seen { unhindered: ms(999), ran: ms(5) });
        assert_eq!(unhindered(&[thread(b'S', ms(5), ms(900))]).unhindered, ms(100));
        assert_eq!(unhindered(&[thread(b'R', ms(700), ms(200))]), Seen { unhindered: ms(700), ran: ms(700) });
        assert_eq!(unhindered(&[thread(b'R', ms(0), ms(0))]).unhindered, ms(0));
        for state in *b"DTtZ" {
            let held = unhindered(&[thread(b'S', ms(0), ms(0)), thread(state, ms(900), ms(0))]);
            assert_eq!(held.unhindered, ms(0));
        }
    }

    #[test]
    fn lines_of_the_kernel() {
        let parsed = parse("12 (a) b) S 1 2 3", "111155 2583027 2\n").unwrap();
        assert_eq!((parsed.state, parsed.ran, parsed.waited), (b'S', 111_155, 2_583_027));
        assert!(parse("12 (a", "1 2 3").is_none() && parse("12 (a) S", "").is_none());
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(Threads::of([own]).is_some());
        assert!(Threads::of([i32::MAX]).is_none());
    }
}
