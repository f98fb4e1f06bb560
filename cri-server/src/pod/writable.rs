//! What a container writes, as a disk of the pod's machine: a file with holes, of a limited size, in which the guest has an ext4. It lies in the container's
//! snapshot, in the place of what is written otherwise: what it takes of the node's disk is the container's, and it goes with it.
//!
//! Without a journal: no other guest ever has it, and with its guest it is over.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use podvisor_proto::hypervisor::Disk;
use tokio::process::Command;

use crate::error::PodError;
use crate::id::ContainerId;

/// The program, and how it leaves the file as small as it can be.
const PROGRAM: &str = "mkfs.ext4";
const OPTIONS: [&str; 9] =
    ["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", "--"];
/// Containers of a pod that have one at most: each takes one of the machine's places for devices.
const MOST: usize = 4;

/// Whether one more container of a pod that has so many others can have one.
pub(super) fn fits(others: usize) -> bool {
    others < MOST
}

/// Makes it, of so many bytes, in the snapshot's directory for what is written.
pub(super) async fn make(container: &ContainerId, upper: &Path, bytes: u64) -> Result<Disk, PodError> {
    let path = upper.join("disk");
    let failed = |operation| {
        let path = path.clone();
        move |source| PodError::File { operation, path, source }
    };
    let file = File::create(&path).map_err(failed("make"))?;
    file.set_len(bytes)
        .and_then(|()| file.set_permissions(Permissions::from_mode(0o600)))
        .map_err(failed("set the size of"))?;
    let made = Command::new(PROGRAM).args(OPTIONS).arg(&path).stdin(Stdio::null()).output().await;
    let failed = failed("make a file system (e2fsprogs) in");
    match made {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().last().unwrap_or_default();
            return Err(failed(io::Error::other(format!("{PROGRAM} ended with {}: {said}", output.status))));
        }
        Err(error) => return Err(failed(error)),
    }
    Ok(Disk { serial: serial(container), path: path.display().to_string(), read_only: false })
}

/// Twenty bytes at most. Ids are random: no two containers of a pod have the same.
fn serial(container: &ContainerId) -> String {
    format!("disk-{}", container.as_str().get(..15).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn it_takes_no_more_than_it_has_to() {
        let directory = tempfile::tempdir().unwrap();
        let id: ContainerId = "0123456789abcdef".repeat(4).parse().unwrap();
        let disk = make(&id, directory.path(), 10 << 30).await.unwrap();
        assert_eq!(disk.serial, "disk-0123456789abcde");
        let metadata = std::fs::metadata(&disk.path).unwrap();
        assert_eq!(metadata.len(), 10 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} bytes", metadata.blocks() * 512);
        // One that a daemon has left unfinished is made anew.
        make(&id, directory.path(), 64 << 20).await.unwrap();
        assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), 64 << 20);
        assert!(make(&id, &directory.path().join("nowhere"), 64 << 20).await.is_err());
        assert!(make(&id, directory.path(), 4096).await.unwrap_err().to_string().contains("e2fsprogs"));
    }

    #[test]
    fn a_pod_has_some() {
        assert!(fits(3) && !fits(4));
    }
}
