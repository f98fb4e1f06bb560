//! What plugins have been told of one pod or container, and the order in which hooks about it run.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

/// Hooks that are behind. Without plugins a hook is passed, which counts: who joins later finds the object in its synchronisation.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(super) created: AtomicBool,
    pub(super) stopped: AtomicBool,
    pub(super) removed: AtomicBool,
}

impl Told {
    /// Of something that an earlier daemon has left.
    pub(crate) fn recovered(created: bool, stopped: bool) -> Self {
        Self { created: created.into(), stopped: stopped.into(), removed: AtomicBool::new(false) }
    }

    /// Plugins know of it, or will with their synchronisation.
    pub(crate) fn is_known(&self) -> bool {
        self.created.load(Ordering::Acquire) && !self.removed.load(Ordering::Acquire)
    }

    /// It has, and nobody was there to be told.
    pub(crate) fn has_stopped(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// True for the first who asks, if plugins know of it.
    pub(super) fn stops(&self) -> bool {
        self.is_known() && !self.stopped.swap(true, Ordering::AcqRel)
    }
}

/// Hands out turns, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    last: Option<oneshot::Receiver<()>>,
}

/// Comes when the turn before it has been dropped. Taken by the pod's task, in the order of its steps, waited for in effects.
#[derive(Debug)]
pub(crate) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    _over: oneshot::Sender<()>,
}

impl Turns {
    pub(crate) fn next(&mut self) -> Turn {
        let (over, next) = oneshot::channel();
        Turn { before: self.last.replace(next), _over: over }
    }
}

impl Turn {
    pub(crate) async fn comes(&mut self) {
        if let Some(before) = self.before.take() {
            // Nothing is ever sent: the end of the sender is the message.
            let _ = before.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_come_in_the_order_in_which_they_were_taken() {
        let mut turns = Turns::default();
        let (mut first, mut second, mut third) = (turns.next(), turns.next(), turns.next());
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        let say = |number: u32| sender.send(number).unwrap();
        tokio::join!(
            async {
                third.comes().await;
                say(3);
            },
            async {
                second.comes().await;
                say(2);
                drop(second);
            },
            async {
                first.comes().await;
                tokio::task::yield_now().await;
                say(1);
                drop(first);
            },
        );
        assert_eq!([order.recv().await, order.recv().await, order.recv().await], [Some(1), Some(2), Some(3)]);
    }

    #[test]
    fn a_stop_is_told_once_and_only_of_what_is_known() {
        let told = Told::default();
        assert!(!told.stops());
        told.created.store(true, Ordering::Release);
        assert!(told.is_known() && told.stops() && !told.stops());
        assert!(!Told::recovered(true, true).stops());
    }
}
