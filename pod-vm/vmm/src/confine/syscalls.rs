//! Which system calls remain, for each kind of thread (seccomp(2)). Any other ends the machine: only one that has been taken over makes it.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use crate::sys::{ADD_MEMORY, TAP_SET_OFFLOAD};

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
    /// Carries out what it is asked by the process that started this one, and waits for the end.
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
            // Makes devices of what it is handed, and speaks with the file servers of new shares.
            Self::Main => &[
                libc::SYS_poll,
                libc::SYS_ppoll,
                libc::SYS_recvmsg,
                libc::SYS_sendmsg,
                libc::SYS_epoll_ctl,
                libc::SYS_shutdown,
                libc::SYS_eventfd2,
                libc::SYS_memfd_create,
                libc::SYS_ftruncate,
                libc::SYS_lseek,
                libc::SYS_fstat,
                libc::SYS_statx,
                libc::SYS_newfstatat,
            ],
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
            // Of this process's own memory the guest may get more.
            Self::Main => &[ADD_MEMORY],
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
    let commands = match role {
        Role::Main => &[libc::F_GETFD, libc::F_ADD_SEALS][..],
        _ => &[libc::F_GETFD],
    };
    let command = |command: &i32| rule([(1, SeccompCmpOp::Eq, u64::from(command.cast_unsigned()))]);
    allowed.insert(libc::SYS_fcntl, commands.iter().map(command).collect::<Result<_, _>>()?);
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
    use crate::sys::call_with;

    /// More than there are on x86-64, without those of the 32-bit interfaces.
    const CALLS: std::ops::Range<libc::c_long> = 0..512;
    /// Arguments that no call makes anything of: no descriptor, address, size or process is like that.
    const NOTHING: [u64; 6] = [u64::MAX; 6];

    fn is_killed(program: &BpfProgram, number: libc::c_long, arguments: [u64; 6]) -> bool {
        match call_with(program, number, arguments) {
            0 => false,
            status if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS => true,
            status => panic!("system call {number} ended the process with {status:#x}"),
        }
    }

    /// Every call that is not on a role's list ends the process, and none that is.
    #[test]
    fn one_call_more_ends_the_machine() {
        let Filters(programs) = filters().unwrap();
        assert_eq!(programs.len(), ROLES.len());
        for (role, program) in &programs {
            assert!(program.len() < 4096);
            let plain: Vec<_> = EVERY.iter().chain(role.calls()).copied().collect();
            // These end a process or a thread, or go back from a handler that nobody has come to.
            let ends = [libc::SYS_exit, libc::SYS_exit_group, libc::SYS_rt_sigreturn];
            // Of these some are allowed.
            let some =
                [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_fcntl, libc::SYS_tgkill, libc::SYS_ioctl];
            // The kernel lets probes of programs pass whatever a filter says, and ends who has none (uretprobe(2), uprobe).
            let probes = 335..=336;
            let others =
                |number: &i64| !(ends.contains(number) || some.contains(number) || probes.contains(number));
            for number in CALLS.filter(others) {
                let killed = is_killed(program, number, NOTHING);
                assert_eq!(killed, !plain.contains(&number), "system call {number} of {role:?}");
            }
        }
    }

    #[test]
    fn calls_that_are_allowed_in_part() {
        let Filters(programs) = filters().unwrap();
        let with = |at: usize, value: u64| {
            let mut arguments = NOTHING;
            arguments[at] = value;
            arguments
        };
        let flags = |flags: i32| u64::from(flags.cast_unsigned());
        for (role, program) in &programs {
            let killed = |number, at, value| is_killed(program, number, with(at, value));
            // Memory with code in it.
            for number in [libc::SYS_mmap, libc::SYS_mprotect] {
                assert!(!killed(number, 2, flags(libc::PROT_READ | libc::PROT_WRITE)), "{role:?}");
                assert!(killed(number, 2, flags(libc::PROT_READ | libc::PROT_EXEC)), "{role:?}");
            }
            assert!(!killed(libc::SYS_fcntl, 1, flags(libc::F_GETFD)));
            for forbidden in [libc::F_SETFD, libc::F_SETFL, libc::F_DUPFD, libc::F_SETOWN] {
                assert!(killed(libc::SYS_fcntl, 1, flags(forbidden)), "{role:?} {forbidden}");
            }
            assert_eq!(killed(libc::SYS_fcntl, 1, flags(libc::F_ADD_SEALS)), *role != Role::Main);
            // Signals to other processes.
            assert!(!killed(libc::SYS_tgkill, 0, std::process::id().into()));
            assert!(killed(libc::SYS_tgkill, 0, 1));
            let processor = *role == Role::Processor;
            assert_eq!(killed(libc::SYS_ioctl, 1, KVM_RUN), !processor);
            assert_eq!(killed(libc::SYS_ioctl, 1, TAP_SET_OFFLOAD), !processor);
            assert_eq!(killed(libc::SYS_ioctl, 1, ADD_MEMORY), *role != Role::Main);
            // KVM_CREATE_VM, KVM_SET_GSI_ROUTING, TUNSETIFF, TIOCSTI
            for forbidden in [0xae01, 0x4008_ae6a, 0x4004_54ca, 0x5412] {
                assert!(killed(libc::SYS_ioctl, 1, forbidden), "{role:?} {forbidden:#x}");
            }
        }
    }

    #[test]
    fn nobody_opens_starts_or_becomes_anything() {
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
