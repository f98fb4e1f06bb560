//! Whether the guest lives. It is given the time once a second, and its answer is the sign of life. When that does not come, two others are
//! asked: the guest's kernel, which refuses connections to a port where nobody listens without any program's help, and the hypervisor.
//!
//! Silence alone proves nothing: on a busy host a healthy guest may not run for seconds. What counts is [`Chance`]: the time in which nothing
//! outside the guest kept it from answering, as the host's scheduler tells it of each thread of the machine.
//!
//! | agent | kernel | machine | |
//! |---|---|---|---|
//! | silent | silent | its threads sleep, none waits for a processor | dead after [`STILL`] |
//! | silent | silent | its processors run | dead after [`BUSY`] of their time |
//! | silent | silent | waits for a processor or a disk, is stopped or frozen | nothing is known |
//! | silent | answers | | a request's own time limit decides |
//!
//! Whatever comes first, a hang is known within two seconds in which the machine has the processors that it wants. A guest that works is
//! asked at [`GLANCE`] already, as one that hangs with its processors running cannot be told from it.

use std::time::{Duration, Instant};

use podvisor_proto::agent::{SetTime, request::Verb};
use rustix::process::Pid;

use super::agent::Purpose;
use super::dial::{DialError, Goal};
use super::end::Cause;
use super::threads::Threads;
use crate::monitor::Monitor;
use crate::output::timestamp;
use crate::poll::{Timer, TimerId};

/// How often the guest is given the time.
const PERIOD: Duration = Duration::from_secs(1);
/// How long after an answer is looked whether the machine works, and what of a processor's time since the last such look that is.
const GLANCE: Duration = Duration::from_millis(500);
const WORKS: Duration = Duration::from_millis(100);
/// How long an answer usually does not take, and how often is looked from then on.
const USUAL: Duration = Duration::from_millis(50);
const LOOK: Duration = Duration::from_millis(100);
/// A longer time between two looks says more about this process than about the machine.
const LONGEST_LOOK: Duration = Duration::from_millis(200);
/// A machine that sleeps though a request waits for it will not wake up by itself. With [`PERIOD`] and a look it makes two seconds.
const STILL: Duration = Duration::from_millis(800);
/// The most that a kernel that works keeps what asks for it waiting is what programs in real time may use at a stretch: 0.19 s (the agent's
/// `sched_rt_runtime_us`), or 0.95 s where kernels of 6.12 and later count otherwise. With [`GLANCE`] and [`WORKS`] it makes two seconds.
const BUSY: Duration = Duration::from_millis(1200);
/// How much of an answering kernel's time passes before it is asked again.
const AGAIN: Duration = Duration::from_millis(300);
/// The kernel's port: nobody listens there.
pub(super) const NOBODYS_PORT: u32 = 1;

/// Time in which the machine could have answered.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Chance {
    /// Its threads slept.
    still: Duration,
    /// They ran.
    busy: Duration,
}

impl Chance {
    fn total(self) -> Duration {
        self.still + self.busy
    }

    fn add(&mut self, time: Duration, still: bool) {
        if still { self.still += time } else { self.busy += time }
    }
}

/// What is known of the guest's life.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// When the agent has said something last.
    heard: Option<Instant>,
    /// When it is given the time, or looked at, next.
    timer: Option<TimerId>,
    /// What the machine's threads had done at the last glance, and whether one is due before the next beat.
    glanced: Option<Threads>,
    glance: bool,
    /// `None`: it answers.
    silence: Option<Silence>,
}

/// It has not answered since.
#[derive(Debug)]
struct Silence {
    began: Instant,
    looked: Instant,
    threads: Option<Threads>,
    /// Since the agent was heard, and the kernel.
    agent: Chance,
    kernel: Chance,
    probed: bool,
    hypervisor: Hypervisor,
}

/// Whether the hypervisor answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hypervisor {
    Unasked,
    Asked,
    /// It has said that the machine runs.
    Runs,
}

impl Silence {
    fn new() -> Self {
        let began = Instant::now();
        Self {
            began,
            looked: began,
            threads: None,
            agent: Chance::default(),
            kernel: Chance::default(),
            probed: false,
            hypervisor: Hypervisor::Unasked,
        }
    }

