//! A processor's thread: runs the guest, and carries out what it cannot do without help.

use kvm_ioctls::{VcpuExit, VcpuFd};
use podvisor_proto::hypervisor::EndReason;

use crate::machine::bus::Bus;
use crate::machine::ending::Ending;

/// `KVM_SYSTEM_EVENT_SHUTDOWN`, `_RESET`, `_CRASH`
const SHUTDOWN: u32 = 1;
const RESET: u32 = 2;
const CRASH: u32 = 3;

/// Runs until the machine ends.
pub(crate) fn run(mut vcpu: VcpuFd, number: u8, bus: &Bus, ending: &Ending) -> ! {
    let failure = |what: String| ending.tell(EndReason::Failure, &format!("processor {number}: {what}"));
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, bytes)) => bus.read(address, bytes),
            Ok(VcpuExit::MmioWrite(address, bytes)) => bus.write(address, bytes),
            Ok(VcpuExit::IoIn(port, bytes)) => bus.input(port, bytes),
            Ok(VcpuExit::IoOut(port, bytes)) => bus.output(port, bytes),
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            // A triple fault, by which Linux resets a machine (reboot=t).
            Ok(VcpuExit::Shutdown) => ending.tell(EndReason::Reset, "the guest wanted to begin anew"),
            Ok(VcpuExit::SystemEvent(SHUTDOWN, _)) => {
                ending.tell(EndReason::PowerOff, "the guest switched itself off");
            }
            Ok(VcpuExit::SystemEvent(RESET, _)) => {
                ending.tell(EndReason::Reset, "the guest wanted to begin anew");
            }
            Ok(VcpuExit::SystemEvent(CRASH, _)) => {
                ending.tell(EndReason::Panic, "the guest's kernel panicked");
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                failure(format!("it could not enter the guest (hardware's reason {reason:#x})"));
            }
            Ok(VcpuExit::InternalError) => {
                failure("KVM cannot carry out an instruction of the guest's (internal error)".to_owned());
            }
            Ok(other) => failure(format!("it left the guest for a reason that nobody knows: {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => failure(format!("it cannot run: {error}")),
        }
    }
}
