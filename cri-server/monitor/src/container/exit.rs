//! The end of a container: what is read, drained and written before anybody is told, and the runtime's `delete`.

use std::time::{Duration, Instant};

use podvisor_proto::monitor::{self as proto, Exit, Place, event, reply, stream_frame::Frame};
use rustix::process::Signal;

use super::{Ending, Maker, Removal, State};
use crate::cgroup::Cgroup;
use crate::disk::Job;
use crate::exit_record::ExitRecord;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::output::lines::Stream;
use crate::output::timestamp;
use crate::poll::Timer;
use crate::runtime::Purpose;

/// How long output may still come after the process has ended, from somebody outside the container's cgroup who
/// holds its pipes open.
const PATIENCE: Duration = Duration::from_secs(2);

impl Monitor {
    /// A container's process has been reaped, or is known to be gone.
    pub(crate) fn container_ended(&mut self, key: u64, code: i32) {
        let finished_at = timestamp::nanoseconds();
        self.count_oom_kills(key);
        let Some(container) = self.containers.get_mut(&key) else { return };
        let (State::Created { child, .. } | State::Running { child }) = &container.state else { return };
        let starting = matches!(container.state, State::Created { starting: true, .. });
        // With a pid namespace that is shared the container's other processes live on, and hold its pipes.
        if let Some(cgroup) = &container.cgroup
            && !cgroup.processes().is_empty()
        {
            cgroup.signal_all(Signal::KILL);
        }
        drop(container.maker.ends());
        let exit = Exit { code, finished_at, oom_killed: container.oom_kills > 0 };
        container.state = State::Ending(Ending {
            pid: child.pid.as_raw_pid(),
            start_time: child.start_time,
            exit,
            starting,
            drained: false,
            recorded: false,
            patience: self.timers.set(PATIENCE, Timer::Drain(key)),
            since: Instant::now(),
        });
        if let Some(mut memory) = container.memory.take() {
            let _ = memory.watch.set(&self.poller, &memory.notices, None);
        }
        if let Some(input) = container.streams.stdin.take() {
            input.close(&self.poller);
        }
        let guest = matches!(container.maker, Maker::Guest(_));
        for output in container.streams.outputs() {
            if guest {
                output.expect_arrival();
            } else {
                output.give_up_slave();
            }
        }
        self.resume_attached(key);
        self.pump_container(key, Stream::Stdout);
        self.pump_container(key, Stream::Stderr);
        self.advance_ending(key);
    }

    /// A container that has ended should have come to the end of its output by now.
    pub(crate) fn container_drain_is_over(&mut self, key: u64) {
        let mut arrives = self.containers.get(&key).is_some_and(|container| {
            let guest = matches!(container.maker, Maker::Guest(_));
            let State::Ending(ending) = &container.state else { return false };
            guest && !self.guest_has_spoken_since(ending.since)
        });
        let Some(container) = self.containers.get_mut(&key) else { return };
        let held_back = container.held_back;
        for output in container.streams.outputs() {
            arrives |= output.still_arrives(held_back);
        }
        if arrives {
            if let State::Ending(ending) = &mut container.state {
                ending.patience = self.timers.set(PATIENCE, Timer::Drain(key));
            }
            return;
        }
        for output in container.streams.outputs() {
            output.limit_to_present();
        }
        self.watch_output(key);
    }

    /// Does what can be done next for a container that has ended.
    pub(super) fn advance_ending(&mut self, key: u64) {
        let Some(pod) = &self.pod else { return };
        let Some(container) = self.containers.get_mut(&key) else { return };
        let drained = container.streams.drained();
        let State::Ending(ending) = &mut container.state else { return };
        if drained && !ending.drained {
            ending.drained = true;
            self.timers.cancel(ending.patience);
            let record = ExitRecord::new(&container.id, &ending.exit).because(&container.because);
            self.disk.send(Job::Finish { key, record, directory: pod.state_dir.clone() });
        }
        if ending.starting || !ending.drained {
            return;
        }
        let recorded = ending.recorded;
        // While the disk works; but a `start` that has not ended would find its container gone, and fail.
        if matches!(container.removal, Removal::NotBegun) {
            self.begin_removal(key);
        }
        if recorded {
            self.announce_exit(key);
        }
    }

    /// What held up the removal of a container that has ended may be gone.
    pub(crate) fn continue_removal(&mut self, key: u64) {
        let Some(container) = self.containers.get(&key) else { return };
        match (&container.removal, &container.state) {
            (Removal::NotBegun, State::Ending(_)) => self.advance_ending(key),
            (Removal::NotBegun, State::Exited { .. }) => self.begin_removal(key),
            _ => {}
        }
    }

    /// The exit record is on the disk.
    pub(crate) fn container_recorded(&mut self, key: u64) {
        if let Some(State::Ending(ending)) =
            self.containers.get_mut(&key).map(|container| &mut container.state)
        {
            ending.recorded = true;
        }
        self.advance_ending(key);
    }

