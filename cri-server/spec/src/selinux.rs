//! SELinux labels: those of a pod, which separate it from the others by its level, and those of a container in it. What the node's policy
//! has for containers is for the caller to know.

use std::fmt;
use std::str::FromStr;

use podvisor_proto::cri::{self, NamespaceMode};
use serde::{Deserialize, Serialize};

use crate::error::{Result, SpecError};
use crate::security;

const FIELD: &str = "config.linux.security_context.selinux_options";

/// Categories of a targeted policy: `c0` to `c1023`.
const CATEGORIES: u32 = 1024;

/// How many levels there are with two categories each.
pub const LEVELS: u32 = CATEGORIES * (CATEGORIES - 1) / 2;

/// Of what may look at everything: it has access to the files of all pods whatever their level.
const SUPER_PRIVILEGED: &str = "spc_t";

/// A security context: `USER:ROLE:TYPE`, with `:LEVEL` where the policy has levels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Context {
    user: String,
    role: String,
    kind: String,
    /// Itself with colons: `s0:c1,c2`.
    level: Option<String>,
}

/// Why a text is no security context.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no security context: expected USER:ROLE:TYPE or USER:ROLE:TYPE:LEVEL")]
pub struct InvalidContext(String);

impl FromStr for Context {
    type Err = InvalidContext;

    fn from_str(text: &str) -> std::result::Result<Self, InvalidContext> {
        let invalid = || InvalidContext(text.to_owned());
        let mut parts = text.splitn(4, ':');
        let mut next = || parts.next().filter(|part| is_part(part)).ok_or_else(invalid);
        let (user, role, kind) = (next()?.to_owned(), next()?.to_owned(), next()?.to_owned());
        let level = parts.next();
        match level {
            Some(level) if !is_level(level) => Err(invalid()),
            level => Ok(Self { user, role, kind, level: level.map(str::to_owned) }),
        }
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        self.level.iter().try_for_each(|level| write!(f, ":{level}"))
    }
}

impl TryFrom<String> for Context {
    type Error = InvalidContext;

    fn try_from(text: String) -> std::result::Result<Self, InvalidContext> {
        text.parse()
    }
}

impl From<Context> for String {
    fn from(context: Context) -> Self {
        context.to_string()
    }
}

/// No byte that divides contexts, mount options or lines.
fn is_part(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

fn is_level(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.:,".contains(&byte))
}

/// The labels of processes and of the files that they may use: what the policy has for containers, or those of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Labels {
    pub process: Context,
    pub file: Context,
}

