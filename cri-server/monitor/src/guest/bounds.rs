//! How much of what a guest says is taken, and how often: whatever it sends, the monitor stays small and idle.

use std::time::{Duration, Instant};

use prost::decode_length_delimiter;

/// Text of a guest's as people may see it: no control characters but newlines, and of `limit` bytes at most, the beginning.
pub(super) fn plain(text: &str, limit: usize) -> String {
    let mut plain = String::new();
    for character in text.chars() {
        if plain.len() + character.len_utf8() > limit {
            break;
        }
        match character {
            '\n' => plain.push('\n'),
            character if character.is_control() => {}
            character => plain.push(character),
        }
    }
    plain
}

/// The same in one line.
pub(super) fn line(text: &str, limit: usize) -> String {
    plain(text, limit).trim().replace('\n', " ")
}

/// The same for the end of it, from a line's beginning where that can be.
pub(super) fn plain_end(text: &str, limit: usize) -> String {
    let start = (text.len().saturating_sub(limit)..=text.len()).find(|&start| text.is_char_boundary(start));
    let mut end = &text[start.unwrap_or(text.len())..];
    if end.len() < text.len()
        && let Some((_, lines)) = end.split_once('\n').filter(|(_, lines)| !lines.is_empty())
    {
        end = lines;
    }
    plain(end.trim_end(), limit)
}

/// How often something may happen: so many times at once, and one more after each interval.
#[derive(Debug)]
pub(super) struct Budget {
    most: u32,
    interval: Duration,
    left: u32,
    counted: Instant,
}

impl Budget {
    pub(super) fn new(most: u32, interval: Duration) -> Self {
        Self { most, interval, left: most, counted: Instant::now() }
    }

    /// Takes one; `false`: there is none left.
    pub(super) fn take(&mut self) -> bool {
        self.take_at(Instant::now())
    }

    fn take_at(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.counted).as_nanos() / self.interval.as_nanos().max(1);
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned >= self.most - self.left {
            (self.left, self.counted) = (self.most, now);
        } else {
            self.left += earned;
            self.counted += self.interval * earned;
        }
        let enough = self.left > 0;
        self.left = self.left.saturating_sub(1);
        enough
    }
}

/// How many elements the lists of an agent's reply have at most, without decoding it: an element of two bytes takes hundreds when it is
/// decoded. `None`: it is no message.
pub(super) fn elements(body: &[u8]) -> Option<usize> {
    const LISTS: [usize; 2] = [6, 7]; // `stats`, `processes`
    let mut count = 0;
    for field in Fields(body) {
        let (number, content) = field?;
        if LISTS.contains(&number) {
            for inner in Fields(content) {
                inner?;
                count += 1;
            }
        }
    }
    Some(count)
}

/// The fields of an encoded message: the number, and what it holds.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(usize, &'a [u8])> {
        let key = decode_length_delimiter(&mut self.0).ok()?;
        let length = match key & 7 {
            0 => decode_length_delimiter(&mut self.0).map(|_| 0).ok()?,
            1 => 8,
            2 => decode_length_delimiter(&mut self.0).ok()?,
            5 => 4,
            _ => return None,
        };
        let (content, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some((key >> 3, content))
    }
}

impl<'a> Iterator for Fields<'a> {
    /// `None`: what follows is no field.
    type Item = Option<(usize, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use podvisor_proto::agent::{ContainerStats, Process, Processes, Reply, StatsReply, reply};
    use prost::Message;

    use super::*;

    #[test]
    fn text_is_cut_and_cleaned() {
        assert_eq!(plain("a\x1b[31mb\r\nc\u{9b}", 100), "a[31mb\nc");
        assert_eq!(plain("äöü", 5), "äö");
        assert_eq!(line("a\nb\r\n", 100), "a b");
        assert_eq!(plain_end("first\nsecond\nthird\n", 12), "third");
        assert_eq!(plain_end("first\nsecond\n", 100), "first\nsecond");
        assert_eq!(plain_end("äöü", 3), "ü");
    }

    #[test]
    fn a_budget_refills_with_time() {
        let mut budget = Budget::new(2, Duration::from_secs(1));
        let start = budget.counted;
        assert!(budget.take_at(start) && budget.take_at(start) && !budget.take_at(start));
        assert!(!budget.take_at(start + Duration::from_millis(900)));
        assert!(budget.take_at(start + Duration::from_millis(1100)));
        assert!(!budget.take_at(start + Duration::from_millis(1200)));
        assert!(budget.take_at(start + Duration::from_secs(1000)));
    }

    #[test]
    fn elements_of_lists_are_counted_before_they_are_decoded() {
        let count = |result| elements(&Reply { id: 7, result: Some(result) }.encode_to_vec());
        let processes = vec![Process::default(); 5];
        assert_eq!(count(reply::Result::Processes(Processes { processes })), Some(5));
        let containers = vec![ContainerStats { root_bytes: 5, ..Default::default() }; 3];
        let stats = StatsReply { containers, pod: Some(Default::default()), ..Default::default() };
        assert_eq!(count(reply::Result::Stats(stats)), Some(4));
        assert_eq!(count(reply::Result::Hello(Default::default())), Some(0));
        for garbage in [&[0xff; 20][..], &[0x32, 0x05, 0x01], &[0x0b], &[0x32, 0x01, 0x0a]] {
            assert_eq!(elements(garbage), None, "{garbage:?}");
        }
    }
}
