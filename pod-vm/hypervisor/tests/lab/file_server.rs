//! Shares of a real file server.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use podvisor_proto::hypervisor::Share;

use super::target;

/// A program as it is built for users.
pub fn built(program: &str) -> PathBuf {
    let path = target().join("release").join(program);
    assert!(path.is_file(), "{} is missing; `make build` makes it", path.display());
    path.canonicalize().unwrap()
}

/// podvisor-fs with a directory of its own.
pub struct FileServer {
    process: Child,
    directory: tempfile::TempDir,
}

impl FileServer {
    pub fn new(content: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(shared.join("file"), content).unwrap();
        mount(&["--bind"], &shared);
        mount(&["--make-shared"], &shared);
        let (mut ready, theirs) = std::io::pipe().unwrap();
        // Another descriptor of the same pipe, which the program inherits.
        let inherited = rustix::io::dup(&theirs).unwrap();
        let process = Command::new(built("podvisor-fs"))
            .arg("--socket-path")
            .arg(directory.path().join("fs.sock"))
            .arg("--shared-dir")
            .arg(&shared)
            .args(["--ready-fd", &inherited.as_raw_fd().to_string()])
            .spawn()
            .unwrap();
        drop((theirs, inherited));
        assert_eq!(ready.read(&mut [0]).unwrap(), 0);
        Self { process, directory }
    }

    pub fn share(&self, tag: &str) -> Share {
        let socket_path = self.directory.path().join("fs.sock").to_str().unwrap().to_owned();
        Share { tag: tag.into(), socket_path }
    }
}

fn mount(how: &[&str], place: &Path) {
    let both = how == ["--bind"];
    let mut command = Command::new("mount");
    command.args(how).arg(place).args(both.then_some(place));
    assert!(command.status().unwrap().success());
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = Command::new("umount").arg(self.directory.path().join("shared")).status();
    }
}
