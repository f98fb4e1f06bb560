//! Kernel modules: those of every start, and those that somebody asks for.
//!
//! `/modules`, which the guest's builder writes (podvisor-guest, README.md), says which are loaded when and by which names the kernel
//! asks. Who asks is a device that has appeared (`uevents.rs`) or the kernel itself, which runs the program in
//! `/proc/sys/kernel/modprobe`: this one. A file is removed when its module is loaded: it lies in the guest's memory.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::sys;

const LIST: &str = "/modules";
const DIRECTORY: &str = "/lib/modules";

/// A module that could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error("load {}", path.display())]
pub(crate) struct LoadError {
    path: PathBuf,
    source: io::Error,
}

/// The modules of every start that are not loaded yet, in load order.
#[derive(Debug, Default)]
pub(crate) struct Waiting(VecDeque<String>);

impl Waiting {
    /// Loads what the host is heard through, and leaves the rest: the host can say what it wants meanwhile.
    pub(crate) fn begin() -> Result<Self, LoadError> {
        let mut waiting = Self(at_start(&list()).map(str::to_owned).collect());
        let first = waiting.0.iter().rposition(|name| name.contains("vsock")).map_or(0, |last| last + 1);
        for name in waiting.0.drain(..first) {
            load(&name)?;
        }
        Ok(waiting)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Loads the next one. What fails is told on the console, and again by whoever needs it.
    pub(crate) fn next(&mut self) {
        if let Some(name) = self.0.pop_front()
            && let Err(error) = load(&name)
        {
            eprintln!("podvisor-agent: {}", crate::failure::chain(&error));
        }
    }
}

/// Loads whatever has this alias, or this name.
pub(crate) fn demand(alias: &str) -> Result<(), LoadError> {
    let list = list();
    for name in asked_for(&list, alias) {
        for name in needed_by(&list, name).chain([name]) {
            load(name)?;
        }
    }
    Ok(())
}

/// Loads what the devices that are there already ask for.
pub(crate) fn demand_by_devices() {
    for bus in ["virtio", "nd"] {
        let Ok(devices) = fs::read_dir(format!("/sys/bus/{bus}/devices")) else { continue };
        for device in devices.flatten() {
            if let Ok(alias) = fs::read_to_string(device.path().join("modalias")) {
                demand_quietly(alias.trim());
            }
        }
    }
}

/// [`demand`] for a device: without its driver the guest goes on, and says so.
pub(crate) fn demand_quietly(alias: &str) {
    if let Err(error) = demand(alias) {
        eprintln!("podvisor-agent: {}", crate::failure::chain(&error));
    }
}

fn list() -> String {
    fs::read_to_string(LIST).unwrap_or_default()
}

fn load(name: &str) -> Result<(), LoadError> {
    let path = Path::new(DIRECTORY).join(format!("{name}.ko"));
    match File::open(&path).and_then(|file| sys::load_module(file.as_fd())) {
        Ok(()) => {}
        // Loaded before, and its file removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // It is there already; a driver without its device; one that needs a hypervisor's help that is not given.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENODEV | libc::EOPNOTSUPP)) => {}
        Err(source) => return Err(LoadError { path, source }),
    }
    // It takes memory, no more.
    let _ = fs::remove_file(path);
    Ok(())
}

fn at_start(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| line.strip_prefix("start ")?.split_whitespace().next())
}

/// What must be loaded before a module, in load order.
fn needed_by<'l>(list: &'l str, module: &str) -> impl Iterator<Item = &'l str> {
    let lines = list.lines().filter_map(|line| line.strip_prefix("start ").or(line.strip_prefix("demand ")));
    let mut lines = lines.map(str::split_whitespace);
    let found = lines.find_map(|mut words| (words.next() == Some(module)).then_some(words));
    found.into_iter().flatten()
}

/// The modules that an alias, or a module's name, stands for.
fn asked_for<'l>(list: &'l str, alias: &str) -> Vec<&'l str> {
    // As modprobe has it: `-` and `_` are the same.
    let alias = alias.replace('-', "_");
    let mut found = Vec::new();
    for line in list.lines() {
        let mut words = line.split_whitespace();
        let name = match (words.next(), words.next(), words.next()) {
            (Some("start" | "demand"), Some(name), _) if name == alias => name,
            (Some("alias"), Some(pattern), Some(name))
                if fits(pattern.replace('-', "_").as_bytes(), alias.as_bytes()) =>
            {
                name
            }
            _ => continue,
        };
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

/// `*`, `?` and `[…]` as in a shell (fnmatch(3)). Linear but for the last star that can be tried again.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        let one = match (pattern.get(at), text.get(read)) {
            (None, None) => return true,
            (Some(b'*'), _) => {
                star = Some((at + 1, read));
                at += 1;
                continue;
            }
            (Some(b'?'), Some(_)) => Some(1),
            (Some(b'['), Some(byte)) => class(&pattern[at..], *byte),
            (Some(wanted), Some(byte)) if wanted == byte => Some(1),
            _ => None,
        };
        match (one, &mut star) {
            (Some(length), _) => (at, read) = (at + length, read + 1),
            (None, Some((after, from))) if *from < text.len() => {
                *from += 1;
                (at, read) = (*after, *from);
            }
            (None, _) => return false,
        }
    }
}

/// The length of a class `[a-f0]` at the pattern's start, if the byte is in it.
fn class(pattern: &[u8], byte: u8) -> Option<usize> {
    let end = pattern.iter().position(|byte| *byte == b']')?;
    let mut members = &pattern[1..end];
    while let Some((first, rest)) = members.split_first() {
        members = rest;
        let mut last = first;
        if let [b'-' | b'_', to, rest @ ..] = members {
            (last, members) = (to, rest);
        }
        if (*first..=*last).contains(&byte) {
            return Some(end + 1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "podvisor-modules 1\nstart virtio\nstart virtio_blk virtio\ndemand nf_tables nfnetlink\n\
        demand nft_chain_nat nf_conntrack nf_nat nf_tables\nalias virtio:d00000005v* virtio_balloon\n\
        alias nft-chain-1-nat nft_chain_nat\nalias pci:v*d000010[0-3]? virtio_pci\nstart\nalias a\n";

    #[test]
    fn only_what_a_start_needs_is_loaded_at_the_start() {
        assert_eq!(at_start(TEXT).collect::<Vec<_>>(), ["virtio", "virtio_blk"]);
    }

    #[test]
    fn a_module_is_asked_for_by_its_name_or_by_an_alias() {
        assert_eq!(asked_for(TEXT, "nf-tables"), ["nf_tables"]);
        assert_eq!(asked_for(TEXT, "nft_chain_1_nat"), ["nft_chain_nat"]);
        assert_eq!(asked_for(TEXT, "virtio:d00000005v00001AF4"), ["virtio_balloon"]);
        assert_eq!(asked_for(TEXT, "virtio:d00000006v00001AF4"), [""; 0]);
        assert_eq!(asked_for(TEXT, ""), [""; 0]);
        assert_eq!(
            needed_by(TEXT, "nft_chain_nat").collect::<Vec<_>>(),
            ["nf_conntrack", "nf_nat", "nf_tables"]
        );
        assert_eq!(needed_by(TEXT, "unknown").count(), 0);
    }

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("a*c", "abbc", true),
            ("a*c", "abb", false),
            ("*b*d", "abcbd", true),
            ("a?c", "ac", false),
            ("pci:v*d000010[0-3]?", "pci:v1af4d0000102f", true),
            ("pci:v*d000010[0-3]?", "pci:v1af4d0000104f", false),
            ("[", "[", false),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(fits(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }
}