    /// Adds what has passed since the last look.
    fn look(&mut self, threads: Option<Threads>) {
        let interval = self.looked.elapsed();
        self.looked = Instant::now();
        let before = std::mem::replace(&mut self.threads, threads);
        // A hypervisor that does not answer, or that holds the machine, says why there is nothing to be heard.
        if self.hypervisor == Hypervisor::Runs
            && let (Some(before), Some(after)) = (before, &self.threads)
        {
            let seen = after.since(&before, interval);
            let time = seen.unhindered.min(LONGEST_LOOK);
            // What runs little because it waits for a processor is not still.
            let still = seen.ran < interval / 10 && seen.unhindered > interval / 2;
            self.agent.add(time, still);
            self.kernel.add(time, still);
        }
    }

    /// What is to be said of a guest that hangs.
    fn verdict(&self) -> Option<String> {
        if self.kernel.still >= STILL {
            return Some("the guest stands still: neither its kernel nor its agent answers".to_owned());
        }
        (self.kernel.total() >= BUSY).then(|| {
            let seconds = BUSY.as_secs_f32();
            format!("the guest hangs: neither its kernel nor its agent has answered in {seconds} s of processor time")
        })
    }
}

impl Monitor {
    /// Begins, or begins anew on another connection, with the time.
    pub(super) fn feel_pulse(&mut self) {
        if let Some(machine) = &mut self.machine {
            machine.agent.pulse.silence = None;
            self.beat();
        }
    }

    /// The next beat or look is due.
    pub(crate) fn pulse_is_due(&mut self) {
        let Some(machine) = self.machine.as_mut().filter(|machine| machine.is_running()) else { return };
        let pulse = &mut machine.agent.pulse;
        if pulse.silence.is_some() {
            self.look_at_guest();
        } else if std::mem::take(&mut pulse.glance) && !self.machine_works() {
            self.set_pulse_timer(PERIOD.saturating_sub(GLANCE));
        } else {
            self.beat();
        }
    }

    /// Whether the agent has said anything since then, or never will. Until it has, what a process wrote that has ended may still be on its
    /// way: a guest that gets no processor sends nothing, and has not kept anything back.
    pub(crate) fn guest_has_spoken_since(&self, then: Instant) -> bool {
        let Some(machine) = self.machine.as_ref().filter(|machine| machine.is_running()) else { return true };
        machine.agent.pulse.heard.is_some_and(|heard| heard > then)
    }

    /// Whether the machine's process has used much of a processor since the last glance.
    fn machine_works(&mut self) -> bool {
        let Some(machine) = &mut self.machine else { return false };
        let Some(threads) =
            machine.process.as_ref().and_then(|it| Threads::of([it.relative.pid.as_raw_pid()]))
        else {
            return false;
        };
        let works =
            machine.agent.pulse.glanced.as_ref().is_some_and(|before| threads.ran_since(before) >= WORKS);
        machine.agent.pulse.glanced = Some(threads);
        works
    }

    /// Gives the guest the time. One that has not taken it the last time is only listened to.
    fn beat(&mut self) {
        let Some(machine) = self.machine.as_mut().filter(|machine| machine.is_running()) else { return };
        machine.agent.pulse.silence = Some(Silence::new());
        let under_way = machine.agent.asked.values().any(|it| it.purpose == Purpose::Time);
        if machine.agent.greeted && !under_way {
            self.tell_agent(Verb::SetTime(SetTime { time_ns: timestamp::nanoseconds() }), Purpose::Time);
        }
        self.set_pulse_timer(USUAL);
    }

    pub(super) fn set_pulse_timer(&mut self, after: Duration) {
        let timer = self.timers.set(after, Timer::Pulse);
        if let Some(machine) = &mut self.machine
            && let Some(old) = machine.agent.pulse.timer.replace(timer)
        {
            self.timers.cancel(old);
        }
    }

    pub(super) fn stop_pulse(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        let pulse = std::mem::take(&mut machine.agent.pulse);
        if let Some(timer) = pulse.timer {
            self.timers.cancel(timer);
        }
    }

    /// The agent has said something.
    pub(super) fn agent_lives(&mut self) {
        let Some(machine) = self.machine.as_mut().filter(|machine| machine.is_running()) else { return };
        machine.agent.pulse.heard = Some(Instant::now());
        if machine.agent.pulse.silence.take().is_some() {
            machine.agent.pulse.glance = true;
            self.hang_up(|goal| *goal == Goal::Kernel);
            self.set_pulse_timer(GLANCE);
        }
    }

