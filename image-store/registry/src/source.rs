//! The endpoints of one pull, with what they turned out to be.

use crate::reference::Reference;
use crate::session::Session;

/// The endpoints that answered, with the authorisation they gave. Opaque.
#[derive(Debug)]
pub struct Source {
    pub(crate) reference: Reference,
    pub(crate) sessions: Vec<Session>,
}

impl Source {
    /// Positions of the endpoints that may be asked for content by digest: in the configured order, but those that
    /// failed during this pull last.
    pub(crate) fn for_content(&self) -> Vec<usize> {
        let pulls = |position: &usize| self.sessions[*position].endpoint().capabilities.pull;
        let mut order: Vec<usize> = (0..self.sessions.len()).filter(pulls).collect();
        order.sort_by_key(|position| self.sessions[*position].is_demoted());
        order
    }
}
