//! Changes to a machine that runs: devices, memory, processors. One at a time, in the order of the requests.
//!
//! A change is a list of steps, commands to QEMU and things that the guest has to do. A command that was carried out leaves the one that takes
//! it back; when a later step fails those run, last first, and then the request is answered. What is known of the machine changes only
//! when all has been done.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::keeper::Answer;
use podvisor_proto::hypervisor::{Done, Resized, reply, request::Verb};
use serde_json::Value;

use crate::device;
use crate::inventory::Inventory;
use crate::plan::Plan;
use crate::qmp::Qmp;

/// How long a guest may take to let go of a device, or to take or give back memory.
const PATIENCE: Duration = Duration::from_secs(10);

/// A command of QMP's.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) arguments: Value,
}

/// Part of a change.
#[derive(Debug)]
pub(crate) enum Step {
    Do {
        command: Command,
        descriptor: Option<OwnedFd>,
        undo: Option<Command>,
    },
    /// The guest is asked to let go of a device, and does.
    Release(String),
    /// The guest has so much of the memory that can be added. `less`: it gives some back, as far as it can.
    Memory {
        added: u64,
        less: bool,
    },
}

impl Step {
    pub(crate) fn new(name: &'static str, arguments: Value) -> Self {
        Self::Do { command: Command { name, arguments }, descriptor: None, undo: None }
    }

    pub(crate) fn with_undo(self, name: &'static str, arguments: Value) -> Self {
        match self {
            Self::Do { command, descriptor, .. } => {
                Self::Do { command, descriptor, undo: Some(Command { name, arguments }) }
            }
            other => other,
        }
    }

    pub(crate) fn with_descriptor(self, handed: impl Into<OwnedFd>) -> Self {
        match self {
            Self::Do { command, undo, .. } => Self::Do { command, descriptor: Some(handed.into()), undo },
            other => other,
        }
    }
}

/// What is known of the machine when a change is done.
#[derive(Debug)]
pub(crate) enum Outcome {
    Nothing,
    Added(device::Added),
    Removed(String),
    /// What was there from the start, and what has been added.
    Memory {
        from_start: u64,
        added: u64,
    },
}

impl Outcome {
    fn answer(&self) -> reply::Result {
        match self {
            Self::Memory { from_start, added } => {
                reply::Result::Resized(Resized { memory: from_start + added })
            }
            Self::Nothing | Self::Added(_) | Self::Removed(_) => reply::Result::Done(Done {}),
        }
    }
}

/// What a request comes to.
#[derive(Debug)]
pub(crate) struct Change {
    /// In words, for errors.
    pub(crate) attempt: String,
    pub(crate) steps: VecDeque<Step>,
    pub(crate) outcome: Outcome,
}

#[derive(Debug)]
enum Waiting {
    /// For the answer to a command of that number.
    Answer(u64, Option<Command>),
    /// For the answer to the request to let go of a device, then for the guest.
    Asked(u64, String),
    Released(String),
    Memory {
        added: u64,
        less: bool,
    },
}

#[derive(Debug)]
struct Running {
    request: u64,
    change: Change,
    undo: Vec<Command>,
    failure: Option<Failure>,
    waiting: Option<Waiting>,
    deadline: Option<Instant>,
}

/// All changes, made and to be made.
#[derive(Debug)]
pub(crate) struct Changes {
    inventory: Inventory,
    queue: VecDeque<(u64, Verb)>,
    running: Option<Running>,
    /// Devices that the guest has let go of when nobody waited any more.
    released: Vec<String>,
    /// What the guest has of the memory that can be added, in bytes.
    added_memory: u64,
}

