//! Work that several callers want at once is done once: whoever comes later joins, and when the last one has gone the work is
//! cancelled.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Work in progress by key.
#[derive(Debug)]
pub(crate) struct Flights<K, T> {
    flying: Arc<Mutex<HashMap<K, Flight<T>>>>,
}

#[derive(Debug)]
struct Flight<T> {
    outcome: watch::Receiver<Option<T>>,
    task: AbortHandle,
    waiting: usize,
    /// Tells one flight from the next of the same key.
    number: u64,
}

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Self { flying: Arc::default() }
    }
}

/// Counts a caller out again, also when it is dropped while waiting.
struct Seat<'a, K: Eq + Hash, T> {
    flights: &'a Mutex<HashMap<K, Flight<T>>>,
    key: &'a K,
    number: u64,
}

impl<K: Eq + Hash, T> Drop for Seat<'_, K, T> {
    fn drop(&mut self) {
        let mut flying = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(flight) = flying.get_mut(self.key).filter(|flight| flight.number == self.number) else {
            return;
        };
        flight.waiting -= 1;
        if flight.waiting == 0 {
            flight.task.abort();
            flying.remove(self.key);
        }
    }
}

impl<K: Eq + Hash + Clone + Send + 'static, T: Clone + Send + Sync + 'static> Flights<K, T> {
    /// The outcome of the work for `key`: begun by `work` when nobody does it yet. `None`: it was cancelled under us.
    pub(crate) async fn join<F>(&self, key: K, work: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let (mut outcome, number) = {
            let mut flying = self.flying.lock().unwrap_or_else(PoisonError::into_inner);
            match flying.get_mut(&key) {
                // One that is finished and still here has panicked.
                Some(flight) if !flight.task.is_finished() => {
                    flight.waiting += 1;
                    (flight.outcome.clone(), flight.number)
                }
                _ => self.begin(&mut flying, key.clone(), work()),
            }
        };
        let _seat = Seat { flights: &self.flying, key: &key, number };
        let found = outcome.wait_for(Option::is_some).await.ok()?;
        found.clone()
    }

    fn begin<F>(
        &self,
        flying: &mut HashMap<K, Flight<T>>,
        key: K,
        work: F,
    ) -> (watch::Receiver<Option<T>>, u64)
    where
        F: Future<Output = T> + Send + 'static,
    {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (sender, outcome) = watch::channel(None);
        let (flights, done) = (self.flying.clone(), key.clone());
        let task = tokio::spawn(async move {
            let found = work.await;
            // Out of the table first: who comes now begins anew and finds what this one has made.
            let mut flying = flights.lock().unwrap_or_else(PoisonError::into_inner);
            if flying.get(&done).is_some_and(|flight| flight.number == number) {
                flying.remove(&done);
            }
            drop(flying);
            sender.send_replace(Some(found));
        });
        flying
            .insert(key, Flight { outcome: outcome.clone(), task: task.abort_handle(), waiting: 1, number });
        (outcome, number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn many_callers_one_piece_of_work() {
        let flights = Arc::new(Flights::<&str, usize>::default());
        let count = Arc::new(AtomicUsize::new(0));
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let callers: Vec<_> = (0..5)
            .map(|_| {
                let (flights, count, gate) = (flights.clone(), count.clone(), gate.clone());
                tokio::spawn(async move {
                    flights
                        .join("x", || async move {
                            let _ = gate.acquire().await;
                            count.fetch_add(1, Ordering::Relaxed) + 1
                        })
                        .await
                })
            })
            .collect();
        while flights.flying.lock().unwrap().get("x").is_none_or(|flight| flight.waiting < 5) {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        for caller in callers {
            assert_eq!(caller.await.unwrap(), Some(1));
        }
        assert!(flights.flying.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn the_last_to_leave_cancels() {
        struct Told(Arc<tokio::sync::Notify>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        let flights = Flights::<u8, ()>::default();
        let dropped = Arc::new(tokio::sync::Notify::new());
        let told = Told(dropped.clone());
        let mut waiting = Box::pin(flights.join(1, || async move {
            let _told = told;
            std::future::pending::<()>().await;
        }));
        // Polled once, so that the work has begun.
        tokio::select! {
            biased;
            _ = &mut waiting => panic!("it never ends"),
            () = std::future::ready(()) => {}
        }
        drop(waiting);
        dropped.notified().await;
        assert!(flights.flying.lock().unwrap().is_empty());
    }
}
