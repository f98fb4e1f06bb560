//! The open streams of a connection and what may still be sent on them.
//!
//! Kubernetes clients (Go, moby/spdystream) have no flow control: they never send WINDOW_UPDATE, so holding to the
//! initial window would stop every stream after 64 KiB. A window is therefore counted from the start but kept to
//! only once the peer has shown that it has windows: with SETTINGS_INITIAL_WINDOW_SIZE or a WINDOW_UPDATE on any
//! stream for the streams, with one on stream 0 for the session.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::frame::{INITIAL_WINDOW, MAX_WINDOW};
use crate::pieces::{Budget, PieceReceiver, PieceSender};

/// Streams open at a time; more are refused.
const MAX_STREAMS: usize = 1024;

/// The stream or the whole connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed;

/// Why a SYN_STREAM opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Not a client's identifier, or not greater than the one before (section 2.3.2): the session is broken.
    Identifier,
    TooMany,
    /// The connection is ending.
    Ending,
}

#[derive(Debug)]
pub(super) struct Table {
    state: Mutex<State>,
    credit_changed: Notify,
    budget: Budget,
}

#[derive(Debug)]
struct State {
    streams: HashMap<u32, Open>,
    last: u32,
    ending: bool,
    initial_window: i64,
    windows_kept: bool,
    session_credit: i64,
    session_window_kept: bool,
}

#[derive(Debug)]
struct Open {
    /// None once the peer has finished, or nobody listens.
    inbound: Option<PieceSender>,
    outbound: bool,
    /// What may be sent; negative if more was sent before the peer showed its windows.
    credit: i64,
}

