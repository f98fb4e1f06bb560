//! What the agent tells unasked: ends of processes, and processes that the guest's kernel killed for want of memory. An end is
//! acknowledged when it is recorded, so that none is lost between two connections, and none is counted twice.

use std::collections::BTreeMap;
use std::time::Duration;

use podvisor_proto::agent::{Acknowledge, Event, ProcessExit, event::Kind, request::Verb};

use super::agent::Purpose;
use super::bounds::Budget;
use super::end::Cause;
use crate::container::Maker;
use crate::monitor::Monitor;

/// What the pod's init is called.
const INIT: &str = "init";

/// The agent's events.
#[derive(Debug)]
pub(super) struct News {
    /// The last that came on this connection, and on any.
    last: u64,
    highest: u64,
    /// Ends that are being recorded, with the container.
    unsettled: BTreeMap<u64, u64>,
    acknowledged: u64,
    /// An acknowledgement is under way.
    asking: bool,
    /// Of events that no request of the monitor's has led to.
    budget: Budget,
    /// Of news about memory that the daemon is told.
    pub(super) oom_budget: Budget,
}

impl Default for News {
    fn default() -> Self {
        Self {
            last: 0,
            highest: 0,
            unsettled: BTreeMap::new(),
            acknowledged: 0,
            asking: false,
            // A container whose processes die for memory one after the other is told of a hundred times a second, for ever.
            budget: Budget::new(4096, Duration::from_millis(10)),
            oom_budget: Budget::new(64, Duration::from_millis(100)),
        }
    }
}

impl News {
    /// What was not acknowledged comes again.
    pub(super) fn new_connection(&mut self) {
        (self.last, self.asking) = (0, false);
    }

    /// Everything up to this has been dealt with.
    fn settled(&self) -> u64 {
        self.unsettled.keys().next().map_or(self.highest, |first| first - 1)
    }
}

impl Monitor {
    pub(super) fn agent_told(&mut self, event: Event) {
        let Some(machine) = &mut self.machine else { return };
        let news = &mut machine.agent.news;
        if event.sequence <= news.last {
            return self.distrust("its news do not count upwards");
        }
        news.last = event.sequence;
        if event.sequence <= news.highest {
            // Known: what was not acknowledged before a connection was lost is told again.
            return self.acknowledge();
        }
        news.highest = event.sequence;
        let expected = match event.kind {
            Some(Kind::Exited(exited)) => self.exited_in_guest(event.sequence, exited),
            Some(Kind::Oom(oom)) => {
                self.out_of_memory_in_guest(&oom.container_id);
                false
            }
            None => false,
        };
        if let Some(machine) = &mut self.machine
            && !expected
            && !machine.agent.news.budget.take()
        {
            return self.distrust("it has more news than there can be");
        }
        self.acknowledge();
    }

    /// A process has ended; `true`: one that the monitor knows.
    fn exited_in_guest(&mut self, sequence: u64, ProcessExit { id, exit }: ProcessExit) -> bool {
        let exit = exit.unwrap_or_default();
        let code = exit.code.clamp(0, 255);
        if id == INIT {
            self.end_machine(Cause::guest(format!("the pod's init in the guest ended with code {code}")));
            return true;
        }
        if let Some(key) = self.find_container(&id) {
            let Some(container) = self.containers.get_mut(&key) else { return false };
            let (alive, creating) = (container.is_alive(), container.is_being_created());
            let Maker::Guest(guest) = &mut container.maker else { return false };
            if !alive && !creating {
                return false;
            }
            if exit.oom_killed {
                container.oom_kills = container.oom_kills.max(1);
            }
            if let Some(machine) = &mut self.machine {
                machine.agent.news.unsettled.insert(sequence, key);
            }
            if alive {
                self.container_ended(key, code);
            } else {
                guest.ended = Some(code);
            }
            return true;
        }
        let exec = self.execs.iter().find(|(_, exec)| exec.in_guest().is_some_and(|guest| guest.name == id));
        match exec.map(|(key, _)| *key) {
            Some(key) => {
                self.exec_ended_in_guest(key, code);
                true
            }
            // One that was given up before it was made.
            None => false,
        }
    }

    /// The end of a container is recorded and told.
    pub(crate) fn exit_is_settled(&mut self, key: u64) {
        if let Some(machine) = &mut self.machine {
            machine.agent.news.unsettled.retain(|_, container| *container != key);
        }
        self.acknowledge();
        self.record_machine_end();
    }

    /// Lets the agent forget what has been dealt with.
    pub(super) fn acknowledge(&mut self) {
        let Some(machine) = self.machine.as_mut().filter(|machine| machine.is_running()) else { return };
        let greeted = machine.agent.greeted;
        let news = &mut machine.agent.news;
        let sequence = news.settled();
        if greeted && !news.asking && sequence > news.acknowledged {
            news.asking = true;
            self.tell_agent(Verb::Acknowledge(Acknowledge { sequence }), Purpose::Acknowledge(sequence));
        }
    }

    pub(super) fn acknowledged(&mut self, sequence: u64, done: bool) {
        let Some(machine) = &mut self.machine else { return };
        machine.agent.news.asking = false;
        if done {
            machine.agent.news.acknowledged = sequence;
            self.acknowledge();
        }
    }
}
