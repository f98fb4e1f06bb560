//! Which sysctls belong to a namespace, and writing them from inside it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};

use rustix::process::{Gid, Uid};

use super::{NamespaceError, Request, UserMappings, dumpable};

/// The namespace that a sysctl is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Net,
    Ipc,
    Uts,
}

/// The kernel's `net/sysctl_net.c`, `ipc/ipc_sysctl.c`, `ipc/mq_sysctl.c` and `kernel/utsname_sysctl.c` register these per
/// namespace; everything else is the node's.
fn owner(name: &str) -> Option<Owner> {
    if name.starts_with("net.") {
        Some(Owner::Net)
    } else if name == "kernel.sem"
        || name.starts_with("kernel.shm")
        || name.starts_with("kernel.msg")
        || name.starts_with("fs.mqueue.")
    {
        Some(Owner::Ipc)
    } else if name == "kernel.domainname" {
        Some(Owner::Uts)
    } else {
        None
    }
}

fn well_formed(name: &str) -> bool {
    name.split('.').all(|part| !part.is_empty())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

/// Refuses names that lead elsewhere and sysctls whose namespace the pod shares with the node.
pub(super) fn check(request: &Request) -> Result<(), NamespaceError> {
    for name in request.sysctls.keys() {
        let reason = if well_formed(name) {
            match owner(name) {
                None => Some("it belongs to the node, not to a namespace"),
                Some(Owner::Net) if !request.net => Some("the pod has no network namespace of its own"),
                Some(Owner::Ipc) if !request.ipc => Some("the pod has no IPC namespace of its own"),
                Some(Owner::Uts) if request.uts.is_none() => Some("the pod has no UTS namespace of its own"),
                Some(_) => None,
            }
        } else {
            Some("a name consists of parts of letters, digits, `_` and `-`, joined by dots")
        };
        if let Some(reason) = reason {
            return Err(NamespaceError::SysctlRefused { name: name.clone(), reason });
        }
    }
    Ok(())
}

/// Writes the sysctls; the calling thread is in the namespaces, whose owner is the user namespace with the ids `user`, if any.
pub(super) fn write(
    sysctls: &BTreeMap<String, String>,
    user: Option<&UserMappings>,
) -> Result<(), NamespaceError> {
    let mut refused = Vec::new();
    for (name, value) in sysctls {
        match (write_one(name, value), user) {
            // Since Linux 6.9 the root of a user namespace owns its IPC sysctls, and the node's root may only read them.
            (Err(error), Some(user)) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused.push((name, value, user));
            }
            (Err(source), _) => return Err(failed(name, value, source)),
            (Ok(()), _) => {}
        }
    }
    for (name, value, user) in refused {
        as_root_of(user, || write_one(name, value)).map_err(|source| failed(name, value, source))?;
    }
    Ok(())
}

fn failed(name: &str, value: &str, source: io::Error) -> NamespaceError {
    NamespaceError::Sysctl { name: name.to_owned(), value: value.to_owned(), source }
}

/// `/proc/sys` resolves against the thread that opens.
fn write_one(name: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Runs `work` in a thread that has the ids of a user namespace's root, and is in the same namespaces as this one.
fn as_root_of(user: &UserMappings, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uids.outside), Gid::from_raw(user.gids.outside));
    dumpable::kept(|| {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("sysctls".into()).spawn_scoped(scope, || {
                rustix::thread::set_thread_res_gid(gid, gid, gid)?;
                rustix::thread::set_thread_res_uid(uid, uid, uid)?;
                work()
            })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(name: &str, net: bool, ipc: bool, uts: bool) -> Option<String> {
        let request = Request {
            name: "p".into(),
            user: None,
            net,
            ipc,
            uts: uts.then(|| "h".into()),
            sysctls: BTreeMap::from([(name.into(), "1".into())]),
        };
        check(&request).err().map(|error| error.to_string())
    }

    #[test]
    fn only_namespaced_sysctls_pass() {
        for name in [
            "net.ipv4.ip_forward",
            "net.ipv4.conf.eth-0.rp_filter",
            "kernel.shmmax",
            "kernel.shm_rmid_forced",
        ] {
            assert_eq!(verdict(name, true, true, true), None, "{name}");
        }
        for name in ["kernel.msgmax", "kernel.sem", "fs.mqueue.msg_max", "kernel.domainname"] {
            assert_eq!(verdict(name, true, true, true), None, "{name}");
        }
        for name in ["kernel.panic", "vm.swappiness", "kernel.hostname", "fs.file-max", "netfilter.x"] {
            assert!(verdict(name, true, true, true).unwrap().contains("belongs to the node"), "{name}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "",
            "net.",
            "net..ipv4",
            "net.../x",
            "net/ipv4/ip_forward",
            "net.ipv4/../../kernel/panic",
            "net.a b",
            "net.\0",
        ] {
            assert!(verdict(name, true, true, true).unwrap().contains("joined by dots"), "{name:?}");
        }
    }

    #[test]
    fn a_shared_namespace_is_not_written() {
        assert!(verdict("net.ipv4.ip_forward", false, true, true).unwrap().contains("no network namespace"));
        assert!(verdict("kernel.sem", true, false, true).unwrap().contains("no IPC namespace"));
        assert!(verdict("kernel.domainname", true, true, false).unwrap().contains("no UTS namespace"));
    }
}
