//! A pull without a daemon, a registry and a database: layers out of files, hashed, inflated, hashed again and written, one per processor at
//! a time. Nothing of them is checked.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

const BLOCK: usize = 512;
const BUFFER: usize = 128 << 10;

/// Unpacks them below a directory of its own; the time that took.
pub(crate) fn unpack(layers: &[PathBuf]) -> Result<Duration> {
    let directory = tempfile::Builder::new().prefix("layers.").tempdir()?;
    let began = Instant::now();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let work = || {
            while let Some(blob) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                layer(blob, directory.path()).with_context(|| format!("unpacking {}", blob.display()))?;
            }
            anyhow::Ok(())
        };
        let threads = std::thread::available_parallelism()?.get();
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread that unpacks"))
    })?;
    Ok(began.elapsed())
}

/// Hashes what is read through it.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new() }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into)?;
        self.hash.update(&into[..count]);
        Ok(count)
    }
}

fn layer(blob: &Path, root: &Path) -> Result<()> {
    let mut magic = [0_u8; 2];
    File::open(blob)?.read_exact(&mut magic)?;
    let compressed = BufReader::with_capacity(BUFFER, Hashing::new(File::open(blob)?));
    // RFC 1952, 2.3.1; the other kind is zstd.
    let inflated: Box<dyn Read> = if magic == [0x1f, 0x8b] {
        Box::new(flate2::bufread::GzDecoder::new(compressed))
    } else {
        Box::new(zstd::Decoder::with_buffer(compressed)?)
    };
    let mut tar = BufReader::with_capacity(BUFFER, Hashing::new(inflated));
    files(&mut tar, root)?;
    io::copy(&mut tar, &mut io::sink())?;
    let hash = tar.into_inner().hash.finalize();
    std::hint::black_box(hash);
    Ok(())
}

/// Directories and files of a ustar archive (IEEE Std 1003.1) as this project's own images are.
fn files(tar: &mut impl Read, root: &Path) -> Result<()> {
    let mut header = [0_u8; BLOCK];
    loop {
        tar.read_exact(&mut header)?;
        if header[0] == 0 {
            return Ok(());
        }
        let text = |range: std::ops::Range<usize>| -> Result<&str> {
            let field = header[range].split(|byte| *byte == 0).next().unwrap_or_default();
            Ok(std::str::from_utf8(field)?)
        };
        ensure!(text(345..500)?.is_empty(), "a name in two parts");
        let path = root.join(text(0..100)?);
        let size = u64::from_str_radix(text(124..136)?.trim(), 8)?;
        match header[156] {
            b'5' => fs::create_dir_all(&path)?,
            b'0' => {
                io::copy(&mut tar.take(size), &mut File::create(&path)?)?;
                let padding = size.next_multiple_of(BLOCK as u64) - size;
                io::copy(&mut tar.take(padding), &mut io::sink())?;
            }
            kind => anyhow::bail!("an entry of kind {kind}"),
        }
    }
}
