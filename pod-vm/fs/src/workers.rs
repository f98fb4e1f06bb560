//! Threads that do what they are handed, oldest first.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use rustix::thread::UnshareFlags;

use crate::sys;

/// Some threads, for as long as the process lives.
pub(crate) struct Workers<T> {
    waiting: Arc<Waiting<T>>,
}

struct Waiting<T> {
    work: Mutex<VecDeque<T>>,
    more: Condvar,
}

impl<T: Send + 'static> Workers<T> {
    pub(crate) fn start(count: usize, perform: impl Fn(T) + Clone + Send + 'static) -> io::Result<Self> {
        let waiting = Arc::new(Waiting { work: Mutex::new(VecDeque::new()), more: Condvar::new() });
        for _ in 0..count {
            let (waiting, perform) = (Arc::clone(&waiting), perform.clone());
            thread::Builder::new().name("worker".to_owned()).spawn(move || {
                // The file system changes its thread's working directory and umask for a moment.
                if let Err(error) = sys::unshare(UnshareFlags::FS) {
                    panic!("a thread without a working directory of its own: {error}");
                }
                loop {
                    perform(waiting.take());
                }
            })?;
        }
        Ok(Self { waiting })
    }

    /// Has `work` done by whichever is free first.
    pub(crate) fn hand(&self, work: T) {
        self.waiting.work.lock().unwrap_or_else(PoisonError::into_inner).push_back(work);
        self.waiting.more.notify_one();
    }
}

impl<T> Waiting<T> {
    fn take(&self) -> T {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match work.pop_front() {
                Some(first) => return first,
                None => work = self.more.wait(work).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    #[test]
    fn as_many_things_are_done_at_a_time_as_there_are_workers() {
        let together = Arc::new(Barrier::new(3));
        let (done, ends) = channel();
        let workers = Workers::start(3, move |number: u32| {
            together.wait();
            done.send(number).unwrap();
        })
        .unwrap();
        (0..6).for_each(|number| workers.hand(number));
        let mut seen: Vec<u32> = ends.iter().take(6).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    }
}
