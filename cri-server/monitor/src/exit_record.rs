//! Exit records: what a daemon that was not there finds in the pod's state directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use podvisor_proto::monitor::Exit;
use serde::{Deserialize, Serialize};

/// `<container>.exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    /// Of this format.
    pub(crate) version: u32,
    /// The container's, or the pod's for its init.
    pub(crate) id: String,
    /// 128 + signal when a signal ended it.
    pub(crate) code: i32,
    /// Nanoseconds since the epoch.
    pub(crate) finished_at: i64,
    /// The kernel's OOM killer took at least one of its processes.
    pub(crate) oom_killed: bool,
    /// What the code does not say, of a virtual machine.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
}

/// Why a record is not durable.
#[derive(Debug, thiserror::Error)]
#[error("write the exit record {path}")]
pub(crate) struct WriteRecordError {
    path: PathBuf,
    source: io::Error,
}

impl ExitRecord {
    const VERSION: u32 = 1;

    pub(crate) fn new(id: &str, exit: &Exit) -> Self {
        Self {
            version: Self::VERSION,
            id: id.to_owned(),
            code: exit.code,
            finished_at: exit.finished_at,
            oom_killed: exit.oom_killed,
            reason: String::new(),
        }
    }

    pub(crate) fn because(self, reason: &str) -> Self {
        Self { reason: reason.to_owned(), ..self }
    }

    /// Replaces the record in `directory`. When this returns it survives a power cut.
    pub(crate) fn write(&self, directory: &Path) -> Result<(), WriteRecordError> {
        let path = directory.join(format!("{}.exit.json", self.id));
        self.replace(directory, &path).map_err(|source| WriteRecordError { path, source })
    }

    fn replace(&self, directory: &Path, path: &Path) -> io::Result<()> {
        let new = directory.join(format!(".{}.exit.json.new", self.id));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(directory)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let record = ExitRecord::new(
            "abc",
            &Exit { code: 137, finished_at: 1_475_713_029_669_794_202, oom_killed: true },
        );
        record.write(directory.path()).unwrap();
        record.write(directory.path()).unwrap();
        let text = std::fs::read(directory.path().join("abc.exit.json")).unwrap();
        assert_eq!(serde_json::from_slice::<ExitRecord>(&text).unwrap(), record);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(record.write(&directory.path().join("missing")).is_err());
    }
}
