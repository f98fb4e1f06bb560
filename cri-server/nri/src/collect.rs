//! What several plugins ask for, put together: each sees the container as those before it have left it, and a thing that two of
//! them set is an error. Pure.

mod resources;

use std::collections::BTreeMap;

use podvisor_proto::nri::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, Field, Hooks, KeyValue,
    LinuxContainerAdjustment, LinuxNamespace, LinuxResources,
};

use crate::owners::{Conflict, Owners, removal};
pub use resources::overlay;

/// Why an answer of a plugin cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectError {
    /// Two plugins want different things.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// An update of the very container that is being created.
    #[error("plugin {plugin:?} asked for an update of the container that is being created")]
    UpdateOfNew {
        /// Which.
        plugin: String,
    },
}

/// The answers to one CreateContainer.
#[derive(Debug)]
pub(crate) struct Creation {
    /// As the next plugin is to see it.
    pub(crate) container: Container,
    pub(crate) adjustment: ContainerAdjustment,
    pub(crate) changes: Changes,
}

/// Updates and evictions that came with answers.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) owners: Owners,
    /// By container, in the order of their ids.
    pub(crate) updates: BTreeMap<String, ContainerUpdate>,
    pub(crate) evictions: Vec<ContainerEviction>,
    /// No update may be about this one.
    new: Option<String>,
}

impl Changes {
    /// Adds what `plugin` asks for. An update that may fail and conflicts is left out.
    pub(crate) fn add(
        &mut self,
        plugin: &str,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> Result<(), CollectError> {
        for update in updates {
            let id = update.container_id;
            if self.new.as_ref() == Some(&id) {
                return Err(CollectError::UpdateOfNew { plugin: plugin.to_owned() });
            }
            let Some(asked) = update.linux.and_then(|linux| linux.resources) else { continue };
            let known = self.updates.get(&id);
            // A copy: an update that may fail changes nothing when it does.
            let mut whole = known
                .and_then(|known| known.linux.clone())
                .and_then(|linux| linux.resources)
                .unwrap_or_default();
            let ignore = update.ignore_failure && known.is_none_or(|known| known.ignore_failure);
            match resources::claim(&mut self.owners, &id, plugin, &asked) {
                Ok(()) => overlay(&mut whole, asked),
                Err(_) if update.ignore_failure => continue,
                Err(conflict) => return Err(conflict.into()),
            }
            let linux = podvisor_proto::nri::LinuxContainerUpdate { resources: Some(whole) };
            let update =
                ContainerUpdate { container_id: id.clone(), linux: Some(linux), ignore_failure: ignore };
            self.updates.insert(id, update);
        }
        self.evictions.extend(evictions);
        Ok(())
    }

    /// What was asked for `container` itself.
    pub(crate) fn take(&mut self, container: &str) -> Option<LinuxResources> {
        self.updates.remove(container)?.linux?.resources
    }
}

impl Creation {
    pub(crate) fn of(container: Container) -> Self {
        let changes = Changes { new: Some(container.id.clone()), ..Changes::default() };
        Self { container, adjustment: ContainerAdjustment::default(), changes }
    }