impl Changes {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            inventory: Inventory::new(plan),
            queue: VecDeque::new(),
            running: None,
            released: Vec::new(),
            added_memory: 0,
        }
    }

    pub(crate) fn push(&mut self, request: u64, verb: Verb) {
        self.queue.push_back((request, verb));
    }

    /// When a guest's time is over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.running.as_ref()?.deadline
    }

    /// Requests that will not be answered any more by what they ask for.
    pub(crate) fn unanswered(&self) -> Vec<u64> {
        let running = self.running.iter().map(|running| running.request);
        running.chain(self.queue.iter().map(|(request, _)| *request)).collect()
    }

    /// QEMU has answered a command.
    pub(crate) fn answered(&mut self, number: u64, result: Result<(), String>) {
        let Some(running) = &mut self.running else { return };
        match (&mut running.waiting, result) {
            (Some(Waiting::Answer(awaited, undo)), result) if *awaited == number => {
                match result {
                    Ok(()) => running.undo.extend(undo.take()),
                    Err(cause) => running.fail(cause),
                }
                running.waiting = None;
            }
            (Some(Waiting::Asked(awaited, id)), result) if *awaited == number => match result {
                // QMP has no other sign of a request that the guest was given before.
                Err(cause) if !cause.contains("already in the process of unplug") => {
                    running.fail(cause);
                    running.waiting = None;
                }
                _ => running.waiting = Some(Waiting::Released(std::mem::take(id))),
            },
            _ => {}
        }
    }

    /// QEMU tells of something that the guest has done.
    pub(crate) fn heard(&mut self, event: &str, data: &Value) {
        match event {
            "DEVICE_DELETED" => {
                // There are others, without a name of ours, for parts of devices.
                self.released.extend(data["device"].as_str().map(str::to_owned));
            }
            "MEMORY_DEVICE_SIZE_CHANGE" => {
                self.added_memory = data["size"].as_u64().unwrap_or(self.added_memory);
            }
            "DEVICE_UNPLUG_GUEST_ERROR" => {
                if let Some(running) = &mut self.running
                    && matches!(&running.waiting, Some(Waiting::Released(id)) if data["device"] == *id)
                {
                    running.fail("the guest refuses".to_owned());
                    running.waiting = None;
                }
            }
            _ => {}
        }
    }

    /// Goes on as far as it can; gives the answers that are ready.
    pub(crate) fn advance(&mut self, qmp: &mut Qmp) -> Vec<Answer> {
        let mut answers = Vec::new();
        loop {
            let Some(running) = &mut self.running else {
                let Some((request, verb)) = self.queue.pop_front() else { return answers };
                match self.inventory.change(verb) {
                    Ok(change) => self.running = Some(Running::new(request, change)),
                    Err(failure) => answers.push((request, Err(failure))),
                }
                continue;
            };
            running.look(&mut self.released, self.added_memory);
            if running.waiting.is_some() {
                return answers;
            }
            running.skip_released(&mut self.released);
            if !running.next(qmp) {
                continue;
            }
            let Some(Running { request, change, failure, .. }) = self.running.take() else { continue };
            answers.push((request, failure.map_or_else(|| Ok(change.outcome.answer()), Err)));
            if matches!(answers.last(), Some((_, Ok(_)))) {
                self.inventory.note(change.outcome);
            }
        }
    }
}

impl Running {
    fn new(request: u64, change: Change) -> Self {
        Self { request, change, undo: Vec::new(), failure: None, waiting: None, deadline: None }
    }

    /// What is left of the change is not made, and what was made is taken back. The first cause is the one that is told.
    fn fail(&mut self, cause: String) {
        self.change.steps.clear();
        self.failure.get_or_insert_with(|| Failure::failed(&self.change.attempt, cause));
    }

    /// Whether what it waits for has come, or has not come in time.
    fn look(&mut self, released: &mut Vec<String>, added_memory: u64) {
        let came = match &self.waiting {
            Some(Waiting::Released(id)) => {
                let at = released.iter().position(|released| released == id);
                at.map(|at| released.swap_remove(at)).is_some()
            }
            Some(Waiting::Memory { added, .. }) => added_memory == *added,
            Some(Waiting::Answer(..) | Waiting::Asked(..)) | None => return,
        };
        if came {
            self.waiting = None;
        } else if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            if let Some(Waiting::Memory { less: true, .. }) = self.waiting.take() {
                return self.settle_for(added_memory);
            }
            self.fail(format!("the guest has not done its part within {} s", PATIENCE.as_secs()));
        }
        if self.waiting.is_none() {
            self.deadline = None;
        }
    }

    /// The guest keeps more memory than it was to: that is what it has from now on, and it is asked for no more of it.
    fn settle_for(&mut self, kept: u64) {
        self.deadline = None;
        if let Outcome::Memory { added, .. } = &mut self.change.outcome {
            *added = kept;
        }
        self.change.steps.push_front(Inventory::request_memory(kept));
    }

    /// A device that the guest has let go of after an earlier request had given up is gone already.
    fn skip_released(&mut self, released: &mut Vec<String>) {
        let Some(Step::Release(id)) = self.change.steps.front() else { return };
        if let Some(at) = released.iter().position(|released| released == id) {
            released.swap_remove(at);
            self.change.steps.pop_front();
        }
    }

    /// Begins the next step; true when there is none.
    fn next(&mut self, qmp: &mut Qmp) -> bool {
        let (command, descriptor, undo) = match self.change.steps.pop_front() {
            Some(Step::Do { command, descriptor, undo }) => (command, descriptor, undo),
            Some(Step::Release(id)) => {
                let arguments = serde_json::json!({ "id": id });
                self.deadline = Some(Instant::now() + PATIENCE);
                match qmp.execute("device_del", arguments, None) {
                    Ok(number) => self.waiting = Some(Waiting::Asked(number, id)),
                    Err(error) => self.fail(error.to_string()),
                }
                return false;
            }
            Some(Step::Memory { added, less }) => {
                self.deadline = Some(Instant::now() + PATIENCE);
                self.waiting = Some(Waiting::Memory { added, less });
                return false;
            }
            None => match self.undo.pop().filter(|_| self.failure.is_some()) {
                Some(command) => (command, None, None),
                None => return true,
            },
        };
        match qmp.execute(command.name, command.arguments, descriptor.as_ref().map(AsFd::as_fd)) {
            Ok(number) => self.waiting = Some(Waiting::Answer(number, undo)),
            // QEMU has ended, which is seen too.
            Err(error) => self.fail(error.to_string()),
        }
        false
    }
}
