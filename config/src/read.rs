//! Which keys there are: each field of [`Config`] with its dotted key and what may stand there.

use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;

use crate::document::{Document, Section, shorten};
use crate::error::ProblemKind;
use crate::value::{
    HANDLER_NAME, Refused, absolute_path, annotation, argument, boolean, cgroup, choice, guest_id,
    handler_name, image_reference, interface, is_handler_name, list, log_filter, number, optional,
    own_directory, pids, program, registry, socket_address, socket_path, subnets,
};
use crate::{
    CgroupDriver, Config, Handler, HandlerKind, Hypervisor, LogFormat, Machine, NetworkMode, Rootfs,
    ShareImages, Trust, Vm, Writable, default,
};

/// Most of what a pull or a call may take: a day, in seconds.
const DAY: i64 = 24 * 60 * 60;

/// Overrides in `config` what the file says.
pub(crate) fn all(document: &mut Document<'_>, mut root: Section<'_>, config: &mut Config) {
    document.set(&mut root, "root", &mut config.root, own_directory);
    document.set(&mut root, "run", &mut config.run, own_directory);
    document.set(&mut root, "socket", &mut config.socket, socket_path);
    log(document, &mut root, config);
    metrics(document, &mut root, config);
    streaming(document, &mut root, config);
    runtime(document, &mut root, config);
    image(document, &mut root, config);
    network(document, &mut root, config);
    nri(document, &mut root, config);
    limits(document, &mut root, config);
    document.leave(&root);
}

fn log(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "log");
    let log = &mut config.log;
    document.set(section, "level", &mut log.level, log_filter);
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json)];
    document.set(section, "format", &mut log.format, choice(&formats));
    document.leave(section);
}

fn metrics(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "metrics");
    document.set(section, "address", &mut config.metrics.address, optional(socket_address));
    document.leave(section);
}

fn streaming(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "streaming");
    let streaming = &mut config.streaming;
    document.set(section, "address", &mut streaming.address, socket_address);
    document.set(section, "tls_cert", &mut streaming.tls_cert, optional(absolute_path));
    document.set(section, "tls_key", &mut streaming.tls_key, optional(absolute_path));
    document.set(section, "token_lifetime", &mut streaming.token_lifetime, number(1..=3600, "seconds"));
    document.set(section, "idle_timeout", &mut streaming.idle_timeout, number(1..=7 * DAY, "seconds"));
    document.leave(section);
}

fn runtime(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "runtime");
    let runtime = &mut config.runtime;
    let drivers = [
        ("auto", CgroupDriver::Auto),
        ("cgroupfs", CgroupDriver::Cgroupfs),
        ("systemd", CgroupDriver::Systemd),
    ];
    document.set(section, "cgroup_driver", &mut runtime.cgroup_driver, choice(&drivers));
    document.set(section, "trusted_handler", &mut runtime.trusted_handler, handler_name);
    document.set(section, "untrusted_handler", &mut runtime.untrusted_handler, optional(handler_name));
    let trusts = [("trusted", Trust::Trusted), ("untrusted", Trust::Untrusted)];
    document.set(section, "default_workload_trust", &mut runtime.default_workload_trust, choice(&trusts));
    document.set(section, "monitor", &mut runtime.monitor, optional(absolute_path));
    document.set(section, "monitor_cgroup", &mut runtime.monitor_cgroup, cgroup);
    document.set(section, "seccomp_profile", &mut runtime.seccomp_profile, optional(absolute_path));
    document.set(section, "seccomp_root", &mut runtime.seccomp_root, absolute_path);
    let directories = list("an array of absolute paths", absolute_path);
    document.set(section, "cdi_spec_dirs", &mut runtime.cdi_spec_dirs, directories);
    document.set(section, "monitor_pool", &mut runtime.monitor_pool, number(0..=64, "processes"));

    // The names of handlers are the operator's, so no key in this table is unknown.
    let handlers = document.section(section, "handlers");
    for (name, span, value) in handlers.named_entries() {
        let dotted = handlers.dotted(&shorten(name));
        if is_handler_name(name) {
            handler(document, name, dotted, value, config);
        } else {
            let refused =
                Refused { span, found: format!("\"{}\"", shorten(name)), allowed: HANDLER_NAME.into() };
            document.refuse(format!("name of {dotted}"), refused);
        }
    }
    document.leave(section);
}