    fn announce_exit(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Ending(ending) = &container.state else { return };
        let exit = ending.exit;
        container.state = State::Exited { pid: ending.pid, start_time: ending.start_time, exit };
        let attached = std::mem::take(&mut container.attached);
        let (id, reason) = (container.id.clone(), container.because.clone());
        self.broadcast(event::Kind::Exited(proto::ProcessExit { id, exit: Some(exit), reason }));
        for attached in attached {
            self.send_frame(attached.connection, Frame::Exit(exit));
            if let Some(connection) = self.connections.get_mut(&attached.connection) {
                connection.channel.close(&self.poller);
            }
        }
        self.finish_deletes(key);
        self.exit_is_settled(key);
    }

    /// Lets its maker delete what is left of a container that has ended.
    fn begin_removal(&mut self, key: u64) {
        match self.containers.get(&key).map(|container| &container.maker) {
            Some(Maker::Runtime(_)) => self.remove_from_host(key),
            Some(Maker::Guest(_)) => self.remove_from_guest(key),
            None => {}
        }
    }

    /// Lets the runtime delete what is left, its cgroup above all. Not by force at first: with it runc kills once more and
    /// looks again only after 100 ms, although the process has been reaped. What the plain way refuses, force is for: a
    /// state that the runtime lost, or that it does not hold for stopped.
    fn remove_from_host(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Maker::Runtime(host) = &container.maker else { return };
        let force =
            host.place == Place::Inside || matches!(container.removal, Removal::Refused | Removal::Failed);
        container.removal = Removal::Running { force };
        let runtime = host.runtime.clone();
        let mut arguments = vec![container.id.clone().into()];
        if force {
            arguments.insert(0, "--force".into());
        }
        if let Err(failure) = self.call(&runtime, "delete", &arguments, None, Purpose::Delete(key)) {
            self.removal_ended(key, Err(failure));
        }
    }

    /// Its maker has deleted it, or could not.
    pub(crate) fn removal_ended(&mut self, key: u64, outcome: Result<(), Failure>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        match outcome {
            Ok(()) => {
                container.removal = Removal::Done;
                self.finish_deletes(key);
            }
            Err(_) if matches!(container.removal, Removal::Running { force: false }) => {
                container.removal = Removal::Refused;
                self.begin_removal(key);
            }
            Err(failure) => {
                self.journal.note("a container could not be deleted", &container.id, &failure.detail);
                container.removal = Removal::Failed;
                for to in std::mem::take(&mut container.deletes) {
                    self.reply(to, Err(failure.clone()));
                }
            }
        }
    }

    /// Forgets a container that has ended, when that is wanted and the runtime has done its part.
    pub(super) fn finish_deletes(&mut self, key: u64) {
        let Some(container) = self.containers.get(&key) else { return };
        if container.deletes.is_empty() || !matches!(container.state, State::Exited { .. }) {
            return;
        }
        match container.removal {
            Removal::Running { .. } => {}
            Removal::NotBegun | Removal::Refused | Removal::Failed => self.begin_removal(key),
            Removal::Done => {
                let _ = std::fs::remove_file(self.run_file(&format!("{}.pid", container.id)));
                let Some(container) = self.containers.remove(&key) else { return };
                self.leave_volumes(key);
                if let Some(checkpoint) = container.checkpoint {
                    self.drop_checkpoint(checkpoint, &container.id);
                }
                for to in container.deletes {
                    self.reply(to, Ok(reply::Result::Done(proto::Done {})));
                }
            }
        }
    }

    /// The kernel says that something happened to a container's memory.
    pub(crate) fn memory_event(&mut self, key: u64) {
        if let Some(memory) = self.containers.get(&key).and_then(|container| container.memory.as_ref()) {
            // An eventfd's counter, or inotify's events; only that there was one is of interest.
            while matches!(rustix::io::read(&memory.notices, &mut [0u8; 512]), Ok(1..)) {}
        }
        self.look_for_oom_kills(key, 0);
    }

    /// Version 1 says that memory is out before anybody is killed and counted, so one look may come too early.
    pub(crate) fn look_for_oom_kills(&mut self, key: u64, looks: u32) {
        const LOOKS: u32 = 8;
        if !self.count_oom_kills(key) && looks < LOOKS && self.containers.contains_key(&key) {
            self.timers.set(Duration::from_millis(2 << looks), Timer::Oom(key, looks + 1));
        }
    }

    /// Tells of OOM kills that there were since the last look, if any.
    fn count_oom_kills(&mut self, key: u64) -> bool {
        let Some(container) = self.containers.get_mut(&key) else { return false };
        let kills = container.cgroup.as_ref().and_then(Cgroup::oom_kills).unwrap_or(0);
        if kills <= container.oom_kills {
            return false;
        }
        container.oom_kills = kills;
        let container_id = container.id.clone();
        self.broadcast(event::Kind::Oom(proto::OomKill { container_id }));
        true
    }
}
