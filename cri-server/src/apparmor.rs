//! AppArmor on this node: whether the kernel has it, podvisor's own default profile, which profile a container runs under.
//!
//! Profiles are compiled by `apparmor_parser`, a program of AppArmor's, as by every other runtime: the kernel takes compiled ones only.
//! Without it a container that says nothing runs unconfined, which Status and `podvisor check` tell; one that asks for the default by name
//! is refused.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use podvisor_proto::cri;
use podvisor_spec::SecurityProfile;

use crate::error::PodError;
use crate::node::find_program;

const DEFAULT: &str = "podvisor-default";
const TEXT: &str = include_str!("apparmor/default.profile");

/// What pins the kernel features that a profile was written for, where AppArmor is installed with it: without it AppArmor 4 would mediate
/// classes that the profile does not know, which means deny.
const FEATURES: &str = "/etc/apparmor.d/abi/3.0";

const SECURITY: &str = "/sys/kernel/security/apparmor";

/// AppArmor as it was found at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AppArmor {
    /// Not in this kernel, or switched off.
    Absent,
    /// The default profile is loaded.
    Ready,
    /// It could not be loaded, and why.
    WithoutDefault(String),
}

/// Why the default profile could not be loaded.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error("apparmor_parser is not installed")]
    NoParser,
    #[error("cannot run {}", path.display())]
    Run { path: PathBuf, source: std::io::Error },
    #[error("{} refused podvisor's default profile: {said}", path.display())]
    Refused { path: PathBuf, said: String },
}

impl AppArmor {
    /// What this kernel has; loads nothing.
    pub(crate) fn enabled() -> bool {
        std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.starts_with('Y'))
    }

    /// Loads the default profile where the kernel has AppArmor. Blocking: the parser takes some 100 ms, so it is not called again while
    /// the kernel still has the profile that this build would load (`run` is as volatile as the kernel's memory is).
    pub(crate) fn open(run: &Path) -> Self {
        if !Self::enabled() {
            return Self::Absent;
        }
        let text = profile_text();
        let mark = run.join("apparmor.profile");
        let same = std::fs::read_to_string(&mark).is_ok_and(|last| last == text);
        if same && is_loaded(DEFAULT) == Some(true) {
            return Self::Ready;
        }
        match load(&text) {
            Ok(()) => {
                if let Err(error) = std::fs::write(&mark, &text) {
                    tracing::debug!(%error, "the default profile will be loaded again at the next start");
                }
                Self::Ready
            }
            Err(error) => {
                let why = crate::error::chain(&error);
                tracing::warn!(why, "containers without a profile of their own run without AppArmor");
                Self::WithoutDefault(why)
            }
        }
    }

    /// What an operator has to know, if anything.
    pub(crate) fn complaint(&self) -> Option<&str> {
        match self {
            Self::WithoutDefault(why) => Some(why),
            Self::Absent | Self::Ready => None,
        }
    }

    /// The profile that a container runs under; `None`: none. One that was asked for and cannot be enforced is refused, never left out.
    pub(crate) fn profile(&self, config: &cri::ContainerConfig) -> Result<Option<String>, PodError> {
        let refused = |why| Err(PodError::invalid("config.linux.security_context.apparmor", why));
        match (podvisor_spec::apparmor_request(config)?, self) {
            (Some(SecurityProfile::Unconfined), _) | (None, Self::Absent | Self::WithoutDefault(_)) => {
                Ok(None)
            }
            // As on every runtime: the default of a node without AppArmor is nothing.
            (Some(SecurityProfile::RuntimeDefault), Self::Absent) => Ok(None),
            (Some(SecurityProfile::RuntimeDefault), Self::WithoutDefault(why)) => {
                refused(format!("the default profile cannot be enforced: {why}"))
            }
            (None | Some(SecurityProfile::RuntimeDefault), Self::Ready) => Ok(Some(DEFAULT.to_owned())),
            (Some(SecurityProfile::Localhost(name)), Self::Absent) => {
                refused(format!("profile {name:?} cannot be enforced: this node's kernel has no AppArmor"))
            }
            (Some(SecurityProfile::Localhost(name)), _) => match is_loaded(&name) {
                Some(false) => refused(format!(
                    "profile {name:?} is not loaded on this node: load it with apparmor_parser"
                )),
                // Where the list cannot be read, the kernel refuses it when the container starts.
                Some(true) | None => Ok(Some(name)),
            },
        }
    }
}