    /// The kernel has refused a connection, or a program has taken it.
    pub(super) fn kernel_dialled<T>(&mut self, outcome: &Result<T, DialError>) {
        if let Some(machine) = &mut self.machine
            && let Some(silence) = &mut machine.agent.pulse.silence
            && matches!(outcome, Ok(_) | Err(DialError::Nobody))
        {
            silence.kernel = Chance::default();
        }
    }

    /// The hypervisor has answered whether the machine runs.
    pub(super) fn hypervisor_checked(&mut self, runs: bool) {
        if let Some(machine) = &mut self.machine
            && let Some(silence) = &mut machine.agent.pulse.silence
        {
            silence.hypervisor = if runs { Hypervisor::Runs } else { Hypervisor::Unasked };
        }
    }

    fn look_at_guest(&mut self) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let pids = [
            Some(machine.hypervisor.program.pid()),
            machine.process.as_ref().map(|process| process.relative.pid),
        ];
        let probing = machine.dials.values().any(|dial| dial.goal == Goal::Kernel);
        let Some(silence) = &mut machine.agent.pulse.silence else { return };
        silence.look(Threads::of(pids.into_iter().flatten().map(Pid::as_raw_pid)));
        if let Some(text) = silence.verdict() {
            return self.end_machine(Cause::guest(text));
        }
        if silence.hypervisor != Hypervisor::Asked {
            silence.hypervisor = Hypervisor::Asked;
            machine.hypervisor.check(poller);
        }
        let probe = !probing && (!silence.probed || silence.kernel.total() >= AGAIN);
        silence.probed |= probe;
        if probe {
            self.dial(Goal::Kernel, None);
        }
        self.set_pulse_timer(LOOK);
    }

    /// How much longer an agent may take that was asked at `asked` and has `patience` of the time in which it can answer. None for one that
    /// has said something else since then.
    pub(super) fn patience_left(&self, asked: Instant, patience: Duration) -> Duration {
        let pulse = self.machine.as_ref().map(|machine| &machine.agent.pulse);
        let silent = pulse.filter(|pulse| pulse.heard.is_none_or(|heard| heard < asked));
        silent.and_then(|pulse| pulse.silence.as_ref()).map_or(Duration::ZERO, |silence| {
            let unwatched = silence.began.saturating_duration_since(asked);
            patience.saturating_sub(silence.agent.total() + unwatched)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::threads::tests::{sleeping, spinning};
    use super::*;

    /// What is said after so many looks at a machine whose threads are so.
    fn after(looks: u32, hypervisor: Hypervisor, threads: impl Fn(u32) -> Threads) -> Option<String> {
        let mut silence = Silence { hypervisor, ..Silence::new() };
        for look in 0..=looks {
            silence.looked = Instant::now().checked_sub(LOOK).unwrap();
            silence.look(Some(threads(look)));
        }
        silence.verdict()
    }

    #[test]
    fn silence_is_held_against_a_guest_that_could_speak_alone() {
        let sleeps = |_| sleeping();
        assert_eq!(after(7, Hypervisor::Runs, sleeps), None);
        assert!(after(9, Hypervisor::Runs, sleeps).unwrap().starts_with("the guest stands still"));
        assert_eq!(after(1000, Hypervisor::Asked, sleeps), None);
        assert_eq!(after(1000, Hypervisor::Unasked, sleeps), None);
        let runs = |look| spinning(LOOK * look);
        assert_eq!(after(11, Hypervisor::Runs, runs), None);
        assert!(after(13, Hypervisor::Runs, runs).unwrap().starts_with("the guest hangs"));
        // Which gets a tenth of a processor.
        let starved = |look| spinning(LOOK / 10 * look);
        assert_eq!(after(100, Hypervisor::Runs, starved), None);
    }

    #[test]
    fn a_hang_is_known_within_two_seconds() {
        let limit = Duration::from_secs(2);
        // It hangs right after an answer; or when it has worked too little at the glance to be asked then. Each look is late by up to one.
        assert!(GLANCE + USUAL + BUSY + LOOK <= limit);
        assert!(PERIOD + WORKS + USUAL + BUSY + LOOK <= limit + GLANCE);
        assert!(PERIOD + USUAL + STILL + LOOK <= limit);
    }

    #[test]
    fn a_look_that_comes_late_counts_as_one() {
        let mut silence = Silence { hypervisor: Hypervisor::Runs, ..Silence::new() };
        for _ in 0..3 {
            silence.looked = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
            silence.look(Some(sleeping()));
        }
        assert_eq!(silence.verdict(), None);
    }
}
