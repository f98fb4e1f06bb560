//! Makes the machine of a plan: everything is opened, QEMU gets it, and the vsock device is served.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use podvisor_hypervisor::console::Console;
use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::files::{self, Handed};
use podvisor_hypervisor::process::Process;
use podvisor_hypervisor::tap;

use crate::command_line::{Numbers, arguments};
use crate::launch::launch;
use crate::plan::Plan;
use crate::qmp::Qmp;
use crate::tsc::Clock;
use crate::vsock;

/// A machine whose QEMU runs.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) process: Process,
    pub(crate) qmp: Qmp,
    pub(crate) console: Console,
    _names: Names,
}

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

/// Starts QEMU for a plan. What was made is gone again when it fails.
pub(crate) fn begin(plan: &Plan, clock: Clock) -> Result<Begun, Failure> {
    let start = &plan.start;
    let run_dir = Path::new(&start.run_dir);
    if !run_dir.is_dir() {
        return Err(Failure::failed(format!("use {} as run_dir", run_dir.display()), "it is no directory"));
    }
    let kernel = files::open_for_reading("kernel", &start.kernel, start.user)?;
    let initramfs = files::open_for_reading("initramfs", &start.initramfs, start.user)?;
    let vsock = vsock::prepare(Path::new(&start.vsock_path), run_dir)?;
    let names = Names(vec![PathBuf::from(&start.vsock_path)]);

    let mut handed = Handed::default();
    let mut numbers = Numbers::default();
    for share in &start.shares {
        numbers.shares.push(handed.add(files::connect_share(share)?));
    }
    for disk in &start.disks {
        let (file, described) = files::open_disk(disk)?;
        handed.add(file);
        numbers.disks.push(described);
    }
    for network in &start.networks {
        numbers.networks.push(handed.add(tap::open(network)?));
    }
    let (qmp, theirs) = pair()?;
    numbers.qmp = handed.add(theirs);
    let (console, theirs) = pair()?;
    numbers.console = handed.add(theirs);
    let console = Console::new(console, &start.console_path, start.console_limit)
        .map_err(|error| Failure::failed(format!("write the console to {}", start.console_path), error))?;
    numbers.vsock = handed.add(vsock.frontend.try_clone().map_err(descriptors)?);
    numbers.kernel = handed.add(kernel.try_clone().map_err(descriptors)?);
    numbers.initramfs = handed.add(initramfs.try_clone().map_err(descriptors)?);

    let kilohertz = start.emulate.then(|| clock.kilohertz());
    let arguments = arguments(plan, &numbers, kilohertz);
    let process = launch(start, &arguments, &handed, &[kernel.as_fd(), initramfs.as_fd()])?;
    // From here on QEMU alone has them, and their other ends see it when it ends.
    drop(handed);
    vsock.serve()?;
    Ok(Begun { process, qmp: Qmp::new(qmp), console, _names: names })
}

fn pair() -> Result<(OwnedFd, OwnedFd), Failure> {
    let (ours, theirs) = UnixStream::pair().map_err(descriptors)?;
    Ok((ours.into(), theirs.into()))
}

fn descriptors(error: io::Error) -> Failure {
    Failure::failed("make the sockets between this process and QEMU", error)
}
