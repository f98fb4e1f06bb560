//! Plugins that podvisor starts itself: executable files named INDEX-NAME in one directory, their configuration in another.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::Command;

use crate::plugin::{PluginName, RegisterError};

/// Longest configuration of a plugin. It travels in one message.
const LONGEST_CONFIGURATION: u64 = 1 << 20;

/// What WebAssembly modules begin with.
const WASM: [u8; 4] = *b"\0asm";

/// A plugin's program, found in the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) name: PluginName,
    path: PathBuf,
    configuration: Option<PathBuf>,
}

/// Why a plugin could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The file's name.
    #[error("{path} is not named INDEX-NAME")]
    Name {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: RegisterError,
    },
    /// Not a program.
    #[error("{path} is a WebAssembly module, which podvisor does not run")]
    Wasm {
        /// The file.
        path: PathBuf,
    },
    /// The configuration is too long.
    #[error("{path} has more than {LONGEST_CONFIGURATION} bytes")]
    LongConfiguration {
        /// The file.
        path: PathBuf,
    },
    /// The system.
    #[error("cannot {operation} {path}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// A started process; killed when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    _process: tokio::process::Child,
}

/// Every plugin in `plugins`, in the order of their names. A missing directory has none; what cannot be used is reported and left out.
pub(crate) fn discover(plugins: &Path, configurations: &Path) -> (Vec<Program>, Vec<LaunchError>) {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    let entries = match std::fs::read_dir(plugins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return (found, errors),
        Err(source) => {
            errors.push(LaunchError::System { operation: "read", path: plugins.to_owned(), source });
            return (found, errors);
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        // Follows links.
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            continue;
        }
        match PluginName::parse(&entry.file_name().to_string_lossy()) {
            Ok(name) => {
                let files = [format!("{name}.conf"), format!("{}.conf", name.base)];
                let configuration =
                    files.iter().map(|file| configurations.join(file)).find(|path| path.exists());
                found.push(Program { name, path, configuration });
            }
            Err(source) => errors.push(LaunchError::Name { path, source }),
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    (found, errors)
}

impl Program {
    /// Its configuration; empty without one. Blocking.
    pub(crate) fn configuration(&self) -> Result<String, LaunchError> {
        let Some(path) = &self.configuration else { return Ok(String::new()) };
        let failed = |source| LaunchError::System { operation: "read", path: path.clone(), source };
        if std::fs::metadata(path).map_err(failed)?.len() > LONGEST_CONFIGURATION {
            return Err(LaunchError::LongConfiguration { path: path.clone() });
        }
        std::fs::read_to_string(path).map_err(failed)
    }

    /// Starts it with its socket as descriptor 3.
    pub(crate) fn start(&self) -> Result<(Child, UnixStream), LaunchError> {
        let failed = |source| LaunchError::System { operation: "start", path: self.path.clone(), source };
        let mut beginning = [0; WASM.len()];
        {
            use std::io::Read;
            let read = std::fs::File::open(&self.path).and_then(|mut file| file.read_exact(&mut beginning));
            if read.is_ok() && beginning == WASM {
                return Err(LaunchError::Wasm { path: self.path.clone() });
            }
        }
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let mut command = Command::new("/bin/sh");
        // The shell moves the socket to where NRI has it. To do it between fork and exec oneself would take unsafe code.
        command
            .args(["-c", "exec \"$0\" 3<&0 </dev/null"])
            .arg(&self.path)
            .stdin(std::os::fd::OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .env_clear()
            .env("NRI_PLUGIN_NAME", &self.name.base)
            .env("NRI_PLUGIN_IDX", &self.name.index)
            .env("NRI_PLUGIN_SOCKET", "3")
            .kill_on_drop(true);
        let process = command.spawn().map_err(failed)?;
        Ok((Child { _process: process }, UnixStream::from_std(ours).map_err(failed)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_files_with_an_index_are_plugins() {
        let directory = tempfile::tempdir().unwrap();
        let (plugins, configurations) = (directory.path().join("plugins"), directory.path().join("conf.d"));
        assert_eq!(discover(&plugins, &configurations).0, []);
        std::fs::create_dir(&plugins).unwrap();
        std::fs::create_dir(&configurations).unwrap();
        std::fs::create_dir(plugins.join("00-directory")).unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o755), ("30-data", 0o644), ("noindex", 0o755)] {
            std::fs::write(plugins.join(name), "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(plugins.join(name), PermissionsExt::from_mode(mode)).unwrap();
        }
        // The one with the index comes first.
        for (name, text) in [("10-a.conf", "one"), ("a.conf", "two"), ("b.conf", "three")] {
            std::fs::write(configurations.join(name), text).unwrap();
        }
        let (found, errors) = discover(&plugins, &configurations);
        let names: Vec<_> = found.iter().map(|program| program.name.to_string()).collect();
        assert_eq!(names, ["10-a", "20-b"]);
        let texts: Vec<_> = found.iter().map(|program| program.configuration().unwrap()).collect();
        assert_eq!(texts, ["one", "three"]);
        assert!(matches!(errors.as_slice(), [LaunchError::Name { .. }]));
    }
}
