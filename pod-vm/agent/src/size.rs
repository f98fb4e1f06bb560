//! The guest follows its machine: containers may use memory that was added, as huge pages too, processors come and go.

use std::fs;
use std::path::{Path, PathBuf};

use podvisor_proto::agent::Adapt;

use crate::agent::Agent;
use crate::container::PARENT;
use crate::failure::Failure;
use crate::huge_pages;

const PROCESSORS: &str = "/sys/devices/system/cpu";

/// What the guest began with.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Began {
    /// Bytes that the machine had, and those of them that containers may not use.
    pub(crate) memory: u64,
    pub(crate) reserve: u64,
}

impl Began {
    /// What containers may use together when so many bytes have been added. The kernel takes a page for the description of 64.
    pub(crate) fn limit(self, added: u64) -> u64 {
        self.memory.saturating_sub(self.reserve).saturating_add(added - added / 64)
    }
}

impl Agent {
    /// Nothing is changed when it cannot be done.
    pub(crate) fn adapt(&mut self, wanted: &Adapt) -> Result<(), Failure> {
        if !self.pod.is_personalised() {
            return Err(Failure::state("this guest is no pod yet"));
        }
        if std::process::id() != 1 {
            // Without a guest around it these would be the machine's.
            return Ok(());
        }
        let Some(directory) = self.cgroups.cgroup(PARENT).directory("memory").map(Path::to_path_buf) else {
            return Err(Failure::unsupported("this guest has no cgroup for the containers' memory"));
        };
        // A huge page is charged to its own controller, and taken from what there is of memory (cgroup-v2.rst, "HugeTLB").
        let limit = self.pod.began.limit(wanted.added).saturating_sub(huge_pages::bytes(&wanted.huge_pages));
        make_room(&directory, limit)?;
        let sizes = Path::new(huge_pages::SIZES);
        let changed = huge_pages::set_aside(sizes, &wanted.huge_pages)?;
        let mut outcome = Ok(());
        if wanted.cpus > 0 {
            outcome = bring_online(Path::new(PROCESSORS), wanted.cpus);
        }
        let outcome = outcome.and_then(|()| {
            fs::write(directory.join("memory.max"), limit.to_string())
                .map_err(|error| Failure::system("limit the containers' memory", error))
        });
        if outcome.is_err() {
            huge_pages::restore(sizes, &changed);
        }
        outcome
    }
}

/// A limit below what is used would end processes: caches are given up, and what then remains is the containers'.
fn make_room(directory: &Path, limit: u64) -> Result<(), Failure> {
    let used = || -> Result<u64, Failure> {
        let text = fs::read_to_string(directory.join("memory.current"))
            .map_err(|error| Failure::system("read the containers' memory", error))?;
        Ok(text.trim().parse().unwrap_or(u64::MAX))
    };
    let before = used()?;
    if before <= limit {
        return Ok(());
    }
    // What it could not get all of it reports as an error (Documentation/admin-guide/cgroup-v2.rst, `memory.reclaim`).
    let _ = fs::write(directory.join("memory.reclaim"), (before - limit).to_string());
    let now = used()?;
    if now <= limit {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    Err(Failure::state(format!(
        "the containers use {} MiB of memory, and {} MiB would remain for them",
        mib(now),
        mib(limit)
    )))
}

/// Lets the kernel use the first `count` processors and no other.
fn bring_online(processors: &Path, count: u32) -> Result<(), Failure> {
    let mut switches: Vec<(u32, PathBuf)> = Vec::new();
    for entry in fs::read_dir(processors).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu")?.parse().ok());
        // The first one has no switch.
        if let Some(number @ 1..) = number {
            switches.push((number, entry.path().join("online")));
        }
    }
    switches.sort();
    if u32::try_from(switches.len()).unwrap_or(u32::MAX) < count - 1 {
        let there = switches.len() + 1;
        return Err(Failure::invalid(format!("the machine has {there} processors, not {count}")));
    }
    let mut changed: Vec<(&PathBuf, &str)> = Vec::new();
    for (number, switch) in &switches {
        let (wanted, other) = if *number < count { ("1", "0") } else { ("0", "1") };
        if fs::read_to_string(switch).is_ok_and(|is| is.trim() == wanted) {
            continue;
        }
        if let Err(error) = fs::write(switch, wanted) {
            for (switch, before) in changed {
                let _ = fs::write(switch, before);
            }
            let what = if wanted == "1" { "use" } else { "stop using" };
            return Err(Failure::system(&format!("{what} processor {number}"), error));
        }
        changed.push((switch, other));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_the_containers_less_its_description() {
        let began = Began { memory: 500 << 20, reserve: 100 << 20 };
        assert_eq!(began.limit(0), 400 << 20);
        assert_eq!(began.limit(64 << 20), (400 << 20) + (63 << 20));
        assert_eq!(Began { memory: 1, reserve: 2 }.limit(0), 0);
    }

    #[test]
    fn processors_are_used_from_the_first_on() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..4 {
            let cpu = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            if number > 0 {
                fs::write(cpu.join("online"), "0\n").unwrap();
            }
        }
        fs::create_dir(directory.path().join("cpufreq")).unwrap();
        let online = |number: u32| {
            let path = directory.path().join(format!("cpu{number}/online"));
            fs::read_to_string(path).unwrap().trim() == "1"
        };
        bring_online(directory.path(), 3).unwrap();
        assert_eq!([1, 2, 3].map(online), [true, true, false]);
        bring_online(directory.path(), 1).unwrap();
        assert_eq!([1, 2, 3].map(online), [false; 3]);
        assert!(bring_online(directory.path(), 5).is_err());
        assert_eq!([1, 2, 3].map(online), [false; 3]);
    }
}
