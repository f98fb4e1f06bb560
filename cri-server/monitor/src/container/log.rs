//! A container's output: from its pipes to its log and to who is attached.
//!
//! The log comes first: the pipes are read as fast as the disk thread writes, with at most [`BACKLOG`] bytes under
//! way, and no attached client can slow that down. A flood is read in large pieces ([`pace`]).

use podvisor_proto::monitor::{self as proto, ReopenLog, reply, stream_frame::Frame};

use super::{Container, Maker, State};
use crate::disk::{BACKLOG, BATCH, Job};
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::output::lines::Stream;
use crate::output::pace::{self, Pace};
use crate::output::timestamp;
use crate::poll::Timer;
use crate::runtime::LOG_LIMIT;
use crate::stdio::{Chunk, Output};
use crate::verbs::{Answer, Answered, ReplyTo};

impl Container {
    fn output(&mut self, stream: Stream) -> &mut Option<Output> {
        match stream {
            Stream::Stdout => &mut self.streams.stdout,
            Stream::Stderr => &mut self.streams.stderr,
        }
    }

    /// It writes as fast as its output is read, as far as one can tell.
    fn is_flooded(&self) -> bool {
        self.resting || self.backlog > 0 || self.pace.is_flood()
    }

    /// Appends the log lines that these bytes complete, or that the end of the stream does.
    fn cut(&mut self, stream: Stream, written: Option<&[u8]>, log: &mut Vec<u8>) {
        if !self.logged {
            return;
        }
        let before = log.len();
        let time = timestamp::now();
        let lines = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        match written {
            Some(bytes) => lines.push(bytes, &time, log),
            None => lines.finish(&time, log),
        }
        self.backlog += log.len() - before;
    }
}

impl Monitor {
    /// Begins to read what a container writes.
    pub(crate) fn watch_output(&mut self, key: u64) {
        self.pump_container(key, Stream::Stdout);
        self.pump_container(key, Stream::Stderr);
    }

    /// Reads what a container has written, as long as there is something and the disk keeps up.
    pub(crate) fn pump_container(&mut self, key: u64, stream: Stream) {
        /// Reads in a row, so that one container's flood does not keep the others waiting.
        const TURNS: usize = 8;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut log = self.disk.lines();
        let mut ended = false;
        for turn in 0.. {
            let Some(container) = self.containers.get_mut(&key) else { break };
            let full = container.backlog >= BACKLOG;
            let creating = matches!(container.state, State::Creating { .. });
            let is_flood = container.pace.is_flood();
            let Some(output) = container.output(stream) else { break };
            if full {
                output.watch(&self.poller, false);
                container.held_back = true;
                break;
            }
            if turn == TURNS {
                output.watch(&self.poller, true);
                break;
            }
            match output.read(&mut buffer) {
                // Nobody but the runtime can have written this: the container's program does not run yet.
                Chunk::Data(count) if creating => {
                    let Maker::Runtime(host) = &mut container.maker else { break };
                    let room = LOG_LIMIT.saturating_sub(host.words.len()).min(count);
                    host.words.extend_from_slice(&buffer[..room]);
                }
                Chunk::Data(count) => {
                    container.pace.count(count);
                    container.cut(stream, Some(&buffer[..count]), &mut log);
                    self.show_attached(key, stream, &buffer[..count]);
                    if log.len() >= BATCH {
                        let lines = std::mem::replace(&mut log, self.disk.lines());
                        self.disk.send(Job::Append { key, lines });
                    }
                }
                Chunk::Blocked => {
                    let rests = is_flood && output.make_room();
                    output.watch(&self.poller, !rests);
                    if !rests && is_flood {
                        container.pace = Pace::new();
                    } else if rests && !container.resting {
                        container.resting = true;
                        self.timers.set(pace::EACH, Timer::Output(key));
                    }
                    break;
                }
                Chunk::End => {
                    if let Some(output) = container.output(stream).take() {
                        output.close(&self.poller);
                    }
                    container.cut(stream, None, &mut log);
                    container.pace = Pace::new();
                    ended = true;
                    break;
                }
            }
        }
        self.buffer = buffer;
        let flood = self.containers.get(&key).is_some_and(Container::is_flooded);
        if log.is_empty() {
            self.disk.take_back(log, flood);
        } else {
            self.disk.send(Job::Append { key, lines: log });
        }
        if ended {
            self.advance_ending(key);
        }
    }

    fn show_attached(&mut self, key: u64, stream: Stream, bytes: &[u8]) {
        let Some(container) = self.containers.get(&key) else { return };
        let interested: Vec<u64> = container
            .attached
            .iter()
            .filter(|attached| match stream {
                Stream::Stdout => attached.stdout,
                Stream::Stderr => attached.stderr,
            })
            .map(|attached| attached.connection)
            .collect();
        for connection in interested {
            let frame = match stream {
                Stream::Stdout => Frame::Stdout(bytes.to_vec()),
                Stream::Stderr => Frame::Stderr(bytes.to_vec()),
            };
            self.send_attached(key, connection, frame);
        }
    }

    /// A container that has written much may have written more.
    pub(crate) fn rested(&mut self, key: u64) {
        match self.containers.get_mut(&key) {
            Some(container) => {
                container.resting = false;
                self.watch_output(key);
            }
            None => self.disk.take_back(Vec::new(), false),
        }
    }

    /// The disk thread has written a part of a log.
    pub(crate) fn log_written(&mut self, key: u64, lines: Vec<u8>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        container.backlog = container.backlog.saturating_sub(lines.len());
        self.disk.take_back(lines, container.is_flooded());
        if container.held_back && container.backlog < BACKLOG / 2 {
            container.held_back = false;
            self.watch_output(key);
        }
    }

    pub(crate) fn reopen_log(&mut self, to: ReplyTo, request: &ReopenLog) -> Answered {
        let id = &request.container_id;
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let Some(container) = self.containers.get_mut(&key) else { return Err(Failure::no_container(id)) };
        if !matches!(container.state, State::Created { .. } | State::Running { .. }) {
            return Err(container.wrong_state("running"));
        }
        if !container.logged {
            return Err(Failure::wrong_state(format!("container {id} has no log")));
        }
        container.reopening.push(to);
        self.disk.send(Job::Reopen { key });
        Ok(Answer::Later)
    }

    /// The disk thread goes on in a new file, or could not. It answers in the order it was asked.
    pub(crate) fn log_reopened(&mut self, key: u64, result: Result<(), String>) {
        let Some(container) = self.containers.get_mut(&key).filter(|it| !it.reopening.is_empty()) else {
            return;
        };
        let to = container.reopening.remove(0);
        let result = result
            .map(|()| reply::Result::Done(proto::Done {}))
            .map_err(|error| Failure::system(format!("reopen the log of container {}", container.id), error));
        self.reply(to, result);
    }
}
