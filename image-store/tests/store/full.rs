//! A disk that is full: said so, nothing half-made stays, and afterwards all is well without a restart.

#![allow(unsafe_code)]

use std::fs;

use podvisor_image_store::ErrorKind;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::layer::Layer;
use crate::server::Server;
use crate::{World, chain, ids};

/// Runs `test` in a thread with mounts of its own, with a runtime whose threads share them.
pub(crate) fn privately<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let run = || {
        // SAFETY: only UnshareFlags::FILES has a condition, and it is not among the flags.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("these tests need root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(test());
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// A file system of that size at `world`'s place until this is dropped.
struct Small(std::path::PathBuf);

impl Small {
    fn new(place: &std::path::Path, options: &std::ffi::CStr) -> Self {
        mount("tmpfs", place, "tmpfs", MountFlags::empty(), options).unwrap();
        Self(place.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // What is still removed in the background may hold it; it goes with the namespace.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn of_bytes() {
    privately(|| async {
        let place = tempfile::tempdir().unwrap();
        let small = Small::new(place.path(), c"size=10m");
        let (world, server) = (World::at(place.path()), Server::start().await);
        let (fits, large) = (Layer::bulk("a", 1, 1 << 19), Layer::bulk("b", 2, 12 << 20));
        let kept = server.push("kept", "latest", &[&fits], "kept");
        server.push("large", "latest", &[&fits, &large], "large");
        let store = world.open().await;
        store.pull(&server.name("kept"), None).await.unwrap();
        let error = store.pull(&server.name("large"), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{}", chain(&error));
        server.idle().await;
        world.holds(&[fits.diff_id()]).await;
        assert_eq!(ids(&store), [kept.id.as_str()]);

        // To the last page, so that the database cannot grow either.
        fill(&world.path("ballast"));
        let other = server.push("other", "latest", &[&fits], &"x".repeat(100_000));
        let mut pulled = None;
        for number in 0..50 {
            let text = format!("{number}{}", "x".repeat(100_000));
            server.push("other", "latest", &[&fits], &text);
            if let Err(error) = store.pull(&server.name("other"), None).await {
                assert_eq!(error.kind(), ErrorKind::Full, "{}", chain(&error));
                pulled = Some(error);
                break;
            }
        }
        assert!(pulled.is_some(), "the database never had to grow");
        assert!(ids(&store).contains(&kept.id));
        let before = ids(&store);
        assert!(store.prepare("key", &kept.id, false).await.is_err());
        assert!(store.snapshots().is_empty());
        world.holds(&[fits.diff_id()]).await;

        // There is room again.
        fs::remove_file(world.path("ballast")).unwrap();
        server.tag("other", "latest", &other.digest);
        assert_eq!(store.pull(&server.name("other"), None).await.unwrap().id, other.id);
        store.prepare("key", &kept.id, false).await.unwrap();
        drop(store);
        let store = world.open().await;
        let mut wanted = before;
        wanted.push(other.id);
        wanted.sort();
        assert_eq!(ids(&store), wanted);
        drop(store);
        drop(small);
    });
}

#[test]
fn of_an_image_for_machines() {
    privately(|| async {
        let place = tempfile::tempdir().unwrap();
        let small = Small::new(place.path(), c"size=10m");
        let (world, server) = (World::at(place.path()), Server::start().await);
        let layer = Layer::bulk("a", 1, 6 << 20);
        let pushed = server.push("app", "latest", &[&layer], "app");
        let store = world.open().await;
        store.pull(&server.name("app"), None).await.unwrap();
        store.prepare("key", &pushed.id, true).await.unwrap();
        let error = store.machine_image("key", None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{}", chain(&error));
        world.holds(&[layer.diff_id()]).await;
        assert_eq!(crate::entries(&world.path("images/machine")), [""; 0]);
        mount_remount(place.path(), MountFlags::empty(), c"size=30m").unwrap();
        let image = store.machine_image("key", None).await.unwrap();
        assert_eq!(fs::metadata(&image.blobs[0]).unwrap().len(), 6 << 20);
        drop(store);

        // With a pull that makes it too, it is the pull that fails.
        fill(&world.path("ballast"));
        mount_remount(place.path(), MountFlags::empty(), c"size=40m").unwrap();
        let other = Layer::bulk("b", 2, 6 << 20);
        let options = podvisor_image_store::Options { machine_images: true, ..world.options() };
        let store = podvisor_image_store::ImageStore::open(options).await.unwrap();
        server.push("other", "latest", &[&other], "other");
        let error = store.pull(&server.name("other"), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{}", chain(&error));
        world.holds(&[layer.diff_id()]).await;
        assert_eq!(ids(&store), [pushed.id.as_str()]);
        drop(store);
        drop(small);
    });
}

/// A node that is restarted with a full disk must come up: only so can it make room.
#[test]
fn at_the_start() {
    privately(|| async {
        let place = tempfile::tempdir().unwrap();
        let small = Small::new(place.path(), c"size=10m");
        let (world, server) = (World::at(place.path()), Server::start().await);
        let layer = Layer::bulk("a", 1, 1 << 19);
        let pushed = server.push("app", "latest", &[&layer], "app");
        let store = world.open().await;
        store.pull(&server.name("app"), None).await.unwrap();
        drop(store);
        fill(&world.path("ballast"));
        let store = world.open().await;
        assert_eq!(ids(&store), [pushed.id.as_str()]);
        store.remove(&pushed.id).await.unwrap();
        world.holds(&[]).await;
        drop(store);
        drop(small);
    });
}

#[test]
fn of_inodes() {
    privately(|| async {
        let place = tempfile::tempdir().unwrap();
        let small = Small::new(place.path(), c"size=64m,nr_inodes=300");
        let (world, server) = (World::at(place.path()), Server::start().await);
        let many =
            (0..400).fold(crate::layer::Tar::new(), |tar, number| tar.file(&format!("f{number}"), b""));
        server.push("app", "latest", &[&Layer::new(many, crate::layer::As::Gzip)], "app");
        let store = world.open().await;
        let error = store.pull(&server.name("app"), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{}", chain(&error));
        world.holds(&[]).await;
        drop(store);
        drop(small);
    });
}

/// Takes every byte there is.
fn fill(path: &std::path::Path) {
    use std::io::Write as _;
    let mut file = fs::File::create(path).unwrap();
    for size in [1 << 20, 4096, 1] {
        let chunk = vec![0; size];
        while file.write_all(&chunk).is_ok() {}
    }
}
