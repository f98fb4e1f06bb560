//! Whether an installed guest's files are those of its manifest, and which of them are not.

use std::collections::BTreeMap;
use std::fmt;

use crate::build::module_path;
use crate::manifest::{Sum, sha256};
use crate::read::read_limited;
use crate::{Guest, cpio};

/// Longest file that is read, bytes.
const LONGEST: u64 = 1 << 30;

/// A file that is not as the manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Which: `kernel`, `initramfs`, or `initramfs: /init`.
    pub file: String,
    /// How it differs.
    pub how: How,
}

/// How a file differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// It is not there, or cannot be read.
    Unreadable(String),
    /// It has another length.
    Size {
        /// What the manifest says.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// It has another digest.
    Digest {
        /// What the manifest says.
        expected: String,
        /// What it has.
        found: String,
    },
    /// The manifest does not name it.
    Unexpected,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file)?;
        match &self.how {
            How::Unreadable(why) => write!(f, "cannot be read: {why}"),
            How::Size { expected, found } => write!(f, "{found} bytes instead of {expected}"),
            How::Digest { expected, found } => write!(f, "sha256 {found} instead of {expected}"),
            How::Unexpected => f.write_str("the manifest does not name it"),
        }
    }
}

/// Compares the files with the manifest.
pub(crate) fn differences(guest: &Guest) -> Vec<Difference> {
    let manifest = guest.manifest();
    let mut found = Vec::new();
    let kernel = Sum { sha256: manifest.kernel.sha256.clone(), size: manifest.kernel.size };
    for (name, path, sum) in
        [("kernel", guest.kernel(), &kernel), ("initramfs", guest.initramfs(), &manifest.initramfs)]
    {
        match read_limited(&path, LONGEST) {
            Err(error) => {
                found.push(Difference { file: name.to_owned(), how: How::Unreadable(error.to_string()) });
            }
            Ok(content) => {
                let difference = compare(name, &content, sum);
                if difference.is_some() && name == "initramfs" {
                    found.extend(inside(guest, &content));
                }
                found.extend(difference);
            }
        }
    }
    found
}

fn compare(file: &str, content: &[u8], sum: &Sum) -> Option<Difference> {
    let size = content.len() as u64;
    let digest = sha256(content);
    let how = if size != sum.size {
        How::Size { expected: sum.size, found: size }
    } else if digest != sum.sha256 {
        How::Digest { expected: sum.sha256.clone(), found: digest }
    } else {
        return None;
    };
    Some(Difference { file: file.to_owned(), how })
}

/// What differs in an initramfs that is not the manifest's.
fn inside(guest: &Guest, archive: &[u8]) -> Vec<Difference> {
    let manifest = guest.manifest();
    let mut expected: BTreeMap<String, Sum> = BTreeMap::new();
    let agent = Sum { sha256: manifest.agent.sha256.clone(), size: manifest.agent.size };
    expected.insert("init".to_owned(), agent);
    for module in &manifest.modules {
        expected.insert(module_path(&module.name), Sum { sha256: module.sha256.clone(), size: module.size });
    }
    let label = |name: &str| format!("initramfs: /{name}");
    let files = match cpio::files(archive) {
        Ok(files) => files,
        Err(error) => {
            return vec![Difference {
                file: "initramfs".to_owned(),
                how: How::Unreadable(error.to_string()),
            }];
        }
    };
    let mut found = Vec::new();
    for (name, content) in files {
        match expected.remove(name) {
            Some(sum) => found.extend(compare(&label(name), content, &sum)),
            // The list follows from the modules, and has no digest of its own.
            None if name == "modules" => {}
            None => found.push(Difference { file: label(name), how: How::Unexpected }),
        }
    }
    let missing =
        |name: &String| Difference { file: label(name), how: How::Unreadable("it is not there".to_owned()) };
    found.extend(expected.keys().map(missing));
    found
}
