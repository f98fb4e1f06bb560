//! Which known key somebody meant who wrote an unknown one.

/// Longer keys are compared by their beginning: nothing that long is a typing mistake.
const LONGEST: usize = 80;

/// The member of `known` (dotted keys) that looks most like the dotted key `unknown`. A key of the same
/// table wins over a key of another, unless the other has nearly the same name.
pub(crate) fn nearest<'k>(unknown: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let (table, name) = split(unknown);
    known
        .into_iter()
        .map(|candidate| {
            let (candidate_table, candidate_name) = split(candidate);
            let by_name = likeness(name, candidate_name);
            let score = if table == candidate_table {
                by_name
            } else {
                // Right name, wrong table: one mistake, as long as the name is right.
                let moved = if by_name <= 1 { by_name + 1 } else { usize::MAX };
                moved.min(distance(unknown, candidate).saturating_add(3))
            };
            (score, table != candidate_table, candidate)
        })
        .min()
        .map(|(_, _, candidate)| candidate)
}

fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or(("", key))
}

/// Edit distance, where leaving out or adding whole words ("pause" for "pause_image") costs little.
fn likeness(written: &str, known: &str) -> usize {
    let edits = distance(written, known);
    let shorter = written.chars().count().min(known.chars().count());
    if shorter >= 3 && (known.contains(written) || written.contains(known)) { edits.min(2) } else { edits }
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b` (optimal string
/// alignment).
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(LONGEST).collect();
    let b: Vec<char> = b.chars().take(LONGEST).collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, &from) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &to) in b.iter().enumerate() {
            let mut best = (above[j] + usize::from(from != to)).min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && from == b[j - 1] && a[i - 1] == to {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{distance, nearest};

    #[test]
    fn distances() {
        let cases =
            [("", "", 0), ("a", "", 1), ("level", "lvel", 1), ("level", "leevl", 1), ("root", "run", 3)];
        for (a, b, expected) in cases {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn the_key_that_was_meant() {
        let known = [
            "root",
            "run",
            "socket",
            "log",
            "log.level",
            "log.format",
            "streaming",
            "runtime",
            "runtime.cgroup_driver",
            "image.pause_image",
            "image.certs_dir",
            "runtime.handlers.runc.path",
        ];
        let cases = [
            ("log.lvel", "log.level"),
            ("stremaing", "streaming"),
            ("rot", "root"),
            ("cgroup_driver", "runtime.cgroup_driver"),
            ("runtime.cgroupdriver", "runtime.cgroup_driver"),
            ("image.pause", "image.pause_image"),
            ("image.cert_dir", "image.certs_dir"),
        ];
        for (unknown, expected) in cases {
            assert_eq!(nearest(unknown, known), Some(expected), "{unknown}");
        }
        assert_eq!(nearest("x", []), None);
    }
}
