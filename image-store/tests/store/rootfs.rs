//! Snapshots, mounted on the real kernel.

use std::fs;
use std::path::{Path, PathBuf};

use podvisor_image_store::{ErrorKind, ImageStore, Rootfs};
use rustix::mount::{UnmountFlags, unmount};

use crate::full::privately;
use crate::layer::{As, Layer, Tar};
use crate::server::Server;
use crate::{World, chain, eventually};

struct Mounted(PathBuf);

impl Mounted {
    fn new(store: &ImageStore, world: &World, rootfs: &Rootfs) -> Self {
        let target = world.path(&format!("mount-{}", rootfs.key));
        fs::create_dir_all(&target).unwrap();
        store.mount(rootfs, &target, None).map_err(|error| chain(&error)).unwrap();
        Self(target)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.0.join(name)).ok()
    }

    fn names(&self, name: &str) -> Vec<String> {
        crate::entries(&self.0.join(name))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::empty()).unwrap();
        fs::remove_dir(&self.0).unwrap();
    }
}

#[test]
fn layers_whiteouts_and_opaque_directories() {
    privately(|| async {
        let (world, server) = (World::new(), Server::start().await);
        let lower = Tar::new()
            .directory("./", 0o755)
            .directory("etc", 0o755)
            .file("etc/keep", b"lower")
            .file("etc/change", b"lower")
            .file("etc/remove", b"lower")
            .directory("hidden", 0o755)
            .file("hidden/old", b"lower")
            .directory("gone", 0o755)
            .file("gone/file", b"lower")
            .file("becomes-directory", b"lower");
        let upper = Tar::new()
            .directory("./", 0o711)
            .file("etc/change", b"upper")
            .whiteout("etc", "remove")
            .directory("hidden", 0o755)
            .opaque("hidden")
            .file("hidden/new", b"upper")
            .whiteout(".", "gone")
            .directory("becomes-directory", 0o755)
            .file("becomes-directory/file", b"upper");
        let layers = [Layer::new(lower, As::Gzip), Layer::new(upper, As::Zstd)];
        let pushed = server.push("app", "latest", &[&layers[0], &layers[1]], "app");
        let store = world.open().await;
        store.pull(&server.name("app"), None).await.unwrap();

        let rootfs = store.prepare("writable", &pushed.id, false).await.unwrap();
        assert_eq!(rootfs, store.prepare("writable", &pushed.id, false).await.unwrap());
        let view = store.prepare("view", &pushed.id, true).await.unwrap();
        assert!(view.upper.is_none() && view.work.is_none());
        {
            let (mounted, view) =
                (Mounted::new(&store, &world, &rootfs), Mounted::new(&store, &world, &view));
            for mounted in [&mounted, &view] {
                assert_eq!(mounted.read("etc/keep").as_deref(), Some("lower"));
                assert_eq!(mounted.read("etc/change").as_deref(), Some("upper"));
                assert_eq!(mounted.names("etc"), ["change", "keep"]);
                assert_eq!(mounted.names("hidden"), ["new"]);
                assert_eq!(mounted.names(""), ["becomes-directory", "etc", "hidden"]);
                assert_eq!(mounted.names("becomes-directory"), ["file"]);
                let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&mounted.0).unwrap());
                assert_eq!(mode & 0o7777, 0o711, "the root directory is the topmost layer's");
            }
            fs::write(mounted.0.join("etc/keep"), "mine").unwrap();
            fs::remove_file(mounted.0.join("etc/change")).unwrap();
            fs::write(mounted.0.join("new"), vec![1; 100_000]).unwrap();
            let refused = fs::write(view.0.join("new"), "x").unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            assert_eq!(
                view.read("etc/keep").as_deref(),
                Some("lower"),
                "containers share what they cannot change"
            );
        }
        // What was written is there again after a restart.
        drop(store);
        let store = world.open().await;
        assert_eq!(store.snapshots(), ["view", "writable"]);
        let again = store.prepare("writable", &pushed.id, false).await.unwrap();
        assert_eq!(again, rootfs);
        {
            let mounted = Mounted::new(&store, &world, &again);
            assert_eq!(mounted.read("etc/keep").as_deref(), Some("mine"));
            assert_eq!(mounted.names("etc"), ["keep"]);
            // Measured in the background, once somebody has asked.
            eventually(|| match store.writable_usage("writable") {
                Some(usage) if usage.used_bytes > 100_000 && usage.inodes_used >= 4 => Ok(()),
                usage => Err(usage),
            })
            .await;
            let (images, containers) = store.fs_info();
            assert_eq!(images.mountpoint, containers.mountpoint);
            assert!(containers.used_bytes > 100_000 && images.inodes_used > 10);
        }
        for key in store.snapshots() {
            store.release(&key).await.unwrap();
        }
        assert!(store.snapshots().is_empty() && store.writable_usage("writable").is_none());
        eventually(
            || if crate::entries(&world.path("images/snapshots")).is_empty() { Ok(()) } else { Err(()) },
        )
        .await;
        world.holds(&layers.map(|layer| layer.diff_id())).await;
    });
}

