//! Which seccomp and AppArmor profiles a container asks for.

use podvisor_proto::cri;
use podvisor_proto::cri::security_profile::ProfileType;

use crate::error::{Result, SpecError};

/// A requested profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecurityProfile {
    /// The runtime's default one.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// Seccomp: absolute path of a file on the node. AppArmor: name of a profile that is loaded.
    Localhost(String),
}

const FIELD: &str = "config.linux.security_context";

/// The seccomp profile that a container asks for; privileged containers are unconfined, and so is one that says nothing.
pub fn seccomp_request(config: &cri::ContainerConfig) -> Result<SecurityProfile> {
    let Some(security) = context(config) else { return Ok(SecurityProfile::Unconfined) };
    #[allow(deprecated)] // kubelet before 1.26 sets only this one
    let old = ("seccomp_profile_path", security.seccomp_profile_path.as_str());
    let requested = request("seccomp", security.seccomp.as_ref(), old, SecurityProfile::Unconfined)?;
    if let (SecurityProfile::Localhost(path), false) = (&requested, security.privileged)
        && !path.starts_with('/')
    {
        let field = if security.seccomp.is_some() { "seccomp.localhost_ref" } else { "seccomp_profile_path" };
        return Err(SpecError::invalid(
            format!("{FIELD}.{field}"),
            format!("{path:?} is not an absolute path"),
        ));
    }
    Ok(if security.privileged { SecurityProfile::Unconfined } else { requested })
}

/// The AppArmor profile that a container asks for; privileged containers are unconfined. `None`: it says nothing, and gets what the node
/// gives by itself. What the node has is for the caller to know.
pub fn apparmor_request(config: &cri::ContainerConfig) -> Result<Option<SecurityProfile>> {
    let Some(security) = context(config) else { return Ok(None) };
    #[allow(deprecated)] // kubelet before 1.30 sets only this one
    let old = ("apparmor_profile", security.apparmor_profile.as_str());
    let silent = security.apparmor.is_none() && old.1.is_empty();
    let requested = request("apparmor", security.apparmor.as_ref(), old, SecurityProfile::RuntimeDefault)?;
    Ok(if security.privileged {
        Some(SecurityProfile::Unconfined)
    } else {
        Some(requested).filter(|_| !silent)
    })
}

fn context(config: &cri::ContainerConfig) -> Option<&cri::LinuxContainerSecurityContext> {
    config.linux.as_ref()?.security_context.as_ref()
}

/// The new field where it is set, else the deprecated string.
fn request(
    name: &str,
    new: Option<&cri::SecurityProfile>,
    (old_name, old): (&str, &str),
    unset: SecurityProfile,
) -> Result<SecurityProfile> {
    let Some(new) = new else {
        return match old {
            "" => Ok(unset),
            "runtime/default" | "docker/default" => Ok(SecurityProfile::RuntimeDefault),
            "unconfined" => Ok(SecurityProfile::Unconfined),
            other => match other.strip_prefix("localhost/").filter(|rest| !rest.is_empty()) {
                Some(rest) if !rest.contains('\0') => Ok(SecurityProfile::Localhost(rest.to_owned())),
                _ => {
                    let why =
                        format!("{other:?} is none of runtime/default, unconfined and localhost/PROFILE");
                    Err(SpecError::invalid(format!("{FIELD}.{old_name}"), why))
                }
            },
        };
    };
    let field = |part: &str| format!("{FIELD}.{name}.{part}");
    let Ok(kind) = ProfileType::try_from(new.profile_type) else {
        let why = format!("{} is not a profile type", new.profile_type);
        return Err(SpecError::invalid(field("profile_type"), why));
    };
    let local = new.localhost_ref.strip_prefix("localhost/").unwrap_or(&new.localhost_ref);
    match kind {
        ProfileType::Localhost if local.is_empty() => {
            Err(SpecError::invalid(field("localhost_ref"), "is empty, but the profile type is Localhost"))
        }
        ProfileType::Localhost if local.contains('\0') => {
            Err(SpecError::invalid(field("localhost_ref"), "contains a NUL byte"))
        }
        ProfileType::Localhost => Ok(SecurityProfile::Localhost(local.to_owned())),
        ProfileType::RuntimeDefault | ProfileType::Unconfined if !new.localhost_ref.is_empty() => {
            Err(SpecError::invalid(field("localhost_ref"), "is set, but the profile type is not Localhost"))
        }
        ProfileType::RuntimeDefault => Ok(SecurityProfile::RuntimeDefault),
        ProfileType::Unconfined => Ok(SecurityProfile::Unconfined),
    }
}

#[cfg(test)]
mod tests;
