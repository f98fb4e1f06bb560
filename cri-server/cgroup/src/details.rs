//! What only metrics want to know of a cgroup: how often limits were hit, huge pages, how many tasks it may have.

use std::path::Path;

use crate::cgroup::Hierarchy;
use crate::files::{child_directories, keyed, read_number, read_optional};
use crate::{Cgroup, Result};

/// Beside [`crate::Stats`]. `None`: not counted on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Details {
    /// How often the memory limit stopped an allocation, at least for a moment.
    pub memory_limit_hits: Option<u64>,
    /// How often it was throttled for being over `memory.high` (version 2).
    pub memory_high_hits: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: Option<u64>,
    /// Most tasks that it may have; `Some(u64::MAX)`: no limit.
    pub pids_limit: Option<u64>,
    /// By page size.
    pub huge_pages: Vec<HugePages>,
}

/// Use of huge pages of one size.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HugePages {
    /// As in the files' names, e.g. `2MB`.
    pub page_size: String,
    /// Bytes.
    pub usage: u64,
    /// Highest usage so far, bytes (version 1).
    pub peak: Option<u64>,
    /// How often the limit refused one.
    pub limit_hits: u64,
}

/// Sizes of huge pages that this machine has, in the words of the cgroup's files. `/sys/kernel/mm/hugepages` names them
/// `hugepages-2048kB`; the controller rounds to the largest unit (`mm/hugetlb_cgroup.c`, `mem_fmt`).
pub fn huge_page_sizes() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let mut sizes: Vec<String> =
        entries.filter_map(|entry| controller_name(entry.file_name().to_str()?)).collect();
    sizes.sort();
    sizes
}

fn controller_name(directory: &str) -> Option<String> {
    let kilobytes: u64 = directory.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kilobytes {
        0..1024 => format!("{kilobytes}KB"),
        1024..1_048_576 => format!("{}MB", kilobytes / 1024),
        _ => format!("{}GB", kilobytes / 1_048_576),
    })
}

impl Cgroup {
    /// Reads them: five files, and three per size of huge page.
    pub fn details(&self, page_sizes: &[String]) -> Result<Details> {
        let mut details = Details::default();
        match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => {
                if let Some(events) = read_optional(&directory.join("memory.events"))? {
                    details.memory_limit_hits = keyed(&events, "max");
                    details.memory_high_hits = keyed(&events, "high");
                    details.oom_kills = keyed(&events, "oom_kill");
                }
                details.pids_limit = read_number(&directory.join("pids.max"))?;
                details.huge_pages = huge_pages_v2(directory, page_sizes)?;
            }
            Hierarchy::V1 { .. } => {
                if let Some(directory) = self.directory("memory") {
                    details.memory_limit_hits = read_number(&directory.join("memory.failcnt"))?;
                    let control = read_optional(&directory.join("memory.oom_control"))?.unwrap_or_default();
                    details.oom_kills = keyed(&control, "oom_kill");
                }
                if let Some(directory) = self.directory("pids") {
                    details.pids_limit = read_number(&directory.join("pids.max"))?;
                }
                details.huge_pages = match (self.directory("hugetlb"), self.in_unified()) {
                    (Some(directory), _) => huge_pages_v1(directory, page_sizes)?,
                    // Hybrid layouts can have this controller in version 2.
                    (None, Some(unified)) => huge_pages_v2(unified, page_sizes)?,
                    (None, None) => Vec::new(),
                };
            }
        }
        Ok(details)
    }

    /// Processes in it and below it, when it consists of at most `cgroups` cgroups; else `None`. A container with a cgroup tree of its own
    /// (systemd in it) can have any number.
    pub fn pids_within(&self, cgroups: usize) -> Result<Option<Vec<i32>>> {
        let (mut found, mut todo, mut seen) = (Vec::new(), vec![self.primary().to_path_buf()], 0);
        while let Some(directory) = todo.pop() {
            seen += 1;
            if seen > cgroups {
                return Ok(None);
            }
            found.extend(crate::cgroup::pids_of(&directory)?);
            todo.extend(child_directories(&directory)?);
        }
        Ok(Some(found))
    }
}

fn huge_pages_v2(directory: &Path, sizes: &[String]) -> Result<Vec<HugePages>> {
    let mut all = Vec::new();
    for size in sizes {
        let Some(usage) = read_number(&directory.join(format!("hugetlb.{size}.current")))? else { continue };
        let events = read_optional(&directory.join(format!("hugetlb.{size}.events")))?.unwrap_or_default();
        let limit_hits = keyed(&events, "max").unwrap_or(0);
        all.push(HugePages { page_size: size.clone(), usage, peak: None, limit_hits });
    }
    Ok(all)
}

