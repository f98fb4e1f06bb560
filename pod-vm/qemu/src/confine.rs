//! What QEMU is left with. Prepared by [`Confinement`], applied in the child between fork and exec.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use podvisor_hypervisor::sys;

use crate::kvm::Node;

/// Everything that is done to the process that becomes QEMU.
#[derive(Debug)]
pub(crate) struct Confinement {
    /// `cgroup.procs` files to be in.
    pub(crate) cgroups: Vec<CString>,
    /// 0: stays who it is.
    pub(crate) user: u32,
    /// The groups of that user, besides its own.
    pub(crate) groups: Vec<u32>,
    /// It begins as root, who has more to give up and may make namespaces.
    pub(crate) privileged: bool,
    /// A node for KVM that takes the place of /dev/kvm.
    pub(crate) kvm: Option<Node>,
    pub(crate) rules: Option<OwnedFd>,
    /// The process that it must not outlive.
    pub(crate) parent: i32,
    /// Descriptors that it inherits.
    pub(crate) inherited: Vec<i32>,
}

impl Confinement {
    /// Runs between fork and exec: only system calls from here on, no memory is allocated. The step that failed is told on stderr,
    /// as the error can carry no more than its number.
    pub(crate) fn apply(&self) -> io::Result<()> {
        let step = |name: &'static str, result: io::Result<()>| {
            result.inspect_err(|_| {
                let _ = rustix::io::write(rustix::stdio::stderr(), name.as_bytes());
            })
        };
        for cgroup in &self.cgroups {
            step("join the cgroup", sys::write_file(cgroup, b"0"))?;
        }
        // Who started the monitor may have protected it from the kernel's OOM killer; a machine is not. Raising is always allowed,
        // and where it is not needed (the pod's own score is higher) it does not matter that it fails.
        step("leave the protection from the OOM killer", sys::write_file(c"/proc/self/oom_score_adj", b"0"))?;
        if self.privileged {
            let kinds = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
            step("make namespaces", sys::unshare(kinds))?;
            step("give up capabilities for good", sys::empty_bounding_set())?;
        }
        if let Some(node) = &self.kvm {
            step("put a node in the place of /dev/kvm", node.take_its_place())?;
        }
        if self.user != 0 {
            step("become the machine's user", sys::become_user(self.user, &self.groups))?;
        }
        step("give up capabilities", sys::drop_capabilities())?;
        step("give up new privileges", sys::no_new_privileges())?;
        step("give up core files", sys::no_core_file())?;
        for number in &self.inherited {
            step("inherit descriptors", sys::leave_open(*number))?;
        }
        if let Some(rules) = &self.rules {
            step("restrict the files that can be opened", sys::landlock_restrict(rules.as_raw_fd()))?;
        }
        // Last, as changing the user clears it.
        step("end with the hypervisor", sys::die_with(self.parent))
    }
}
