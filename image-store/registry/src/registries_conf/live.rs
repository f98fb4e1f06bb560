//! The files as they are now: stat at each use, read again only when something changed, keep the last good ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::RegistriesConf;
use crate::error::ConfigurationError;
use crate::stamp::Stamp;

/// A registries.conf is small; what is larger is none.
const FILE_MAX: u64 = 4 << 20;

/// `registries.conf` and `registries.conf.d/*.conf`, live.
#[derive(Debug)]
pub(crate) struct LiveConf {
    file: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was looked at for `outcome`; `None` before the first look.
    seen: Option<Vec<Stamp>>,
    good: Option<Arc<RegistriesConf>>,
    error: Option<ConfigurationError>,
}

impl LiveConf {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { file, state: Mutex::default() }
    }

    /// The configuration now. A broken file leaves the last good one in force; without one it is an error, because
    /// what the file blocks must not be pulled.
    pub(crate) fn current(&self) -> Result<Arc<RegistriesConf>, ConfigurationError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.refresh(&mut state);
        match (&state.good, &state.error) {
            (Some(good), _) => Ok(Arc::clone(good)),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => Ok(Arc::default()),
        }
    }

    /// What is wrong with the files as they are now.
    pub(crate) fn error(&self) -> Option<ConfigurationError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.refresh(&mut state);
        state.error.clone()
    }

    fn refresh(&self, state: &mut State) {
        // Stamps are taken before the files are read: a change in between is noticed the next time.
        let stamps = self.stamps();
        if let (Ok(stamps), Some(seen)) = (&stamps, &state.seen)
            && stamps == seen
        {
            return;
        }
        let outcome = stamps.and_then(|stamps| {
            state.seen = Some(stamps.clone());
            load(&stamps)
        });
        match outcome {
            Ok(conf) => {
                state.good = Some(Arc::new(conf));
                state.error = None;
            }
            Err(error) => {
                // Said once, not at every pull and Status.
                if state.error.as_ref().is_none_or(|known| known.to_string() != error.to_string()) {
                    tracing::warn!(error = %error, kept = state.good.is_some(), "registries.conf cannot be used");
                }
                state.error = Some(error);
            }
        }
    }

    /// The files there are, in the order they are laid over each other.
    fn stamps(&self) -> Result<Vec<Stamp>, ConfigurationError> {
        let mut stamps: Vec<Stamp> = stamp(&self.file)?.into_iter().collect();
        let mut directory = self.file.clone().into_os_string();
        directory.push(".d");
        let directory = PathBuf::from(directory);
        let mut names = Vec::new();
        match fs::read_dir(&directory) {
            Ok(entries) => {
                for entry in entries {
                    let path = entry.map_err(|error| problem(&directory, &error))?.path();
                    if path.extension().is_some_and(|extension| extension == "conf") {
                        names.push(path);
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(problem(&directory, &error)),
        }
        names.sort();
        for path in names {
            stamps.extend(stamp(&path)?);
        }
        Ok(stamps)
    }
}

fn load(stamps: &[Stamp]) -> Result<RegistriesConf, ConfigurationError> {
    let mut conf = RegistriesConf::default();
    for Stamp { path, size, .. } in stamps {
        if *size > FILE_MAX {
            return Err(ConfigurationError {
                path: path.clone(),
                problem: format!("larger than {FILE_MAX} bytes"),
            });
        }
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(problem(path, &error)),
        };
        conf.merge(&text).map_err(|problem| ConfigurationError { path: path.clone(), problem })?;
    }
    Ok(conf)
}

fn stamp(path: &Path) -> Result<Option<Stamp>, ConfigurationError> {
    Stamp::take(path).map_err(|error| problem(path, &error))
}

fn problem(path: &Path, error: &io::Error) -> ConfigurationError {
    ConfigurationError { path: path.to_owned(), problem: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Reference;

    #[test]
    fn follows_its_files() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("registries.conf");
        let live = LiveConf::new(file.clone());
        let image = Reference::parse("a.net/x").unwrap();
        let blocked = |live: &LiveConf| live.current().unwrap().find(&image).map(|entry| entry.blocked);
        assert_eq!(blocked(&live), None, "a missing file is empty");

        fs::write(&file, "[[registry]]\nprefix = \"a.net\"\nblocked = true\n").unwrap();
        assert_eq!(blocked(&live), Some(true));
        assert!(Arc::ptr_eq(&live.current().unwrap(), &live.current().unwrap()), "unchanged, not read again");

        let drop_ins = directory.path().join("registries.conf.d");
        fs::create_dir(&drop_ins).unwrap();
        fs::write(drop_ins.join("20-b.conf"), "[[registry]]\nprefix = \"a.net\"\nblocked = true\n").unwrap();
        fs::write(drop_ins.join("10-a.conf"), "[[registry]]\nprefix = \"a.net\"\n").unwrap();
        fs::write(drop_ins.join("ignored.toml"), "[[[").unwrap();
        assert_eq!(blocked(&live), Some(true), "the lexically last drop-in wins");
        fs::remove_file(drop_ins.join("20-b.conf")).unwrap();
        assert_eq!(blocked(&live), Some(false));

        fs::write(drop_ins.join("30-c.conf"), "[[[").unwrap();
        assert_eq!(blocked(&live), Some(false), "a broken file keeps the last good state");
        let error = live.error().unwrap().to_string();
        assert!(error.contains("30-c.conf") && error.contains("line 1"), "{error}");

        fs::remove_file(drop_ins.join("30-c.conf")).unwrap();
        assert!(live.error().is_none(), "mended");
        fs::remove_dir_all(&drop_ins).unwrap();
        fs::remove_file(&file).unwrap();
        assert_eq!(blocked(&live), None);
    }

    #[test]
    fn broken_from_the_start_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("registries.conf");
        fs::write(&file, "blocked").unwrap();
        let live = LiveConf::new(file);
        assert!(live.current().is_err());
        assert!(live.error().is_some());
    }
}
