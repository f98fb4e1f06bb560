//! What the process may do: limits, user, groups, capabilities, filters. The order is the kernel's (credentials(7), capabilities(7)).

use rustix::process::{Gid, Uid};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use crate::error::{During, Step};
use crate::process::ProcessPlan;
use crate::sys;

/// Highest capability that a `CapabilitySet` names; the kernel refuses those it does not know with EINVAL.
const CAPABILITIES: u32 = 64;

/// Everything up to the filter, which comes last where it can.
pub(crate) fn take_on(process: &ProcessPlan) -> Step {
    for (resource, limit) in &process.limits {
        rustix::process::setrlimit(*resource, *limit).during(|| format!("set the limit {resource:?}"))?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(process.umask));
    if !process.no_new_privileges {
        // Loading it needs CAP_SYS_ADMIN, which goes below; with no_new_privs nobody needs it (seccomp(2)).
        filter(process)?;
    }
    let wanted = &process.capabilities;
    drop_bounding(wanted.bounding)?;
    thread::set_keep_capabilities(true).during(|| "keep capabilities over the change of user".into())?;
    become_user(process)?;
    let sets = CapabilitySets {
        effective: wanted.effective,
        permitted: wanted.permitted,
        inheritable: wanted.inheritable,
    };
    thread::set_capabilities(None, sets).during(|| "set capabilities".into())?;
    thread::set_keep_capabilities(false).during(|| "stop keeping capabilities".into())?;
    thread::clear_ambient_capability_set().during(|| "clear ambient capabilities".into())?;
    for capability in wanted.ambient.iter() {
        // Only what is permitted and inheritable can be ambient; what is not is left out, as runtimes do.
        if wanted.permitted.contains(capability) && wanted.inheritable.contains(capability) {
            thread::configure_capability_in_ambient_set(capability, true)
                .during(|| format!("make {capability:?} ambient"))?;
        }
    }
    Ok(())
}

/// The last step before the program: nothing but execve is called after it.
pub(crate) fn seal(process: &ProcessPlan) -> Step {
    if process.no_new_privileges {
        thread::set_no_new_privs(true).during(|| "set no_new_privs".into())?;
        filter(process)?;
    }
    Ok(())
}

fn filter(process: &ProcessPlan) -> Step {
    match &process.seccomp {
        Some(filter) => sys::load_seccomp(&filter.program, filter.flags.into())
            .during(|| "load the seccomp filter".into()),
        None => Ok(()),
    }
}

/// Drops every capability from the bounding set but those.
pub(crate) fn drop_bounding(kept: CapabilitySet) -> Step {
    for number in 0..CAPABILITIES {
        let Some(capability) = CapabilitySet::from_bits(1 << number) else { continue };
        if kept.contains(capability) {
            continue;
        }
        match thread::remove_capability_from_bounding_set(capability) {
            // One that this kernel does not have.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).during(|| format!("drop {capability:?}")),
        }
    }
    Ok(())
}

fn become_user(process: &ProcessPlan) -> Step {
    let groups: Vec<Gid> = process.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    match thread::set_thread_groups(&groups) {
        Ok(()) => {}
        // A user namespace whose owner may not call it (user_namespaces(7), "setgroups"): then there are none to take away.
        Err(rustix::io::Errno::PERM) if groups.is_empty() => {}
        Err(error) => return Err(error).during(|| "set the supplementary groups".into()),
    }
    thread::set_thread_gid(Gid::from_raw(process.gid)).during(|| format!("become group {}", process.gid))?;
    thread::set_thread_uid(Uid::from_raw(process.uid)).during(|| format!("become user {}", process.uid))
}
