//! What a container's state is and how it moves: pure, so that every path can be tested without a kernel.
//!
//! ```text
//!            CreateDone          Start            StartDone
//! Creating ────────────▶ Created ──────▶ Starting ────────▶ Running
//!    │ CreateFailed         │ Stop          │ StartFailed      │ Stop
//!    ▼                      ▼               ▼                  ▼
//! Removing ◀──────────── Stopping ───────▶ Exited ◀──────── Stopping
//!    │        Remove           Exited        │ Remove
//!    ▼ Removed                               ▼
//! Removed ◀────────────────────────────── Removing
//! ```
//!
//! `Unknown` is for a record that cannot be read or an OCI runtime that cannot be asked: it can still be stopped
//! and removed. A request that comes in a moment of transition ([`Denied::Later`]) is kept by the pod's task and
//! tried again at the next transition.

use std::time::Duration;

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Exit {
    /// 128 + signal when it was killed by one.
    pub code: i32,
    /// ns since the epoch.
    pub at: i64,
    /// CRI reason: `Completed`, `Error`, `OOMKilled`, `StartError`, …
    pub reason: String,
    /// For people; may be empty.
    pub message: String,
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Creating,
    Created,
    /// `stop`: its grace period runs already. Before the runtime's answer there may be no program that could heed a signal, so it gets
    /// its stop signal with the answer; SIGKILL waits for none, as the answer may never come.
    Starting {
        stop: bool,
    },
    Running,
    /// Told to stop. `killed`: with SIGKILL.
    Stopping {
        killed: bool,
    },
    Exited(Exit),
    /// `exit`: how it had ended, if it had.
    Removing {
        exit: Option<Exit>,
    },
    Removed,
    Unknown {
        why: String,
    },
}

/// What happens to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    CreateDone,
    CreateFailed,
    Start,
    StartDone,
    StartFailed(Exit),
    Stop {
        grace: Duration,
    },
    /// The grace period of a stop is over.
    Deadline,
    Exited(Exit),
    Remove,
    RemoveFailed {
        why: String,
    },
    Removed,
}

/// What has to be done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Let the OCI runtime start the created process.
    Start,
    /// Send the stop signal.
    Signal,
    /// Deliver [`Event::Deadline`] after this long.
    Arm(Duration),
    /// SIGKILL for everything in the container.
    Kill,
    /// Delete it in the OCI runtime (killing what runs) and undo what it acquired.
    Delete,
}

/// Why an event is not possible now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    /// In transition: try again after the next step.
    #[error("the container is in transition")]
    Later,
    /// Only a created container can be started.
    #[error("the container is {0}, only a created container can be started")]
    NotCreated(&'static str),
    /// The container is no more.
    #[error("the container has been removed")]
    Gone,
    /// News that no longer means anything, e.g. a late deadline.
    #[error("the event came too late to matter")]
    Stale,
}

impl State {
    /// One word for messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            State::Creating => "being created",
            State::Created => "created",
            State::Starting { .. } => "being started",
            State::Running => "running",
            State::Stopping { .. } => "being stopped",
            State::Exited(_) => "exited",
            State::Removing { .. } => "being removed",
            State::Removed => "removed",
            State::Unknown { .. } => "unknown",
        }
    }

    /// A process of it may exist.
    pub(crate) fn may_run(&self) -> bool {
        match self {
            State::Creating
            | State::Created
            | State::Starting { .. }
            | State::Running
            | State::Stopping { .. }
            | State::Unknown { .. } => true,
            State::Removing { exit } => exit.is_none(),
            State::Exited(_) | State::Removed => false,
        }
    }
}

