//! What an exec's process writes: from its streams to its client, and the last word to the client.

use podvisor_proto::monitor::{ExecSyncReply, reply, stream_frame::Frame};

use super::{Client, Exec, PATIENCE, Stage, WINDOW};
use crate::connection::Role;
use crate::monitor::Monitor;
use crate::output::lines::Stream;
use crate::poll::Timer;
use crate::stdio::Chunk;

impl Monitor {
    /// Passes on what an exec's process writes, as fast as its client takes it.
    pub(crate) fn pump_exec(&mut self, key: u64, stream: Stream) {
        const TURNS: usize = 8;
        let mut buffer = std::mem::take(&mut self.buffer);
        for turn in 0.. {
            let Some(exec) = self.execs.get_mut(&key) else { break };
            let full = exec.window_is_full(&self.connections);
            let place = match stream {
                Stream::Stdout => &mut exec.streams.stdout,
                Stream::Stderr => &mut exec.streams.stderr,
            };
            let Some(output) = place else { break };
            if full || turn == TURNS {
                output.watch(&self.poller, !full);
                break;
            }
            match output.read(&mut buffer) {
                Chunk::Data(count) => self.pass_on(key, stream, &buffer[..count]),
                Chunk::Blocked => {
                    output.watch(&self.poller, true);
                    break;
                }
                Chunk::End => {
                    if let Some(output) = place.take() {
                        output.close(&self.poller);
                    }
                    break;
                }
            }
        }
        self.buffer = buffer;
        self.finish_exec(key);
    }

    fn pass_on(&mut self, key: u64, stream: Stream, bytes: &[u8]) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        match &mut exec.client {
            Client::Sync { limit, stdout, stderr, .. } => {
                let kept = match stream {
                    Stream::Stdout => stdout,
                    Stream::Stderr => stderr,
                };
                let room = limit.saturating_sub(kept.len()).min(bytes.len());
                kept.extend_from_slice(&bytes[..room]);
            }
            // A terminal and a stream of a guest's process are read also when they were not asked for, or the process would wait.
            Client::Stream { to } if exec.wanted.has(stream) => {
                let connection = to.connection;
                let frame = match stream {
                    Stream::Stdout => Frame::Stdout(bytes.to_vec()),
                    Stream::Stderr => Frame::Stderr(bytes.to_vec()),
                };
                self.send_frame(connection, frame);
            }
            Client::Stream { .. } | Client::Gone => {}
        }
    }

    /// Reads an exec's output again.
    pub(crate) fn resume_exec_output(&mut self, key: u64) {
        self.pump_exec(key, Stream::Stdout);
        self.pump_exec(key, Stream::Stderr);
    }

    /// A client has taken some of what waited for it.
    pub(crate) fn client_took_output(&mut self, connection: u64) {
        if let Some(connection) = self.connections.get(&connection)
            && let Role::Exec(exec) = connection.role
            && connection.channel.queued() < WINDOW / 2
        {
            self.resume_exec_output(exec);
        }
    }

    /// An exec whose process has ended should have come to the end of its output by now.
    pub(crate) fn exec_drain_is_over(&mut self, key: u64) {
        let ended_at = self.execs.get(&key).and_then(Exec::in_guest).and_then(|guest| guest.ended_at);
        let mut arrives = ended_at.is_some_and(|then| !self.guest_has_spoken_since(then));
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let full = exec.window_is_full(&self.connections);
        for output in exec.streams.outputs() {
            arrives |= output.still_arrives(full);
        }
        if arrives {
            exec.timer = Some(self.timers.set(PATIENCE, Timer::Drain(key)));
            return;
        }
        for output in exec.streams.outputs() {
            output.limit_to_present();
        }
        self.resume_exec_output(key);
    }

    /// The last frame or the reply, when everything is passed on.
    pub(super) fn finish_exec(&mut self, key: u64) {
        let Some(exec) = self.execs.get(&key) else { return };
        let Stage::Ended(exit) = exec.stage else { return };
        if !exec.streams.drained() {
            return;
        }
        let Some(exec) = self.execs.remove(&key) else { return };
        if let Some(timer) = exec.timer {
            self.timers.cancel(timer);
        }
        match exec.client {
            Client::Sync { to, stdout, stderr, .. } => {
                let exec_sync = ExecSyncReply { exit_code: exit.code, stdout, stderr, timed_out: false };
                self.reply(to, Ok(reply::Result::ExecSync(exec_sync)));
            }
            Client::Stream { to } => {
                self.send_frame(to.connection, Frame::Exit(exit));
                if let Some(connection) = self.connections.get_mut(&to.connection) {
                    connection.channel.close(&self.poller);
                }
            }
            Client::Gone => {}
        }
    }
}
