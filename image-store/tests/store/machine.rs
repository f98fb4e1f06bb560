//! Images for virtual machines: what the store keeps of them, for whom and how long.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use podvisor_image_store::{ErrorKind, ImageStore, MachineImage};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use crate::full::privately;
use crate::layer::{As, Layer, Tar, noise};
use crate::server::Server;
use crate::{World, chain, entries, eventually};

/// Two layers with something to merge.
fn layers() -> [Layer; 2] {
    let lower = Tar::new()
        .directory("etc", 0o755)
        .file("etc/keep", &noise(1, 10_000))
        .file("etc/change", b"lower")
        .file("etc/remove", &noise(2, 5000))
        .link("link", "etc/keep");
    let upper = Tar::new().file("etc/change", b"upper").whiteout("etc", "remove").file("empty", b"");
    [Layer::new(lower, As::Gzip), Layer::new(upper, As::Gzip)]
}

/// The image in one file.
fn joined(image: &MachineImage) -> tempfile::NamedTempFile {
    let parts = std::iter::once(&image.metadata).chain(&image.blobs);
    let bytes: Vec<u8> = parts.flat_map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(bytes.len() as u64, image.size);
    // On a disk: the kernel mounts no EROFS from a file of a tmpfs.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(&file, bytes).unwrap();
    file
}

fn files(directory: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(path) = pending.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let content = if stat.is_dir() {
            pending.extend(entries(&path).iter().map(|name| path.join(name)));
            Vec::new()
        } else if stat.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else {
            fs::read(&path).unwrap()
        };
        found.insert(path.strip_prefix(directory).unwrap().to_owned(), (stat.mode(), content));
    }
    found
}

fn mount_erofs(image: &Path, target: &Path) {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_set_string(&context, "source", image).unwrap();
    fsconfig_create(&context).unwrap();
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    move_mount(&mount, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
}

#[test]
fn a_machine_sees_what_a_container_sees() {
    privately(|| async {
        let (world, server) = (World::new(), Server::start().await);
        let layers = layers();
        // A layer twice is there once.
        let pushed = server.push("app", "latest", &[&layers[0], &layers[1], &layers[1]], "app");
        let store = world.open().await;
        store.pull(&server.name("app"), None).await.unwrap();
        let rootfs = store.prepare("pod", &pushed.id, true).await.unwrap();
        let image = store.machine_image("pod", None).await.unwrap();
        assert_eq!(image.blobs.len(), 2);
        for file in image.blobs.iter().chain([&image.metadata]) {
            let stat = fs::metadata(file).unwrap();
            assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.len() % 4096), (0o400, 0, 0));
        }
        let (overlay, erofs) = (world.path("overlay"), world.path("erofs"));
        fs::create_dir(&overlay).unwrap();
        fs::create_dir(&erofs).unwrap();
        store.mount(&rootfs, &overlay, None).unwrap();
        let file = joined(&image);
        mount_erofs(file.path(), &erofs);
        assert_eq!(files(&overlay), files(&erofs));
        assert_eq!(fs::read(erofs.join("link")).unwrap(), noise(1, 10_000));
        for target in [&overlay, &erofs] {
            unmount(target, UnmountFlags::empty()).unwrap();
        }
    });
}

fn pieces(world: &World) -> usize {
    entries(&world.path("images/machine")).len()
}

