//! Layers as a builder makes them: a tar, compressed.

use std::io::Write as _;

use podvisor_registry::Digest;

const BLOCK: usize = 512;

/// A layer, ready to be served.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) media_type: &'static str,
    diff_id: String,
    digest: String,
}

/// How to compress.
#[derive(Debug, Clone, Copy)]
pub(crate) enum As {
    Plain,
    Gzip,
    Zstd,
}

impl Layer {
    pub(crate) fn new(tar: Tar, compression: As) -> Self {
        let tar = tar.finish();
        let (blob, media_type) = match compression {
            As::Plain => (tar.clone(), "application/vnd.oci.image.layer.v1.tar"),
            As::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(&tar).unwrap();
                (gzip.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip")
            }
            As::Zstd => {
                (zstd::encode_all(tar.as_slice(), 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")
            }
        };
        let (diff_id, digest) = (Digest::sha256(&tar).to_string(), Digest::sha256(&blob).to_string());
        Self { tar, blob, media_type, diff_id, digest }
    }

    /// The same tar, if its diff id is to be believed, in another blob.
    pub(crate) fn with_blob(self, blob: Vec<u8>) -> Self {
        Self { digest: Digest::sha256(&blob).to_string(), blob, ..self }
    }

    /// One file, `name`, with that content.
    pub(crate) fn file(name: &str, content: &[u8]) -> Self {
        Self::new(Tar::new().file(name, content), As::Gzip)
    }

    /// One file of `size` bytes that no compressor makes smaller; another seed, another layer.
    pub(crate) fn bulk(name: &str, seed: u64, size: usize) -> Self {
        Self::new(Tar::new().file(name, &noise(seed, size)), As::Gzip)
    }

    pub(crate) fn diff_id(&self) -> String {
        self.diff_id.clone()
    }

    pub(crate) fn digest(&self) -> String {
        self.digest.clone()
    }
}

/// Bytes without pattern (splitmix64).
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Writes ustar entries, owner root, time zero.
#[derive(Debug, Default)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn directory(self, name: &str, mode: u32) -> Self {
        self.entry(b'5', name, "", mode, &[])
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(b'0', name, "", 0o644, content)
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, 0o777, &[])
    }

    /// Removes `directory/name` of the layers below.
    pub(crate) fn whiteout(self, directory: &str, name: &str) -> Self {
        self.file(&format!("{directory}/.wh.{name}"), &[])
    }

    /// Hides everything that the layers below have in `directory`.
    pub(crate) fn opaque(self, directory: &str) -> Self {
        self.whiteout(directory, ".wh..opq")
    }

    fn entry(mut self, kind: u8, name: &str, target: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        for (at, width, value) in
            [(100, 8, mode as usize), (108, 8, 0), (116, 8, 0), (124, 12, content.len()), (136, 12, 0)]
        {
            let digits = format!("{value:0digits$o}", digits = width - 1);
            header[at..at + width - 1].copy_from_slice(digits.as_bytes());
        }
        header[156] = kind;
        header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}