    /// Adds what `plugin` asks for.
    pub(crate) fn adjust(&mut self, plugin: &str, asked: ContainerAdjustment) -> Result<(), Conflict> {
        // Taken apart completely: a new field has to be thought of.
        let ContainerAdjustment { annotations, mounts, env, hooks, linux, rlimits, cdi_devices, args } =
            asked;
        let (id, owners) = (self.container.id.clone(), &mut self.changes.owners);
        let whole = &mut self.adjustment;
        let container = &mut self.container;

        let mut map = Entries { id: &id, plugin, field: Field::Annotations, owners };
        map.map(annotations, &mut container.annotations, &mut whole.annotations)?;

        let mut list = Entries { id: &id, plugin, field: Field::Mounts, owners };
        list.list(mounts, &mut container.mounts, &mut whole.mounts, |mount| &mount.destination)?;

        self.adjust_env(plugin, env)?;
        self.adjust_args(plugin, args)?;
        self.adjust_hooks(plugin, hooks.unwrap_or_default());
        if let Some(linux) = linux {
            self.adjust_linux(plugin, linux)?;
        }

        let owners = &mut self.changes.owners;
        for limit in rlimits {
            owners.claim_entry(&id, Field::Rlimits, &limit.r#type, plugin)?;
            self.container.rlimits.retain(|present| present.r#type != limit.r#type);
            self.container.rlimits.push(limit.clone());
            self.adjustment.rlimits.push(limit);
        }
        for device in cdi_devices {
            owners.claim_entry(&id, Field::CdiDevices, &device.name, plugin)?;
            self.adjustment.cdi_devices.push(device);
        }
        Ok(())
    }

    fn adjust_env(&mut self, plugin: &str, env: Vec<KeyValue>) -> Result<(), Conflict> {
        let id = self.container.id.clone();
        let mut present: Vec<KeyValue> = self
            .container
            .env
            .iter()
            .map(|entry| {
                let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
                KeyValue { key: key.to_owned(), value: value.to_owned() }
            })
            .collect();
        let mut list = Entries { id: &id, plugin, field: Field::Env, owners: &mut self.changes.owners };
        list.list(env, &mut present, &mut self.adjustment.env, |variable| &variable.key)?;
        self.container.env = present.into_iter().map(|kv| format!("{}={}", kv.key, kv.value)).collect();
        Ok(())
    }

    fn adjust_args(&mut self, plugin: &str, mut args: Vec<String>) -> Result<(), Conflict> {
        let id = &self.container.id;
        if args.first().is_some_and(String::is_empty) {
            self.changes.owners.clear(id, Field::Args, plugin);
            args.remove(0);
        }
        if !args.is_empty() {
            self.changes.owners.claim(id, Field::Args, plugin)?;
            self.container.args.clone_from(&args);
            self.adjustment.args = args;
        }
        Ok(())
    }

    /// Several plugins may add hooks.
    fn adjust_hooks(&mut self, plugin: &str, hooks: Hooks) {
        if hooks == Hooks::default() {
            return;
        }
        self.changes.owners.join(&self.container.id, Field::OciHooks, plugin);
        for whole in
            [self.container.hooks.get_or_insert_default(), self.adjustment.hooks.get_or_insert_default()]
        {
            let Hooks { prestart, create_runtime, create_container, start_container, poststart, poststop } =
                hooks.clone();
            whole.prestart.extend(prestart);
            whole.create_runtime.extend(create_runtime);
            whole.create_container.extend(create_container);
            whole.start_container.extend(start_container);
            whole.poststart.extend(poststart);
            whole.poststop.extend(poststop);
        }
    }

    fn adjust_linux(&mut self, plugin: &str, asked: LinuxContainerAdjustment) -> Result<(), Conflict> {
        let LinuxContainerAdjustment {
            devices,
            resources,
            cgroups_path,
            oom_score_adj,
            io_priority,
            seccomp_policy,
            namespaces,
            sysctl,
            net_devices,
            scheduler,
            rdt,
            memory_policy,
        } = asked;
        let (id, owners) = (self.container.id.clone(), &mut self.changes.owners);
        let whole = self.adjustment.linux.get_or_insert_default();
        let container = self.container.linux.get_or_insert_default();

        let mut list = Entries { id: &id, plugin, field: Field::Devices, owners };
        list.list(devices, &mut container.devices, &mut whole.devices, |device| &device.path)?;
        if let Some(asked) = resources {
            resources::claim(owners, &id, plugin, &asked)?;
            overlay(container.resources.get_or_insert_default(), asked.clone());
            overlay(whole.resources.get_or_insert_default(), asked);
        }
        if !cgroups_path.is_empty() {
            owners.claim(&id, Field::CgroupsPath, plugin)?;
            container.cgroups_path.clone_from(&cgroups_path);
            whole.cgroups_path = cgroups_path;
        }
        if oom_score_adj.is_some() {
            owners.claim(&id, Field::OomScoreAdj, plugin)?;
            container.oom_score_adj = oom_score_adj;
            whole.oom_score_adj = oom_score_adj;
        }
        if io_priority.is_some() {
            owners.claim(&id, Field::IoPriority, plugin)?;
            container.io_priority = io_priority;
            whole.io_priority = io_priority;
        }
        if seccomp_policy.is_some() {
            owners.claim(&id, Field::SeccompPolicy, plugin)?;
            container.seccomp_policy.clone_from(&seccomp_policy);
            whole.seccomp_policy = seccomp_policy;
        }
        for namespace in namespaces {
            let LinuxNamespace { r#type, .. } = &namespace;
            let kind = removal(r#type).unwrap_or(r#type);
            owners.claim_entry(&id, Field::Namespace, kind, plugin)?;
            container.namespaces.retain(|present| present.r#type != kind);
            if removal(r#type).is_none() {
                container.namespaces.push(namespace.clone());
            }
            whole.namespaces.push(namespace);
        }
        let mut map = Entries { id: &id, plugin, field: Field::Sysctl, owners };
        map.map(sysctl, &mut container.sysctl, &mut whole.sysctl)?;
        let mut map = Entries { id: &id, plugin, field: Field::LinuxNetDevices, owners };
        map.map(net_devices, &mut container.net_devices, &mut whole.net_devices)?;
        if scheduler.is_some() {
            owners.claim(&id, Field::LinuxSched, plugin)?;
            container.scheduler.clone_from(&scheduler);
            whole.scheduler = scheduler;
        }
        if let Some(asked) = rdt {
            let rdt = whole.rdt.get_or_insert_default();
            if asked.remove {
                for field in [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring] {
                    owners.clear(&id, field, plugin);
                }
                *rdt = podvisor_proto::nri::LinuxRdt { remove: true, ..Default::default() };
            }
            if asked.clos_id.is_some() {
                owners.claim(&id, Field::RdtClosId, plugin)?;
                rdt.clos_id = asked.clos_id;
            }
            if asked.schemata.is_some() {
                owners.claim(&id, Field::RdtSchemata, plugin)?;
                rdt.schemata = asked.schemata;
            }
            if asked.enable_monitoring.is_some() {
                owners.claim(&id, Field::RdtEnableMonitoring, plugin)?;
                rdt.enable_monitoring = asked.enable_monitoring;
            }
        }
        if memory_policy.is_some() {
            owners.claim(&id, Field::MemoryPolicy, plugin)?;
            whole.memory_policy = memory_policy;
        }
        Ok(())
    }
}

/// Adjustment of a map or list: entries with a removal mark go first, then the others are set.
struct Entries<'a> {
    id: &'a str,
    plugin: &'a str,
    field: Field,
    owners: &'a mut Owners,
}

impl Entries<'_> {
    fn map<V: Clone + Default>(
        &mut self,
        asked: BTreeMap<String, V>,
        container: &mut BTreeMap<String, V>,
        whole: &mut BTreeMap<String, V>,
    ) -> Result<(), Conflict> {
        let (removed, set): (Vec<_>, Vec<_>) = asked.into_iter().partition(|(key, _)| removal(key).is_some());
        for (marked, _) in removed {
            let key = removal(&marked).unwrap_or_default();
            if whole.remove(key).is_some() {
                self.owners.clear_entry(self.id, self.field, key, self.plugin);
            }
            container.remove(key);
            whole.insert(marked, V::default());
        }
        for (key, value) in set {
            self.owners.claim_entry(self.id, self.field, &key, self.plugin)?;
            container.insert(key.clone(), value.clone());
            whole.insert(key, value);
        }
        Ok(())
    }

    fn list<V: Clone>(
        &mut self,
        asked: Vec<V>,
        container: &mut Vec<V>,
        whole: &mut Vec<V>,
        key: impl Fn(&V) -> &String,
    ) -> Result<(), Conflict> {
        let (removed, set): (Vec<_>, Vec<_>) =
            asked.into_iter().partition(|entry| removal(key(entry)).is_some());
        for marked in removed {
            let name = removal(key(&marked)).unwrap_or_default().to_owned();
            if whole.iter().any(|entry| *key(entry) == name) {
                self.owners.clear_entry(self.id, self.field, &name, self.plugin);
            }
            whole.retain(|entry| *key(entry) != name && key(entry) != key(&marked));
            container.retain(|entry| *key(entry) != name);
            whole.push(marked);
        }
        for entry in set {
            let name = key(&entry).clone();
            self.owners.claim_entry(self.id, self.field, &name, self.plugin)?;
            container.retain(|present| *key(present) != name);
            container.push(entry.clone());
            whole.push(entry);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
