//! What edits do to a spec. Pure but for the host's device nodes, which the caller looks up.

use std::io;
use std::path::Path;

use oci_spec::runtime::{
    Hook as OciHook, Hooks, Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxIntelRdt,
    LinuxNetDevice, LinuxResources, Mount as OciMount, Spec,
};

use super::document::{CdiError, ContainerEdits, DeviceNode, Hook, IntelRdt, Mount, Text};

/// A device node of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostNode {
    /// `b`, `c` or `p`.
    pub kind: char,
    /// 0 for a pipe.
    pub major: i64,
    /// See `major`.
    pub minor: i64,
    /// Permission bits.
    pub mode: u32,
}

/// Applies `edits` to `spec`. `host` looks a device node up, without following a link at its end.
pub fn apply(
    spec: &mut Spec,
    edits: &ContainerEdits,
    host: impl Fn(&Path) -> io::Result<HostNode>,
) -> Result<(), CdiError> {
    environment(spec, &edits.env);
    for node in &edits.device_nodes {
        device(spec, node, &host)?;
    }
    for device in &edits.net_devices {
        let mut moved = LinuxNetDevice::default();
        moved.set_name(Some(device.name.clone()));
        let mut devices = linux(spec).net_devices().clone().unwrap_or_default();
        devices.insert(device.host_interface_name.clone(), moved);
        linux(spec).set_net_devices(Some(devices));
    }
    mounts(spec, &edits.mounts);
    for one in &edits.hooks {
        hook(spec, one)?;
    }
    if let Some(rdt) = &edits.intel_rdt {
        linux(spec).set_intel_rdt(Some(intel_rdt(rdt)));
    }
    groups(spec, &edits.additional_gids);
    Ok(())
}

fn linux(spec: &mut Spec) -> &mut Linux {
    spec.linux_mut().get_or_insert_with(Linux::default)
}

/// A variable that is there gets the new value, in its place.
fn environment(spec: &mut Spec, env: &[Text]) {
    let Some(process) = spec.process_mut() else { return };
    let variables = process.env_mut().get_or_insert_with(Vec::new);
    for Text(variable) in env {
        let name = |text: &str| text.split('=').next().unwrap_or_default().to_owned();
        match variables.iter_mut().find(|known| name(known) == name(variable)) {
            Some(known) => known.clone_from(variable),
            None => variables.push(variable.clone()),
        }
    }
}

fn device(
    spec: &mut Spec,
    node: &DeviceNode,
    host: impl Fn(&Path) -> io::Result<HostNode>,
) -> Result<(), CdiError> {
    let on_host = if node.host_path.is_empty() { &node.path } else { &node.host_path };
    let place = || format!("device node {on_host}");
    let is_complete = !node.kind.is_empty() && (node.major != 0 || node.kind == "p");
    let found = match host(Path::new(on_host)) {
        Ok(found) => Some(found),
        // A vendor may say everything about a node that is not there.
        Err(_) if is_complete => None,
        Err(error) => return Err(CdiError::new(place(), error.to_string())),
    };
    let kind = match (&found, node.kind.as_str()) {
        (Some(found), "") => found.kind,
        (Some(found), stated) if !is_complete && !stated.starts_with(found.kind) => {
            return Err(CdiError::new(place(), format!("has type {}, not {stated}", found.kind)));
        }
        (_, stated) => stated.chars().next().unwrap_or('c'),
    };
    let (major, minor) = match &found {
        Some(found) if kind != 'p' && node.major == 0 => (found.major, found.minor),
        _ => (node.major, node.minor),
    };
    let user = spec.process().as_ref().map(|process| (process.user().uid(), process.user().gid()));
    // Else the container's user could not open what it was given.
    let owner = |stated: Option<u32>, of: u32| stated.or((of > 0).then_some(of));
    let (uid, gid) = user.unwrap_or_default();
    let typ = match kind {
        'b' => LinuxDeviceType::B,
        'u' => LinuxDeviceType::U,
        'p' => LinuxDeviceType::P,
        _ => LinuxDeviceType::C,
    };
    let mut made = LinuxDevice::default();
    made.set_path(node.path.clone().into())
        .set_typ(typ)
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(node.file_mode.or(found.map(|found| found.mode)))
        .set_uid(owner(node.uid, uid))
        .set_gid(owner(node.gid, gid));
    let linux = linux(spec);
    let devices = linux.devices_mut().get_or_insert_with(Vec::new);
    devices.retain(|other| other.path() != made.path());
    devices.push(made);
    if matches!(typ, LinuxDeviceType::B | LinuxDeviceType::C) {
        let access = if node.permissions.is_empty() { "rwm" } else { &node.permissions };
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(typ))
            .set_major(Some(major))
            .set_minor(Some(minor))
            .set_access(Some(access.to_owned()));
        let resources = linux.resources_mut().get_or_insert_with(LinuxResources::default);
        resources.devices_mut().get_or_insert_with(Vec::new).push(rule);
    }
    Ok(())
}

