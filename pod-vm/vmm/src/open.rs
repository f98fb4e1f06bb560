//! Opens everything that a machine is made of, with this process's rights.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::{files, tap};
use podvisor_proto::hypervisor::Start;

use crate::machine::parts::Parts;

const KVM: &str = "/dev/kvm";

/// What goes from the file system with the machine.
#[derive(Debug, Default)]
pub(crate) struct Names(Vec<PathBuf>);

impl Drop for Names {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

pub(crate) fn open(start: &Start, console: OwnedFd) -> Result<(Parts, Names), Failure> {
    let run_dir = Path::new(&start.run_dir);
    if !run_dir.is_dir() {
        return Err(Failure::failed(format!("use {} as run_dir", run_dir.display()), "it is no directory"));
    }
    let kvm = kvm()?;
    // Read by descriptors of this process's, so its user's rights are what counts.
    let kernel = files::open_for_reading("kernel", &start.kernel, 0)?;
    let initramfs = files::open_for_reading("initramfs", &start.initramfs, 0)?;
    let mut shares = Vec::new();
    for share in &start.shares {
        shares.push((share.clone(), files::connect_share(share)?));
    }
    let mut disks = Vec::new();
    for disk in &start.disks {
        disks.push((disk.clone(), files::open_disk(disk)?.0));
    }
    let mut networks = Vec::new();
    for network in &start.networks {
        networks.push((network.clone(), tap::open(network)?));
    }
    let path = Path::new(&start.vsock_path);
    let vsock = listen(path)?;
    let names = Names(vec![path.to_owned()]);
    Ok((Parts { kvm, kernel, initramfs, console, vsock, shares, disks, networks }, names))
}

fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let failed =
        |error| Failure::failed(format!("listen for connections to the guest at {}", path.display()), error);
    // One that a killed hypervisor has left.
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(path).map_err(failed)
}

fn kvm() -> Result<OwnedFd, Failure> {
    let opened = File::options().read(true).write(true).open(KVM);
    opened.map(Into::into).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::NotFound => {
                ": load the module kvm_intel or kvm_amd, or use a machine with VT-x or AMD-V"
            }
            ErrorKind::PermissionDenied => {
                ": podvisor has to run as root, with the device allowed by its cgroup"
            }
            _ => "",
        };
        Failure::failed(format!("open {KVM}"), format!("{error}{advice}"))
    })
}
