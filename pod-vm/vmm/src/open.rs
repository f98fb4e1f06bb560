//! Opens everything that a machine is made of, with this process's rights.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::{files, request, tap};
use podvisor_proto::hypervisor::{Network, Start, request::Verb};
use podvisor_virtio::net::HEADER;

use crate::machine::parts::Parts;
use crate::sys;

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
        networks.push((network.clone(), network_tap(network)?));
    }
    let path = Path::new(&start.vsock_path);
    let vsock = listen(path)?;
    let names = Names(vec![path.to_owned()]);
    Ok((Parts { kvm, kernel, initramfs, console, vsock, shares, disks, networks }, names))
}

/// What a request to change a machine's devices names, checked and opened.
pub(crate) fn device(verb: &Verb) -> Result<Vec<OwnedFd>, Failure> {
    let missing = || Failure::invalid("the request names no device");
    let opened = match verb {
        Verb::AddShare(add) => {
            let share = add.share.as_ref().ok_or_else(missing)?;
            request::check_share(share)?;
            files::connect_share(share)?.into()
        }
        Verb::AddDisk(add) => {
            let disk = add.disk.as_ref().ok_or_else(missing)?;
            request::check_disk(disk)?;
            files::open_disk(disk)?.0.into()
        }
        Verb::AddNetwork(add) => {
            let network = add.network.as_ref().ok_or_else(missing)?;
            request::check_network(network)?;
            network_tap(network)?.into()
        }
        Verb::AddImage(add) => {
            let image = add.image.as_ref().ok_or_else(missing)?;
            request::check_image(image)?;
            let files = image.paths.iter().map(|path| files::open_for_reading("image", path, 0));
            return files.map(|file| file.map(Into::into)).collect();
        }
        _ => return Ok(Vec::new()),
    };
    Ok(vec![opened])
}

/// A tap with everything set that the machine itself may not.
pub(crate) fn network_tap(network: &Network) -> Result<File, Failure> {
    let tap = tap::open(network)?;
    let set = rustix::io::ioctl_fionbio(&tap, true)
        .map_err(std::io::Error::from)
        // A small number.
        .and_then(|()| sys::set_tap_header(&tap, i32::try_from(HEADER).unwrap_or(0)));
    set.map_err(|error| Failure::failed(format!("use tap {}", network.tap), error))?;
    Ok(tap)
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