impl Table {
    pub(super) fn new(budget: Budget) -> Self {
        let state = State {
            streams: HashMap::new(),
            last: 0,
            ending: false,
            initial_window: INITIAL_WINDOW,
            windows_kept: false,
            session_credit: INITIAL_WINDOW,
            session_window_kept: false,
        };
        Self { state: Mutex::new(state), credit_changed: Notify::new(), budget }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a stream that the client opened.
    pub(super) fn open(&self, stream: u32, fin: bool) -> Result<PieceReceiver, Refusal> {
        let mut state = self.lock();
        if stream.is_multiple_of(2) || stream <= state.last {
            return Err(Refusal::Identifier);
        }
        state.last = stream;
        if state.ending {
            return Err(Refusal::Ending);
        }
        if state.streams.len() >= MAX_STREAMS {
            return Err(Refusal::TooMany);
        }
        let (sender, receiver) = self.budget.queue();
        if fin {
            sender.end();
        }
        let inbound = (!fin).then_some(sender);
        let credit = state.initial_window;
        state.streams.insert(stream, Open { inbound, outbound: true, credit });
        Ok(receiver)
    }

    /// The greatest stream identifier seen.
    pub(super) fn last(&self) -> u32 {
        self.lock().last
    }

    /// Where data that arrived for the stream goes.
    pub(super) fn inbound(&self, stream: u32) -> Option<PieceSender> {
        self.lock().streams.get(&stream)?.inbound.clone()
    }

    /// The peer finished its side, if `finished`; otherwise our side does not want to hear more.
    pub(super) fn close_inbound(&self, stream: u32, finished: bool) {
        let mut state = self.lock();
        let Some(open) = state.streams.get_mut(&stream) else { return };
        if let Some(inbound) = open.inbound.take()
            && finished
        {
            inbound.end();
        }
        if !open.outbound {
            state.streams.remove(&stream);
        }
    }

    /// Our side is finished. False: it was already.
    pub(super) fn close_outbound(&self, stream: u32) -> bool {
        let mut state = self.lock();
        let Some(open) = state.streams.get_mut(&stream) else { return false };
        let was_open = std::mem::replace(&mut open.outbound, false);
        if open.inbound.is_none() {
            state.streams.remove(&stream);
        }
        was_open
    }

    /// Both sides are over. False: they were already.
    pub(super) fn remove(&self, stream: u32) -> bool {
        let removed = self.lock().streams.remove(&stream).is_some();
        self.credit_changed.notify_waiters();
        removed
    }

    /// The connection is over: consumers see their queues end, senders are told.
    pub(super) fn clear(&self) {
        let mut state = self.lock();
        state.ending = true;
        state.streams.clear();
        drop(state);
        self.credit_changed.notify_waiters();
    }

    /// Streams that come from now on are refused.
    pub(super) fn refuse_more(&self) {
        self.lock().ending = true;
    }

    /// Takes credit for up to `want` bytes, at least one, and waits for it where the peer has windows.
    pub(super) async fn take_credit(&self, stream: u32, want: usize) -> Result<usize, Closed> {
        loop {
            let mut changed = std::pin::pin!(self.credit_changed.notified());
            changed.as_mut().enable();
            if let Some(granted) = self.lock().take_credit(stream, want)? {
                return Ok(granted);
            }
            changed.await;
        }
    }

    /// SETTINGS_INITIAL_WINDOW_SIZE: also moves the windows of streams that are open (section 2.6.8).
    pub(super) fn set_initial_window(&self, size: u32) {
        let mut state = self.lock();
        let change = i64::from(size) - state.initial_window;
        state.initial_window = i64::from(size);
        state.windows_kept = true;
        for open in state.streams.values_mut() {
            open.credit = open.credit.saturating_add(change);
        }
        drop(state);
        self.credit_changed.notify_waiters();
    }

    /// WINDOW_UPDATE. False: the window would become larger than a window can be.
    pub(super) fn add_credit(&self, stream: u32, delta: u32) -> bool {
        let mut state = self.lock();
        if stream == 0 {
            state.session_window_kept = true;
        }
        state.windows_kept = true;
        let credit = if stream == 0 {
            &mut state.session_credit
        } else if let Some(open) = state.streams.get_mut(&stream) {
            &mut open.credit
        } else {
            // Closed in the meantime.
            return true;
        };
        *credit = credit.saturating_add(i64::from(delta));
        let possible = *credit <= MAX_WINDOW;
        drop(state);
        self.credit_changed.notify_waiters();
        possible
    }
}

impl State {
    /// None: there is no credit now.
    fn take_credit(&mut self, stream: u32, want: usize) -> Result<Option<usize>, Closed> {
        let open = self.streams.get_mut(&stream).filter(|open| open.outbound).ok_or(Closed)?;
        let mut granted = i64::try_from(want).unwrap_or(i64::MAX);
        if self.windows_kept {
            granted = granted.min(open.credit);
        }
        if self.session_window_kept {
            granted = granted.min(self.session_credit);
        }
        if granted <= 0 {
            return Ok(None);
        }
        open.credit = open.credit.saturating_sub(granted);
        self.session_credit = self.session_credit.saturating_sub(granted);
        Ok(usize::try_from(granted).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new(Budget::new(1 << 20))
    }

    #[tokio::test]
    async fn without_windows_nothing_is_held_back() {
        let table = table();
        table.open(1, false).unwrap();
        for _ in 0..100 {
            assert_eq!(table.take_credit(1, 32 << 10).await, Ok(32 << 10));
        }
    }

    #[tokio::test]
    async fn windows_are_kept_to_once_the_peer_has_them() {
        let table = table();
        table.open(1, false).unwrap();
        assert_eq!(table.take_credit(1, 60 << 10).await, Ok(60 << 10));
        table.add_credit(1, 1);
        assert_eq!(table.take_credit(1, 60 << 10).await, Ok((4 << 10) + 1));
        let waiting = table.take_credit(1, 10);
        let (granted, ()) = tokio::join!(waiting, async { assert!(table.add_credit(1, 4)) });
        assert_eq!(granted, Ok(4));
        table.set_initial_window((64 << 10) + 5);
        assert_eq!(table.take_credit(1, 10).await, Ok(5));
        assert!(!table.add_credit(1, u32::MAX >> 1) || !table.add_credit(1, 1));
    }

    #[tokio::test]
    async fn the_session_window_holds_all_streams() {
        let table = table();
        table.open(1, false).unwrap();
        table.open(3, false).unwrap();
        assert_eq!(table.take_credit(1, 64 << 10).await, Ok(64 << 10));
        assert!(table.add_credit(0, 5) && table.add_credit(1, 100));
        assert_eq!(table.take_credit(3, 10).await, Ok(5));
        let (granted, ()) = tokio::join!(table.take_credit(3, 10), async { table.clear() });
        assert_eq!(granted, Err(Closed));
    }

    #[test]
    fn identifiers_are_odd_and_grow() {
        let table = table();
        assert_eq!(table.open(2, false).unwrap_err(), Refusal::Identifier);
        let _first = table.open(5, false).unwrap();
        assert_eq!(table.open(5, false).unwrap_err(), Refusal::Identifier);
        assert_eq!(table.open(3, false).unwrap_err(), Refusal::Identifier);
        for id in 0..1023 {
            table.open(7 + 2 * id, false).unwrap();
        }
        assert_eq!(table.open(9001, false).unwrap_err(), Refusal::TooMany);
        assert!(table.remove(5) && !table.remove(5));
        table.refuse_more();
        assert_eq!(table.open(9003, false).unwrap_err(), Refusal::Ending);
    }

    #[test]
    fn a_stream_goes_when_both_sides_are_over() {
        let table = table();
        let _queue = table.open(1, false).unwrap();
        table.close_inbound(1, true);
        assert!(table.inbound(1).is_none());
        assert!(table.close_outbound(1) && !table.close_outbound(1));
        assert!(table.lock().streams.is_empty());
        let _queue = table.open(3, false).unwrap();
        assert!(table.close_outbound(3));
        assert!(table.inbound(3).is_some());
        table.close_inbound(3, false);
        assert!(table.lock().streams.is_empty());
    }
}
