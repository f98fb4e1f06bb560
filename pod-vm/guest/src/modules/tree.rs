//! The modules of a kernel: the files below `/lib/modules/VERSION`, and what is built in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::ModuleError;
use super::modinfo::{Modinfo, name};
use crate::decompress::{Compression, DecompressError, decompress};
use crate::elf::Elf;
use crate::read::read_limited;

/// Longest module, bytes. The longest of Debian's cloud kernel have 5 MB.
const LONGEST: u64 = 64 << 20;
/// Most directory entries. Debian's large kernel has 4,500 modules.
const MOST: usize = 100_000;
/// Longest list of built-in modules, bytes.
const LONGEST_LIST: u64 = 16 << 20;

/// What the directory holds.
#[derive(Debug)]
pub(crate) struct Tree {
    /// Files by module name.
    files: BTreeMap<String, PathBuf>,
    /// Built-in modules' names and aliases.
    builtin: BTreeSet<String>,
}

/// A module as it goes into the guest.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// The ELF file, unpacked.
    pub(crate) content: Vec<u8>,
    pub(crate) info: Modinfo,
}

impl Tree {
    /// Reads what there is below `directory`. Links are not followed: `build` and `source` lead away.
    pub(crate) fn open(directory: &Path) -> Result<Self, ModuleError> {
        const BUILTIN: &str = "modules.builtin";
        let no_directory =
            |source| ModuleError::NoDirectory { directory: directory.to_owned(), file: BUILTIN, source };
        let builtin = read_limited(&directory.join(BUILTIN), LONGEST_LIST).map_err(no_directory)?;
        // Made by the build since 5.2. Without it only the aliases of built-in modules are unknown.
        let info = read_limited(&directory.join("modules.builtin.modinfo"), LONGEST_LIST).unwrap_or_default();
        let mut files = Vec::new();
        walk(directory, &mut files)?;
        Ok(Self { files: by_name(directory, files), builtin: builtin_names(&builtin, &info) })
    }

    /// How many module files there are.
    pub(crate) fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether the module, or the alias, is part of the kernel itself.
    pub(crate) fn is_builtin(&self, wanted: &str) -> bool {
        self.builtin.contains(wanted) || name(wanted).is_some_and(|name| self.builtin.contains(&name))
    }

    /// Whether there is a file for the module.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Reads and unpacks a module for which there is a file.
    pub(crate) fn load(&self, name: &str) -> Result<Option<Loaded>, ModuleError> {
        let Some(path) = self.files.get(name) else { return Ok(None) };
        let path = || path.clone();
        let file =
            read_limited(&path(), LONGEST).map_err(|source| ModuleError::Read { path: path(), source })?;
        let content = if file.starts_with(b"\x7fELF") {
            file
        } else {
            let unpack = |source: DecompressError| ModuleError::Unpack { path: path(), source };
            let compression = Compression::of(&file).map_err(unpack)?;
            decompress(compression, &file, LONGEST).map_err(unpack)?
        };
        let section = Elf::parse(&content).and_then(|elf| elf.section(b".modinfo"));
        let section = section.map_err(|source| ModuleError::Elf { path: path(), source })?;
        let info = Modinfo::parse(section.ok_or_else(|| ModuleError::NoInfo(path()))?);
        Ok(Some(Loaded { content, info }))
    }
}

/// All regular files below `directory`, in no order.
fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), ModuleError> {
    let mut seen = 0;
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        let read = |source| ModuleError::Read { path: path.clone(), source };
        for entry in fs::read_dir(&path).map_err(read)? {
            let entry = entry.map_err(read)?;
            seen += 1;
            if seen > MOST {
                return Err(ModuleError::TooMany { directory: directory.to_owned(), limit: MOST });
            }
            // The type of the entry itself, not of what a link names.
            let kind = entry.file_type().map_err(read)?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(())
}

/// The files that are modules. Of two with one name that in `updates` wins, as depmod does by default, then the first path.
fn by_name(directory: &Path, mut files: Vec<PathBuf>) -> BTreeMap<String, PathBuf> {
    let updates = directory.join("updates");
    files.sort_by_cached_key(|path| (!path.starts_with(&updates), path.clone()));
    let mut modules = BTreeMap::new();
    for path in files {
        let stem = path.file_name().and_then(|file| file.to_str()).and_then(stem).and_then(name);
        if let Some(stem) = stem {
            modules.entry(stem).or_insert(path);
        }
    }
    modules
}

/// `overlay` of `overlay.ko.xz`.
fn stem(file: &str) -> Option<&str> {
    [".ko", ".ko.gz", ".ko.xz", ".ko.zst"].iter().find_map(|end| file.strip_suffix(end))
}

/// Names in `modules.builtin` (a path per line), and aliases in `modules.builtin.modinfo` (`module.key=value`, zeros between).
fn builtin_names(list: &[u8], info: &[u8]) -> BTreeSet<String> {
    let list = String::from_utf8_lossy(list);
    let file = |line: &str| line.rsplit('/').next().and_then(stem).and_then(name);
    let mut names: BTreeSet<String> = list.lines().filter_map(file).collect();
    for field in info.split(|byte| *byte == 0) {
        let alias = std::str::from_utf8(field).ok().and_then(|field| field.split_once(".alias="));
        names.extend(alias.map(|(_, alias)| alias.to_owned()));
    }
    names
}
