//! The server behind a virtual machine: what programs in it can do, and what they see of the host's changes, with both kernels.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, XattrFlags, getxattr, makedev, mknodat, setxattr};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};

mod machine;
mod server;

use machine::Machine;
use server::{Server, Tree};

/// Each test with each kernel.
macro_rules! with_both_kernels {
    ($($test:ident)*) => {
        mod kernel_6_1 {
            $(#[test] fn $test() { super::$test("bookworm", "6.1."); })*
        }
        mod kernel_6_12 {
            $(#[test] fn $test() { super::$test("bookworm-backports", "6.12."); })*
        }
    };
}

with_both_kernels! {
    programs_find_a_file_system
    owners_and_bits_are_kept
    attributes_are_kept
    what_is_shared_in_the_guest_is
    changes_of_the_host_are_seen_at_once
    mounts_of_the_host_come_and_go
    many_files_take_little
}

/// The same in a volume and in a container's root file system: the directory that the guest works in, and where it is on the host.
fn at_each_place(suite: &str, version: &str, check: impl Fn(&mut Machine, &Path)) {
    let tree = Tree::new();
    let lower = tree.beside("lower");
    fs::create_dir(&lower).unwrap();
    tree.mount_overlay("container/rootfs", &lower);
    for directory in [tree.path().join("container/volume"), tree.beside("volume")] {
        fs::create_dir(directory).unwrap();
    }
    mount_bind(tree.beside("volume"), tree.path().join("container/volume")).unwrap();
    let (server, mut machine) = start(&tree, suite, version);
    for place in ["container/volume", "container/rootfs"] {
        println!("{place}");
        set_mode(&tree.path().join(place), 0o777);
        machine.done(&format!("chdir /share/{place}"));
        check(&mut machine, &tree.path().join(place));
    }
    machine.kill();
    assert!(server.end().success());
}

/// A server, and a guest that has mounted its tree.
fn start(tree: &Tree, suite: &str, version: &str) -> (Server, Machine) {
    let server = Server::start(tree, &["--tag", "share"]);
    let mut machine = Machine::start(suite, 256, &[("share", server.socket())]);
    assert!(machine.release.starts_with(version), "{}", machine.release);
    machine.done("mount share /share");
    (server, machine)
}

/// Asks until it is so; what is waited for is not ordered with the guest's answers.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn programs_find_a_file_system(suite: &str, version: &str) {
    at_each_place(suite, version, |machine, place| {
        let path = |name: &str| place.join(name);

        machine.done("write file hello");
        assert_eq!(fs::read_to_string(path("file")).unwrap(), "hello");
        machine.done("append file -world");
        assert_eq!(machine.done("read file"), "hello-world");
        machine.done("truncate file 4");
        assert_eq!(fs::read_to_string(path("file")).unwrap(), "hell");

        machine.done("mkdir directory");
        machine.done("rename file directory/file");
        machine.done("symlink directory/file link");
        machine.done("link directory/file second");
        assert_eq!(machine.done("read link"), "hell");
        assert_eq!(machine.done("stat second"), "100644 0 0 4 2");
        machine.done("link second third");
        machine.done("unlink second");
        assert_eq!(machine.done("stat directory/file"), "100644 0 0 4 2");
        machine.done("rename third second");
        machine.done("write other other");
        machine.done("exchange other second");
        assert_eq!(machine.done("read second"), "other");
        assert_eq!(machine.done("list ."), "directory link other second");
        assert_eq!(machine.refused("rmdir directory"), "ENOTEMPTY");
        machine.done("unlink directory/file");
        machine.done("rmdir directory");
        assert_eq!(machine.refused("read link"), "ENOENT");

        machine.done("fill large 64 131072");
        assert_eq!(fs::metadata(path("large")).unwrap().len(), 64 << 20);
        for check in ["check large 131072", "check large 4096", "check-direct large 65536"] {
            assert!(machine.done(check).ends_with(" 0"), "{check}: the content differs");
        }
        machine.done("fill-direct large 8 65536");
        assert!(machine.done("check large 1048576").ends_with(" 0"));
        let space = rustix::fs::statvfs(place).unwrap();
        assert_eq!(machine.done("space ."), (space.f_blocks * space.f_frsize).to_string());

        // Sockets, FIFOs and devices are names here: what they stand for is the guest's own.
        machine.done("fifo fifo");
        assert!(fs::symlink_metadata(path("fifo")).unwrap().file_type().is_fifo());
        machine.done("bind socket");
        assert!(fs::symlink_metadata(path("socket")).unwrap().file_type().is_socket());
        let listener = UnixListener::bind(path("of-the-host")).unwrap();
        assert_eq!(machine.refused("connect of-the-host"), "ECONNREFUSED");
        drop(listener);
        assert_eq!(machine.refused("device device"), "EPERM");
        // An overlay keeps these for itself.
        let whiteout = machine.ask("whiteout whiteout");
        assert_eq!(whiteout.is_ok(), place.ends_with("volume"), "{whiteout:?}");
        assert_eq!(machine.refused("without-name ."), "EOPNOTSUPP");
        assert_eq!(machine.refused("same-flags large"), "ENOTTY");
        mknodat(rustix::fs::CWD, path("null"), FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).unwrap();
        assert_eq!(machine.done("open-device null"), "");
    });
}

fn owners_and_bits_are_kept(suite: &str, version: &str) {
    at_each_place(suite, version, |machine, place| {
        let path = |name: &str| place.join(name);

        machine.done("as 1000 1001 1002 write own text");
        let status = fs::metadata(path("own")).unwrap();
        assert_eq!((status.uid(), status.gid(), status.mode()), (1000, 1001, 0o100_644));
        assert_eq!(machine.refused("as 1005 1005 1005 append own more"), "EACCES");
        assert_eq!(machine.refused("as 1000 1001 1002 chown own 0 0"), "EPERM");
        assert_eq!(machine.refused("as 1005 1005 1005 chmod own 777"), "EPERM");
        machine.done("chown own 4000000000 65534");
        let status = fs::metadata(path("own")).unwrap();
        assert_eq!((status.uid(), status.gid()), (4_000_000_000, 65534));

        // By a supplementary group, which FUSE tells since Linux 6.3.
        machine.done("mkdir group");
        machine.done("chown group 0 2000");
        machine.done("chmod group 2770");
        machine.done("as 1000 1000 2000 write group/file x");
        machine.done("as 1000 1000 2000 mkdir group/directory");
        assert_eq!(machine.refused("as 1000 1000 1000 write group/other x"), "EACCES");
        assert_eq!(fs::metadata(path("group/file")).unwrap().gid(), 2000);
        assert_eq!(mode(&path("group/directory")), 0o2755);

        // Set-ID bits go when the file changes, also by root, as for a container in a user namespace; and with its owner.
        for change in ["append own x", "truncate own 3", "write own x"] {
            for who in ["as 1001 1001 1001 ", ""] {
                machine.done("chmod own 6777");
                machine.done(&format!("{who}{change}"));
                assert_eq!(mode(&path("own")), 0o777, "{who}{change}");
                assert!(machine.done("stat own").starts_with("100777 "), "{who}{change}");
            }
        }
        machine.done("chmod own 6755");
        assert_eq!(mode(&path("own")), 0o6755);
        machine.done("chown own 1000 1000");
        assert_eq!(mode(&path("own")), 0o755);
        assert_eq!(machine.done("stat own"), "100755 1000 1000 1 1");
    });
}

/// security.capability with CAP_NET_RAW, permitted and effective (capabilities(7), `struct vfs_cap_data`, revision 2).
const NET_RAW: &str = "0100000200200000000000000000000000000000";

/// Read and write for the owner, read for user 1005 (acl(5); include/uapi/linux/posix_acl_xattr.h).
const ACL: &str = "0200000001000600ffffffff02000400ed03000004000000ffffffff10000400ffffffff20000000ffffffff";

fn attributes_are_kept(suite: &str, version: &str) {
    at_each_place(suite, version, |machine, place| {
        let path = |name: &str| place.join(name);
        let digit = |value: u8| char::from_digit(value.into(), 16).unwrap();
        let hex = |bytes: &[u8]| {
            bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(digit).collect::<String>()
        };
        let value = |name: &str, attribute: &str| {
            let mut bytes = [0; 64];
            getxattr(path(name), attribute, &mut bytes).map(|length| hex(&bytes[..length]))
        };

        machine.done("write file x");
        machine.done("set file user.name 414243");
        assert_eq!(value("file", "user.name").unwrap(), "414243");
        assert_eq!(machine.done("get file user.name"), "414243");
        assert_eq!(machine.done("attributes file"), "user.name");
        machine.done("remove file user.name");
        assert_eq!(machine.refused("get file user.name"), "ENODATA");
        assert_eq!(machine.refused("set file trusted.overlay.opaque 79"), "EPERM");

        // A program of the image has them, a package manager sets them, whoever changes the program loses them.
        let bytes: Vec<u8> = (0..NET_RAW.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&NET_RAW[at..at + 2], 16).unwrap())
            .collect();
        fs::write(path("image"), "").unwrap();
        setxattr(path("image"), "security.capability", &bytes, XattrFlags::empty()).unwrap();
        assert_eq!(machine.done("get image security.capability"), NET_RAW);
        machine.done(&format!("set file security.capability {NET_RAW}"));
        assert_eq!(machine.done("get file security.capability"), NET_RAW);
        assert_eq!(value("file", "security.capability").unwrap(), NET_RAW);
        machine.done("chmod file 666");
        let set = format!("as 1000 1000 1000 set file security.capability {NET_RAW}");
        assert_eq!(machine.refused(&set), "EPERM");
        machine.done("as 1000 1000 1000 append file x");
        assert_eq!(machine.refused("get file security.capability"), "ENODATA");

        // The guest's kernel (up to 6.12) knows ACLs only in a share's first file system, and every place is a mount below.
        assert_eq!(machine.refused(&format!("set file system.posix_acl_access {ACL}")), "EOPNOTSUPP");
    });
}

