//! Readings of many pods at once, of which one that hangs holds up nobody.
//!
//! Files of cgroups and processes are read on a few threads that share the work. A read can hang in the kernel (a cgroup whose lock is
//! held, a process in a dead file system's call), and no signal ends it. So a list that sees nothing move for [`PATIENCE`] starts further
//! threads for what is left, answers without the pods that hang, and remembers them: later lists do not try them again until the read
//! that hangs has come back. A pod that hangs costs one thread, however often somebody lists.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::id::PodId;
use crate::pod::view::PodView;

/// How long nothing may move before a list goes on without what it waits for. Far beyond what a busy machine needs for one pod.
const PATIENCE: Duration = Duration::from_secs(2);

/// Threads that a list begins with.
const THREADS: usize = 2;

/// Most threads that one list starts.
const MOST_THREADS: usize = 16;

/// Which pods' readings hang right now.
#[derive(Debug, Clone)]
pub(crate) struct Readings {
    hanging: Arc<Mutex<BTreeSet<PodId>>>,
    patience: Duration,
}

impl Default for Readings {
    fn default() -> Self {
        Self { hanging: Arc::default(), patience: PATIENCE }
    }
}

/// One list's work.
struct Work<V> {
    queue: Mutex<Queue<V>>,
    hanging: Arc<Mutex<BTreeSet<PodId>>>,
}

struct Queue<V> {
    left: VecDeque<(usize, PodId, V)>,
    /// What is being read.
    begun: BTreeSet<PodId>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic under this lock")
}

impl Readings {
    /// What `read` says about each pod, in their order. Pods whose reading hangs are left out.
    pub(crate) async fn of<T: Send + 'static>(
        &self,
        views: Vec<Arc<PodView>>,
        read: impl Fn(&PodView) -> T + Send + Sync + 'static,
    ) -> Vec<T> {
        let views = views.into_iter().map(|view| (view.record.id.clone(), view));
        self.gather(views.collect(), move |view: &Arc<PodView>| read(view)).await
    }

    /// How many pods hang.
    pub(crate) fn hanging(&self) -> usize {
        lock(&self.hanging).len()
    }

    async fn gather<V: Send + 'static, T: Send + 'static>(
        &self,
        items: Vec<(PodId, V)>,
        read: impl Fn(&V) -> T + Send + Sync + 'static,
    ) -> Vec<T> {
        let hanging = lock(&self.hanging).clone();
        let items = items.into_iter().enumerate().filter(|(_, (id, _))| !hanging.contains(id));
        let left: VecDeque<_> = items.map(|(index, (id, view))| (index, id, view)).collect();
        let (wanted, mut threads) = (left.len(), THREADS.min(left.len()));
        let queue = Mutex::new(Queue { left, begun: BTreeSet::new() });
        let work = Arc::new(Work { queue, hanging: self.hanging.clone() });
        let read = Arc::new(read);
        let (sender, mut receiver) = mpsc::unbounded_channel();
        for _ in 0..threads {
            start(&work, &read, &sender);
        }
        let mut results = Vec::with_capacity(wanted);
        while results.len() < wanted {
            if let Ok(Some(result)) = tokio::time::timeout(self.patience, receiver.recv()).await {
                results.push(result);
                continue;
            }
            if !work.give_up() || threads >= MOST_THREADS {
                break;
            }
            threads += THREADS;
            for _ in 0..THREADS {
                start(&work, &read, &sender);
            }
        }
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

impl<V> Work<V> {
    fn next(&self) -> Option<(usize, PodId, V)> {
        let mut queue = lock(&self.queue);
        let next = queue.left.pop_front()?;
        queue.begun.insert(next.1.clone());
        Some(next)
    }

    fn done(&self, id: &PodId) {
        // Both at once: whoever gives up sees it either as begun or as done.
        let mut queue = lock(&self.queue);
        queue.begun.remove(id);
        lock(&self.hanging).remove(id);
    }

    /// What is being read hangs; whether something waits behind it.
    fn give_up(&self) -> bool {
        let queue = lock(&self.queue);
        lock(&self.hanging).extend(queue.begun.iter().cloned());
        !queue.left.is_empty()
    }
}

fn start<V: Send + 'static, T: Send + 'static>(
    work: &Arc<Work<V>>,
    read: &Arc<impl Fn(&V) -> T + Send + Sync + 'static>,
    results: &mpsc::UnboundedSender<(usize, T)>,
) {
    let (work, read, results) = (work.clone(), read.clone(), results.clone());
    tokio::task::spawn_blocking(move || {
        // Nobody waits any more when the caller has gone away.
        while let Some((index, id, view)) = (!results.is_closed()).then(|| work.next()).flatten() {
            let result = read(&view);
            work.done(&id);
            let _ = results.send((index, result));
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc as channel;

    use super::*;

    fn items(count: usize) -> Vec<(PodId, usize)> {
        (0..count).map(|number| (PodId::random(), number)).collect()
    }

    #[tokio::test]
    async fn all_in_order() {
        let readings = Readings::default();
        assert_eq!(
            readings.gather(items(300), |number| number * 2).await,
            (0..300).map(|n| n * 2).collect::<Vec<_>>()
        );
        assert!(readings.gather(items(0), |number| *number).await.is_empty());
    }

    #[tokio::test]
    async fn one_that_hangs_is_left_out_and_tried_again_when_it_has_come_back() {
        let readings = Readings { patience: Duration::from_millis(200), ..Readings::default() };
        let items = items(9);
        let (release, hang) = channel::channel::<()>();
        let hang = Mutex::new(hang);
        let read = move |number: &usize| {
            // Three hang, more than a list has threads at first.
            if number.is_multiple_of(3) {
                let _ = hang.lock().unwrap().recv();
            }
            *number
        };
        assert_eq!(readings.gather(items.clone(), read).await, [1, 2, 4, 5, 7, 8]);
        // Not waited for again, with whatever patience.
        let patient = Readings { patience: Duration::from_secs(3600), ..readings.clone() };
        assert_eq!(patient.gather(items.clone(), |number| *number).await, [1, 2, 4, 5, 7, 8]);
        drop(release);
        while !lock(&readings.hanging).is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(patient.gather(items, |number| *number).await, (0..9).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_ends_the_work() {
        let readings = Readings::default();
        let (begun, seen) = channel::channel();
        let (release, hang) = channel::channel::<()>();
        let hang = Mutex::new(hang);
        let read = move |number: &usize| {
            begun.send(*number).unwrap();
            let _ = hang.lock().unwrap().recv();
        };
        let list = tokio::spawn(async move { readings.gather(items(100), read).await });
        let first = tokio::task::spawn_blocking(move || (seen.recv().unwrap(), seen)).await.unwrap();
        list.abort();
        assert!(list.await.unwrap_err().is_cancelled());
        drop(release);
        let rest = tokio::task::spawn_blocking(move || first.1.into_iter().count()).await.unwrap();
        assert!(rest < 3, "{rest}");
    }
}
