//! ResizeVm: the machine and the guest follow each other, step by step; what was done is taken back when a later step fails.
//!
//! Before memory or processors go the guest is held to what remains, and after they have come it may use them. Memory that is to go is the
//! guest's to give back: what it keeps stays, and the answer says so.

use std::collections::VecDeque;

use podvisor_proto::agent::{Adapt, HugePages, request::Verb as AgentVerb};
use podvisor_proto::hypervisor::{self as wire, SetCpus, SetMemory, request::Verb};
use podvisor_proto::monitor::{ResizeVm, Resized, reply};

use super::agent::Purpose;
use super::bounds::line;
use super::hypervisor::{Ask, refusal};
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::verbs::{Answer, Answered, ReplyTo};

/// Of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) memory: u64,
    pub(super) cpus: u32,
    /// What of the memory the guest sets aside.
    pub(super) huge_pages: Vec<HugePages>,
}

impl Size {
    /// What both have.
    fn least(&self, other: &Self) -> Self {
        let both = self.huge_pages.iter().filter_map(|pages| {
            let same = other.huge_pages.iter().find(|other| other.page_size == pages.page_size)?;
            Some(HugePages { count: pages.count.min(same.count), ..*pages })
        });
        Self {
            memory: self.memory.min(other.memory),
            cpus: self.cpus.min(other.cpus),
            huge_pages: both.collect(),
        }
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// The guest uses that much.
    Adapt(Size),
    Memory(u64),
    Cpus(u32),
}

/// A resize that is under way.
#[derive(Debug)]
pub(super) struct Resizing {
    to: ReplyTo,
    from: Size,
    /// What the machine is to be, and what it has become of it.
    size: Size,
    steps: VecDeque<Step>,
    /// What takes back the steps that were done, in their order.
    undo: Vec<Step>,
    failure: Option<Failure>,
    under_way: Option<Step>,
}

impl Resizing {
    fn new(to: ReplyTo, from: Size, size: Size) -> Self {
        let least = from.least(&size);
        let mut steps = VecDeque::new();
        if least != from {
            steps.push_back(Step::Adapt(least));
        }
        if size.memory != from.memory {
            steps.push_back(Step::Memory(size.memory));
        }
        if size.cpus != from.cpus {
            steps.push_back(Step::Cpus(size.cpus));
        }
        steps.push_back(Step::Adapt(size.clone()));
        Self { to, from, size, steps, undo: Vec::new(), failure: None, under_way: None }
    }

    /// A step was done.
    fn done(&mut self, step: &Step, reached: Option<u64>) {
        if self.failure.is_some() {
            return;
        }
        self.undo.push(match step {
            Step::Adapt(_) => Step::Adapt(self.from.clone()),
            Step::Memory(_) => Step::Memory(self.from.memory),
            Step::Cpus(_) => Step::Cpus(self.from.cpus),
        });
        if let (Step::Memory(_), Some(reached)) = (step, reached) {
            self.size.memory = reached;
            for step in &mut self.steps {
                if let Step::Adapt(size) = step {
                    size.memory = reached;
                }
            }
        }
    }

    /// From now on what was done is taken back.
    fn fail(&mut self, failure: Failure) {
        self.failure = Some(failure);
        self.steps = std::mem::take(&mut self.undo).into_iter().rev().collect();
    }
}

impl Monitor {
    pub(crate) fn resize_vm(&mut self, to: ReplyTo, request: &ResizeVm) -> Answered {
        self.running_machine()?;
        let Some(machine) = &mut self.machine else { return Ok(Answer::DONE) };
        if machine.resizing.is_some() {
            return Err(Failure::wrong_state("the virtual machine is being resized"));
        }
        let from = machine.size.clone();
        let mut size = from.clone();
        if request.memory != 0 {
            size.memory = request.memory;
        }
        if request.cpus != 0 {
            size.cpus = request.cpus;
        }
        if !request.huge_pages.is_empty() {
            size.huge_pages.clone_from(&request.huge_pages);
        }
        if size == from {
            return Ok(Answer::Now(resized(&size)));
        }
        machine.resizing = Some(Resizing::new(to, from, size));
        self.next_resize_step();
        Ok(Answer::Later)
    }

    fn next_resize_step(&mut self) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let started_with = machine.started_with;
        let Some(resizing) = &mut machine.resizing else { return };
        resizing.under_way = resizing.steps.pop_front();
        let verb = match &resizing.under_way {
            Some(Step::Adapt(size)) => {
                let Size { memory, cpus, huge_pages } = size.clone();
                let added = memory.saturating_sub(started_with);
                let adapt = AgentVerb::Adapt(Adapt { added, cpus, huge_pages });
                if let Err(failure) = self.ask_agent(adapt, Purpose::Adapt) {
                    self.resize_answered(Err(failure));
                }
                return;
            }
            Some(Step::Memory(bytes)) => Verb::SetMemory(SetMemory { bytes: *bytes }),
            Some(Step::Cpus(count)) => Verb::SetCpus(SetCpus { count: *count }),
            None => return self.resize_ended(),
        };
        machine.hypervisor.ask(verb, Ask::Resize, poller);
    }

