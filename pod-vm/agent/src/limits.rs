//! Resource limits that containers inherit: what they would have on the host, where their spec names none.

use std::fs;

use podvisor_proto::agent::ResourceLimit;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::failure::Failure;

/// What no limit for descriptors can be above (Documentation/admin-guide/sysctl/fs.rst).
const MOST_FILES: &str = "/proc/sys/fs/nr_open";

/// Makes this process, and with it all that it starts, have them. Only as the first process of a guest.
pub(crate) fn inherit(limits: &[ResourceLimit]) -> Result<(), Failure> {
    for limit in limits {
        let resource = resource(&limit.name)?;
        if limit.soft > limit.hard {
            return Err(Failure::invalid(format!("{}: the soft limit is above the hard one", limit.name)));
        }
        let bound = |value: u64| (value != u64::MAX).then_some(value);
        let wanted = Rlimit { current: bound(limit.soft), maximum: bound(limit.hard) };
        if matches!(resource, Resource::Nofile) {
            allow_files(limit.hard)?;
        }
        setrlimit(resource, wanted)
            .map_err(|error| Failure::system(&format!("set {} to {wanted:?}", limit.name), error))?;
    }
    Ok(())
}

fn resource(name: &str) -> Result<Resource, Failure> {
    Ok(match name {
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_STACK" => Resource::Stack,
        name => return Err(Failure::invalid(format!("{name:?} is no limit that containers inherit"))),
    })
}

/// Lets descriptors have that limit, where the node's kernel has been told to allow more than kernels do by themselves.
fn allow_files(hard: u64) -> Result<(), Failure> {
    let failed = |error| Failure::system(&format!("read or write {MOST_FILES}"), error);
    let most = fs::read_to_string(MOST_FILES).map_err(failed)?;
    if most.trim().parse::<u64>().is_ok_and(|most| most < hard) {
        fs::write(MOST_FILES, hard.to_string()).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_limit_is_refused() {
        let limit = |name: &str, soft, hard| ResourceLimit { name: name.to_owned(), soft, hard };
        for (limit, words) in [
            (limit("RLIMIT_AS", 1, 1), "\"RLIMIT_AS\" is no limit"),
            (limit("", 1, 1), "\"\" is no limit"),
            (limit("RLIMIT_STACK", 2, 1), "above the hard one"),
        ] {
            let failure = format!("{:?}", inherit(&[limit]).unwrap_err()).replace("\\\"", "\"");
            assert!(failure.contains(words), "{failure}");
        }
    }
}
