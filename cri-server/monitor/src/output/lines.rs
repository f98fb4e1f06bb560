//! Bytes from a container's pipe → lines of the CRI log format:
//! `<RFC 3339 time> <stdout|stderr> <P|F> <content>\n` (KEP-2258, and kubelet's `pkg/kubelet/kuberuntime/logs`).
//!
//! - A line longer than the longest (the daemon's `limits.log_line`, else [`LONGEST`]) is written as several `P` lines and a last `F`, as containerd and CRI-O do.
//! - What the process wrote after its last newline is held back until its newline comes, and written as `P` when
//!   the stream ends. kubelet's reader gives a `P` line out without a newline, so `kubectl logs` shows exactly
//!   what was written. (containerd does the same; conmon writes every read that ends without a newline as a `P`
//!   line at once, which tears lines apart at random.)

/// Content bytes of one log line where the daemon does not say how many.
pub(crate) const LONGEST: usize = 16 * 1024;

/// Which output a line came from. A terminal's is all `stdout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Stdout => b"stdout",
            Self::Stderr => b"stderr",
        }
    }
}

/// Cuts one stream into lines.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: Stream,
    /// Content bytes of one line; more become parts.
    longest: usize,
    /// Content since the last newline; at most `longest`.
    begun: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(stream: Stream, longest: usize) -> Self {
        Self { stream, longest, begun: Vec::new() }
    }

    /// Takes what the process wrote, and appends the lines that it completes to `log`.
    pub(crate) fn push(&mut self, written: &[u8], time: &str, log: &mut Vec<u8>) {
        let head = self.head(time, b"F");
        let mut rest = written;
        while !rest.is_empty() {
            let room = self.longest - self.begun.len();
            // One byte more than there is room for: a line of exactly the longest length is still one full line.
            let window = &rest[..rest.len().min(room + 1)];
            if let Some(newline) = memchr::memchr(b'\n', window) {
                let (line, after) = rest.split_at(newline + 1);
                log.extend_from_slice(&head);
                if !self.begun.is_empty() {
                    log.extend_from_slice(&std::mem::take(&mut self.begun));
                }
                log.extend_from_slice(line);
                rest = after;
            } else if window.len() > room {
                self.part(&rest[..room], time, log);
                rest = &rest[room..];
            } else {
                self.begun.extend_from_slice(rest);
                break;
            }
        }
    }

    /// The stream has ended.
    pub(crate) fn finish(&mut self, time: &str, log: &mut Vec<u8>) {
        if !self.begun.is_empty() {
            self.part(b"", time, log);
        }
    }

    /// A line of the log that is not the last of its line.
    fn part(&mut self, end: &[u8], time: &str, log: &mut Vec<u8>) {
        let head = self.head(time, b"P");
        for part in [&head, &std::mem::take(&mut self.begun), end, b"\n"] {
            log.extend_from_slice(part);
        }
    }

    /// What a line of the log begins with.
    fn head(&self, time: &str, tag: &[u8]) -> Vec<u8> {
        [time.as_bytes(), b" ", self.stream.name(), b" ", tag, b" "].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(pieces: &[&[u8]]) -> String {
        log_with(LONGEST, pieces)
    }

    fn log_with(longest: usize, pieces: &[&[u8]]) -> String {
        let mut lines = Lines::new(Stream::Stdout, longest);
        let mut log = Vec::new();
        for piece in pieces {
            lines.push(piece, "T", &mut log);
        }
        lines.finish("T", &mut log);
        String::from_utf8(log).unwrap()
    }

    #[test]
    fn lines_are_cut_at_newlines_however_they_are_read() {
        let expected = "T stdout F one\nT stdout F \nT stdout F three\nT stdout P rest";
        assert_eq!(log_of(&[b"one\n\nthree\nrest"]).trim_end(), expected);
        let bytes: Vec<&[u8]> = b"one\n\nthree\nrest".chunks(1).collect();
        assert_eq!(log_of(&bytes).trim_end(), expected);
        assert_eq!(log_of(&[]), "");
        assert_eq!(log_of(&[b"whole\n"]), "T stdout F whole\n");
    }

    #[test]
    fn long_lines_become_partial_ones() {
        let tags = |log: &str| -> Vec<(String, usize)> {
            log.lines().map(|line| (line[9..10].to_owned(), line.len() - 11)).collect()
        };
        let line = |length: usize| [vec![b'x'; length], b"\n".to_vec()].concat();
        let partial = ("P".to_owned(), LONGEST);
        assert_eq!(tags(&log_of(&[&line(LONGEST)])), [("F".to_owned(), LONGEST)]);
        assert_eq!(tags(&log_of(&[&line(LONGEST + 1)])), [partial.clone(), ("F".to_owned(), 1)]);
        let long = line(3 * LONGEST);
        let expected = [partial.clone(), partial, ("F".to_owned(), LONGEST)];
        assert_eq!(tags(&log_of(&[&long])), expected);
        let pieces: Vec<&[u8]> = long.chunks(1000).collect();
        assert_eq!(tags(&log_of(&pieces)), expected);
    }

    #[test]
    fn the_longest_line_is_as_long_as_asked() {
        let expected = "T stdout P abc\nT stdout P def\nT stdout F g\nT stdout F xyz\n";
        assert_eq!(log_with(3, &[b"abcdefg\nxyz\n"]), expected);
        let bytes: Vec<&[u8]> = b"abcdefg\nxyz\n".chunks(1).collect();
        assert_eq!(log_with(3, &bytes), expected);
    }
}
