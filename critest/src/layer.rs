//! Layers: a set of files as a tar stream, compressed, the same bytes for the same content.
//!
//! The tar is plain POSIX ustar (IEEE Std 1003.1, pax interchange format, "ustar Interchange Format"). Entries are
//! sorted and dated 1970, no path stands twice, parents come before what they contain, and hard links after the
//! file they name.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};

const BLOCK: usize = 512;

/// `sha256:` and 64 hex digits.
pub type Digest = String;

/// The digest of `bytes` as OCI writes it.
pub fn digest_of(bytes: &[u8]) -> Digest {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// How a layer's tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952, as nearly all images have it.
    Gzip,
    /// RFC 8878; OCI images only.
    Zstd,
    /// Not at all.
    Plain,
}

/// A finished layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// What is pushed.
    pub blob: Vec<u8>,
    /// How `blob` is compressed.
    pub compression: Compression,
    /// Digest of the uncompressed tar, as the configuration names it.
    pub diff_id: Digest,
}

/// What a path is.
#[derive(Debug, Clone)]
enum Entry {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    HardLink(String),
}

/// The files of a layer to be.
#[derive(Debug, Clone, Default)]
pub struct Files {
    entries: BTreeMap<String, (u32, Entry)>,
}

impl Files {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory; its parents are made 0755 if they are not there. Paths are relative to the image's root.
    #[must_use]
    pub fn directory(self, path: &str, mode: u32) -> Self {
        self.with(path, mode, Entry::Directory)
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        self.with(path, mode, Entry::File(content.into()))
    }

    /// A symbolic link to `target`.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.with(path, 0o777, Entry::Symlink(target.to_owned()))
    }

    /// Another name of the file at `target`, which is a path in the same layer.
    #[must_use]
    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.with(path, 0o755, Entry::HardLink(target.to_owned()))
    }

    fn with(mut self, path: &str, mode: u32, entry: Entry) -> Self {
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert((0o755, Entry::Directory));
        }
        self.entries.insert(path.to_owned(), (mode, entry));
        self
    }

    /// Packs the files into a layer.
    pub fn pack(&self, compression: Compression) -> Result<Layer> {
        let tar = self.tar()?;
        let diff_id = digest_of(&tar);
        let blob = match compression {
            Compression::Plain => tar,
            Compression::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
                encoder.write_all(&tar)?;
                encoder.finish()?
            }
            Compression::Zstd => {
                zstd::encode_all(tar.as_slice(), 3).context("compressing a layer with zstd")?
            }
        };
        Ok(Layer { blob, compression, diff_id })
    }

    fn tar(&self) -> Result<Vec<u8>> {
        let is_link = |entry: &Entry| matches!(entry, Entry::HardLink(_));
        let mut tar = Vec::new();
        for links in [false, true] {
            for (path, (mode, entry)) in self.entries.iter().filter(|(_, (_, entry))| is_link(entry) == links)
            {
                append(&mut tar, path, *mode, entry).with_context(|| format!("packing {path}"))?;
            }
        }
        // Two empty blocks end the archive.
        tar.resize(tar.len() + 2 * BLOCK, 0);
        Ok(tar)
    }
}

fn append(tar: &mut Vec<u8>, path: &str, mode: u32, entry: &Entry) -> Result<()> {
    let (kind, link, content): (u8, &str, &[u8]) = match entry {
        Entry::File(content) => (b'0', "", content),
        Entry::HardLink(target) => (b'1', target, &[]),
        Entry::Symlink(target) => (b'2', target, &[]),
        Entry::Directory => (b'5', "", &[]),
    };
    let path = if kind == b'5' { format!("{path}/") } else { path.to_owned() };
    let (prefix, name) = split(&path)?;
    let mut header = [0_u8; BLOCK];
    put(&mut header[0..100], name)?;
    put(&mut header[100..108], &format!("{mode:07o}"))?;
    put(&mut header[108..116], "0000000")?; // owner
    put(&mut header[116..124], "0000000")?; // group
    put(&mut header[124..136], &format!("{:011o}", content.len()))?;
    put(&mut header[136..148], "00000000000")?; // time
    header[148..156].fill(b' '); // the checksum counts as spaces in itself
    header[156] = kind;
    put(&mut header[157..257], link)?;
    header[257..265].copy_from_slice(b"ustar\x0000");
    put(&mut header[345..500], prefix)?;
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    Ok(())
}

fn put(field: &mut [u8], text: &str) -> Result<()> {
    let Some(room) = field.get_mut(..text.len()) else { bail!("{text:?} does not fit into a tar header") };
    room.copy_from_slice(text.as_bytes());
    Ok(())
}

/// A name of more than 100 bytes goes in two parts, the first of at most 155.
fn split(path: &str) -> Result<(&str, &str)> {
    if path.len() <= 100 {
        return Ok(("", path));
    }
    path.match_indices('/')
        .map(|(at, _)| (&path[..at], &path[at + 1..]))
        .find(|(prefix, name)| prefix.len() <= 155 && !name.is_empty() && name.len() <= 100)
        .context("the name is too long for a tar header")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn listed_by_tar(layer: &Layer) -> String {
        let mut tar = Command::new("tar")
            .args(["-tvzf", "-", "--numeric-owner"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&layer.blob).unwrap();
        let output = tar.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn tar_reads_what_was_packed() {
        let long = format!("{}/{}", "d".repeat(90), "f".repeat(60));
        let files = Files::new()
            .directory("root", 0o700)
            .hard_link("bin/a", "bin/busybox")
            .file("bin/busybox", 0o4755, "program")
            .symlink("var/log/access.log", "/dev/stdout")
            .file(&long, 0o644, vec![b'x'; 1000]);
        let listing = listed_by_tar(&files.pack(Compression::Gzip).unwrap());
        let lines: Vec<&str> = listing.lines().collect();
        assert!(lines.iter().any(|l| l.starts_with("drwx------") && l.ends_with(" root/")), "{listing}");
        assert!(
            lines.iter().any(|l| l.starts_with("-rwsr-xr-x") && l.ends_with(" bin/busybox")),
            "{listing}"
        );
        assert!(lines.iter().any(|l| l.ends_with("access.log -> /dev/stdout")), "{listing}");
        assert!(lines.iter().any(|l| l.contains(" 1000 ") && l.ends_with(&long)), "{listing}");
        assert!(lines.last().unwrap().ends_with("bin/a link to bin/busybox"), "{listing}");
    }

    #[test]
    fn the_same_content_is_the_same_layer() {
        let pack = |compression| Files::new().file("a", 0o644, "x").pack(compression).unwrap();
        for compression in [Compression::Gzip, Compression::Zstd, Compression::Plain] {
            assert_eq!(pack(compression).blob, pack(compression).blob);
        }
        assert_eq!(pack(Compression::Gzip).diff_id, digest_of(&pack(Compression::Plain).blob));
    }

    #[test]
    fn a_name_that_does_not_fit_is_an_error() {
        assert!(Files::new().file(&"x".repeat(101), 0o644, "").pack(Compression::Plain).is_err());
    }
}