/// One entry of `[runtime.handlers]`: a table, or `false`, which removes a handler of an earlier file or of the
/// defaults.
fn handler<'t>(
    document: &mut Document<'_>,
    name: &str,
    dotted: String,
    value: &'t Spanned<DeValue<'t>>,
    config: &mut Config,
) {
    let start = value.span().start;
    if value.get_ref().as_bool() == Some(false) {
        config.handlers.remove(name);
        let below = format!("{dotted}.");
        document.origins.retain(|key, _| !key.starts_with(&below));
        document.note(dotted, start);
        return;
    }
    let section = &mut document.table(dotted.clone(), value, "a table, or false to remove the handler");
    let present = config.handlers.get(name).cloned();
    let is_new = present.is_none();
    let run = Path::new("/run/podvisor");
    let Handler { mut kind, mut annotations, mut aliases } =
        present.unwrap_or_else(|| default::handler(name, run));

    let mut is_vm = matches!(kind, HandlerKind::Vm(_));
    document.set(section, "type", &mut is_vm, choice(&[("oci", false), ("vm", true)]));
    if is_new && value.get_ref().is_table() && !section.has("type") {
        let detail = "a new handler needs a type; allowed are type = \"oci\" and type = \"vm\"".to_owned();
        document.problem(dotted.clone(), start, ProblemKind::Contradiction { detail });
    }
    kind = match kind {
        HandlerKind::Oci { .. } if is_vm => HandlerKind::Vm(Vm::default()),
        HandlerKind::Vm(_) if !is_vm => default::oci(name, run),
        kind => kind,
    };
    match &mut kind {
        HandlerKind::Oci { path, root, arguments, sandbox_container } => {
            document.set(section, "path", path, program);
            document.set(section, "root", root, own_directory);
            document.set(section, "arguments", arguments, list("an array of arguments", argument));
            document.set(section, "sandbox_container", sandbox_container, boolean);
            let names = list("an array of annotation names", annotation);
            document.set(section, "annotations", &mut annotations, names);
        }
        HandlerKind::Vm(vm) => self::vm(document, section, vm),
    }
    document.set(section, "aliases", &mut aliases, list("an array of names of handlers", handler_name));
    document.leave(section);
    document.note(dotted, start);
    config.handlers.insert(name.to_owned(), Handler { kind, annotations, aliases });
}

fn vm(document: &mut Document<'_>, section: &mut Section<'_>, vm: &mut Vm) {
    let hypervisors = [("auto", Hypervisor::Auto), ("kvm", Hypervisor::Kvm), ("qemu", Hypervisor::Qemu)];
    document.set(section, "hypervisor", &mut vm.hypervisor, choice(&hypervisors));
    document.set(section, "allow_emulation", &mut vm.allow_emulation, boolean);
    document.set(section, "qemu", &mut vm.qemu, program);
    let machines = [("auto", Machine::Auto), ("microvm", Machine::Microvm), ("q35", Machine::Q35)];
    document.set(section, "machine", &mut vm.machine, choice(&machines));
    document.set(section, "guest", &mut vm.guest, guest_id);
    document.set(section, "default_memory", &mut vm.default_memory, number(16..=1 << 20, "MiB"));
    document.set(section, "guest_reserve", &mut vm.guest_reserve, number(64..=1 << 16, "MiB"));
    document.set(section, "max_memory", &mut vm.max_memory, number(0..=1 << 24, "MiB"));
    document.set(section, "default_cpus", &mut vm.default_cpus, number(1..=32, "CPUs"));
    document.set(section, "max_cpus", &mut vm.max_cpus, number(1..=32, "CPUs"));
    let forms =
        [("auto", Rootfs::Auto), ("pmem", Rootfs::Pmem), ("block", Rootfs::Block), ("fs", Rootfs::Fs)];
    document.set(section, "rootfs", &mut vm.rootfs, choice(&forms));
    let shared =
        [("node", ShareImages::Node), ("namespace", ShareImages::Namespace), ("pod", ShareImages::Pod)];
    document.set(section, "share_images", &mut vm.share_images, choice(&shared));
    let writable = [("fs", Writable::Fs), ("disk", Writable::Disk)];
    document.set(section, "writable", &mut vm.writable, choice(&writable));
    document.set(section, "writable_size", &mut vm.writable_size, number(16..=1 << 24, "MiB"));
}

