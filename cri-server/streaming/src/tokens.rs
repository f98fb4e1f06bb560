//! The sessions that were offered and not yet used, by their token.
//!
//! A token is the only credential for a session: 128 random bits, good for one use and a short time.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use tokio::time::Instant;

use crate::Session;

/// Random bytes in a token.
const TOKEN_BYTES: usize = 16;

#[derive(Debug)]
pub(crate) struct Tokens {
    lifetime: Duration,
    /// How many may be outstanding; beyond it the oldest expires.
    capacity: usize,
    offered: Mutex<Offered>,
}

#[derive(Debug, Default)]
struct Offered {
    sessions: HashMap<String, Entry>,
    /// Oldest first. Holds used tokens too until their time comes.
    order: VecDeque<(Instant, String)>,
}

#[derive(Debug)]
struct Entry {
    session: Session,
    expires: Instant,
}

impl Tokens {
    pub(crate) fn new(lifetime: Duration, capacity: usize) -> Self {
        Self { lifetime, capacity, offered: Mutex::default() }
    }

    /// A fresh token for the session.
    pub(crate) fn offer(&self, session: Session) -> String {
        let token = random_token();
        let now = Instant::now();
        // A lifetime beyond the clock's range is cut to a day.
        let expires = now.checked_add(self.lifetime).unwrap_or(now + Duration::from_secs(86_400));
        let mut offered = self.lock();
        offered.expire(now);
        while offered.sessions.len() >= self.capacity {
            let Some((_, oldest)) = offered.order.pop_front() else { break };
            offered.sessions.remove(&oldest);
        }
        // Used tokens leave their place in the order behind; it must not grow without bound either.
        if offered.order.len() >= 2 * self.capacity {
            let Offered { sessions, order } = &mut *offered;
            order.retain(|(_, token)| sessions.contains_key(token));
        }
        offered.order.push_back((expires, token.clone()));
        offered.sessions.insert(token.clone(), Entry { session, expires });
        token
    }

    /// What the token leads to, without using it up.
    pub(crate) fn look(&self, token: &str) -> Option<Session> {
        let offered = self.lock();
        offered.sessions.get(token).filter(|entry| entry.expires > Instant::now()).map(|e| e.session.clone())
    }

    /// Uses the token up.
    pub(crate) fn take(&self, token: &str) -> Option<Session> {
        let entry = self.lock().sessions.remove(token)?;
        (entry.expires > Instant::now()).then_some(entry.session)
    }

    /// Forgets every offer.
    pub(crate) fn clear(&self) {
        *self.lock() = Offered::default();
    }

    fn lock(&self) -> MutexGuard<'_, Offered> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Offered {
    fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(expires, _)| *expires <= now) {
            if let Some((_, token)) = self.order.pop_front() {
                self.sessions.remove(&token);
            }
        }
    }
}

/// Lowercase hex.
fn random_token() -> String {
    let mut bytes = [0_u8; TOKEN_BYTES];
    // Up to 256 bytes come whole and uninterrupted (getrandom(2)); it fails only where the system call is
    // missing, and a predictable token must not exist.
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    assert_eq!(filled, Ok(TOKEN_BYTES), "the kernel gives no random bytes");
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(sandbox: &str) -> Session {
        Session::PortForward { sandbox: sandbox.to_owned(), ports: Vec::new() }
    }

    #[tokio::test]
    async fn a_token_is_random_hex_and_works_once() {
        let tokens = Tokens::new(Duration::from_secs(60), 10);
        let (first, second) = (tokens.offer(session("a")), tokens.offer(session("b")));
        assert_ne!(first, second);
        assert!(first.len() == 32 && first.bytes().all(|b| b.is_ascii_hexdigit()));
        assert!(tokens.look(&first).is_some());
        assert!(tokens.take(&first).is_some());
        assert!(tokens.take(&first).is_none() && tokens.look(&first).is_none());
        assert!(tokens.take(&second[..31]).is_none(), "a part of a token is no token");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_expires() {
        let tokens = Tokens::new(Duration::from_secs(60), 10);
        let token = tokens.offer(session("a"));
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(tokens.look(&token).is_some());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(tokens.look(&token).is_none() && tokens.take(&token).is_none());
    }

    #[tokio::test]
    async fn the_oldest_gives_way() {
        let tokens = Tokens::new(Duration::from_secs(60), 3);
        let first = tokens.offer(session("0"));
        for round in 0..100 {
            let token = tokens.offer(session(&round.to_string()));
            if round % 3 == 0 {
                tokens.take(&token);
            }
        }
        assert!(tokens.take(&first).is_none());
        let offered = tokens.lock();
        assert!(offered.sessions.len() <= 3 && offered.order.len() <= 6);
    }
}