/// One step. The order of effects is the order in which they are done.
pub(crate) fn step(state: &State, event: Event) -> Result<(State, Vec<Effect>), Denied> {
    use State as S;
    let stopping = |grace: Duration| {
        if grace.is_zero() {
            (S::Stopping { killed: true }, vec![Effect::Kill])
        } else {
            (S::Stopping { killed: false }, vec![Effect::Signal, Effect::Arm(grace)])
        }
    };
    match (state, event) {
        (S::Removed, _) => Err(Denied::Gone),

        (S::Creating, Event::CreateDone) => Ok((S::Created, vec![])),
        (S::Creating, Event::CreateFailed) => Ok((S::Removing { exit: None }, vec![Effect::Delete])),
        // The process died between the runtime's create and our hearing of it: Created first, then Exited.
        (
            S::Creating
            | S::Created
            | S::Starting { .. }
            | S::Stopping { .. }
            | S::Running
            | S::Unknown { .. },
            Event::Exited(exit),
        ) => Ok((S::Exited(exit), vec![])),

        (S::Created, Event::Start) => Ok((S::Starting { stop: false }, vec![Effect::Start])),
        (S::Starting { stop: false }, Event::StartDone) => Ok((S::Running, vec![])),
        (S::Starting { stop: true }, Event::StartDone) => {
            Ok((S::Stopping { killed: false }, vec![Effect::Signal]))
        }
        // It ended before the runtime's start had answered: it did run.
        (S::Exited(exit), Event::StartDone) => Ok((S::Exited(exit.clone()), vec![])),
        (S::Starting { .. }, Event::StartFailed(exit)) => Ok((S::Exited(exit), vec![Effect::Kill])),
        (S::Running | S::Stopping { .. } | S::Exited(_) | S::Unknown { .. }, Event::Start) => {
            Err(Denied::NotCreated(state.name()))
        }

        // A created process has not run the container's program yet: there is nobody to be polite to.
        (S::Created | S::Unknown { .. }, Event::Stop { .. }) => {
            Ok((S::Stopping { killed: true }, vec![Effect::Kill]))
        }
        (S::Running | S::Stopping { killed: false }, Event::Stop { grace }) => Ok(stopping(grace)),
        (S::Starting { .. }, Event::Stop { grace }) if !grace.is_zero() => {
            Ok((S::Starting { stop: true }, vec![Effect::Arm(grace)]))
        }
        (S::Starting { .. }, Event::Stop { .. }) | (S::Starting { stop: true }, Event::Deadline) => {
            Ok((S::Stopping { killed: true }, vec![Effect::Kill]))
        }
        (S::Stopping { killed: true }, Event::Stop { .. }) => {
            Ok((S::Stopping { killed: true }, vec![Effect::Kill]))
        }
        (S::Stopping { killed: false }, Event::Deadline) => {
            Ok((S::Stopping { killed: true }, vec![Effect::Kill]))
        }
        (S::Exited(_), Event::Stop { .. }) => Ok((state.clone(), vec![])),

        (S::Created | S::Running | S::Stopping { .. } | S::Unknown { .. }, Event::Remove) => {
            Ok((S::Removing { exit: None }, vec![Effect::Delete]))
        }
        // The deletion waits for the start's end, which SIGKILL brings about.
        (S::Starting { .. }, Event::Remove) => {
            Ok((S::Removing { exit: None }, vec![Effect::Kill, Effect::Delete]))
        }
        (S::Exited(exit), Event::Remove) => {
            Ok((S::Removing { exit: Some(exit.clone()) }, vec![Effect::Delete]))
        }
        (S::Removing { .. }, Event::Removed) => Ok((S::Removed, vec![])),
        (S::Removing { exit: Some(exit) }, Event::RemoveFailed { .. }) => {
            Ok((S::Exited(exit.clone()), vec![]))
        }
        (S::Removing { exit: None }, Event::RemoveFailed { why }) => Ok((S::Unknown { why }, vec![])),
        (S::Removing { exit: None }, Event::Exited(exit)) => Ok((S::Removing { exit: Some(exit) }, vec![])),

        (S::Creating | S::Removing { .. }, Event::Start | Event::Stop { .. } | Event::Remove)
        | (S::Starting { .. }, Event::Start) => Err(Denied::Later),

        (_, Event::Deadline | Event::Exited(_)) => Err(Denied::Stale),
        (
            _,
            Event::CreateDone
            | Event::CreateFailed
            | Event::StartDone
            | Event::StartFailed(_)
            | Event::Removed
            | Event::RemoveFailed { .. },
        ) => Err(Denied::Stale),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit() -> Exit {
        Exit { code: 0, at: 1, reason: "Completed".into(), message: String::new() }
    }

    fn states() -> Vec<State> {
        vec![
            State::Creating,
            State::Created,
            State::Starting { stop: false },
            State::Starting { stop: true },
            State::Running,
            State::Stopping { killed: false },
            State::Stopping { killed: true },
            State::Exited(exit()),
            State::Removing { exit: None },
            State::Removing { exit: Some(exit()) },
            State::Removed,
            State::Unknown { why: "unreadable".into() },
        ]
    }

    fn events() -> Vec<Event> {
        vec![
            Event::CreateDone,
            Event::CreateFailed,
            Event::Start,
            Event::StartDone,
            Event::StartFailed(exit()),
            Event::Stop { grace: Duration::ZERO },
            Event::Stop { grace: Duration::from_secs(1) },
            Event::Deadline,
            Event::Exited(exit()),
            Event::Remove,
            Event::RemoveFailed { why: "busy".into() },
            Event::Removed,
        ]
    }

    #[test]
    fn every_state_but_the_last_can_be_stopped_and_removed_at_once_or_later() {
        for state in states().into_iter().filter(|s| *s != State::Removed) {
            for event in [Event::Stop { grace: Duration::ZERO }, Event::Remove] {
                let answer = step(&state, event.clone());
                assert!(matches!(answer, Ok(_) | Err(Denied::Later)), "{state:?} {event:?} {answer:?}");
            }
        }
    }

    #[test]
    fn stop_and_remove_are_idempotent() {
        let stop = Event::Stop { grace: Duration::ZERO };
        for state in states() {
            let Ok((once, _)) = step(&state, stop.clone()) else { continue };
            let Ok((twice, _)) = step(&once, stop.clone()) else { continue };
            assert_eq!(once, twice, "stop from {state:?}");
        }
        for state in states() {
            let Ok((once, effects)) = step(&state, Event::Remove) else { continue };
            assert_eq!(effects.last(), Some(&Effect::Delete));
            assert_eq!(step(&once, Event::Remove), Err(Denied::Later), "remove from {state:?}");
        }
    }

    #[test]
    fn an_exit_is_never_forgotten() {
        for state in states() {
            if let State::Exited(_) = state {
                for event in events() {
                    if let Ok((next, _)) = step(&state, event) {
                        assert!(matches!(next, State::Exited(_) | State::Removing { exit: Some(_) }));
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_removed_container_stays_removed_and_nothing_runs_after_an_exit(
            path in proptest::collection::vec(0..12_usize, 0..40)
        ) {
            let mut state = State::Creating;
            for index in path {
                let before = state.clone();
                if let Ok((next, effects)) = step(&state, events()[index].clone()) {
                    prop_assert!(before != State::Removed);
                    if matches!(before, State::Exited(_)) {
                        prop_assert!(!effects.contains(&Effect::Start));
                        prop_assert!(!matches!(next, State::Running | State::Created));
                    }
                    state = next;
                }
            }
        }
    }
}