fn what_is_shared_in_the_guest_is(suite: &str, version: &str) {
    at_each_place(suite, version, |machine, place| {
        // The child ended well, the parent sees what it wrote, and so does read(2).
        assert_eq!(machine.done("share-memory memory"), "0 child child");
        let memory = fs::read(place.join("memory")).unwrap();
        assert!(memory.starts_with(b"parent\0") && memory[4096..].starts_with(b"child\0"));
        // No lock of either kind was got by a second process.
        assert_eq!(machine.done("share-locks locks"), "0");
    });
}

fn changes_of_the_host_are_seen_at_once(suite: &str, version: &str) {
    let tree = Tree::new();
    let path = |name: &str| tree.path().join(name);
    let (_server, mut machine) = start(&tree, suite, version);

    // What kubelet does with a configMap: a new directory, and one rename that all names follow.
    let write = |version: u32| {
        fs::create_dir(path(&format!("..{version}"))).unwrap();
        fs::write(path(&format!("..{version}/key")), format!("value-{version:03}")).unwrap();
        symlink(format!("..{version}"), path("..data_tmp")).unwrap();
        fs::rename(path("..data_tmp"), path("..data")).unwrap();
        if version > 0 {
            fs::remove_dir_all(path(&format!("..{}", version - 1))).unwrap();
        }
    };
    write(0);
    symlink("..data/key", path("key")).unwrap();
    for version in 0..20 {
        assert_eq!(machine.done("read /share/key"), format!("value-{version:03}"));
        write(version + 1);
    }

    assert_eq!(machine.refused("read /share/later"), "ENOENT");
    fs::write(path("later"), "1").unwrap();
    for length in 1..20 {
        assert_eq!(machine.done("stat /share/later"), format!("100644 0 0 {length} 1"));
        assert_eq!(machine.done("read /share/later"), "1".repeat(length));
        fs::write(path("later"), "1".repeat(length + 1)).unwrap();
    }
    // In place, without a change of the size.
    for text in ["one", "two", "six"] {
        fs::write(path("later"), text).unwrap();
        assert_eq!(machine.done("read /share/later"), text);
    }
    set_mode(&path("later"), 0o640);
    assert_eq!(machine.done("stat /share/later"), "100640 0 0 3 1");
    fs::remove_file(path("later")).unwrap();
    assert_eq!(machine.refused("stat /share/later"), "ENOENT");
}

