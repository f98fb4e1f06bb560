//! What a second machine with the same image costs: pages of the host's page cache that hold the image's files, and memory of the machine's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_proto::hypervisor::{AddImage, Image, Start, Stop, request::Verb};

use super::lab::{Hypervisor, Suite};
use super::{MEMORY, memory_of, wait};

const BYTES: usize = 48 << 20;

/// A file system that has a page cache of its own: what the lab writes to is a tmpfs.
struct Disk(PathBuf);

impl Disk {
    fn new(directory: &Path) -> Self {
        let (file, place) = (directory.join("disk"), directory.join("mounted"));
        fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
        fs::create_dir(&place).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&place));
        Self(place)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// Pages of a file that the host has in memory (mincore(2), by fincore(1)).
fn cached(file: &Path) -> f64 {
    let output =
        Command::new("fincore").args(["--raw", "--noheadings", "--output", "PAGES"]).arg(file).output();
    String::from_utf8(output.unwrap().stdout).unwrap().trim().parse().unwrap()
}

/// A machine that has read the whole image; memory of the guest's that is not shared, in KiB, which that has taken.
fn reader(image: &Image) -> (Hypervisor, i32, f64) {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(Start { emulate: false, plugs: true, memory: MEMORY, ..start });
    for module in ["virtio_pmem", "nd_pmem", "erofs"] {
        assert_eq!(hypervisor.tell(&format!("load {module}")), "ok");
    }
    hypervisor.done(Verb::AddImage(AddImage { image: Some(image.clone()) }));
    let question = format!("{} {}", if image.disk { "disk" } else { "image" }, image.serial);
    wait(|| hypervisor.tell("bind -") == "ok" && hypervisor.tell(&question) != "none");
    let device = hypervisor.tell(&question);
    let mount = if image.disk { "mount erofs" } else { "dax" };
    assert_eq!(hypervisor.tell(&format!("{mount} /dev/{device} /image")), "ok");
    let before = memory_of(started.pid, true);
    let said = hypervisor.tell("sum /image/file");
    assert!(said.starts_with(&format!("{BYTES} ")), "{said}");
    let took = memory_of(started.pid, true) - before;
    (hypervisor, started.pid, took)
}

/// Prints it for both forms of images.
pub(crate) fn print(directory: &Path) {
    let disk = Disk::new(directory);
    let tree = directory.join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), vec![7; BYTES]).unwrap();
    println!(
        "\nan image of {} MiB that two machines of podvisor-vmm's read one after the other",
        BYTES >> 20
    );
    for (name, as_disk) in [("in memory (pmem)", false), ("as a disk (block)", true)] {
        let file = disk.0.join("image");
        run(Command::new("mkfs.erofs").arg("--quiet").arg(&file).arg(&tree));
        run(Command::new("sync").arg(&file));
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        let image =
            Image { serial: "image".into(), paths: vec![file.to_str().unwrap().into()], disk: as_disk };
        let mut pages = vec![cached(&file)];
        let mut machines = Vec::new();
        for _ in 0..2 {
            machines.push(reader(&image));
            pages.push(cached(&file));
        }
        let (first, second) = (pages[1] - pages[0], pages[2] - pages[1]);
        let own: Vec<f64> = machines.iter().map(|(_, _, own)| *own).collect();
        println!(
            "{name:20} pages that the first adds: {first}, the second: {second} ({:.3} of the first); KiB of the guest's own: {own:?}",
            second / first
        );
        for (mut hypervisor, pid, _) in machines {
            hypervisor.done(Verb::Stop(Stop {}));
            hypervisor.finish(pid);
        }
        fs::remove_file(&file).unwrap();
    }
}
