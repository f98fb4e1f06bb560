//! Removing trees that do not want to go.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};

use podvisor_unpack::remove_tree;
use rustix::fs::{FileType, IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use crate::scratch::{Scratch, tmpfs};

#[test]
fn links_whiteouts_and_locked_directories_go_and_nothing_else() {
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    fs::create_dir_all(tree.join("a/b/c")).expect("make");
    fs::create_dir(tree.join("empty")).expect("make");
    for index in 0..3000 {
        fs::write(tree.join(format!("a/b/{index}")), "x").expect("write");
        fs::create_dir_all(tree.join(format!("many/{index}/x"))).expect("make");
    }
    symlink(scratch.outside(), tree.join("a/out")).expect("link");
    symlink(scratch.outside(), scratch.path("link")).expect("link");
    rustix::fs::mknodat(rustix::fs::CWD, tree.join("a/wh"), FileType::CharacterDevice, Mode::empty(), 0)
        .expect("make whiteout");
    fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o000)).expect("lock");
    let parent = File::open(scratch.path("")).expect("open");
    let remove = |name: &str| remove_tree(parent.as_fd(), OsStr::new(name));
    for name in ["tree", "link", "missing"] {
        remove(name).expect(name);
        assert!(!scratch.path(name).is_symlink() && !scratch.path(name).exists(), "{name}");
    }
    for name in ["", ".", "..", "a/b", "../outside", "/"] {
        assert_eq!(remove(name).expect_err(name).errno(), Errno::INVAL);
    }
    scratch.assert_canary("removal");
}

#[test]
fn depth_is_no_obstacle() {
    let root = tmpfs(&[]);
    let open = |parent: &OwnedFd| {
        rustix::fs::openat(parent, "d", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("open")
    };
    rustix::fs::mkdirat(&root, "d", Mode::RWXU).expect("make");
    let mut current = open(&root);
    for _ in 0..20_000 {
        rustix::fs::mkdirat(&current, "d", Mode::RWXU).expect("make");
        rustix::fs::mkdirat(&current, "e", Mode::RWXU).expect("make");
        current = open(&current);
    }
    drop(current);
    remove_tree(root.as_fd(), OsStr::new("d")).expect("remove");
    assert_eq!(rustix::fs::statat(&root, "d", rustix::fs::AtFlags::empty()).err(), Some(Errno::NOENT));
}

#[test]
fn what_a_privileged_container_made_immutable_goes_too() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("tree/locked/below")).expect("make");
    for name in ["tree/file", "tree/locked/log", "tree/locked/below/file"] {
        fs::write(scratch.path(name), "x").expect("write");
    }
    let set = |name: &str, flag: IFlags| {
        let file = File::open(scratch.path(name)).expect("open");
        let flags =
            ioctl_getflags(&file).expect("a file system with inode flags below the temporary directory");
        ioctl_setflags(&file, flags | flag).expect("set flag");
    };
    for (name, flag) in [
        ("tree/file", IFlags::IMMUTABLE),
        ("tree/locked/log", IFlags::APPEND),
        ("tree/locked/below", IFlags::IMMUTABLE),
        ("tree/locked", IFlags::APPEND),
        ("tree", IFlags::IMMUTABLE),
    ] {
        set(name, flag);
    }
    let parent = File::open(scratch.path("")).expect("open");
    remove_tree(parent.as_fd(), OsStr::new("tree")).expect("remove");
    assert!(!scratch.path("tree").exists());
}