fn mounts_of_the_host_come_and_go(suite: &str, version: &str) {
    let tree = Tree::new();
    let path = |name: &str| tree.path().join(name);
    let (server, mut machine) = start(&tree, suite, version);
    let (before, open) = (server.descriptors(), server.open_files());

    // A container that is added: the guest knew the directory before.
    fs::create_dir(path("rootfs")).unwrap();
    assert_eq!(machine.done("list /share/rootfs"), "");
    let lower = tree.beside("lower");
    fs::create_dir(&lower).unwrap();
    fs::write(lower.join("program"), "of the image").unwrap();
    tree.mount_overlay("rootfs", &lower);
    assert_eq!(machine.done("list /share/rootfs"), "program");
    assert_eq!(machine.done("mounts /share/rootfs"), "virtiofs");
    machine.done("append /share/rootfs/program ,changed");
    assert_eq!(machine.done("read /share/rootfs/program"), "of the image,changed");
    assert_eq!(fs::read_to_string(lower.join("program")).unwrap(), "of the image");
    assert_eq!(fs::read_to_string(tree.beside("upper/program")).unwrap(), "of the image,changed");

    // Two file systems give the same numbers to different files: programs tell them apart by the device.
    for name in ["one", "two"] {
        fs::create_dir(path(name)).unwrap();
        mount("none", path(name), "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(path(&format!("{name}/file")), name).unwrap();
    }
    let numbers = ["one", "two"].map(|name| fs::metadata(path(&format!("{name}/file"))).unwrap().ino());
    assert_eq!(numbers[0], numbers[1]);
    let [one, two] = ["one", "two"].map(|name| machine.done(&format!("identity /share/{name}/file")));
    assert_ne!(one, two);
    assert_eq!(machine.done("read /share/two/file"), "two");

    // What is read-only on the host is so in the guest, if it was when it came: a remount later stays the host's.
    fs::create_dir(path("read-only")).unwrap();
    let aside = tree.beside("read-only");
    fs::create_dir(&aside).unwrap();
    mount_bind(&aside, &aside).unwrap();
    mount_remount(&aside, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    mount_bind(&aside, path("read-only")).unwrap();
    assert_eq!(machine.refused("write /share/read-only/file x"), "EROFS");
    unmount(&aside, UnmountFlags::DETACH).unwrap();

    // One directory mounted twice is two file systems to the guest, each with its own locks and memory: what containers share is one
    // mount.
    for name in ["first", "second"] {
        fs::create_dir(path(name)).unwrap();
        mount_bind(tree.beside("lower"), path(name)).unwrap();
    }
    let [first, second] =
        ["first", "second"].map(|name| machine.done(&format!("identity /share/{name}/program")));
    assert_ne!(first, second);

    // A volume that is a single file.
    fs::write(path("hosts"), "").unwrap();
    fs::write(tree.beside("hosts"), "127.0.0.1").unwrap();
    assert_eq!(machine.done("read /share/hosts"), "");
    mount_bind(tree.beside("hosts"), path("hosts")).unwrap();
    assert_eq!(machine.done("read /share/hosts"), "127.0.0.1");

    // Down in order: first the guest's mount, then the host's, which then is in nobody's use.
    machine.done("umount /share/one");
    eventually("the guest lets go of what it unmounted", || {
        unmount(path("one"), UnmountFlags::empty()).is_ok()
    });
    assert_eq!(machine.done("list /share/one"), "");
    // And without the guest: where it looks, it sees what is below.
    for name in ["two", "rootfs", "read-only", "first", "second", "hosts"] {
        unmount(path(name), UnmountFlags::DETACH).unwrap();
    }
    for name in ["two", "rootfs", "read-only", "first", "second"] {
        assert_eq!(machine.done(&format!("list /share/{name}")), "", "{name}");
        assert_eq!(machine.done(&format!("mounts /share/{name}")), "", "{name}");
    }
    assert_eq!(machine.done("read /share/hosts"), "");
    assert_eq!(server.file("mountinfo").lines().count(), 1);
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.descriptors() > before {
        assert!(
            Instant::now() < deadline,
            "at first {open:?} were open, and now {:?} are",
            server.open_files()
        );
        std::thread::yield_now();
    }
}

/// KiB that the server may have of its own with 10,000 files that the guest holds.
const MOST_KIB: u64 = 8 << 10;

fn many_files_take_little(suite: &str, version: &str) {
    const FILES: usize = 10_000;
    let tree = Tree::new();
    for at in 0..FILES {
        if at % 1000 == 0 {
            fs::create_dir(tree.path().join((at / 1000).to_string())).unwrap();
        }
        fs::write(tree.path().join(format!("{}/{at}", at / 1000)), "").unwrap();
    }
    let server = Server::start_release(&tree, &[]);
    let mut machine = Machine::start(suite, 256, &[("share", server.socket())]);
    machine.done("mount share /share");
    let (memory, descriptors) = (server.own_kib(), server.descriptors());

    // Who only looks at files holds none of them afterwards.
    let walked = machine.done("walk /share");
    assert!(walked.starts_with("10010 "), "{walked}");
    eventually("files that nobody uses are forgotten", || server.descriptors() <= descriptors + 20);
    println!("{version}: {memory} KiB, after a walk {} KiB, {walked} µs", server.own_kib());

    machine.done("hold /share");
    println!("{version}: {FILES} held: {} KiB, {} descriptors", server.own_kib(), server.descriptors());
    assert!(server.descriptors() >= descriptors + FILES);
    assert!(server.own_kib() < MOST_KIB, "{} KiB", server.own_kib());
    machine.done("release");
    eventually("released files are forgotten", || server.descriptors() <= descriptors + 20);

    // With a bound the guest's programs get an error, nothing else fails, and it goes on once they let go.
    let own = Tree::new();
    for name in 0..200 {
        fs::write(own.path().join(name.to_string()), "").unwrap();
    }
    let bounded = Server::start(&own, &["--max-files", "100"]);
    let mut machine = Machine::start(suite, 256, &[("share", bounded.socket())]);
    machine.done("mount share /share");
    assert_eq!(machine.refused("hold /share"), "ENFILE");
    assert!(bounded.descriptors() < 200);
    machine.done("release");
    machine.done("write /share/new x");
}