fn image(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "image");
    let image = &mut config.image;
    document.set(section, "pause_image", &mut image.pause_image, image_reference);
    document.set(section, "registries_conf", &mut image.registries_conf, absolute_path);
    document.set(section, "certs_dir", &mut image.certs_dir, absolute_path);
    let files = list("an array of absolute paths", absolute_path);
    document.set(section, "auth_files", &mut image.auth_files, files);
    let registries = list("an array of registries", registry);
    document.set(section, "default_registries", &mut image.default_registries, registries);
    document.set(section, "parallel_layers", &mut image.parallel_layers, number(1..=64, "layers"));
    document.set(section, "progress_timeout", &mut image.progress_timeout, number(1..=DAY, "seconds"));
    document.leave(section);
}

fn network(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "network");
    let network = &mut config.network;
    let modes = [("cni", NetworkMode::Cni), ("builtin", NetworkMode::Builtin)];
    document.set(section, "mode", &mut network.mode, choice(&modes));
    document.set(section, "cni_config_dir", &mut network.cni_config_dir, absolute_path);
    let directories = list("an array of absolute paths", absolute_path);
    document.set(section, "cni_bin_dirs", &mut network.cni_bin_dirs, directories);
    document.set(section, "cni_cache_dir", &mut network.cni_cache_dir, absolute_path);
    document.set(section, "cni_timeout", &mut network.cni_timeout, number(1..=600, "seconds"));
    document.set(section, "bridge", &mut network.bridge, interface);
    document.set(section, "subnets", &mut network.subnets, subnets);
    document.leave(section);
}

fn nri(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "nri");
    let nri = &mut config.nri;
    document.set(section, "enabled", &mut nri.enabled, boolean);
    document.set(section, "socket", &mut nri.socket, socket_path);
    document.set(section, "plugin_dir", &mut nri.plugin_dir, absolute_path);
    document.set(section, "plugin_config_dir", &mut nri.plugin_config_dir, absolute_path);
    document.set(section, "registration_timeout", &mut nri.registration_timeout, number(1..=600, "seconds"));
    document.set(section, "request_timeout", &mut nri.request_timeout, number(1..=600, "seconds"));
    document.set(section, "disable_connections", &mut nri.disable_connections, boolean);
    document.leave(section);
}

fn limits(document: &mut Document<'_>, root: &mut Section<'_>, config: &mut Config) {
    let section = &mut document.section(root, "limits");
    let limits = &mut config.limits;
    // kubelet's client accepts messages of 16 MiB, the monitor protocol carries two outputs of that size.
    document.set(section, "exec_sync_output", &mut limits.exec_sync_output, number(1..=16 << 20, "bytes"));
    document.set(section, "log_line", &mut limits.log_line, number(256..=1 << 20, "bytes"));
    document.set(section, "pids", &mut limits.pids, pids);
    document.set(section, "drain_timeout", &mut limits.drain_timeout, number(0..=600, "seconds"));
    document.set(section, "runtime_timeout", &mut limits.runtime_timeout, number(1..=3600, "seconds"));
    document.set(section, "grpc_message", &mut limits.grpc_message, number(4 << 20..=64 << 20, "bytes"));
    document.leave(section);
}