impl Labels {
    /// What a policy says in `contexts/lxc_contexts`: lines `NAME = "CONTEXT"`, of which `process` and `file` count.
    pub fn of_policy(text: &str) -> std::result::Result<Self, PolicyError> {
        let find = |wanted: &'static str| {
            let mut found = text.lines().filter_map(|line| {
                let (name, value) = line.split_once('=')?;
                // A comment's name is none.
                (name.trim() == wanted).then(|| value.trim().trim_matches('"'))
            });
            Ok::<_, PolicyError>(found.next_back().ok_or(PolicyError::Missing(wanted))?.parse()?)
        };
        Ok(Self { process: find("process")?, file: find("file")? })
    }

    /// Those of a pod that asks for `options`, on a node whose policy has `self` for containers.
    pub fn of_pod(&self, options: Option<&cri::SeLinuxOption>) -> Result<Self> {
        self.overlaid(options)
    }

    /// Gives the pod a level of its own, unless it has asked for one or the policy has none: the first one from number `start` on that
    /// nobody has taken.
    pub fn separate(
        &mut self,
        options: Option<&cri::SeLinuxOption>,
        start: u32,
        mut taken: impl FnMut(&str) -> bool,
    ) {
        let asked = options.is_some_and(|options| !options.level.is_empty());
        let (Some(level), false) = (self.process.level.as_deref(), asked) else { return };
        // Of a range (`s0-s0:c0.c1023`) the low end.
        let sensitivity = level.split(['-', ':']).next().unwrap_or(level).to_owned();
        let start = start % LEVELS;
        let mut levels = (start..LEVELS).chain(0..start).map(|number| {
            let (first, second) = pair(number);
            format!("{sensitivity}:c{first},c{second}")
        });
        let level = levels.find(|level| !taken(level));
        self.process.level.clone_from(&level);
        if self.file.level.is_some() {
            self.file.level = level;
        }
    }

    /// The level, which the pod shares with nobody who has not asked for the same.
    pub fn level(&self) -> Option<&str> {
        self.process.level.as_deref()
    }

    fn overlaid(&self, options: Option<&cri::SeLinuxOption>) -> Result<Self> {
        let mut labels = self.clone();
        let Some(options) = options else { return Ok(labels) };
        let checked = |name: &str, value: &String, check: fn(&str) -> bool| {
            if value.is_empty() || check(value) {
                return Ok(Some(value.clone()).filter(|value| !value.is_empty()));
            }
            let why = format!("{value:?} cannot be a part of a security context");
            Err(SpecError::invalid(format!("{FIELD}.{name}"), why))
        };
        if let Some(user) = checked("user", &options.user, is_part)? {
            labels.process.user.clone_from(&user);
            labels.file.user = user;
        }
        if let Some(role) = checked("role", &options.role, is_part)? {
            labels.process.role = role;
        }
        if let Some(kind) = checked("type", &options.r#type, is_part)? {
            labels.process.kind = kind;
        }
        if let Some(level) = checked("level", &options.level, is_level)? {
            labels.process.level = Some(level.clone());
            labels.file.level = Some(level);
        }
        Ok(labels)
    }
}

/// Why a policy is none for containers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum PolicyError {
    #[error("it does not say which context a container's {0} has")]
    Missing(&'static str),
    #[error(transparent)]
    Invalid(#[from] InvalidContext),
}

/// The categories of a level: all pairs `(a, b)` with a < b, numbered by b, then a.
fn pair(number: u32) -> (u32, u32) {
    let second = (1 + 8 * number).isqrt().div_ceil(2);
    (number - second * (second - 1) / 2, second)
}

/// How a container is labelled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    /// `process.selinuxLabel`; `None`: the policy decides by what the OCI runtime is, which is unconfined with every policy for containers
    /// (`spc_t`).
    pub process: Option<Context>,
    /// `linux.mountLabel`, and of everything that is mounted or made for the container. `None`: the node has no labels for containers.
    pub files: Option<Context>,
}

impl Confinement {
    /// Of a container in a pod with the labels `pod`.
    pub fn of_container(
        pod: Option<&Labels>,
        sandbox: &cri::PodSandboxConfig,
        config: &cri::ContainerConfig,
    ) -> Result<Self> {
        let Some(pod) = pod else { return Ok(Self::default()) };
        let security = security(config);
        let options = security.and_then(|security| security.selinux_options.as_ref());
        let labels = pod.overlaid(options)?;
        let node = NamespaceMode::Node as i32;
        let own = security.and_then(|security| security.namespace_options.as_ref());
        let shared = sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let shared = shared.and_then(|security| security.namespace_options.as_ref());
        let privileged = security.is_some_and(|security| security.privileged);
        // Who looks at the node's processes or shares memory with them is in the way of itself with a level, unless it knows one that is not.
        let of_node =
            own.is_some_and(|own| own.pid == node) || shared.is_some_and(|shared| shared.ipc == node);
        let asked = options.is_some_and(|options| !options.r#type.is_empty());
        let confined = !privileged && (asked || !of_node);
        Ok(Self { process: confined.then_some(labels.process), files: Some(labels.file) })
    }

    /// Whether volumes need its label: who is not confined may use them as they are, and others' labels on them stay.
    pub fn relabels(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.kind != SUPER_PRIVILEGED)
    }
}

#[cfg(test)]
mod tests;
