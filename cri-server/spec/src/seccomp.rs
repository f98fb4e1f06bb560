//! Seccomp profiles: the built-in one, and files in the format that Docker, Podman and Kubernetes' examples use.
//!
//! That format is the OCI runtime spec's with conditions added: entries for some architectures, capabilities or kernels only. Conditions are
//! resolved here; what is left is a plain OCI profile. A profile without conditions passes unchanged.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::Deserialize;

use crate::error::{Result, SpecError};

/// Written for this project; what it allows is what Docker's and containerd's defaults allow, because images are tested against those.
const DEFAULT: &str = include_str!("seccomp/default.json");

/// The built-in profile needs no conditions on older kernels than podvisor runs on.
const NEWEST_KERNEL: (u32, u32) = (u32::MAX, 0);

/// A file this large is no profile; the largest that are known have 30 KiB.
const MAX_LENGTH: usize = 1 << 20;

/// The built-in profile for RuntimeDefault, for a container with these capabilities in its bounding set.
pub fn default_seccomp(capabilities: &[String]) -> LinuxSeccomp {
    // The file is part of the program and a test reads it; an empty profile would deny everything, so nothing opens up if it were broken.
    seccomp_profile(DEFAULT, capabilities, NEWEST_KERNEL).unwrap_or_else(|_| {
        let mut closed = LinuxSeccomp::default();
        closed.set_default_action(LinuxSeccompAction::ScmpActErrno);
        closed
    })
}

/// A profile file for a container with `capabilities` in its bounding set, on a kernel of version (major, minor).
pub fn seccomp_profile(
    json: &str,
    capabilities: &[String],
    kernel_version: (u32, u32),
) -> Result<LinuxSeccomp> {
    if json.len() > MAX_LENGTH {
        let why = format!("has {} bytes, more than 1 MiB", json.len());
        return Err(SpecError::invalid("seccomp profile", why));
    }
    let file: File = serde_json::from_str(json).map_err(SpecError::SeccompSyntax)?;
    let facts = Facts { capabilities, kernel_version, arch: native_arch() };

    let mut syscalls = Vec::with_capacity(file.syscalls.len());
    for (index, rule) in file.syscalls.into_iter().enumerate() {
        if let Some(syscall) = rule.resolve(index, &facts)? {
            syscalls.push(syscall);
        }
    }
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(file.default_action)
        .set_default_errno_ret(file.default_errno_ret)
        .set_architectures(architectures(file.architectures, file.arch_map, &facts)?)
        .set_flags(Some(file.flags).filter(|flags| !flags.is_empty()))
        .set_listener_path(file.listener_path.map(Into::into))
        .set_listener_metadata(file.listener_metadata)
        .set_syscalls(Some(syscalls).filter(|syscalls| !syscalls.is_empty()));
    Ok(profile)
}

/// A profile file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<Arch>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchFamily>>,
    #[serde(default)]
    flags: Vec<LinuxSeccompFilterFlag>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchFamily {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    /// Before 2016 one name per rule.
    name: Option<String>,
    #[serde(default)]
    names: Vec<String>,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// What conditions are about.
struct Facts<'a> {
    capabilities: &'a [String],
    kernel_version: (u32, u32),
    /// `None`: an architecture that this build knows no names for.
    arch: Option<(&'static str, Arch)>,
}

/// Go's name, which the files use, and the kernel's.
fn native_arch() -> Option<(&'static str, Arch)> {
    match std::env::consts::ARCH {
        "x86_64" => Some(("amd64", Arch::ScmpArchX86_64)),
        "aarch64" => Some(("arm64", Arch::ScmpArchAarch64)),
        "riscv64" => Some(("riscv64", Arch::ScmpArchRiscv64)),
        "powerpc64" => Some(("ppc64le", Arch::ScmpArchPpc64le)),
        "s390x" => Some(("s390x", Arch::ScmpArchS390x)),
        "loongarch64" => Some(("loong64", Arch::ScmpArchLoongarch64)),
        _ => None,
    }
}

impl Rule {
    /// `None`: not for these facts.
    fn resolve(self, index: usize, facts: &Facts<'_>) -> Result<Option<LinuxSyscall>> {
        let field = || format!("seccomp profile: syscalls[{index}]");
        let mut names = self.names;
        if let Some(name) = self.name.filter(|name| !name.is_empty()) {
            if !names.is_empty() {
                return Err(SpecError::invalid(field(), "has both name and names"));
            }
            names.push(name);
        }
        if names.is_empty() {
            return Err(SpecError::invalid(field(), "has no names"));
        }
        for condition in [&self.includes, &self.excludes].into_iter().flatten() {
            if let Some(text) = &condition.min_kernel
                && version(text).is_none()
            {
                return Err(SpecError::invalid(field(), format!("minKernel {text:?} is not MAJOR.MINOR")));
            }
        }
        let excluded = self.excludes.as_ref().is_some_and(|condition| condition.any(facts));
        let included = self.includes.as_ref().is_none_or(|condition| condition.all(facts));
        if excluded || !included {
            return Ok(None);
        }
        let mut syscall = LinuxSyscall::default();
        syscall
            .set_names(names)
            .set_action(self.action)
            .set_errno_ret(self.errno_ret)
            .set_args(self.args.filter(|args| !args.is_empty()));
        Ok(Some(syscall))
    }
}

impl Condition {
    /// As `includes`: every part that is given has to hold, every capability has to be there.
    fn all(&self, facts: &Facts<'_>) -> bool {
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        let (caps, arches) = (list(&self.caps), list(&self.arches));
        caps.iter().all(|name| facts.has(name))
            && (arches.is_empty() || arches.iter().any(|name| facts.is_arch(name)))
            && self.min_kernel.as_deref().and_then(version).is_none_or(|least| facts.kernel_version >= least)
    }

    /// As `excludes`: one part that holds is enough.
    fn any(&self, facts: &Facts<'_>) -> bool {
        let named = |list: &Option<Vec<String>>, holds: &dyn Fn(&str) -> bool| {
            list.iter().flatten().any(|name| holds(name))
        };
        named(&self.caps, &|name| facts.has(name))
            || named(&self.arches, &|name| facts.is_arch(name))
            || self.min_kernel.as_deref().and_then(version).is_some_and(|least| facts.kernel_version >= least)
    }
}

impl Facts<'_> {
    fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|known| known == capability)
    }

    fn is_arch(&self, name: &str) -> bool {
        self.arch.is_some_and(|(known, _)| known == name)
    }
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A list as it is, or from the map the entry of this architecture. Neither: `None`, the native one alone.
fn architectures(
    list: Option<Vec<Arch>>,
    map: Option<Vec<ArchFamily>>,
    facts: &Facts<'_>,
) -> Result<Option<Vec<Arch>>> {
    let list = list.filter(|list| !list.is_empty());
    let map = map.filter(|map| !map.is_empty());
    match (list, map) {
        (Some(_), Some(_)) => {
            Err(SpecError::invalid("seccomp profile", "has both architectures and archMap"))
        }
        (list, None) => Ok(list),
        (None, Some(map)) => {
            let native = facts.arch.map(|(_, arch)| arch);
            let family = map.into_iter().find(|family| Some(family.architecture) == native);
            Ok(family.map(|family| {
                let mut arches = vec![family.architecture];
                arches.extend(family.sub_architectures.into_iter().flatten());
                arches
            }))
        }
    }
}

#[cfg(test)]
mod tests;
