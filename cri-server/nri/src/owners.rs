//! Which plugin has set what. Two plugins that set the same thing are an error, unless the second has first cleared what the first
//! had set (with a removal mark), after which only it may set it.

use podvisor_proto::nri::{Field, OwningPlugins};

/// Two plugins want different things.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("plugins {plugin:?} and {other:?} both set {what}")]
pub struct Conflict {
    /// The later one.
    pub plugin: String,
    /// The earlier one.
    pub other: String,
    /// What they set.
    pub what: String,
}

/// The owners of everything that was set, as validators are told of them.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    all: OwningPlugins,
}

/// A leading "-" marks a key for removal.
pub(crate) fn removal(key: &str) -> Option<&str> {
    key.strip_prefix('-')
}

impl Owners {
    pub(crate) fn as_message(&self) -> &OwningPlugins {
        &self.all
    }

    /// `plugin` sets a simple field of a container.
    pub(crate) fn claim(&mut self, container: &str, field: Field, plugin: &str) -> Result<(), Conflict> {
        let simple = &mut self.all.owners.entry(container.to_owned()).or_default().simple;
        check(simple.get(&(field as i32)), plugin, || name(field, None))?;
        simple.insert(field as i32, plugin.to_owned());
        Ok(())
    }

    /// `plugin` sets an entry of a map or list.
    pub(crate) fn claim_entry(
        &mut self,
        container: &str,
        field: Field,
        entry: &str,
        plugin: &str,
    ) -> Result<(), Conflict> {
        let compound = &mut self.all.owners.entry(container.to_owned()).or_default().compound;
        let owners = &mut compound.entry(field as i32).or_default().owners;
        check(owners.get(entry), plugin, || name(field, Some(entry)))?;
        owners.insert(entry.to_owned(), plugin.to_owned());
        Ok(())
    }

    /// `plugin` takes part in a field that several may add to.
    pub(crate) fn join(&mut self, container: &str, field: Field, plugin: &str) {
        let simple = &mut self.all.owners.entry(container.to_owned()).or_default().simple;
        simple
            .entry(field as i32)
            .and_modify(|owners| {
                owners.push(',');
                owners.push_str(plugin);
            })
            .or_insert_with(|| plugin.to_owned());
    }

    /// `plugin` has cleared a simple field.
    pub(crate) fn clear(&mut self, container: &str, field: Field, plugin: &str) {
        let simple = &mut self.all.owners.entry(container.to_owned()).or_default().simple;
        simple.insert(field as i32, format!("-{plugin}"));
    }

    /// `plugin` has taken an entry away.
    pub(crate) fn clear_entry(&mut self, container: &str, field: Field, entry: &str, plugin: &str) {
        let compound = &mut self.all.owners.entry(container.to_owned()).or_default().compound;
        let owners = &mut compound.entry(field as i32).or_default().owners;
        owners.insert(entry.to_owned(), format!("-{plugin}"));
    }
}

fn check(owner: Option<&String>, plugin: &str, what: impl FnOnce() -> String) -> Result<(), Conflict> {
    let Some(owner) = owner else { return Ok(()) };
    let other = match removal(owner) {
        Some(cleared_by) if cleared_by == plugin => return Ok(()),
        Some(cleared_by) => cleared_by,
        None => owner,
    };
    Err(Conflict { plugin: plugin.to_owned(), other: other.to_owned(), what: what() })
}

fn name(field: Field, entry: Option<&str>) -> String {
    match entry {
        Some(entry) => format!("{} {entry:?}", field.as_str_name()),
        None => field.as_str_name().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_to_set_something_loses() {
        let mut owners = Owners::default();
        owners.claim("c", Field::MemLimit, "a").unwrap();
        let conflict = owners.claim("c", Field::MemLimit, "b").unwrap_err();
        assert_eq!(conflict.to_string(), r#"plugins "b" and "a" both set MemLimit"#);
        owners.claim("other", Field::MemLimit, "b").unwrap();
        owners.claim_entry("c", Field::Env, "X", "a").unwrap();
        owners.claim_entry("c", Field::Env, "Y", "b").unwrap();
        let conflict = owners.claim_entry("c", Field::Env, "X", "b").unwrap_err();
        assert_eq!(conflict.to_string(), r#"plugins "b" and "a" both set Env "X""#);
    }

    #[test]
    fn who_clears_may_set() {
        let mut owners = Owners::default();
        owners.claim_entry("c", Field::Env, "X", "a").unwrap();
        owners.clear_entry("c", Field::Env, "X", "b");
        owners.claim_entry("c", Field::Env, "X", "c").unwrap_err();
        owners.claim_entry("c", Field::Env, "X", "b").unwrap();
        owners.claim("c", Field::Args, "a").unwrap();
        owners.clear("c", Field::Args, "b");
        owners.claim("c", Field::Args, "b").unwrap();
        owners.join("c", Field::OciHooks, "a");
        owners.join("c", Field::OciHooks, "b");
        assert_eq!(owners.as_message().owners["c"].simple[&(Field::OciHooks as i32)], "a,b");
    }
}
