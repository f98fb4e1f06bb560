//! Which sandbox has which address: one file for each, named by the address, containing the sandbox's id.
//!
//! A file is made with O_EXCL before the address is used and removed after the interface is gone, so a crash can only leave
//! too many. They are found again by [`Leases::open`] and go with their sandbox or, when nobody knows that any more, with
//! `retain`. Nothing is fsynced: after a loss of power no pod is left that could hold an address.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;

use super::BuiltinError;
use super::range::Range;

/// The addresses in use.
#[derive(Debug)]
pub(crate) struct Leases {
    directory: PathBuf,
    /// Address → sandbox id; empty after a crash between making a file and filling it.
    held: BTreeMap<IpAddr, String>,
}

/// Holds the address given last, per family, so that addresses come round as late as possible.
fn pointer(range: Range) -> &'static str {
    if range.is_ipv4() { "last.ipv4" } else { "last.ipv6" }
}

impl Leases {
    /// Reads what earlier processes left. The directory is made when the first lease is.
    pub(crate) fn open(directory: PathBuf) -> Result<Self, BuiltinError> {
        let mut held = BTreeMap::new();
        let failed = |path: &PathBuf, source| BuiltinError::Read { path: path.clone(), source };
        match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(&directory, source)),
            Ok(entries) => {
                for entry in entries {
                    let entry = entry.map_err(|source| failed(&directory, source))?;
                    if let Some(address) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                        let path = entry.path();
                        let id = fs::read(&path).map_err(|source| failed(&path, source))?;
                        held.insert(address, String::from_utf8_lossy(&id).into_owned());
                    }
                }
            }
        }
        Ok(Self { directory, held })
    }

    /// The next free address of `range`, from now on `id`'s.
    pub(crate) fn take(&mut self, range: Range, id: &str) -> Result<IpAddr, BuiltinError> {
        fs::create_dir_all(&self.directory)
            .map_err(|source| BuiltinError::Write { path: self.directory.clone(), source })?;
        let pointer = self.directory.join(pointer(range));
        let last = fs::read_to_string(&pointer).ok().and_then(|text| text.trim().parse().ok());
        let first = range.after(last);
        let mut address = first;
        loop {
            if !self.held.contains_key(&address) && self.write(address, id)? {
                self.held.insert(address, id.to_owned());
                // Losing the pointer costs nothing but an early reuse.
                let _ = fs::write(&pointer, address.to_string());
                return Ok(address);
            }
            address = range.after(Some(address));
            if address == first {
                return Err(BuiltinError::Exhausted { range: range.to_string() });
            }
        }
    }

    /// `false` when another process has made the file meanwhile.
    fn write(&self, address: IpAddr, id: &str) -> Result<bool, BuiltinError> {
        let path = self.directory.join(address.to_string());
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            opened => match opened.and_then(|mut file| file.write_all(id.as_bytes())) {
                Ok(()) => Ok(true),
                Err(source) => {
                    let _ = fs::remove_file(&path);
                    Err(BuiltinError::Write { path, source })
                }
            },
        }
    }

    /// The addresses of a sandbox.
    pub(crate) fn of(&self, id: &str) -> Vec<IpAddr> {
        self.held.iter().filter(|(_, holder)| *holder == id).map(|(address, _)| *address).collect()
    }

    /// Gives back one address.
    pub(crate) fn release(&mut self, address: IpAddr) -> Result<(), BuiltinError> {
        let path = self.directory.join(address.to_string());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(BuiltinError::Remove { path, source: error });
            }
            _ => self.held.remove(&address),
        };
        Ok(())
    }

    /// All sandboxes that hold addresses, and all addresses held.
    pub(crate) fn holders(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        self.held.iter().map(|(address, id)| (*address, id.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range() -> Range {
        "10.0.0.0/29".parse().unwrap()
    }

    #[test]
    fn addresses_come_round_late_and_survive_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("leases");
        let mut leases = Leases::open(directory.clone()).unwrap();
        let take = |leases: &mut Leases, id: &str| leases.take(range(), id).unwrap().to_string();
        assert_eq!(take(&mut leases, "a"), "10.0.0.2");
        leases.release("10.0.0.2".parse().unwrap()).unwrap();
        assert_eq!(take(&mut leases, "b"), "10.0.0.3");
        drop(leases);

        let mut leases = Leases::open(directory).unwrap();
        assert_eq!(leases.of("b"), ["10.0.0.3".parse::<IpAddr>().unwrap()]);
        assert_eq!(leases.of("a"), [] as [IpAddr; 0]);
        assert_eq!(take(&mut leases, "c"), "10.0.0.4");
        assert_eq!(take(&mut leases, "d"), "10.0.0.5");
        assert_eq!(take(&mut leases, "e"), "10.0.0.6");
        assert_eq!(take(&mut leases, "f"), "10.0.0.2");
        let error = leases.take(range(), "g").unwrap_err().to_string();
        assert_eq!(error, "all addresses of 10.0.0.0/29 are in use");
        leases.release("10.0.0.5".parse().unwrap()).unwrap();
        leases.release("10.0.0.5".parse().unwrap()).unwrap();
        assert_eq!(take(&mut leases, "g"), "10.0.0.5");
    }

    #[test]
    fn a_half_made_lease_is_nobody_s_and_not_given_twice() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("10.0.0.2"), "").unwrap();
        fs::write(root.path().join("last.ipv4"), "garbage\0").unwrap();
        fs::write(root.path().join("not an address"), "").unwrap();
        let mut leases = Leases::open(root.path().to_owned()).unwrap();
        assert_eq!(leases.holders().collect::<Vec<_>>(), [("10.0.0.2".parse().unwrap(), "")]);
        // One that appears behind our back is respected too.
        fs::write(root.path().join("10.0.0.3"), "other").unwrap();
        assert_eq!(leases.take(range(), "a").unwrap().to_string(), "10.0.0.4");
    }
}
