//! Which hypervisor pods in virtual machines get on this machine, and why not a better one.

use std::path::{Path, PathBuf};

use podvisor_config::{Hypervisor, Vm};

use crate::node::find_program;

/// Whether KVM can run a distribution's kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kvm {
    Usable,
    /// Why not, and what to do about it.
    Unusable(String),
}

impl Kvm {
    /// Looks; starts nothing.
    pub(crate) fn probe() -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm").map(drop);
        Self::from_facts(opened, |module| Path::new("/sys/module").join(module).exists(), &cpu)
    }

    fn from_facts(opened: std::io::Result<()>, module: impl Fn(&str) -> bool, cpu: &str) -> Self {
        use std::io::ErrorKind;
        let flags = cpu.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
        let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
        let virtualization = has("vmx") || has("svm");
        let why = match opened {
            // A vendor module of its own: it runs only kernels that are made for it.
            Ok(()) if module("kvm_pvm") && !module("kvm_intel") && !module("kvm_amd") => {
                "/dev/kvm is PVM, which runs only guest kernels made for it, no distribution's; use a machine with VT-x or AMD-V (in a \
                 cloud: one with nested virtualization)"
            }
            Ok(()) if !virtualization => {
                "/dev/kvm is there, but the processor has neither VT-x nor AMD-V; use a machine that has (in a cloud: one with nested \
                 virtualization)"
            }
            Ok(()) => return Self::Usable,
            Err(error) if error.kind() == ErrorKind::NotFound && virtualization => {
                "/dev/kvm is missing: load the module kvm_intel or kvm_amd"
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                "/dev/kvm is missing, and the processor has neither VT-x nor AMD-V (or the firmware hides it)"
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                "/dev/kvm may not be opened: let podvisor run as root, with the device allowed by its cgroup"
            }
            Err(error) => return Self::Unusable(format!("/dev/kvm cannot be opened: {error}")),
        };
        Self::Unusable(why.to_owned())
    }
}

/// What machines run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Virtualizer {
    /// podvisor-vmm, on KVM.
    Vmm,
    /// QEMU, on KVM.
    Qemu,
    /// QEMU translates the processor: no isolation boundary.
    Emulation,
}

impl Virtualizer {
    /// In words.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Vmm => "podvisor-vmm on KVM",
            Self::Qemu => "QEMU on KVM",
            Self::Emulation => "QEMU, emulated, not an isolation boundary",
        }
    }

    /// The best for a handler; the error says why none works.
    fn choose(vm: &Vm, kvm: &Kvm) -> Result<Self, String> {
        match (kvm, vm.hypervisor, vm.allow_emulation) {
            (Kvm::Usable, Hypervisor::Auto | Hypervisor::Kvm, _) => Ok(Self::Vmm),
            (Kvm::Usable, Hypervisor::Qemu, _) => Ok(Self::Qemu),
            (Kvm::Unusable(_), Hypervisor::Auto | Hypervisor::Qemu, true) => Ok(Self::Emulation),
            (Kvm::Unusable(why), Hypervisor::Kvm, _) => Err(why.clone()),
            (Kvm::Unusable(why), _, false) => Err(format!(
                "{why}; or, without any isolation, let QEMU translate the processor (allow_emulation = true in the handler's section)"
            )),
        }
    }
}

/// What a handler's machines run on, and the programs for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) virtualizer: Virtualizer,
    /// Program that speaks the hypervisor protocol.
    pub(crate) program: PathBuf,
    /// Program of the machine itself; empty: the same.
    pub(crate) machine: PathBuf,
    pub(crate) file_server: PathBuf,
}

/// Decides for a handler; the error says why none works.
pub(crate) fn choose(vm: &Vm, kvm: &Kvm) -> Result<Choice, String> {
    let virtualizer = Virtualizer::choose(vm, kvm)?;
    let (program, machine) = match virtualizer {
        Virtualizer::Vmm => ("podvisor-vmm", PathBuf::new()),
        Virtualizer::Qemu | Virtualizer::Emulation => {
            let machine = find_program(&vm.qemu)
                .ok_or_else(|| format!("{} is not installed (Debian: qemu-system-x86)", vm.qemu.display()))?;
            ("podvisor-qemu", machine)
        }
    };
    let ours = |name: &str| {
        let program = beside(name);
        find_program(&program).ok_or_else(|| format!("{} is no executable file", program.display()))
    };
    Ok(Choice { virtualizer, program: ours(program)?, machine, file_server: ours("podvisor-fs")? })
}

/// A program that is installed with the daemon.
pub(crate) fn beside(name: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    fn kvm(opened: Result<(), ErrorKind>, modules: &[&str], flags: &str) -> String {
        let cpu = format!("processor\t: 0\nflags\t\t: fpu {flags} sse2\n");
        match Kvm::from_facts(opened.map_err(Error::from), |module| modules.contains(&module), &cpu) {
            Kvm::Usable => String::new(),
            Kvm::Unusable(why) => why,
        }
    }

    #[test]
    fn what_keeps_kvm_from_working_is_told() {
        assert_eq!(kvm(Ok(()), &["kvm_amd"], "svm"), "");
        assert_eq!(kvm(Ok(()), &["kvm_intel"], "vmx"), "");
        for (opened, modules, flags, told) in [
            (Ok(()), &["kvm_pvm"][..], "", "PVM"),
            (Ok(()), &["kvm"], "", "neither VT-x nor AMD-V"),
            (Err(ErrorKind::NotFound), &[], "vmx", "load the module"),
            (Err(ErrorKind::NotFound), &[], "", "firmware"),
            (Err(ErrorKind::PermissionDenied), &["kvm_amd"], "svm", "may not be opened"),
            (Err(ErrorKind::TimedOut), &["kvm_amd"], "svm", "cannot be opened"),
        ] {
            let why = kvm(opened, modules, flags);
            assert!(why.contains(told), "{told}: {why}");
        }
    }

    #[test]
    fn qemu_is_for_who_asks_for_it_where_kvm_works() {
        let virtualizer =
            |hypervisor| Virtualizer::choose(&Vm { hypervisor, ..Vm::default() }, &Kvm::Usable).unwrap();
        assert_eq!(virtualizer(Hypervisor::Auto), Virtualizer::Vmm);
        assert_eq!(virtualizer(Hypervisor::Kvm), Virtualizer::Vmm);
        assert_eq!(virtualizer(Hypervisor::Qemu), Virtualizer::Qemu);
        let allowed = Vm { allow_emulation: true, ..Vm::default() };
        assert_eq!(Virtualizer::choose(&allowed, &Kvm::Usable), Ok(Virtualizer::Vmm));
        assert_eq!(
            Virtualizer::choose(&allowed, &Kvm::Unusable("no KVM".into())),
            Ok(Virtualizer::Emulation)
        );
    }

    #[test]
    fn the_translator_is_only_for_who_allows_it() {
        let unusable = Kvm::Unusable("no KVM".into());
        let refused = choose(&Vm::default(), &unusable).unwrap_err();
        assert!(refused.contains("no KVM") && refused.contains("allow_emulation"), "{refused}");
        let kvm_only = Vm { hypervisor: Hypervisor::Kvm, allow_emulation: true, ..Vm::default() };
        assert_eq!(choose(&kvm_only, &unusable).unwrap_err(), "no KVM");
        let missing = Vm { qemu: "/nonexistent/qemu".into(), allow_emulation: true, ..Vm::default() };
        assert!(choose(&missing, &unusable).unwrap_err().contains("/nonexistent/qemu is not installed"));
    }
}
