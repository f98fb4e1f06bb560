//! What measuring pods needs to keep between two requests.

use std::path::Path;

use crate::rates::Rates;
use crate::readings::Readings;

/// One per daemon.
#[derive(Debug)]
pub(crate) struct Meters {
    pub(crate) readings: Readings,
    pub(crate) rates: Rates,
    /// Sizes of huge pages that this machine has.
    pub(crate) page_sizes: Vec<String>,
    /// Device that the containers' writable layers are on, as mountinfo names it.
    pub(crate) device: String,
}

impl Meters {
    /// For layers below `root`. Blocking.
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            readings: Readings::default(),
            rates: Rates::default(),
            page_sizes: podvisor_cgroup::huge_page_sizes(),
            device: device_of(root),
        }
    }
}

/// The source of the mount that a path is on; its number where the table has none (btrfs shows another number than stat).
fn device_of(path: &Path) -> String {
    let Ok(stat) = rustix::fs::stat(path) else { return String::new() };
    let number = format!("{}:{}", rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    source_of(&table, &number).map_or(number, str::to_owned)
}

/// proc_pid_mountinfo(5): the third field is the device's number, the source stands second behind the lone dash.
fn source_of<'a>(table: &'a str, number: &str) -> Option<&'a str> {
    table.lines().find_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        (head.split(' ').nth(2)? == number).then(|| tail.split(' ').nth(1))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_of_a_mount() {
        let table = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                     40 35 0:31 / /run rw shared:5 - tmpfs tmpfs rw\n";
        assert_eq!(source_of(table, "98:0"), Some("/dev/root"));
        assert_eq!(source_of(table, "0:31"), Some("tmpfs"));
        assert_eq!(source_of(table, "8:1"), None);
        assert!(!device_of(Path::new("/")).is_empty());
    }
}
