//! The server without a virtual machine: what it can see and do, what of the host reaches it, and how it ends.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

mod server;

use server::{Server, Tree};

#[test]
fn it_has_what_it_needs_and_nothing_else() {
    let tree = Tree::new();
    fs::write(tree.path().join("hello"), "").unwrap();
    let server = Server::start(&tree, &[]);

    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
    let kept = format!("{:016x}", [0, 1, 3, 4, 6, 7, 31].map(|bit| 1_u64 << bit).iter().sum::<u64>());
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(server.status(set), kept, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(server.status(set), "0".repeat(16), "{set}");
    }
    assert_eq!(server.status("NoNewPrivs"), "1");
    assert_eq!(server.status("Seccomp"), "2");
    assert_eq!(server.status("Groups"), "");

    for namespace in ["mnt", "net", "ipc", "uts", "cgroup", "user"] {
        let name = format!("ns/{namespace}");
        let own = fs::read_link(format!("/proc/self/{name}")).unwrap();
        assert_ne!(server.link(&name), own.to_string_lossy(), "{namespace}");
    }
    let own = fs::read_to_string("/proc/self/uid_map").unwrap();
    assert_eq!(server.file("uid_map"), own, "ids are what they are outside");

    let mounts = server.file("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("nosuid,nodev,noexec") && mounts.contains(" master:"), "{mounts}");
    let entries = fs::read_dir(server.root()).unwrap();
    assert_eq!(entries.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["hello"]);
    let interfaces = server.file("net/dev");
    assert!(interfaces.lines().skip(2).all(|line| line.trim().starts_with("lo:")), "{interfaces}");
}

#[test]
fn it_sees_what_is_mounted_later_and_holds_up_no_unmount() {
    let tree = Tree::new();
    let server = Server::start(&tree, &[]);
    let lower = tree.beside("lower");
    fs::create_dir(&lower).unwrap();
    fs::write(lower.join("file"), "of the image").unwrap();
    tree.mount_overlay("rootfs", &lower);
    assert_eq!(fs::read_to_string(server.root().join("rootfs/file")).unwrap(), "of the image");
    fs::write(tree.path().join("rootfs/file"), "changed").unwrap();
    assert_eq!(fs::read_to_string(server.root().join("rootfs/file")).unwrap(), "changed");

    // Not even with MNT_DETACH: nobody uses it.
    unmount(tree.path().join("rootfs"), UnmountFlags::empty()).unwrap();
    assert!(!server.root().join("rootfs/file").exists());
    assert_eq!(server.file("mountinfo").lines().count(), 1);

    // A directory that the server knows is held by the kernel until it is let go of, and in nobody's way.
    fs::create_dir(tree.path().join("volume")).unwrap();
    mount("none", tree.path().join("volume"), "tmpfs", MountFlags::empty(), None).unwrap();
    let known = fs::File::open(server.root().join("volume")).unwrap();
    unmount(tree.path().join("volume"), UnmountFlags::DETACH).unwrap();
    fs::remove_dir(tree.path().join("volume")).unwrap();
    drop(known);
}

#[test]
fn it_serves_one_connection_and_ends_with_it() {
    let tree = Tree::new();
    let server = Server::start(&tree, &[]);
    let connection = UnixStream::connect(server.socket()).unwrap();
    // The socket is closed some time after the first connection: from then on it refuses.
    while UnixStream::connect(server.socket()).is_ok() {
        std::thread::yield_now();
    }
    drop(connection);
    assert!(server.end().success());
    assert!(tree.beside("socket").exists(), "removing it is the parent's");
}

#[test]
fn it_ends_when_its_parent_does() {
    let tree = Tree::new();
    let server = std::thread::scope(|scope| {
        // The death signal comes with the end of the thread that started it.
        scope.spawn(|| Server::start(&tree, &[])).join().unwrap()
    });
    let status = server.end();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
}

#[test]
fn what_is_wrong_at_the_start_is_said() {
    let tree = Tree::new();
    let program = Path::new(env!("CARGO_BIN_EXE_podvisor-fs"));
    let said = |command: &mut Command| {
        let output = command.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let arguments = ["--socket-path", "/socket", "--shared-dir", "/", "--ready-fd", "77"];
    let text = said(Command::new(program).args(arguments));
    assert_eq!(text, "podvisor-fs: use --ready-fd 77: it is not open\n");
    let text = said(&mut server::command(program, &tree, &tree.path().join("no/socket")));
    assert!(text.contains("listen on ") && text.contains("No such file"), "{text}");
    unmount(tree.path(), UnmountFlags::DETACH).unwrap();
    let text = said(&mut server::command(program, &tree, &tree.beside("socket")));
    assert!(text.contains("is not a mount point: bind it to itself"), "{text}");
}
