//! What a container runs: arguments, environment, working directory; and further processes in it.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{Process, Spec};
use podvisor_proto::cri;

use crate::error::{Result, SpecError, absolute_path, c_string, clean};
use crate::user::User;
use crate::{Input, capabilities, profile, resources};

/// For images that set none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) fn first(input: &Input<'_>, user: &User) -> Result<Process> {
    let config = input.config;
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let requested = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    // Which profile it comes to is for the node to say; a request that is none is refused in any case.
    profile::apparmor_request(config)?;

    let mut account = oci_spec::runtime::User::default();
    account.set_uid(user.uid).set_gid(user.gid).set_additional_gids(Some(user.supplemental_groups.clone()));
    let mut process = empty();
    process
        .set_terminal(Some(config.tty))
        .set_user(account)
        .set_args(Some(arguments(input)?))
        .set_env(Some(environment(input)?))
        .set_cwd(working_directory(input)?)
        .set_capabilities(Some(capabilities::granted(security, input.host)?.sets()))
        .set_no_new_privileges(Some(security.is_some_and(|security| security.no_new_privs)))
        .set_apparmor_profile(input.apparmor.clone())
        .set_selinux_label(input.selinux.process.as_ref().map(ToString::to_string))
        // Always set: without it the container would have the protected score of its monitor.
        .set_oom_score_adj(Some(resources::oom_score_adj("config.linux.resources", requested, input.host)?));
    Ok(process)
}

/// A process with nothing but what every process has: the crate's default has limits and arguments of its own.
fn empty() -> Process {
    let mut process = Process::default();
    process.set_args(None).set_env(None).set_rlimits(None).set_capabilities(None).set_no_new_privileges(None);
    process
}

/// A process for exec in a container with spec `spec`: its user, capabilities, environment and confinement, with arguments and
/// terminal of its own. Seccomp is not part of a process; runtimes apply the container's.
pub fn exec(spec: &Spec, command: &[String], terminal: bool) -> Result<Process> {
    if command.is_empty() {
        return Err(SpecError::invalid("cmd", "is empty"));
    }
    for (index, argument) in command.iter().enumerate() {
        c_string(|| format!("cmd[{index}]"), argument)?;
    }
    if command[0].is_empty() {
        return Err(SpecError::invalid("cmd[0]", "is empty"));
    }
    let Some(process) = spec.process() else {
        return Err(SpecError::invalid("container_id", "this container has no process to derive one from"));
    };
    let mut process = process.clone();
    process.set_args(Some(command.to_vec())).set_terminal(Some(terminal)).set_console_size(None);
    if terminal {
        let env = process.env_mut().get_or_insert_with(Vec::new);
        if !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
    }
    Ok(process)
}

/// The CRI's `command` replaces the image's entrypoint and with it the image's arguments; `args` alone replaces only these.
fn arguments(input: &Input<'_>) -> Result<Vec<String>> {
    let config = input.config;
    let image = input.image.config().as_ref();
    let entrypoint = image.and_then(|image| image.entrypoint().clone()).unwrap_or_default();
    let cmd = image.and_then(|image| image.cmd().clone()).unwrap_or_default();
    let mut arguments = Vec::new();
    let (program, rest) = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => (&config.command, &config.args),
        (true, false) => (&entrypoint, &config.args),
        (true, true) => (&entrypoint, &cmd),
    };
    for (index, argument) in config.command.iter().enumerate() {
        c_string(|| format!("config.command[{index}]"), argument)?;
    }
    for (index, argument) in config.args.iter().enumerate() {
        c_string(|| format!("config.args[{index}]"), argument)?;
    }
    arguments.extend_from_slice(program);
    arguments.extend_from_slice(rest);
    match arguments.first() {
        None => {
            let why = "nothing to run: neither the request nor the image has a command";
            return Err(SpecError::invalid("config.command", why));
        }
        Some(first) if first.is_empty() => {
            return Err(SpecError::invalid("config.command", "the name of the program is empty"));
        }
        Some(_) => {}
    }
    // Of the request's strings nothing is left to check; the image's are checked as part of the result.
    for argument in &arguments {
        c_string(|| "image command".to_owned(), argument)?;
    }
    Ok(arguments)
}

/// Later ones override earlier ones in place: defaults, image, request. HOME is left to the runtime, which takes it from the container's
/// own `/etc/passwd` when it is missing.
fn environment(input: &Input<'_>) -> Result<Vec<String>> {
    let mut environment = Environment::default();
    environment.set(DEFAULT_PATH.to_owned());
    if input.config.tty {
        environment.set("TERM=xterm".to_owned());
    }
    environment.set(format!("HOSTNAME={}", hostname(input.sandbox)));
    for entry in input.image.config().iter().filter_map(|image| image.env().as_ref()).flatten() {
        // An entry without a name or a value cannot be set; other runtimes drop it, too.
        if entry.find('=').is_some_and(|at| at > 0) {
            c_string(|| "image environment".to_owned(), entry)?;
            environment.set(entry.clone());
        }
    }
    for (index, entry) in input.config.envs.iter().enumerate() {
        let field = |part: &str| format!("config.envs[{index}].{part}");
        if entry.key.is_empty() {
            return Err(SpecError::invalid(field("key"), "is empty"));
        }
        if entry.key.contains('=') {
            return Err(SpecError::invalid(field("key"), format!("{:?} contains \"=\"", entry.key)));
        }
        c_string(|| field("key"), &entry.key)?;
        // The OCI runtime spec is JSON, which has no way to write other bytes.
        let Ok(value) = std::str::from_utf8(&entry.value) else {
            return Err(SpecError::invalid(field("value"), "is not UTF-8"));
        };
        let text = format!("{}={value}", entry.key);
        c_string(|| field("value"), &text)?;
        environment.set(text);
    }
    Ok(environment.entries)
}

/// The pod's host name; on the host's network, where kubelet gives none, the node's.
pub(crate) fn hostname(sandbox: &cri::PodSandboxConfig) -> String {
    if sandbox.hostname.is_empty() {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        sandbox.hostname.clone()
    }
}

#[derive(Default)]
struct Environment {
    entries: Vec<String>,
    positions: HashMap<String, usize>,
}

impl Environment {
    /// `entry` is `NAME=VALUE`.
    fn set(&mut self, entry: String) {
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        let position = *self.positions.entry(name).or_insert(self.entries.len());
        if position == self.entries.len() {
            self.entries.push(entry);
        } else {
            self.entries[position] = entry;
        }
    }
}

fn working_directory(input: &Input<'_>) -> Result<PathBuf> {
    let requested = &input.config.working_dir;
    if !requested.is_empty() {
        return absolute_path(|| "config.working_dir".to_owned(), requested).map(PathBuf::from);
    }
    let image =
        input.image.config().as_ref().and_then(|image| image.working_dir().as_deref()).unwrap_or_default();
    c_string(|| "image working directory".to_owned(), image)?;
    Ok(PathBuf::from(clean(image)))
}

#[cfg(test)]
mod tests;
