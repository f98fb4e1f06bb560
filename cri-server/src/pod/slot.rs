//! A container as its pod's task holds it: record, state, and who waits for what.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::AbortHandle;

use super::record::{ContainerPhase, ContainerRecord};
use super::state::State;
use super::task::{Change, Command, Reply};
use super::view::ContainerView;
use crate::error::Failure;
use crate::hooks::told::{Told, Turns};
use crate::id::ContainerId;

/// One container of a pod.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) record: ContainerRecord,
    pub(super) state: State,
    /// What plugins have been told of it.
    pub(super) told: Arc<Told>,
    /// Whose hook about it runs next.
    pub(super) turns: Turns,
    /// Requests that came during a transition.
    pub(super) queued: VecDeque<Command>,
    pub(super) creating: Vec<Reply<ContainerId>>,
    pub(super) starting: Vec<Reply<()>>,
    pub(super) stopping: Vec<Reply<()>>,
    pub(super) removing: Vec<Reply<()>>,
    /// A start that an earlier daemon had begun: until its outcome is known the container is shown as its record had it.
    pub(super) resumed: bool,
    /// The runtime is changing its resources.
    pub(super) updating: bool,
    /// Changes that wait for that one: each is merged over what the one before has made.
    pub(super) updates: VecDeque<(Change, Reply<()>)>,
    /// Counts deadlines: one that was armed before the last is void.
    pub(super) deadline: u64,
    /// The running clock of a stop: the grace period, or the patience after SIGKILL.
    pub(super) timer: Option<AbortHandle>,
}

impl Slot {
    pub(super) fn new(record: ContainerRecord, state: State) -> Self {
        Self {
            told: Arc::new(Told::recovered(
                record.phase != ContainerPhase::Creating,
                matches!(state, State::Exited(_)),
            )),
            turns: Turns::default(),
            record,
            state,
            queued: VecDeque::new(),
            creating: Vec::new(),
            starting: Vec::new(),
            stopping: Vec::new(),
            removing: Vec::new(),
            resumed: false,
            updating: false,
            updates: VecDeque::new(),
            deadline: 0,
            timer: None,
        }
    }

    /// Replaces the running clock.
    pub(super) fn set_timer(&mut self, timer: Option<AbortHandle>) {
        if let Some(before) = std::mem::replace(&mut self.timer, timer) {
            before.abort();
        }
    }

    pub(super) fn view(&self) -> Arc<ContainerView> {
        let state = match &self.state {
            State::Starting { .. } if self.resumed => State::Running,
            state => state.clone(),
        };
        Arc::new(ContainerView { record: self.record.clone(), state, told: self.told.clone() })
    }

    /// The durable phase that belongs to the live state; `None` where the present one stays.
    pub(super) fn phase(&self) -> Option<ContainerPhase> {
        match &self.state {
            State::Created => Some(ContainerPhase::Created),
            State::Starting { .. } | State::Running => Some(ContainerPhase::Started),
            State::Exited(exit) => Some(ContainerPhase::Exited(exit.clone())),
            // A creation that is being undone was never there: the next start undoes it again.
            State::Removing { .. } if self.record.phase == ContainerPhase::Creating => None,
            State::Removing { .. } => Some(ContainerPhase::Removing),
            State::Creating | State::Stopping { .. } | State::Removed | State::Unknown { .. } => None,
        }
    }
}

/// Answers everybody who waits.
pub(super) fn answer<T: Clone>(waiting: &mut Vec<Reply<T>>, with: &Result<T, Failure>) {
    for reply in waiting.drain(..) {
        // A caller that went away gets its answer at the next try.
        let _ = reply.send(with.clone());
    }
}