fn huge_pages_v1(directory: &Path, sizes: &[String]) -> Result<Vec<HugePages>> {
    let mut all = Vec::new();
    for size in sizes {
        let number = |file: &str| read_number(&directory.join(format!("hugetlb.{size}.{file}")));
        let Some(usage) = number("usage_in_bytes")? else { continue };
        let (peak, limit_hits) = (number("max_usage_in_bytes")?, number("failcnt")?.unwrap_or(0));
        all.push(HugePages { page_size: size.clone(), usage, peak, limit_hits });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Layout;

    fn sizes() -> Vec<String> {
        vec!["1GB".into(), "2MB".into()]
    }

    fn write(directory: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(directory).unwrap();
        for (name, text) in files {
            std::fs::write(directory.join(name), text).unwrap();
        }
    }

    #[test]
    fn names_of_page_sizes() {
        assert_eq!(controller_name("hugepages-64kB").unwrap(), "64KB");
        assert_eq!(controller_name("hugepages-2048kB").unwrap(), "2MB");
        assert_eq!(controller_name("hugepages-1048576kB").unwrap(), "1GB");
        assert_eq!(controller_name("something"), None);
    }

    #[test]
    fn version_2() {
        let root = tempfile::tempdir().unwrap();
        write(
            &root.path().join("leaf"),
            &[
                ("memory.events", "low 0\nhigh 4\nmax 5\noom 6\noom_kill 7\noom_group_kill 0\n"),
                ("pids.max", "max\n"),
                ("hugetlb.2MB.current", "4194304\n"),
                ("hugetlb.2MB.events", "max 3\n"),
                ("cgroup.procs", "11\n12\n"),
            ],
        );
        write(&root.path().join("leaf/below"), &[("cgroup.procs", "13\n")]);
        let cgroup = Layout::V2 { mount: root.path().into() }.cgroup("/leaf");
        let huge = HugePages { page_size: "2MB".into(), usage: 4_194_304, peak: None, limit_hits: 3 };
        let expected = Details {
            memory_limit_hits: Some(5),
            memory_high_hits: Some(4),
            oom_kills: Some(7),
            pids_limit: Some(u64::MAX),
            huge_pages: vec![huge],
        };
        assert_eq!(cgroup.details(&sizes()).unwrap(), expected);
        assert_eq!(cgroup.pids_within(2).unwrap().unwrap(), [11, 12, 13]);
        assert_eq!(cgroup.pids_within(1).unwrap(), None);
    }

    #[test]
    fn version_1_and_hybrid() {
        let root = tempfile::tempdir().unwrap();
        let mut controllers = std::collections::BTreeMap::new();
        for name in ["memory", "pids", "unified"] {
            controllers.insert(name.to_owned(), root.path().join(name));
        }
        write(
            &root.path().join("memory/leaf"),
            &[
                ("memory.failcnt", "9\n"),
                ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ],
        );
        write(&root.path().join("pids/leaf"), &[("pids.max", "100\n")]);
        write(&root.path().join("unified/leaf"), &[("hugetlb.1GB.current", "0\n")]);
        let cgroup = Layout::V1 { controllers: controllers.clone() }.cgroup("/leaf");
        let details = cgroup.details(&sizes()).unwrap();
        assert_eq!(
            (details.memory_limit_hits, details.oom_kills, details.pids_limit),
            (Some(9), Some(2), Some(100))
        );
        assert_eq!(details.huge_pages, [HugePages { page_size: "1GB".into(), ..HugePages::default() }]);

        controllers.insert("hugetlb".into(), root.path().join("hugetlb"));
        write(
            &root.path().join("hugetlb/leaf"),
            &[
                ("hugetlb.2MB.usage_in_bytes", "1\n"),
                ("hugetlb.2MB.max_usage_in_bytes", "2\n"),
                ("hugetlb.2MB.failcnt", "3\n"),
            ],
        );
        let cgroup = Layout::V1 { controllers }.cgroup("/leaf");
        let huge = HugePages { page_size: "2MB".into(), usage: 1, peak: Some(2), limit_hits: 3 };
        assert_eq!(cgroup.details(&sizes()).unwrap().huge_pages, [huge]);
    }

    #[test]
    fn nothing_there_is_nothing_known() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Layout::V2 { mount: root.path().into() }.cgroup("/gone");
        assert_eq!(cgroup.details(&sizes()).unwrap(), Details::default());
        assert_eq!(cgroup.pids_within(1).unwrap(), Some(Vec::new()));
    }
}
