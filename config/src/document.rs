//! Reading one TOML file key by key: remembers where each value stood, and which keys nobody asked for.
//!
//! What is known is what is read: there is no second list of keys that could differ from the code.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::{Problem, ProblemKind};
use crate::nearest::nearest;
use crate::value::Refused;

/// Where a value that is in force was written.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) file: PathBuf,
    pub(crate) line: usize,
}

/// By dotted key. A key that is absent has its default.
pub(crate) type Origins = BTreeMap<String, Origin>;

/// A file while it is read.
pub(crate) struct Document<'d> {
    file: &'d Path,
    line_starts: Vec<usize>,
    problems: Vec<Problem>,
    known: BTreeSet<String>,
    unknown: Vec<(String, usize)>,
    pub(crate) origins: &'d mut Origins,
}

/// One table of the file, or the place of a table that the file does not have.
pub(crate) struct Section<'t> {
    name: String,
    table: Option<&'t DeTable<'t>>,
    asked: BTreeSet<&'static str>,
}

impl<'t> Section<'t> {
    /// The whole file.
    pub(crate) fn root(table: &'t DeTable<'t>) -> Self {
        Self { name: String::new(), table: Some(table), asked: BTreeSet::new() }
    }

    /// Dotted name of `key` in this table.
    pub(crate) fn dotted(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    /// Whether the file says anything about `key`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// Keys and values of a table whose keys are names that the operator chose.
    pub(crate) fn named_entries(&self) -> Vec<(&'t str, Range<usize>, &'t Spanned<DeValue<'t>>)> {
        let entries = self.table.into_iter().flat_map(|table| table.iter());
        entries.map(|(key, value)| (key.get_ref().as_ref(), key.span(), value)).collect()
    }
}

impl<'d> Document<'d> {
    pub(crate) fn new(file: &'d Path, text: &str, origins: &'d mut Origins) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self {
            file,
            line_starts: std::iter::once(0).chain(breaks).collect(),
            problems: Vec::new(),
            known: BTreeSet::new(),
            unknown: Vec::new(),
            origins,
        }
    }

    /// Line of a byte offset, counted from 1.
    pub(crate) fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    /// Reads `key` into `target` if the file has it.
    pub(crate) fn set<T>(
        &mut self,
        section: &mut Section<'_>,
        key: &'static str,
        target: &mut T,
        parse: impl Fn(&Spanned<DeValue<'_>>) -> Result<T, Refused>,
    ) {
        let dotted = self.ask(section, key);
        let Some((_, value)) = section.table.and_then(|table| table.get_key_value(key)) else { return };
        match parse(value) {
            Ok(parsed) => {
                *target = parsed;
                self.note(dotted, value.span().start);
            }
            Err(refused) => self.refuse(dotted, refused),
        }
    }

    /// The table `key`; reading from it sets nothing when the file does not have it.
    pub(crate) fn section<'t>(&mut self, parent: &mut Section<'t>, key: &'static str) -> Section<'t> {
        let name = self.ask(parent, key);
        match parent.table.and_then(|table| table.get(key)) {
            None => Section { name, table: None, asked: BTreeSet::new() },
            Some(value) => self.table(name, value, "a table"),
        }
    }

    /// `value` as a table with the dotted name `name`.
    pub(crate) fn table<'t>(
        &mut self,
        name: String,
        value: &'t Spanned<DeValue<'t>>,
        allowed: &str,
    ) -> Section<'t> {
        let table = value.get_ref().as_table();
        if table.is_none() {
            self.refuse(name.clone(), Refused::new(value, allowed));
        }
        Section { name, table, asked: BTreeSet::new() }
    }

    /// Ends the reading of a table: what was not asked for is unknown.
    pub(crate) fn leave(&mut self, section: &Section<'_>) {
        for (key, span, _) in section.named_entries() {
            if !section.asked.contains(key) {
                let line = self.line(span.start);
                self.unknown.push((section.dotted(&shorten(key)), line));
            }
        }
    }

    /// Remembers that `dotted` was set at `offset`.
    pub(crate) fn note(&mut self, dotted: String, offset: usize) {
        let line = self.line(offset);
        self.origins.insert(dotted, Origin { file: self.file.to_owned(), line });
    }

    /// Remembers a value that cannot be taken.
    pub(crate) fn refuse(&mut self, dotted: String, refused: Refused) {
        let Refused { span, found, allowed } = refused;
        self.problem(dotted, span.start, ProblemKind::BadValue { found, allowed });
    }

    /// Remembers any other mistake.
    pub(crate) fn problem(&mut self, key: String, offset: usize, kind: ProblemKind) {
        let line = Some(self.line(offset));
        self.problems.push(Problem { file: self.file.to_owned(), line, key, kind });
    }

    /// All mistakes of the file in the order of its lines.
    pub(crate) fn finish(mut self) -> Vec<Problem> {
        for (key, line) in std::mem::take(&mut self.unknown) {
            let nearest = nearest(&key, self.known.iter().map(String::as_str)).unwrap_or_default().to_owned();
            let kind = ProblemKind::UnknownKey { nearest };
            self.problems.push(Problem { file: self.file.to_owned(), line: Some(line), key, kind });
        }
        self.problems.sort_by_key(|problem| problem.line);
        self.problems
    }

    fn ask(&mut self, section: &mut Section<'_>, key: &'static str) -> String {
        let dotted = section.dotted(key);
        section.asked.insert(key);
        self.known.insert(dotted.clone());
        dotted
    }
}

/// A key as it may stand in a message: bounded and without control characters.
pub(crate) fn shorten(key: &str) -> String {
    let mut short: String = key.chars().take(64).flat_map(char::escape_debug).collect();
    if key.chars().nth(64).is_some() {
        short.push('…');
    }
    short
}
