//! Pulls an image into an empty store and says what that cost.
//!
//!     cargo run --release -p podvisor-image-store --example pull -- 127.0.0.1:5000/app:latest [DIRECTORY]
//!
//! The store is a temporary directory below DIRECTORY (default: where temporary files go) and is removed afterwards.
//! Bytes are those that came over the network; the peak is of the whole process, with its registry client.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use podvisor_image_store::{ImageStore, Options};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().ok_or("which image?")?;
    let below = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let directory = tempfile::tempdir_in(below)?;
    let path = |name: &str| directory.path().join(name);
    let options = Options {
        root: path("images"),
        run: path("run"),
        registry: podvisor_registry::Options {
            registries_conf: "/etc/containers/registries.conf".into(),
            certs_dir: "/etc/containerd/certs.d".into(),
            auth_files: Vec::new(),
            default_registries: vec!["docker.io".into()],
            progress_timeout: Duration::from_secs(60),
            user_agent: concat!("podvisor-example/", env!("CARGO_PKG_VERSION")).into(),
        },
        parallel_layers: 3,
        machine_images: false,
    };
    // As the daemon has it.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let store = ImageStore::open(options).await?;
        let before = peak()?;
        let started = Instant::now();
        let image = store.pull(&name, None).await?;
        let first = started.elapsed();
        let started = Instant::now();
        store.pull(&name, None).await?;
        let again = started.elapsed();
        let (images, _) = store.fs_info();
        println!("{}", image.id);
        println!("{:.1} MB fetched, {:.1} MB unpacked", mb(image.size), mb(images.used_bytes));
        println!(
            "{:.2} s, {:.0} MB/s fetched, {:.0} MB/s unpacked; pulled again in {:.1} ms",
            first.as_secs_f64(),
            mb(image.size) / first.as_secs_f64(),
            mb(images.used_bytes) / first.as_secs_f64(),
            again.as_secs_f64() * 1e3,
        );
        println!("peak resident {:.1} MiB, {before:.1} before", peak()?);
        Ok(())
    })
}

#[allow(clippy::cast_precision_loss)]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Peak resident set, MiB (proc(5): VmHWM).
fn peak() -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}
