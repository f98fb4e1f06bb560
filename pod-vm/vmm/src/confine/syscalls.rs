//! Which system calls remain, for each kind of thread (seccomp(2)). Any other ends the machine: only one that has been taken over makes it.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use crate::sys::TAP_SET_OFFLOAD;

/// Why system calls could not be restricted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SyscallError {
    #[error("compile a filter")]
    Compile(#[source] BackendError),
    #[error("load a filter")]
    Load(#[source] seccompiler::Error),
}

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// Waits for the end.
    Main,
    /// Runs the guest.
    Processor,
    /// Serves devices other than disks.
    Devices,
    /// Serves a disk.
    Disk,
}

const ROLES: [Role; 4] = [Role::Main, Role::Processor, Role::Devices, Role::Disk];

/// `KVM_RUN`
const KVM_RUN: u64 = 0xae80;

/// What every thread may: memory, locks, the end, events.
const EVERY: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_clock_gettime,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The machine's last words.
    libc::SYS_sendto,
];

impl Role {
    /// What it may besides.
    fn calls(self) -> &'static [libc::c_long] {
        match self {
            Self::Main => &[libc::SYS_recvfrom],
            // A driver that begins anew loses its connections.
            Self::Processor => &[libc::SYS_epoll_ctl, libc::SYS_shutdown, libc::SYS_recvfrom],
            Self::Devices => &[
                libc::SYS_epoll_wait,
                libc::SYS_epoll_pwait,
                libc::SYS_epoll_ctl,
                libc::SYS_accept4,
                libc::SYS_recvfrom,
                libc::SYS_shutdown,
                libc::SYS_getrandom,
            ],
            Self::Disk => &[
                libc::SYS_epoll_wait,
                libc::SYS_epoll_pwait,
                libc::SYS_pread64,
                libc::SYS_pwrite64,
                libc::SYS_fdatasync,
                libc::SYS_fallocate,
            ],
        }
    }

    /// What it may ask of devices of the host.
    fn requests(self) -> &'static [u64] {
        match self {
            Self::Processor => &[KVM_RUN, TAP_SET_OFFLOAD],
            _ => &[],
        }
    }
}

fn rule<const N: usize>(arguments: [(u8, SeccompCmpOp, u64); N]) -> Result<SeccompRule, BackendError> {
    let conditions: Result<Vec<_>, _> = arguments
        .into_iter()
        .map(|(number, operator, value)| {
            SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value)
        })
        .collect();
    SeccompRule::new(conditions?)
}

fn program(role: Role) -> Result<BpfProgram, BackendError> {
    let plain = EVERY.iter().chain(role.calls()).map(|number| (*number, Vec::new()));
    let mut allowed: BTreeMap<libc::c_long, Vec<SeccompRule>> = plain.collect();
    // Memory that no code is run from; a panic that ends this process and no other.
    let code = u64::from(libc::PROT_EXEC.cast_unsigned());
    allowed.insert(libc::SYS_mmap, vec![rule([(2, SeccompCmpOp::MaskedEq(code), 0)])?]);
    allowed.insert(libc::SYS_mprotect, vec![rule([(2, SeccompCmpOp::MaskedEq(code), 0)])?]);
    // Whether a descriptor is open, which builds with assertions ask before they close it.
    let flags = u64::from(libc::F_GETFD.cast_unsigned());
    allowed.insert(libc::SYS_fcntl, vec![rule([(1, SeccompCmpOp::Eq, flags)])?]);
    allowed.insert(libc::SYS_tgkill, vec![rule([(0, SeccompCmpOp::Eq, std::process::id().into())])?]);
    let requests = role.requests().iter().map(|request| rule([(1, SeccompCmpOp::Eq, *request)]));
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    if !requests.is_empty() {
        allowed.insert(libc::SYS_ioctl, requests);
    }
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(allowed, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?.try_into()
}

/// A filter for each role.
pub(crate) struct Filters(BTreeMap<Role, BpfProgram>);

/// Compiles them.
pub(crate) fn filters() -> Result<Filters, SyscallError> {
    let programs = ROLES.into_iter().map(|role| Ok((role, program(role)?)));
    Ok(Filters(programs.collect::<Result<_, _>>().map_err(SyscallError::Compile)?))
}

impl Filters {
    /// Restricts this thread.
    pub(crate) fn restrict(&self, role: Role) -> Result<(), SyscallError> {
        self.0.get(&role).map_or(Ok(()), |program| apply_filter(program).map_err(SyscallError::Load))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_a_filter_of_its_own() {
        let Filters(programs) = filters().unwrap();
        assert_eq!(programs.len(), ROLES.len());
        assert!(programs.values().all(|program| program.len() < 4096));
        // Nobody may open anything, start anything, or change who it is.
        for role in ROLES {
            let calls: Vec<_> = EVERY.iter().chain(role.calls()).collect();
            for forbidden in [
                libc::SYS_openat,
                libc::SYS_execve,
                libc::SYS_clone,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_ptrace,
                libc::SYS_setresuid,
                libc::SYS_kill,
            ] {
                assert!(!calls.contains(&&forbidden), "{role:?}");
            }
        }
    }
}
