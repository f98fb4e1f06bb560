//! Makes an image for virtual machines of directories, lowest layer first, as one file, and says what it took:
//!
//! `cargo run --release -p podvisor-erofs --example image_of -- IMAGE TREE...`

use std::error::Error;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::os::fd::AsFd;
use std::time::Instant;

use podvisor_erofs::{BLOCK, write_image, write_layer};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let image = arguments.next().ok_or("the name of the image is missing")?;
    let mut indexes = Vec::new();
    let mut blobs = Vec::new();
    for (number, tree) in arguments.enumerate() {
        let begin = Instant::now();
        let paths = [format!("{image}.{number}.data"), format!("{image}.{number}.index")];
        let (data, index) = (File::create_new(&paths[0])?, File::create_new(&paths[1])?);
        let (_, summary) = write_layer(File::open(&tree)?.as_fd(), &data, BufWriter::new(index), false)?;
        let index = File::open(&paths[1])?;
        println!(
            "{tree}: {} files, {:.1} MB of content, {} kB of index, {} ms",
            summary.entries,
            f64::from(summary.blocks) * 4096e-6,
            index.metadata()?.len() / 1000,
            begin.elapsed().as_millis()
        );
        indexes.push(BufReader::new(index));
        blobs.push(File::open(&paths[0])?);
        paths.iter().try_for_each(std::fs::remove_file)?;
    }
    let begin = Instant::now();
    let mut file = File::create(&image)?;
    let layout = write_image(&mut indexes, &mut file)?;
    println!("metadata: {:.2} MB, {} ms", f64::from(layout.metadata) * 4096e-6, begin.elapsed().as_millis());
    let mut at = u64::from(layout.metadata) * BLOCK;
    for blob in &mut blobs {
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at))?;
        at += std::io::copy(blob, &mut file)?;
    }
    println!(
        "{}",
        std::fs::read_to_string("/proc/self/status")?
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap_or_default()
    );
    Ok(())
}
