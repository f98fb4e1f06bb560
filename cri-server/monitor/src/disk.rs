//! The disk thread: everything that may wait for a disk, so that the loop never does.
//!
//! One queue, worked off in order: what was appended before a reopen is in the old file, what came after it in
//! the new one, and an exit record is written after the last line of the log. The queue is bounded by its
//! senders: the loop stops reading a container's pipe while [`BACKLOG`] bytes of it have not been written.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};

use crate::exit_record::ExitRecord;
use crate::output::file::LogFile;

/// Bytes of one container's log that may wait for the disk. Then its pipe fills, and then the container waits.
pub(crate) const BACKLOG: usize = 512 * 1024;

/// So much is written at once, where there is more.
pub(crate) const BATCH: usize = 128 * 1024;
/// Batches whose memory is kept: as many as a flood has under way, since memory that is new each time costs as much as what it is for.
const SPARE: usize = BACKLOG / BATCH;

/// What the disk thread is asked. The number is the container's.
#[derive(Debug)]
pub(crate) enum Job {
    /// Opens a log. Answered by [`Done::Opened`].
    Open { key: u64, path: PathBuf },
    /// Appends whole lines. Answered by [`Done::Written`].
    Append { key: u64, lines: Vec<u8> },
    /// Goes on in a new file. Answered by [`Done::Reopened`].
    Reopen { key: u64 },
    /// Closes a log, when there is one, without an answer.
    Close { key: u64 },
    /// Closes the log, when there is one, and writes the exit record. Answered by [`Done::Recorded`].
    Finish { key: u64, record: ExitRecord, directory: PathBuf },
}

/// What it answers, in the order of the jobs.
#[derive(Debug)]
pub(crate) enum Done {
    Opened {
        key: u64,
        result: Result<(), String>,
    },
    /// The lines come back, so that their memory can be used again.
    Written {
        key: u64,
        lines: Vec<u8>,
    },
    Reopened {
        key: u64,
        result: Result<(), String>,
    },
    Recorded {
        key: u64,
        result: Result<(), String>,
    },
}

/// The loop's end.
#[derive(Debug)]
pub(crate) struct Disk {
    jobs: Sender<Job>,
    done: Receiver<Done>,
    waker: Arc<OwnedFd>,
    /// Memory for lines, kept while a flood lasts.
    spare: Vec<Vec<u8>>,
}

impl Disk {
    pub(crate) fn start() -> io::Result<Self> {
        let waker = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, queue) = channel();
        let (answers, done) = channel();
        let theirs = Arc::clone(&waker);
        std::thread::Builder::new()
            .name("disk".to_owned())
            .stack_size(128 * 1024)
            .spawn(move || work(&queue, &answers, &theirs))?;
        Ok(Self { jobs, done, waker, spare: Vec::new() })
    }

    /// Memory for lines to append.
    pub(crate) fn lines(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes memory for lines back. What is kept goes when no flood is on.
    pub(crate) fn take_back(&mut self, mut lines: Vec<u8>, flood: bool) {
        if !flood {
            self.spare = Vec::new();
        } else if lines.capacity() > 0 && self.spare.len() < SPARE {
            lines.clear();
            self.spare.push(lines);
        }
    }

    pub(crate) fn send(&self, job: Job) {
        // The thread ends only when this sender is dropped.
        let _ = self.jobs.send(job);
    }

    /// Readable when something is done.
    pub(crate) fn waker(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }

    /// Forgets that it was woken. To be called before [`Disk::next`], or a wake-up could be lost.
    pub(crate) fn quiet(&self) {
        let _ = rustix::io::read(&*self.waker, &mut [0u8; 8]);
    }

    pub(crate) fn next(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }
}

fn work(queue: &Receiver<Job>, answers: &Sender<Done>, waker: &OwnedFd) {
    let mut logs = BTreeMap::new();
    let mut untold = false;
    loop {
        let next = queue.try_recv().or_else(|_| {
            // Once for all batches in a row: waking the loop up costs nearly as much as a batch.
            if std::mem::take(&mut untold) {
                wake(waker);
            }
            queue.recv()
        });
        let Ok(job) = next else { return };
        let done = match job {
            Job::Open { key, path } => {
                let opened = LogFile::open(&path);
                Some(Done::Opened {
                    key,
                    result: opened.map(|log| drop(logs.insert(key, log))).map_err(chain),
                })
            }
            Job::Append { key, lines } => {
                if let Some(log) = logs.get_mut(&key) {
                    log.append(&lines);
                }
                Some(Done::Written { key, lines })
            }
            Job::Reopen { key } => {
                let result = logs.get_mut(&key).map_or(Ok(()), LogFile::reopen).map_err(chain);
                Some(Done::Reopened { key, result })
            }
            Job::Close { key } => {
                logs.remove(&key);
                None
            }
            Job::Finish { key, record, directory } => {
                logs.remove(&key);
                Some(Done::Recorded { key, result: record.write(&directory).map_err(chain) })
            }
        };
        if let Some(done) = done {
            untold = matches!(done, Done::Written { .. });
            let _ = answers.send(done);
            if !untold {
                wake(waker);
            }
        }
    }
}

fn wake(waker: &OwnedFd) {
    let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
}

/// An error with its causes on one line, for the wire.
pub(crate) fn chain(error: impl Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
