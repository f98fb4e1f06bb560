//! `unpack_layer none|gzip|zstd TARGET < LAYER`: unpacks one layer and prints its digests and speed.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Instant;

use podvisor_unpack::{Compression, Limits, unpack};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let compression = match arguments.next().as_deref() {
        Some("none") => Compression::None,
        Some("gzip") => Compression::Gzip,
        Some("zstd") => Compression::Zstd,
        _ => return Err("usage: unpack_layer none|gzip|zstd TARGET < LAYER".into()),
    };
    let target = File::open(arguments.next().ok_or("the target is missing")?)?;
    let start = Instant::now();
    let limits = Limits { bytes: 64 << 30, entries: 4_000_000 };
    let unpacked = unpack(std::io::stdin().lock(), compression, target.as_fd(), limits)?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{unpacked:#?}\n{seconds:.2} s");
    Ok(())
}
