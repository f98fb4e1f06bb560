//! How a guest finds devices and speaks with them.

pub mod mmio;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use vmm_sys_util::eventfd::EventFd;

use crate::device::{Interrupt, Wake};
use crate::endpoint::Endpoint;

/// A device that can be reached by the guest, and served by a thread.
#[derive(Clone)]
pub struct Attached {
    endpoint: Arc<Mutex<Endpoint>>,
    interrupt: Arc<dyn Interrupt>,
    /// One for each queue: the guest has put something into it. There may be more, of the place that the device is in.
    kicks: Arc<[EventFd]>,
    queues: usize,
}

impl Attached {
    /// A device with the way that it makes itself heard. Fails when there are no descriptors left.
    pub fn new(endpoint: Endpoint, interrupt: Arc<dyn Interrupt>) -> std::io::Result<Self> {
        let kicks = kicks(endpoint.device().queues().len())?;
        Ok(Self::with_kicks(endpoint, interrupt, kicks))
    }

    /// The same, in a place that has its wakes already. A queue without one is not heard.
    pub fn with_kicks(endpoint: Endpoint, interrupt: Arc<dyn Interrupt>, kicks: Arc<[EventFd]>) -> Self {
        let queues = endpoint.device().queues().len().min(kicks.len());
        Self { endpoint: Arc::new(Mutex::new(endpoint)), interrupt, kicks, queues }
    }

    /// What the guest's writes to a queue's notification are to be turned into.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks[..self.queues]
    }

    /// Looks at, or changes, the device. Whoever panicked with it has not left it half changed in a way that the guest could use.
    pub fn with<R>(&self, look: impl FnOnce(&mut Endpoint, &dyn Interrupt) -> R) -> R {
        let mut endpoint = self.endpoint.lock().unwrap_or_else(PoisonError::into_inner);
        look(&mut endpoint, &*self.interrupt)
    }

    /// The same, when nobody else does just now.
    pub fn try_with<R>(&self, look: impl FnOnce(&mut Endpoint, &dyn Interrupt) -> R) -> Option<R> {
        let mut endpoint = match self.endpoint.try_lock() {
            Ok(endpoint) => endpoint,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(look(&mut endpoint, &*self.interrupt))
    }

    /// Serves what has woken the device; what is left is made to wake it again.
    pub fn serve(&self, wake: Wake) {
        if let Wake::Queue(index) = wake {
            // Read before the queue is: what comes later wakes again.
            let _ = self.kicks().get(index).map(EventFd::read);
        }
        if self.with(|endpoint, interrupt| endpoint.serve(wake, interrupt)) {
            match wake {
                Wake::Queue(index) => self.kick(index),
                Wake::Source(_) => self.kick_all(),
            }
        }
    }

    /// Has a queue looked at.
    pub fn kick(&self, index: usize) {
        // Fails only when it would overflow, and then it is set.
        let _ = self.kicks().get(index).map(|kick| kick.write(1));
    }

    fn kick_all(&self) {
        (0..self.queues).for_each(|index| self.kick(index));
    }
}

/// Wakes for so many queues.
pub fn kicks(count: usize) -> std::io::Result<Arc<[EventFd]>> {
    (0..count).map(|_| EventFd::new(flags())).collect()
}

/// How events are made.
pub(crate) fn flags() -> i32 {
    // EFD_NONBLOCK and EFD_CLOEXEC are the flags of open(2).
    let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
    flags.bits().cast_signed()
}