fn profile_text() -> String {
    if Path::new(FEATURES).exists() { format!("abi <abi/3.0>,\n{TEXT}") } else { TEXT.to_owned() }
}

/// `None`: the list of loaded profiles cannot be read (securityfs is not mounted here).
fn is_loaded(name: &str) -> Option<bool> {
    let list = std::fs::read_to_string(Path::new(SECURITY).join("profiles")).ok()?;
    Some(lists(&list, name))
}

/// Lines `NAME (MODE)`; names may contain spaces and parentheses.
fn lists(list: &str, name: &str) -> bool {
    list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(loaded, _)| loaded == name))
}

fn load(text: &str) -> Result<(), LoadError> {
    let path = find_program(Path::new("apparmor_parser"))
        .or_else(|| find_program(Path::new("/usr/sbin/apparmor_parser")))
        .ok_or(LoadError::NoParser)?;
    let failed = |source| LoadError::Run { path: path.clone(), source };
    let mut parser = Command::new(&path)
        // Not through its cache, which is keyed by file names.
        .args(["--replace", "--skip-cache", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let written = parser.stdin.take().map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let output = parser.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        return Err(LoadError::Refused { path, said });
    }
    written.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use podvisor_proto::cri::security_profile::ProfileType;

    fn asking(kind: Option<ProfileType>, privileged: bool) -> cri::ContainerConfig {
        let apparmor = kind.map(|kind| cri::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: if kind == ProfileType::Localhost { "mine".into() } else { String::new() },
        });
        let context = cri::LinuxContainerSecurityContext { apparmor, privileged, ..Default::default() };
        let linux = cri::LinuxContainerConfig { security_context: Some(context), ..Default::default() };
        cri::ContainerConfig { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn what_cannot_be_enforced_is_refused_only_when_it_was_asked_for() {
        let without = AppArmor::WithoutDefault("apparmor_parser is not installed".into());
        let default = Some(DEFAULT.to_owned());
        for (node, kind, expected) in [
            (AppArmor::Absent, None, Ok(None)),
            (AppArmor::Absent, Some(ProfileType::RuntimeDefault), Ok(None)),
            (AppArmor::Absent, Some(ProfileType::Localhost), Err("no AppArmor")),
            (AppArmor::Ready, None, Ok(default.clone())),
            (AppArmor::Ready, Some(ProfileType::RuntimeDefault), Ok(default)),
            (AppArmor::Ready, Some(ProfileType::Unconfined), Ok(None)),
            (without.clone(), None, Ok(None)),
            (without.clone(), Some(ProfileType::Unconfined), Ok(None)),
            (without, Some(ProfileType::RuntimeDefault), Err("not installed")),
        ] {
            match (node.profile(&asking(kind, false)), expected) {
                (Ok(profile), Ok(expected)) => assert_eq!(profile, expected, "{node:?} {kind:?}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{node:?} {kind:?}: {got:?}, not {expected:?}"),
            }
            assert_eq!(node.profile(&asking(kind, true)).unwrap(), None, "privileged");
        }
    }

    #[test]
    fn a_profile_is_loaded_by_its_whole_name() {
        let list = "podvisor-default (enforce)\nmy (own) profile (complain)\n/usr/sbin/ntpd (enforce)\n";
        for (name, loaded) in
            [("podvisor-default", true), ("my (own) profile", true), ("podvisor", false), ("", false)]
        {
            assert_eq!(lists(list, name), loaded, "{name}");
        }
    }
}
