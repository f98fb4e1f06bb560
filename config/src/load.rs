//! From files to a configuration: which files are read, in which order, and what holds when all are read.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use crate::document::{Document, Origins, Section};
use crate::error::{ConfigError, Problem, ProblemKind};
use crate::{Config, HandlerKind, check, default, read};

/// A configuration has some kilobytes; what is larger was given by mistake (a device, a log).
const LARGEST_FILE: u64 = 1 << 20;

impl Config {
    /// Reads `file` and its drop-ins, `<file>.d/*.toml` in lexical order of their names (hidden files are left
    /// out). A later file overrides key by key. A missing `file` is an error only when `required`; its drop-ins
    /// count in either case. All mistakes of all files are reported at once.
    pub fn load(file: &Path, required: bool) -> Result<Self, ConfigError> {
        // Editors keep their unfinished copies in hidden files.
        let texts =
            with_drop_ins(file, required, |name| name.ends_with(b".toml") && !name.starts_with(b"."))?;
        build(file, &texts)
    }

    /// The configuration that `text` alone makes, as if it were the contents of `file` (which is only named
    /// in messages).
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        build(file, &[(file.to_owned(), text.as_bytes().to_vec())])
    }
}

/// `file`, which may be missing unless it is `required`, and the files in `<file>.d/` whose names are `wanted`, in the order in which they
/// count.
pub(crate) fn with_drop_ins(
    file: &Path,
    required: bool,
    wanted: fn(&[u8]) -> bool,
) -> Result<Vec<(PathBuf, Vec<u8>)>, ConfigError> {
    let mut texts = Vec::new();
    match read_file(file) {
        Ok(text) => texts.push((file.to_owned(), text)),
        Err(ConfigError::Read { source, .. }) if !required && source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    for drop_in in drop_ins(file, wanted)? {
        let text = read_file(&drop_in)?;
        texts.push((drop_in, text));
    }
    Ok(texts)
}

fn drop_ins(file: &Path, wanted: fn(&[u8]) -> bool) -> Result<Vec<PathBuf>, ConfigError> {
    let mut directory = file.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let failed = |source| ConfigError::List { path: directory.clone(), source };
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if wanted(name.as_encoded_bytes()) {
            names.insert(name);
        }
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LARGEST_FILE + 1).read_to_end(&mut text))
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    if text.len() as u64 > LARGEST_FILE {
        return Err(ConfigError::TooLarge { path: path.to_owned(), limit: LARGEST_FILE });
    }
    Ok(text)
}

/// Applies the files one after the other to the defaults. `main` is where a problem is reported that no file
/// contains.
fn build(main: &Path, texts: &[(PathBuf, Vec<u8>)]) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    let mut origins = Origins::new();
    let mut problems = Vec::new();
    for (path, bytes) in texts {
        problems.extend(apply(&mut config, &mut origins, path, bytes));
    }
    if problems.is_empty() {
        derive(&mut config, &origins);
        problems = check::contradictions(&config, &origins, main);
    }
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { problems }) }
}

/// Overrides in `config` what one file says; returns the mistakes.
fn apply(config: &mut Config, origins: &mut Origins, path: &Path, bytes: &[u8]) -> Vec<Problem> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let line = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count();
            let kind = ProblemKind::Syntax { message: "not UTF-8".to_owned() };
            return vec![Problem { file: path.to_owned(), line: Some(line), key: String::new(), kind }];
        }
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut document = Document::new(path, text, origins);
    for error in &errors {
        let message = error.message().lines().collect::<Vec<_>>().join(", ");
        let offset = error.span().map_or(0, |span| span.start);
        document.problem(String::new(), offset, ProblemKind::Syntax { message });
    }
    // What the parser guessed after a syntax error would only lead to mistakes that are none.
    if errors.is_empty() {
        read::all(&mut document, Section::root(table.get_ref()), config);
    }
    document.finish()
}

/// Defaults that follow from other keys: what lies in the run directory moves with it.
fn derive(config: &mut Config, origins: &Origins) {
    if !origins.contains_key("socket") {
        config.socket = default::socket(&config.run);
    }
    for (name, handler) in &mut config.handlers {
        if let HandlerKind::Oci { root, .. } = &mut handler.kind
            && !origins.contains_key(&format!("runtime.handlers.{name}.root"))
        {
            *root = config.run.join(name);
        }
    }
}
