//! The control connection to the agent: made when the machine starts, and again when it is lost while the machine lives.
//!
//! What was asked on a lost connection may have been done or not. What can be done twice is asked again; a start is decided by what the
//! agent lists; everything else has failed, and what it may have made is removed.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use podvisor_proto::agent::{
    Hello, List, MAX_FRAME, PROTOCOL_VERSION, ProcessState, Processes, reply, request::Verb,
};

use super::Stage;
use super::agent::{Asked, Outcome, Purpose, QUEUE_LIMIT};
use super::bounds::Budget;
use super::dial::{DialError, Goal};
use super::end::{Cause, KILLED};
use crate::channel::Channel;
use crate::container::Maker;
use crate::disk::chain;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::poll::Token;

/// How long an agent may be out of reach before its machine is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Connections that were lost.
#[derive(Debug)]
pub(super) struct Losses {
    budget: Budget,
    /// Since when there has been none that was greeted.
    since: Option<Instant>,
}

impl Default for Losses {
    fn default() -> Self {
        Self { budget: Budget::new(16, Duration::from_secs(60)), since: None }
    }
}

impl Monitor {
    /// The dial to the control port has come to its end.
    pub(super) fn control_dialled(&mut self, outcome: Result<OwnedFd, DialError>) {
        let key = self.new_key();
        let Some(machine) = &mut self.machine else { return };
        let starting = matches!(machine.stage, Stage::Starting(_));
        let socket = match outcome {
            Ok(socket) => socket,
            Err(error) if starting => {
                return self
                    .end_machine(Cause::guest(format!("the agent does not answer: {}", chain(error))));
            }
            Err(error) => {
                let limit = PATIENCE.as_secs();
                let why =
                    format!("the connection to the agent was lost and did not come back within {limit} s");
                return self.end_machine(Cause::guest(format!("{why}: {}", chain(error))));
            }
        };
        if let Stage::Starting(starting) = &mut machine.stage {
            starting.step = super::boot::Step::Greet;
        }
        let mut channel = Channel::new(Token::Agent(key), socket, MAX_FRAME, QUEUE_LIMIT);
        channel.watch(&self.poller);
        machine.agent.channel = Some((key, channel));
        machine.agent.greeted = false;
        machine.agent.news.new_connection();
        let purpose = if starting { Purpose::Boot } else { Purpose::Greet };
        self.tell_agent(Verb::Hello(Hello { protocol_version: PROTOCOL_VERSION }), purpose);
    }

    /// The agent's connection has ended.
    pub(super) fn agent_lost(&mut self) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        if let Some((_, channel)) = machine.agent.channel.take() {
            channel.end(poller);
        }
        match machine.stage {
            Stage::Starting(_) => {
                self.end_machine(Cause::guest("the agent ended the connection".to_owned()));
            }
            Stage::Running(_) if !machine.agent.losses.budget.take() => {
                self.end_machine(Cause::guest("the agent ends one connection after the other".to_owned()));
            }
            Stage::Running(_) => {
                machine.agent.greeted = false;
                let since = *machine.agent.losses.since.get_or_insert_with(Instant::now);
                self.journal.note("the connection to the agent was lost", "machine", &"it is made again");
                self.requests_lost();
                self.dial(Goal::Control, Some(since + PATIENCE));
            }
            Stage::Ending(_) | Stage::Gone { .. } | Stage::Exited { .. } => {}
        }
    }

    /// Decides about the requests that were under way on a lost connection.
    fn requests_lost(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        let agent = &mut machine.agent;
        let sent: Vec<u64> = agent
            .asked
            .keys()
            .copied()
            .filter(|id| agent.waiting.iter().all(|(waiting, _)| waiting != id))
            .collect();
        let sent: Vec<Asked> = sent.iter().filter_map(|id| agent.asked.remove(id)).collect();
        for Asked { purpose, again, timer, .. } in sent {
            if let Some(timer) = timer {
                self.timers.cancel(timer);
            }
            let agent = self.machine.as_mut().map(|machine| &mut machine.agent);
            match (purpose, again, agent) {
                (Purpose::Start(container, to), _, Some(agent)) => agent.doubtful.push((container, to)),
                // The new connection begins with them.
                (Purpose::Greet | Purpose::Compare, ..) => {}
                (purpose, Some(verb), _) => {
                    if let Err(failure) = self.ask_agent(verb, purpose) {
                        self.agent_answered(purpose, Err(failure));
                    }
                }
                (purpose, None, _) => self.agent_answered(purpose, Err(lost())),
            }
        }
    }

    /// Hello has been answered on a new connection.
    pub(super) fn greeted(&mut self, outcome: Outcome) {
        match outcome {
            Ok(reply::Result::Hello(hello)) if hello.personalised => {
                self.tell_agent(Verb::List(List {}), Purpose::Compare);
            }
            Ok(_) => self.distrust("it does not know the pod any more"),
            Err(failure) => self.distrust(&failure.detail),
        }
    }

    /// The agent has listed what it has: what is not there any more has ended, and requests go out again.
    pub(super) fn compared(&mut self, outcome: Outcome) {
        let Ok(reply::Result::Processes(Processes { processes })) = outcome else {
            return self.distrust("it does not list its processes");
        };
        let state =
            |id: &str| processes.iter().find(|it| it.id == id).map(podvisor_proto::agent::Process::state);
        let Self { machine: Some(machine), poller, .. } = self else { return };
        machine.agent.greeted = true;
        machine.agent.losses.since = None;
        for (_, frame) in std::mem::take(&mut machine.agent.waiting) {
            machine.agent.send(poller, frame);
        }
        for (container, to) in std::mem::take(&mut machine.agent.doubtful) {
            let id = self.containers.get(&container).map(|it| it.id.as_str()).unwrap_or_default();
            let started = matches!(state(id), Some(ProcessState::Running | ProcessState::Exited));
            self.start_ended(container, to, if started { Ok(()) } else { Err(lost()) });
        }
        let in_guest =
            self.containers.iter().filter(|(_, it)| matches!(it.maker, Maker::Guest(_)) && it.is_alive());
        let missing: Vec<u64> =
            in_guest.filter(|(_, it)| state(&it.id).is_none()).map(|(key, _)| *key).collect();
        for container in missing {
            self.container_ended(container, KILLED);
        }
        let in_guest = self.execs.iter().filter(|(_, exec)| exec.is_alive());
        let missing: Vec<u64> = in_guest
            .filter_map(|(key, exec)| {
                exec.in_guest().is_some_and(|it| state(&it.name).is_none()).then_some(*key)
            })
            .collect();
        for exec in missing {
            self.exec_ended_in_guest(exec, KILLED);
        }
        self.feel_pulse();
        self.acknowledge();
    }
}

fn lost() -> Failure {
    Failure::vm("the connection to the agent in the guest was lost before it answered", String::new())
}
