//! The kernels that guests have, 6.1 and 6.12 (`make kernels`), in QEMU without KVM: they see on a disk, and through DAX on a pmem device, what this
//! machine's kernel sees.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_guest::{Inputs, build};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};

use crate::place::{Place, erofs};
use crate::tree::filler;

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from)
}

fn entry(directory: &Path, prefix: &str) -> PathBuf {
    fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{}: {error}; `make kernels` fetches it", directory.display()))
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix))
        .unwrap_or_else(|| panic!("{} has no {prefix}", directory.display()))
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}\n{failed}", output.status);
    said
}

/// Of two layers, with something of everything.
fn image() -> (Place, PathBuf) {
    let place = Place::new(2);
    let at = |layer: usize, name: &str| place.layer(layer).join(name);
    for directory in ["etc", "many", "gone"] {
        fs::create_dir(at(0, directory)).unwrap();
    }
    for number in 0..400 {
        fs::write(at(0, &format!("many/a-rather-long-name-{number}")), vec![filler(number); number * 7])
            .unwrap();
    }
    fs::write(at(0, "gone/file"), vec![1; 100_000]).unwrap();
    fs::write(at(0, "etc/file"), vec![2; 70_000]).unwrap();
    fs::hard_link(at(0, "etc/file"), at(0, "linked")).unwrap();
    chown(at(0, "etc/file"), Some(100_000), Some(3)).unwrap();
    let holes = File::create(at(0, "holes")).unwrap();
    holes.set_len((3 << 20) + 5).unwrap();
    holes.write_all_at(b"middle", 2_000_000).unwrap();
    symlink("etc/file", at(0, "short")).unwrap();
    symlink("x/".repeat(2000), at(0, "long")).unwrap();
    let node = |name: &str, kind, device| mknodat(CWD, at(0, name), kind, Mode::from(0o640), device).unwrap();
    node("fifo", FileType::Fifo, 0);
    node("disk", FileType::BlockDevice, makedev(259, 70_000));
    let set = |name: &str, attribute: &str, value: &[u8]| {
        setxattr(at(0, name), attribute, value, XattrFlags::empty()).unwrap();
    };
    set("etc/file", "user.name", b"value");
    set("etc", "user.long", &[7; 2000]);
    let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
    capability.resize(20, 0);
    set("linked", "security.capability", &capability);
    // posix_acl_xattr(5): owner, user 7, group, mask, others.
    let entry = |tag: u8, mode: u8, id: u32| [&[tag, 0, mode, 0][..], &id.to_le_bytes()].concat();
    let entries = [entry(1, 6, !0), entry(2, 7, 7), entry(4, 4, !0), entry(0x10, 7, !0), entry(0x20, 4, !0)];
    set("many", "system.posix_acl_default", &[vec![2, 0, 0, 0], entries.concat()].concat());
    fs::write(at(1, "upper"), "upper").unwrap();
    mknodat(CWD, at(1, "gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    let (image, _) = place.image();
    // A pmem device is a multiple of 2 MiB long.
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(file.metadata().unwrap().len().next_multiple_of(2 << 20)).unwrap();
    (place, image)
}

/// FNV-1a, as in init.c.
fn hash(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |state, &byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

fn attributes(path: &Path) -> u64 {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split_inclusive(|&byte| byte == 0);
    names.fold(0, |all, name| {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, &name[..name.len() - 1], &mut value[..]).unwrap();
        all ^ hash(hash(EMPTY, name), &value[..length])
    })
}

/// The lines that init.c would say.
fn seen(mount: &OwnedFd) -> Vec<String> {
    let root = PathBuf::from(format!("/proc/self/fd/{}/.", mount.as_raw_fd()));
    let mut lines = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(&path);
        let stat = fs::symlink_metadata(&full).unwrap();
        let kind = stat.file_type();
        let content = if kind.is_dir() {
            pending.extend(fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
            0
        } else if kind.is_file() {
            hash(EMPTY, &fs::read(&full).unwrap())
        } else if kind.is_symlink() {
            hash(EMPTY, fs::read_link(&full).unwrap().as_os_str().as_bytes())
        } else {
            0
        };
        let mut line = String::new();
        if path.as_os_str().is_empty() {
            line.push_str("00");
        } else {
            line.push_str("2f");
        }
        for byte in path.as_os_str().as_bytes() {
            write!(line, "{byte:02x}").unwrap();
        }
        let size = if kind.is_dir() { 0 } else { stat.len() };
        let (major, minor) = (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
        write!(
            line,
            " {:o} {}:{} {}.{:09} {size} {major:x}:{minor:x} {} {} {content:016x} {:016x}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.mtime(),
            stat.mtime_nsec(),
            stat.ino(),
            stat.nlink(),
            attributes(&full)
        )
        .unwrap();
        lines.push(line);
    }
    lines.sort();
    lines
}

fn boot(kernel: &Path, initramfs: &Path, image: &Path) -> String {
    let mut qemu = Command::new("timeout");
    qemu.args(["300", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]);
    // With cmpxchg16b the translator is unreliable under load.
    qemu.args(["-M", "q35", "-accel", "tcg", "-cpu", "max,-cx16", "-display", "none", "-serial", "stdio"]);
    let size = fs::metadata(image).unwrap().len();
    qemu.args(["-m", "256M,slots=1,maxmem=1G"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    // The translator's TSC is the machine's own; on a busy machine the kernel fails to measure it, and then stands still.
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
    let frequency = processor.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": "));
    let kilohertz = frequency.unwrap().1.replace('.', "");
    let command_line = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1";
    qemu.args(["-append", &format!("{command_line} tsc_early_khz={kilohertz}")]);
    let file = image.display();
    qemu.args(["-drive", &format!("if=none,id=disk,format=raw,readonly=on,file={file}")]);
    qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
    // QEMU's pmem is never read-only; a private mapping keeps the guest's hands off the file.
    let memory = format!("memory-backend-file,id=pmem,size={size},mem-path={file},share=off,readonly=off");
    qemu.args(["-object", &memory, "-device", "virtio-pmem-pci,memdev=pmem"]);
    run(&mut qemu)
}

fn sees_it(suite: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let package = target().join("kernels").join(suite).join("package");
    let agent = scratch.path().join("init");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/init.c");
    run(Command::new("cc").args(["-static", "-Os", "-s", "-Wall", "-Werror", "-o"]).arg(&agent).arg(source));
    let inputs = Inputs {
        vmlinuz: entry(&package.join("boot"), "vmlinuz-"),
        modules: entry(&package.join("lib/modules"), "6."),
        agent,
        extra_modules: Vec::new(),
        package: None,
        shell: None,
    };
    let built = build(&inputs, &mut |_| {}).unwrap();
    let (kernel, initramfs) = (scratch.path().join("kernel"), scratch.path().join("initramfs"));
    fs::write(&kernel, built.kernel()).unwrap();
    fs::write(&initramfs, built.initramfs()).unwrap();
    let (_place, image) = image();
    let wanted = seen(&erofs(&image));
    assert!(wanted.len() > 400);
    let console = boot(&kernel, &initramfs, &image);
    for device in ["disk", "pmem"] {
        let prefix = format!("test: {device} ");
        let mut found: Vec<_> =
            console.lines().filter_map(|line| line.trim_end().strip_prefix(&prefix)).collect();
        found.sort_unstable();
        assert_eq!(found.len(), wanted.len(), "{device}: {console}");
        for (wanted, found) in wanted.iter().zip(found) {
            assert_eq!(wanted, found, "{device}");
        }
    }
    assert!(console.contains("test: end"));
}

#[test]
fn kernel_6_1_sees_the_same() {
    sees_it("bookworm");
}

#[test]
fn kernel_6_12_sees_the_same() {
    sees_it("bookworm-backports");
}
