//! What a guest's writes cost where they go to a directory of the host's behind a file server, and where they go to a disk with a file system of the
//! guest's: small files that are made and removed, and small pieces at the end of one file.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use podvisor_proto::hypervisor::{Disk, Start, Stop, request::Verb};

use super::lab::{FileServer, Hypervisor, Suite};
use super::{Count, MEMORY, milliseconds};

const FILES: u32 = 300;
const PIECES: u32 = 3000;

/// Prints it for both.
pub(crate) fn print(directory: &Path) {
    let file = directory.join("writable");
    fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
    assert!(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file).status().unwrap().success());
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let server = FileServer::new("");
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let disk = Disk { serial: "disk".into(), path: file.to_str().unwrap().into(), read_only: false };
    let shares = vec![server.share("share")];
    let started =
        hypervisor.begin(Start { emulate: false, memory: MEMORY, disks: vec![disk], shares, ..start });
    let device = hypervisor.tell("disk disk");
    for module in ["ext4", "virtiofs"] {
        // One that is built in is no module.
        hypervisor.tell(&format!("load {module}"));
    }
    assert_eq!(hypervisor.tell(&format!("mount ext4 /dev/{device} /disk")), "ok");
    assert_eq!(hypervisor.tell("mount virtiofs share /share"), "ok");
    println!("\n{FILES} files of 4 KiB made and removed, {PIECES} pieces of 100 bytes written to one file");
    for place in ["share", "disk", "share", "disk"] {
        print!("{place:6}");
        for (verb, count) in [("files", FILES), ("pieces", PIECES)] {
            let (had, began) = (Count::now(), Instant::now());
            assert_eq!(hypervisor.tell(&format!("{verb} /{place}/it {count}")), "ok");
            let exits = had.since().exits;
            print!(
                "  {verb} {:.0} ms, {:.1} exits each",
                milliseconds(began.elapsed()),
                exits / f64::from(count)
            );
        }
        println!();
    }
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}