#[test]
fn many_layers_and_few() {
    privately(|| async {
        let (world, server) = (World::new(), Server::start().await);
        let layers: Vec<_> = (0..70)
            .map(|number| {
                let tar =
                    Tar::new().file(&format!("f{number}"), b"").file("last", number.to_string().as_bytes());
                Layer::new(tar, As::Plain)
            })
            .collect();
        let same = &layers[3];
        let store = world.open().await;
        let many: Vec<_> = layers.iter().collect();
        for (name, layers, last) in [
            ("many", many, Some("69")),
            ("one", vec![same], Some("3")),
            // The same layer again below itself adds nothing, and overlayfs would refuse it.
            ("repeated", vec![same, &layers[5], same], Some("3")),
            ("none", vec![], None),
        ] {
            let pushed = server.push(name, "latest", &layers, name);
            store.pull(&server.name(name), None).await.unwrap();
            for read_only in [false, true] {
                let key = format!("{name}-{read_only}");
                let rootfs = store.prepare(&key, &pushed.id, read_only).await.unwrap();
                let mounted = Mounted::new(&store, &world, &rootfs);
                assert_eq!(mounted.read("last").as_deref(), last, "{key}");
                if name == "many" {
                    assert_eq!(mounted.names("").len(), 71);
                }
                assert_eq!(fs::write(mounted.0.join("x"), "x").is_err(), read_only, "{key}");
                drop(mounted);
                store.release(&key).await.unwrap();
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn keys() {
    let (world, server) = (World::new(), Server::start().await);
    let first = server.push("first", "latest", &[&Layer::file("a", b"a")], "first");
    let second = server.push("second", "latest", &[&Layer::file("b", b"b")], "second");
    let store = world.open().await;
    for name in ["first", "second"] {
        store.pull(&server.name(name), None).await.unwrap();
    }
    let long = "x".repeat(300);
    for key in ["", ".", "..", "../images", "a/b", "a\0b", &long] {
        let error = store.prepare(key, &first.id, false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{key:?}: {}", chain(&error));
        store.release(key).await.unwrap();
    }
    let error = store.prepare("key", "sha256:0000", false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = store.prepare("key", &server.name("first"), false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "an id is asked for, not a name");
    assert!(store.snapshots().is_empty());
    assert!(Path::new(&world.path("images")).exists());

    // What a container has written is not given to another image.
    let rootfs = store.prepare("key", &first.id, false).await.unwrap();
    fs::write(rootfs.upper.as_ref().unwrap().join("mine"), "mine").unwrap();
    for (image, read_only) in [(&second.id, false), (&first.id, true)] {
        assert_eq!(store.prepare("key", image, read_only).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert!(rootfs.upper.unwrap().join("mine").exists());
    store.release("key").await.unwrap();
}

/// Ten containers start while an image is pulled, removed and pulled again: each stands on all its layers or is refused.
#[tokio::test(flavor = "multi_thread")]
async fn prepared_while_the_image_comes_and_goes() {
    let (world, server) = (World::new(), Server::start().await);
    let layers = [Layer::file("a", b"a"), Layer::file("b", b"b")];
    let pushed = server.push("app", "latest", &[&layers[0], &layers[1]], "app");
    let store = world.open().await;
    let name = server.name("app");
    store.pull(&name, None).await.unwrap();
    let churn = tokio::spawn({
        let (store, name) = (store.clone(), name.clone());
        async move {
            for _ in 0..15 {
                store.remove(&name).await.unwrap();
                store.pull(&name, None).await.unwrap();
            }
        }
    });
    let containers: Vec<_> = (0..10)
        .map(|number| {
            let (store, id) = (store.clone(), pushed.id.clone());
            tokio::spawn(async move {
                let mut stood = 0;
                // The last change pulls the image, so that everybody stands on it in the end.
                for round in 0.. {
                    let key = format!("container-{number}");
                    match store.prepare(&key, &id, false).await {
                        Ok(rootfs) => {
                            for (layer, file) in rootfs.lower.iter().zip(["b", "a"]) {
                                assert!(layer.join(file).exists(), "{key} has lost {file}");
                            }
                            stood += 1;
                        }
                        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{}", chain(&error)),
                    }
                    store.release(&key).await.unwrap();
                    if round >= 20 && stood > 0 {
                        break;
                    }
                }
            })
        })
        .collect();
    for container in containers {
        container.await.unwrap();
    }
    churn.await.unwrap();
    assert!(store.snapshots().is_empty());
    world.holds(&layers.map(|layer| layer.diff_id())).await;
}
