//! The configuration that is being made, and what became of each key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Value;

use super::source::{Leaf, Source};
use super::{Fate, Imported, Note};
use crate::error::ConfigError;
use crate::{Config, Problem};

/// A key of podvisor's with its value, and the keys that it came from.
struct Setting {
    value: Value,
    from: Vec<Note>,
}

/// Keys by table and name. A table is dotted, "" for the file itself.
#[derive(Default)]
pub(super) struct Draft {
    settings: BTreeMap<(String, String), Setting>,
    notes: Vec<Note>,
}

impl Draft {
    /// Sets a key to what `leaf` means.
    pub(super) fn set(&mut self, table: &str, key: &str, value: impl Into<Value>, leaf: &Leaf) {
        let target = if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") };
        let (value, taken) = (value.into(), note(leaf, Fate::Taken(target)));
        let place = self.settings.entry((table.to_owned(), key.to_owned()));
        let setting = place.or_insert_with(|| Setting { value: value.clone(), from: Vec::new() });
        if setting.value != value {
            let overridden = Fate::Needless(format!("{} goes before it", leaf.key));
            let before = setting.from.drain(..).map(|note| Note { fate: overridden.clone(), ..note });
            self.notes.extend(before);
            setting.value = value;
        }
        setting.from.push(taken);
    }

    /// Sets a key to the value itself, if it says anything.
    pub(super) fn copy(&mut self, table: &str, key: &str, leaf: Option<Leaf>) {
        let Some(leaf) = leaf else { return };
        if leaf.is_zero() {
            return self.needless(&leaf, "says nothing");
        }
        self.set(table, key, leaf.value.clone(), &leaf);
    }

    /// Sets a key that counts seconds to a duration of Go's.
    pub(super) fn seconds(&mut self, table: &str, key: &str, leaf: Option<Leaf>) {
        let Some(leaf) = leaf else { return };
        match leaf.seconds() {
            Some(seconds) => self.set(table, key, seconds, &leaf),
            None if leaf.is_zero() => self.needless(&leaf, "says nothing"),
            None => self.lost(&leaf, "is no duration"),
        }
    }

    pub(super) fn needless(&mut self, leaf: &Leaf, why: impl Into<String>) {
        self.notes.push(note(leaf, Fate::Needless(why.into())));
    }

    pub(super) fn by_hand(&mut self, leaf: &Leaf, what: impl Into<String>) {
        self.notes.push(note(leaf, Fate::ToDo(what.into())));
    }

    pub(super) fn lost(&mut self, leaf: &Leaf, why: impl Into<String>) {
        self.notes.push(note(leaf, Fate::Lost(why.into())));
    }

    /// What stands in no file.
    pub(super) fn remark(&mut self, key: &str, fate: Fate) {
        self.notes.push(Note { key: key.to_owned(), file: PathBuf::new(), fate });
    }

    /// Reports what nobody took. `needless` has keys, or prefixes that end in a dot, with the reason.
    pub(super) fn rest(&mut self, source: Source, needless: &[(&str, &str)]) {
        for (path, leaf) in source.rest() {
            let path = path.join(".");
            let known =
                needless.iter().find(|(key, _)| *key == path || key.ends_with('.') && path.starts_with(key));
            match known {
                Some((_, why)) => self.needless(&leaf, *why),
                None if leaf.is_zero() => self.needless(&leaf, "says nothing"),
                None => self.lost(&leaf, ""),
            }
        }
    }

    /// The file. A value that podvisor refuses is left out and reported with what is allowed.
    pub(super) fn finish(mut self) -> Imported {
        loop {
            let toml = self.toml();
            let problems = match Config::parse(Path::new("config.toml"), &toml) {
                Err(ConfigError::Invalid { problems }) => problems,
                _ => Vec::new(),
            };
            if !problems.iter().any(|problem| self.leave_out(problem)) {
                self.notes.extend(self.settings.into_values().flat_map(|setting| setting.from));
                self.notes.sort_by(|a, b| (&a.key, &a.file).cmp(&(&b.key, &b.file)));
                return Imported { toml, notes: self.notes };
            }
        }
    }

    /// Takes out the setting that a problem is about, if there is one.
    fn leave_out(&mut self, problem: &Problem) -> bool {
        let about = |(table, key): &(String, String)| {
            let dotted = if table.is_empty() { key.clone() } else { format!("{table}.{key}") };
            dotted == problem.key || *table == problem.key
        };
        let Some(key) = self.settings.keys().find(|key| about(key)).cloned() else { return false };
        let text = problem.to_string();
        // The file and line are those of a file that nobody has seen.
        let text = text.split_once(": ").map_or(text.as_str(), |(_, text)| text);
        let refused = Fate::ToDo(text.to_owned());
        let from = self.settings.remove(&key).map(|setting| setting.from).unwrap_or_default();
        self.notes.extend(from.into_iter().map(|note| Note { fate: refused.clone(), ..note }));
        true
    }

    fn toml(&self) -> String {
        let mut lines = Vec::new();
        let mut above = "";
        for ((table, key), Setting { value, from }) in &self.settings {
            if table != above {
                lines.push(format!("\n[{table}]\n"));
                above = table;
            }
            let from: Vec<_> = from.iter().map(|note| note.key.as_str()).collect();
            lines.push(format!("# {}\n{key} = {value}\n", from.join(", ")));
        }
        lines.concat().trim_start().to_owned()
    }
}

fn note(leaf: &Leaf, fate: Fate) -> Note {
    Note { key: leaf.key.clone(), file: leaf.file.clone(), fate }
}
