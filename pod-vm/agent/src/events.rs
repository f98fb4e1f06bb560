//! Ends of processes and other news, numbered and kept until the monitor has acknowledged them: a connection may break in between.

use std::collections::VecDeque;

use podvisor_proto::agent::{Event, Exit, OomKill, ProcessExit, event::Kind};

/// News that have not been acknowledged. A monitor that never does is no monitor of ours; the oldest out-of-memory notices go first, ends of
/// processes are never dropped (there are no more of them than containers and execs).
const NOTICES: usize = 256;

/// What is to be told.
#[derive(Debug, Default)]
pub(crate) struct Events {
    last: u64,
    waiting: VecDeque<Event>,
}

impl Events {
    pub(crate) fn exited(&mut self, id: &str, exit: Exit) -> &Event {
        self.add(Kind::Exited(ProcessExit { id: id.to_owned(), exit: Some(exit) }))
    }

    pub(crate) fn out_of_memory(&mut self, container: &str) -> &Event {
        let notice = |event: &Event| matches!(event.kind, Some(Kind::Oom(_)));
        if self.waiting.iter().filter(|event| notice(event)).count() >= NOTICES
            && let Some(oldest) = self.waiting.iter().position(notice)
        {
            self.waiting.remove(oldest);
        }
        self.add(Kind::Oom(OomKill { container_id: container.to_owned() }))
    }

    fn add(&mut self, kind: Kind) -> &Event {
        self.last += 1;
        self.waiting.push_back(Event { sequence: self.last, kind: Some(kind) });
        &self.waiting[self.waiting.len() - 1]
    }

    /// Forgets what was acknowledged.
    pub(crate) fn acknowledge(&mut self, sequence: u64) {
        self.waiting.retain(|event| event.sequence > sequence);
    }

    /// What a new connection has to be told.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &Event> {
        self.waiting.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_kept_until_it_is_acknowledged() {
        let mut events = Events::default();
        assert_eq!(events.exited("a", Exit::default()).sequence, 1);
        events.out_of_memory("a");
        events.acknowledge(1);
        assert_eq!(events.waiting().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_flood_of_notices_pushes_out_no_exit() {
        let mut events = Events::default();
        events.exited("a", Exit::default());
        for _ in 0..2 * NOTICES {
            events.out_of_memory("a");
        }
        assert_eq!(events.waiting().count(), NOTICES + 1);
        assert!(matches!(events.waiting().next().unwrap().kind, Some(Kind::Exited(_))));
    }
}
