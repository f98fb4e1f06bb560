//! What must hold between keys, looked at when all files are read.

use std::path::Path;

use crate::document::Origins;
use crate::error::{Problem, ProblemKind};
use crate::{CgroupDriver, Config, Handler, NetworkMode, Trust};

/// What in `config` contradicts itself. A problem is reported where the first of its keys that a file sets is
/// set, or at `main` when none is.
pub(crate) fn contradictions(config: &Config, origins: &Origins, main: &Path) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut report = |keys: &[&str], detail: String| {
        let origin = keys.iter().find_map(|key| origins.get(*key));
        problems.push(Problem {
            file: origin.map_or_else(|| main.to_owned(), |origin| origin.file.clone()),
            line: origin.map(|origin| origin.line),
            key: keys[0].to_owned(),
            kind: ProblemKind::Contradiction { detail },
        });
    };

    if config.root == config.run {
        report(&["root", "run"], "root and run must be different directories".to_owned());
    }
    streaming(config, &mut report);
    handlers(config, &mut report);
    aliases(config, &mut report);
    cgroup(config, &mut report);
    if config.network.mode == NetworkMode::Builtin && config.network.subnets.is_empty() {
        let detail = "the built-in network needs at least one range, like [\"10.88.0.0/16\"]";
        report(&["network.subnets", "network.mode"], detail.to_owned());
    }
    problems
}

type Report<'r> = dyn FnMut(&[&str], String) + 'r;

/// The URL of a stream is its only credential, so it never travels in the clear.
fn streaming(config: &Config, report: &mut Report<'_>) {
    let streaming = &config.streaming;
    match (&streaming.tls_cert, &streaming.tls_key) {
        (Some(_), None) => {
            report(&["streaming.tls_key", "streaming.tls_cert"], "tls_cert needs tls_key as well".to_owned());
        }
        (None, Some(_)) => {
            report(&["streaming.tls_cert", "streaming.tls_key"], "tls_key needs tls_cert as well".to_owned());
        }
        (None, None) if !streaming.address.ip().to_canonical().is_loopback() => {
            let address = streaming.address;
            let detail = format!(
                "{address} is not a loopback address, so tls_cert and tls_key must be set; \
                 without them allowed is 127.0.0.1 or [::1]"
            );
            report(&["streaming.address"], detail);
        }
        _ => {}
    }
}

fn handlers(config: &Config, report: &mut Report<'_>) {
    let runtime = &config.runtime;
    let names: Vec<&str> = config.handlers.keys().map(String::as_str).collect();
    let there_are = if names.is_empty() {
        "there are none".to_owned()
    } else {
        format!("there are: {}", names.join(", "))
    };

    let trusted = &runtime.trusted_handler;
    let untrusted = runtime.untrusted_handler.as_ref();
    if config.handlers.get(trusted).is_none_or(Handler::is_vm) {
        let table = format!("runtime.handlers.{trusted}");
        report(
            &["runtime.trusted_handler", &table],
            format!("\"{trusted}\" is no handler of type \"oci\"; {there_are}"),
        );
    }
    if let Some(untrusted) = untrusted {
        let table = format!("runtime.handlers.{untrusted}");
        if !config.named_handlers().contains_key(untrusted) {
            report(
                &["runtime.untrusted_handler", &table],
                format!("\"{untrusted}\" is no handler; {there_are}"),
            );
        } else if untrusted == trusted {
            report(
                &["runtime.untrusted_handler", "runtime.trusted_handler"],
                format!("\"{untrusted}\" is the trusted handler and cannot be the untrusted one too"),
            );
        }
    } else if runtime.default_workload_trust == Trust::Untrusted {
        report(
            &["runtime.default_workload_trust", "runtime.untrusted_handler"],
            "\"untrusted\" needs runtime.untrusted_handler, which names the handler of such pods".to_owned(),
        );
    }
}

/// A name that two handlers claim would mean the one today and the other tomorrow.
fn aliases(config: &Config, report: &mut Report<'_>) {
    let mut taken: std::collections::BTreeMap<&str, &str> = std::collections::BTreeMap::new();
    for (name, handler) in &config.handlers {
        for alias in &handler.aliases {
            if let Some(other) = taken.insert(alias, name)
                && other != name
            {
                let [key, theirs] =
                    [name.as_str(), other].map(|name| format!("runtime.handlers.{name}.aliases"));
                report(&[&key, &theirs], format!("\"{alias}\" is an alias of handler \"{other}\" already"));
            }
        }
    }
}

/// With systemd (which `auto` may turn out to be) the monitors' cgroup is a unit of systemd's.
fn cgroup(config: &Config, report: &mut Report<'_>) {
    let name = &config.runtime.monitor_cgroup;
    let stem = name.strip_suffix(".slice");
    let is_slice = stem.is_some_and(|stem| !stem.is_empty() && !stem.contains('/'));
    if config.runtime.cgroup_driver != CgroupDriver::Cgroupfs && !is_slice {
        report(
            &["runtime.monitor_cgroup", "runtime.cgroup_driver"],
            format!(
                "\"{name}\" must be the name of a slice like podvisor.slice, unless cgroup_driver is \"cgroupfs\""
            ),
        );
    }
}
