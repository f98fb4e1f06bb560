//! Which system calls remain (seccomp(2)). Any other ends the process: only one that has been taken over makes it.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

/// Why system calls could not be restricted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SyscallError {
    #[error("compile the filter")]
    Compile(#[source] BackendError),
    #[error("load the filter")]
    Load(#[source] seccompiler::Error),
}

/// Allowed whatever the arguments are.
const PLAIN: &[libc::c_long] = &[
    // The connection: it is accepted, carries descriptors, and replies.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    // Descriptors.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_lseek,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Files: what the guest asks for.
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    // On behalf of whom.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    // Memory, threads, time.
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    // Answered with ENOSYS by the other filter; the C library then uses clone, whose arguments can be looked at.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// What an argument must be.
enum Argument {
    Is(u64),
    /// Of the bits of the first, only those of the second are set.
    Masked(u64, u64),
}

fn rules() -> Result<Vec<(libc::c_long, Vec<SeccompRule>)>, BackendError> {
    let bits = |flags: libc::c_int| u64::from(flags.cast_unsigned());
    let is = |flags: libc::c_int| Argument::Is(bits(flags));
    let thread =
        bits(libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD);
    let no_code = || Argument::Masked(bits(libc::PROT_EXEC), 0);
    Ok(vec![
        // Only threads are made.
        (libc::SYS_clone, vec![rule([(0, Argument::Masked(thread, thread))])?]),
        // A thread gets a working directory and a umask of its own.
        (libc::SYS_unshare, vec![rule([(0, is(libc::CLONE_FS))])?]),
        // No code but the program's.
        (libc::SYS_mmap, vec![rule([(2, no_code())])?]),
        (libc::SYS_mprotect, vec![rule([(2, no_code())])?]),
        // A panic ends this process, and no other.
        (libc::SYS_tgkill, vec![rule([(0, Argument::Is(std::process::id().into()))])?]),
        // Threads' names, and what libcap-ng asks before it sets capabilities.
        (
            libc::SYS_prctl,
            vec![
                rule([(0, is(libc::PR_SET_NAME))])?,
                rule([(0, is(libc::PR_CAPBSET_READ))])?,
                rule([(0, is(libc::PR_CAP_AMBIENT)), (1, is(libc::PR_CAP_AMBIENT_IS_SET))])?,
            ],
        ),
    ])
}

fn rule<const N: usize>(arguments: [(u8, Argument); N]) -> Result<SeccompRule, BackendError> {
    let conditions: Result<Vec<_>, _> = arguments
        .into_iter()
        .map(|(number, argument)| {
            let (operator, value) = match argument {
                Argument::Is(value) => (SeccompCmpOp::Eq, value),
                Argument::Masked(mask, value) => (SeccompCmpOp::MaskedEq(mask), value),
            };
            SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value)
        })
        .collect();
    SeccompRule::new(conditions?)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    matched: SeccompAction,
    other: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, other, matched, architecture)?.try_into()
}

fn programs() -> Result<[BpfProgram; 2], BackendError> {
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> =
        PLAIN.iter().map(|number| (*number, Vec::new())).collect();
    allowed.extend(rules()?);
    let missing = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    Ok([
        compile([(libc::SYS_clone3, Vec::new())].into(), missing, SeccompAction::Allow)?,
        compile(allowed, SeccompAction::Allow, SeccompAction::KillProcess)?,
    ])
}

/// Restricts this thread, and those that it will start.
pub(crate) fn restrict() -> Result<(), SyscallError> {
    for program in programs().map_err(SyscallError::Compile)? {
        apply_filter(&program).map_err(SyscallError::Load)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile() {
        let [missing, allowed] = programs().unwrap();
        assert!(missing.len() < allowed.len() && allowed.len() < 4096);
    }

    #[test]
    fn no_call_is_listed_twice() {
        let mut seen: Vec<_> = PLAIN.to_vec();
        seen.extend(rules().unwrap().iter().map(|(number, _)| *number));
        let listed = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), listed);
    }
}