#[tokio::test]
async fn they_stay_as_long_as_somebody_has_them() {
    let (world, server) = (World::new(), Server::start().await);
    let layers = layers();
    let pushed = server.push("app", "latest", &[&layers[0], &layers[1]], "app");
    let other = server.push("other", "latest", &[&layers[0]], "other");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    assert_eq!(pieces(&world), 0, "nobody has asked for them");
    let before = store.fs_info().0;
    store.prepare("pod", &pushed.id, true).await.unwrap();
    let image = store.machine_image("pod", None).await.unwrap();
    let used = store.fs_info().0;
    assert!(used.used_bytes >= before.used_bytes + image.size, "{used:?}");
    assert_eq!(used.inodes_used, before.inodes_used + 2 * 3 + 2);
    assert_eq!(store.machine_image("pod", None).await.unwrap(), image);

    store.pull(&server.name("other"), None).await.unwrap();
    store.remove(&pushed.id).await.unwrap();
    drop(store);
    let store = world.open().await;
    assert_eq!(store.machine_image("pod", None).await.unwrap(), image, "also after a restart");
    assert_eq!(pieces(&world), 3);
    store.release("pod").await.unwrap();
    // The other image has one of the layers.
    eventually(|| if pieces(&world) == 1 { Ok(()) } else { Err(entries(&world.path("images/machine"))) })
        .await;
    store.remove(&other.id).await.unwrap();
    assert_eq!(pieces(&world), 0);
    world.holds(&[]).await;
    assert_eq!(store.fs_info().0.used_bytes, 0);
    let error = store.machine_image("pod", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{}", chain(&error));
}

async fn asks_at_once(store: &ImageStore, keys: &[&str]) -> Vec<MachineImage> {
    let asked: Vec<_> = keys
        .iter()
        .map(|&key| {
            let (store, key) = (store.clone(), key.to_owned());
            tokio::spawn(async move { store.machine_image(&key, None).await.unwrap() })
        })
        .collect();
    let mut images = Vec::new();
    for image in asked {
        images.push(image.await.unwrap());
    }
    images
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_node_have_the_same_and_those_of_a_domain_their_own() {
    let (world, server) = (World::new(), Server::start().await);
    let pushed = server.push("app", "latest", &layers().each_ref(), "app");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    let keys = ["a", "b", "c", "d"];
    for key in keys {
        store.prepare(key, &pushed.id, true).await.unwrap();
    }
    let images = asks_at_once(&store, &keys).await;
    assert!(images.iter().all(|image| *image == images[0]));

    let ours = store.machine_image("a", Some("tenant/ä")).await.unwrap();
    let same = store.machine_image("b", Some("tenant/ä")).await.unwrap();
    let others = store.machine_image("c", Some("node")).await.unwrap();
    assert_eq!(ours, same);
    let inode = |path: &PathBuf| fs::metadata(path).unwrap().ino();
    for (at, blob) in images[0].blobs.iter().enumerate() {
        assert_ne!(inode(blob), inode(&ours.blobs[at]));
        assert_ne!(inode(&others.blobs[at]), inode(&ours.blobs[at]));
        assert_eq!(fs::read(blob).unwrap(), fs::read(&ours.blobs[at]).unwrap());
    }
    assert_eq!(fs::read(&images[0].metadata).unwrap(), fs::read(&ours.metadata).unwrap());
    assert_eq!(pieces(&world), 9);
    store.release("c").await.unwrap();
    store.release("b").await.unwrap();
    assert_eq!(pieces(&world), 6, "a has those of its domain still");
    // They are known again after a restart.
    drop(store);
    let store = world.open().await;
    assert_eq!(pieces(&world), 6);
    store.release("a").await.unwrap();
    assert_eq!(pieces(&world), 3, "the image has those of the node");
}

#[tokio::test]
async fn made_with_the_pull_where_that_is_wanted() {
    let (world, server) = (World::new(), Server::start().await);
    let layers = layers();
    let pushed = server.push("app", "latest", &layers.each_ref(), "app");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    drop(store);
    let options = podvisor_image_store::Options { machine_images: true, ..world.options() };
    let store = ImageStore::open(options).await.unwrap();
    // Its layers are there already.
    store.pull(&server.name("app"), None).await.unwrap();
    assert_eq!(pieces(&world), 3);
    let bulk = Layer::bulk("b", 2, 1 << 20);
    server.push("other", "latest", &[&layers[0], &bulk], "other");
    let other = store.pull(&server.name("other"), None).await.unwrap();
    assert_eq!(pieces(&world), 5, "what they share is there once");
    store.remove(&other.id).await.unwrap();
    assert_eq!(pieces(&world), 3);
    store.remove(&pushed.id).await.unwrap();
    assert_eq!(pieces(&world), 0);
}

#[tokio::test]
async fn a_damaged_index_is_made_anew() {
    let (world, server) = (World::new(), Server::start().await);
    let pushed = server.push("app", "latest", &layers().each_ref(), "app");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    store.prepare("pod", &pushed.id, true).await.unwrap();
    let image = store.machine_image("pod", None).await.unwrap();
    let wanted = fs::read(&image.metadata).unwrap();
    let index = image.blobs[0].with_file_name("index");
    let mut bytes = fs::read(&index).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&index, bytes).unwrap();
    fs::remove_dir_all(image.metadata.parent().unwrap()).unwrap();
    drop(store);
    let store = world.open().await;
    let error = store.machine_image("pod", None).await.unwrap_err();
    assert!(chain(&error).contains("is damaged"), "{}", chain(&error));
    assert_eq!(store.machine_image("pod", None).await.unwrap(), image);
    assert_eq!(fs::read(&image.metadata).unwrap(), wanted);
}
