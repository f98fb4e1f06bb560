//! Root file systems with the ids of a user namespace, on the real kernel.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use podvisor_image_store::{ErrorKind, ImageStore, Rootfs};
use rustix::mount::{UnmountFlags, unmount};

use crate::full::privately;
use crate::layer::{As, Layer, Tar};
use crate::server::Server;
use crate::{World, chain, eventually};

const FIRST: u32 = 200_000;

/// A process in a user namespace in which id 0 is [`FIRST`].
struct Process(Child);

impl Process {
    async fn start() -> Self {
        let child = Command::new("unshare").args(["--user", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
        let directory = format!("/proc/{}", child.id());
        let ours = fs::metadata("/proc/self/ns/user").unwrap().ino();
        eventually(|| match fs::metadata(format!("{directory}/ns/user")) {
            Ok(its) if its.ino() != ours => Ok(()),
            other => Err(other.map(|its| its.ino())),
        })
        .await;
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("{directory}/{map}"), format!("0 {FIRST} 65536")).unwrap();
        }
        Self(child)
    }

    fn namespace(&self) -> File {
        File::open(format!("/proc/{}/ns/user", self.0.id())).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

fn mounts() -> String {
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}

/// Checks a root file system with `files` entries in its root directory.
fn check(store: &ImageStore, world: &World, rootfs: &Rootfs, user: &File, files: usize) {
    let target = world.path("target");
    fs::create_dir_all(&target).unwrap();
    let before = mounts();
    store.mount_with_ids(rootfs, &target, None, user.as_fd()).map_err(|error| chain(&error)).unwrap();
    assert_eq!(mounts().lines().count(), before.lines().count() + 1, "only the root file system is seen");
    assert_eq!(fs::read_dir(&target).unwrap().count(), files);
    let _mounted = Mounted(&target);
    if files > 0 || rootfs.upper.is_some() {
        assert_eq!(owner(&target), (FIRST, FIRST), "the root directory is the container's root's");
    }
    if files > 0 {
        let file = target.join("etc/f0");
        assert_eq!(owner(&file), (FIRST, FIRST));
        if let Some(upper) = &rootfs.upper {
            // Copied up: on the disk it has the id outside, and the layer is as it was.
            chown(&file, Some(FIRST + 5), Some(FIRST + 6)).unwrap();
            assert_eq!(owner(upper.join("etc/f0")), (FIRST + 5, FIRST + 6));
            assert_eq!(owner(upper.join("etc")), (FIRST, FIRST));
            assert_eq!(owner(rootfs.lower.last().unwrap().join("etc/f0")), (0, 0));
        }
    }
}

/// Takes a mount off again, also when a check fails.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::empty()).unwrap();
    }
}

#[test]
fn an_image_has_the_ids_of_the_namespace() {
    privately(|| async {
        let (world, server) = (World::new(), Server::start().await);
        let process = Process::start().await;
        let user = process.namespace();
        let store = world.open().await;
        store.try_ids(user.as_fd()).map_err(|error| chain(&error)).unwrap();

        let layers: Vec<_> = (0..70)
            .map(|number| {
                let tar = Tar::new()
                    .directory("./", 0o755)
                    .directory("etc", 0o755)
                    .file(&format!("etc/f{number}"), b"x");
                Layer::new(tar, As::Plain)
            })
            .collect();
        for (name, count) in [("none", 0), ("one", 1), ("many", 70)] {
            let layers: Vec<_> = layers.iter().take(count).collect();
            let pushed = server.push(name, "latest", &layers, name);
            store.pull(&server.name(name), None).await.unwrap();
            for read_only in [true, false] {
                let key = format!("{name}-{read_only}");
                let rootfs = store.prepare(&key, &pushed.id, read_only).await.unwrap();
                check(&store, &world, &rootfs, &user, count.min(1));
                store.release(&key).await.unwrap();
            }
        }
        // The same image for containers without a user namespace.
        let id = store.get(&server.name("one")).unwrap().id;
        let rootfs = store.prepare("plain", &id, false).await.unwrap();
        let target = world.path("target");
        store.mount(&rootfs, &target, None).unwrap();
        {
            let _mounted = Mounted(&target);
            assert_eq!((owner(&target), owner(target.join("etc/f0"))), ((0, 0), (0, 0)));
        }
        store.release("plain").await.unwrap();
    });
}

#[test]
fn what_is_no_user_namespace_is_refused() {
    privately(|| async {
        let world = World::new();
        let store = world.open().await;
        // The kernel takes the node's own namespace for no mapping at all.
        for path in ["/proc/self/ns/user", "/proc/self/ns/net", "/dev/null"] {
            let error = store.try_ids(File::open(path).unwrap().as_fd()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{path}");
            assert!(chain(&error).contains("images/layers"), "{path}: {}", chain(&error));
        }
    });
}