    /// The hypervisor has answered a step.
    pub(super) fn hypervisor_resized(&mut self, outcome: Result<wire::reply::Result, wire::Error>) {
        self.resize_answered(match outcome {
            Ok(wire::reply::Result::Resized(resized)) => Ok(Some(resized.memory)),
            Ok(_) => Ok(None),
            Err(error) => Err(refusal(&error)),
        });
    }

    /// A step was done, where it was memory so far, or refused.
    pub(super) fn resize_answered(&mut self, outcome: Result<Option<u64>, Failure>) {
        let Some(resizing) = self.machine.as_mut().and_then(|machine| machine.resizing.as_mut()) else {
            return;
        };
        let Some(step) = resizing.under_way.take() else { return };
        match outcome {
            Ok(reached) => resizing.done(&step, reached),
            Err(failure) if resizing.failure.is_none() => resizing.fail(failure),
            Err(failure) => {
                let detail = line(&failure.detail, 512);
                self.journal.note("a step of a resize could not be taken back", "machine", &detail);
            }
        }
        self.next_resize_step();
    }

    fn resize_ended(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        let Some(resizing) = machine.resizing.take() else { return };
        let answer = if let Some(failure) = resizing.failure {
            Err(failure)
        } else {
            machine.size = resizing.size;
            Ok(resized(&machine.size))
        };
        self.reply(resizing.to, answer);
    }

    /// The machine ends: who waits for its resize is told.
    pub(super) fn fail_resize(&mut self, failure: &Failure) {
        let resizing = self.machine.as_mut().and_then(|machine| machine.resizing.take());
        if let Some(Resizing { to, .. }) = resizing {
            self.reply(to, Err(failure.clone()));
        }
    }
}

fn resized(size: &Size) -> reply::Result {
    reply::Result::Resized(Resized { memory: size.memory, cpus: size.cpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: ReplyTo = ReplyTo { connection: 1, request: 1 };

    fn size(memory: u64, cpus: u32) -> Size {
        Size { memory, cpus, huge_pages: Vec::new() }
    }

    #[test]
    fn the_guest_gives_before_and_takes_after() {
        let steps = |from: &Size, to: &Size| Vec::from(Resizing::new(TO, from.clone(), to.clone()).steps);
        let (small, large) = (size(1, 1), size(4, 2));
        assert_eq!(steps(&small, &large), [Step::Memory(4), Step::Cpus(2), Step::Adapt(large.clone())]);
        assert_eq!(
            steps(&large, &small),
            [Step::Adapt(small.clone()), Step::Memory(1), Step::Cpus(1), Step::Adapt(small)]
        );
        assert_eq!(
            steps(&size(4, 1), &size(1, 2)),
            [Step::Adapt(size(1, 1)), Step::Memory(1), Step::Cpus(2), Step::Adapt(size(1, 2))]
        );
    }

    #[test]
    fn huge_pages_come_with_their_memory_and_go_before_it() {
        let pages = |count| vec![HugePages { page_size: 2 << 20, count }];
        let (plain, few, many) = (
            size(1, 1),
            Size { huge_pages: pages(1), ..size(2, 1) },
            Size { huge_pages: pages(3), ..size(4, 1) },
        );
        let steps = |from: &Size, to: &Size| Vec::from(Resizing::new(TO, from.clone(), to.clone()).steps);
        assert_eq!(steps(&plain, &few), [Step::Memory(2), Step::Adapt(few.clone())]);
        assert_eq!(steps(&few, &many), [Step::Memory(4), Step::Adapt(many.clone())]);
        assert_eq!(steps(&many, &few), [Step::Adapt(few.clone()), Step::Memory(2), Step::Adapt(few)]);
    }

    #[test]
    fn what_was_done_is_taken_back_last_first() {
        let (small, large) = (size(1, 1), size(4, 2));
        let mut resizing = Resizing::new(TO, small, large);
        resizing.done(&Step::Memory(4), None);
        resizing.done(&Step::Cpus(2), None);
        resizing.fail(Failure::wrong_state("no"));
        assert_eq!(Vec::from(resizing.steps), [Step::Cpus(1), Step::Memory(1)]);
    }

    #[test]
    fn what_the_guest_keeps_it_may_use() {
        let mut resizing = Resizing::new(TO, size(8, 1), size(4, 1));
        assert_eq!(resizing.steps.pop_front(), Some(Step::Adapt(size(4, 1))));
        resizing.steps.pop_front();
        resizing.done(&Step::Memory(4), Some(6));
        assert_eq!(Vec::from(resizing.steps), [Step::Adapt(size(6, 1))]);
        assert_eq!(resizing.size, size(6, 1));
    }
}