/// A mount takes the place of what was to be mounted there; all are put in an order in which none hides another.
fn mounts(spec: &mut Spec, mounts: &[Mount]) {
    if mounts.is_empty() {
        return;
    }
    let all = spec.mounts_mut().get_or_insert_with(Vec::new);
    for mount in mounts {
        let destination = Path::new(&mount.container_path).components().collect::<std::path::PathBuf>();
        all.retain(|other| *other.destination() != destination);
        let mut options = mount.options.clone();
        let is_bind = options.iter().any(|option| option == "bind" || option == "rbind");
        if mount.kind.is_empty() && !is_bind {
            options.insert(0, "rbind".to_owned());
        }
        let mut made = OciMount::default();
        made.set_destination(destination)
            .set_source(Some(mount.host_path.clone().into()))
            .set_typ(Some(mount.kind.clone()).filter(|kind| !kind.is_empty()))
            .set_options(Some(options));
        all.push(made);
    }
    // Stable, as the specification's own library sorts.
    all.sort_by_key(|mount| mount.destination().components().count());
}

fn hook(spec: &mut Spec, hook: &Hook) -> Result<(), CdiError> {
    let texts = |texts: &[Text]| {
        (!texts.is_empty()).then(|| texts.iter().map(|Text(text)| text.clone()).collect::<Vec<_>>())
    };
    let mut made = OciHook::default();
    made.set_path(hook.path.clone().into())
        .set_args(texts(&hook.args))
        .set_env(texts(&hook.env))
        .set_timeout(hook.timeout);
    let hooks = spec.hooks_mut().get_or_insert_with(Hooks::default);
    // A file may still ask for what newer files do otherwise.
    #[allow(deprecated)]
    let list = match hook.name.as_str() {
        "prestart" => hooks.prestart_mut(),
        "createRuntime" => hooks.create_runtime_mut(),
        "createContainer" => hooks.create_container_mut(),
        "startContainer" => hooks.start_container_mut(),
        "poststart" => hooks.poststart_mut(),
        "poststop" => hooks.poststop_mut(),
        other => return Err(CdiError::new("hooks", format!("{other:?} is no hook"))),
    };
    list.get_or_insert_with(Vec::new).push(made);
    Ok(())
}

fn intel_rdt(rdt: &IntelRdt) -> LinuxIntelRdt {
    let stated = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let mut made = LinuxIntelRdt::default();
    made.set_clos_id(stated(&rdt.clos_id))
        .set_l3_cache_schema(stated(&rdt.l3_cache_schema))
        .set_mem_bw_schema(stated(&rdt.mem_bw_schema))
        .set_schemata(Some(rdt.schemata.clone()).filter(|lines| !lines.is_empty()))
        .set_enable_monitoring(rdt.enable_monitoring.then_some(true));
    made
}

fn groups(spec: &mut Spec, gids: &[u32]) {
    let Some(process) = spec.process_mut() else { return };
    let groups = process.user_mut().additional_gids_mut().get_or_insert_with(Vec::new);
    for gid in gids {
        // 0 would be the root group, by an oversight.
        if *gid != 0 && !groups.contains(gid) {
            groups.push(*gid);
        }
    }
}

#[cfg(test)]
mod tests;
