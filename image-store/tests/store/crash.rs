//! The process is killed at any moment: each image is there whole or not at all, and the next start leaves nothing behind.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use podvisor_image_store::MachineImage;
use tokio::process::{Child, Command};

use crate::layer::{As, Layer, Tar, noise};
use crate::server::{Pushed, Server};
use crate::{World, ids};

/// Tells the process that is to be killed where to work, and with which registry.
const PLACE: &str = "PODVISOR_STORE_TEST_PLACE";
const REGISTRY: &str = "PODVISOR_STORE_TEST_REGISTRY";
const ROUNDS: u64 = 30;
const IMAGES: usize = 4;

/// What the process does until it is killed; no test of its own.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the test below"]
async fn victim() {
    let Ok(place) = std::env::var(PLACE) else { return };
    let registry = std::env::var(REGISTRY).unwrap();
    let store = World::at(Path::new(&place)).open().await;
    let workers: Vec<_> = (0..IMAGES)
        .map(|number| {
            let (store, name) = (store.clone(), format!("{registry}/app{number}"));
            tokio::spawn(async move {
                for round in 0.. {
                    let image = store.pull(&name, None).await.unwrap();
                    let key = format!("container-{number}");
                    store.release(&key).await.unwrap();
                    store.prepare(&key, &image.id, round % 2 == 0).await.unwrap();
                    let domain = (round % 4 == 1).then_some("tenant");
                    store.machine_image(&key, domain).await.unwrap();
                    store.remove(&image.id).await.unwrap();
                    if round % 3 == 0 {
                        store.release(&key).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
}

fn start(world: &World, server: &Server) -> Child {
    // The file itself may have been built anew meanwhile.
    Command::new("/proc/self/exe")
        .args(["--exact", "crash::victim", "--ignored", "--nocapture"])
        .env(PLACE, world.path(""))
        .env(REGISTRY, server.address.to_string())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment() {
    let (world, server) = (World::new(), Server::start().await);
    let shared = layer(100);
    let mut images: HashMap<String, (Pushed, Vec<Layer>)> = HashMap::new();
    for number in 0..IMAGES {
        let mut layers = vec![shared.clone()];
        layers.extend((0..2).map(|at| layer(number as u64 * 2 + at)));
        let pushed =
            server.push(&format!("app{number}"), "latest", &layers.iter().collect::<Vec<_>>(), "app");
        images.insert(pushed.id.clone(), (pushed, layers));
    }
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let dice = noise(seed.into(), 16 * usize::try_from(ROUNDS).unwrap());
    let (mut found, mut half) = (0, 0);
    for round in dice.chunks_exact(16) {
        let draw = |at: usize| u64::from_le_bytes(round[at..at + 8].try_into().unwrap());
        let mut victim = start(&world, &server);
        // Somewhere in the first two megabytes that it fetches, and a little later: commits come after the last byte.
        server.has_sent(server.sent() + draw(0) % (2 << 20)).await;
        tokio::time::sleep(Duration::from_micros(draw(8) % 30_000)).await;
        if let Some(status) = victim.try_wait().unwrap() {
            panic!("it ended by itself: {status}");
        }
        victim.kill().await.unwrap();
        half += usize::from(!world.ingest().is_empty());

        let store = world.open().await;
        let mut needed = Vec::new();
        for id in ids(&store) {
            let (_, layers) = &images[&id];
            found += 1;
            needed.extend(layers.iter().map(Layer::diff_id));
            for layer in layers {
                assert_whole(&world, layer);
            }
        }
        for key in store.snapshots() {
            let number: u64 = key.strip_prefix("container-").unwrap().parse().unwrap();
            let layers = [shared.clone(), layer(number * 2), layer(number * 2 + 1)];
            needed.extend(layers.iter().map(Layer::diff_id));
            for layer in &layers {
                assert_whole(&world, layer);
            }
            // What is there of its image for machines is what is made anew.
            let found = store.machine_image(&key, None).await.unwrap();
            let again = store.machine_image(&key, Some(&format!("{seed}-{}", draw(0)))).await.unwrap();
            let bytes = |image: &MachineImage| {
                let parts = std::iter::once(&image.metadata).chain(&image.blobs);
                parts.map(|path| std::fs::read(path).unwrap()).collect::<Vec<_>>()
            };
            assert!(bytes(&found) == bytes(&again), "the image of {key} for machines is not whole");
        }
        world.holds(&needed).await;
        // It works on: with what is there, and from there.
        let (pushed, layers) = images.values().nth(usize::try_from(draw(8)).unwrap() % IMAGES).unwrap();
        let name = server.name(&format!("app@{}", pushed.digest));
        assert_eq!(store.pull(&name, None).await.unwrap().id, pushed.id);
        for layer in layers {
            assert_whole(&world, layer);
        }
    }
    println!("{found} images were found whole, {half} times something was half done");
    let store = world.open().await;
    for id in ids(&store) {
        store.remove(&id).await.unwrap();
    }
    for key in store.snapshots() {
        store.release(&key).await.unwrap();
    }
    world.holds(&[]).await;
    assert_eq!(crate::entries(&world.path("images/machine")), [""; 0]);
}

const FILES: u64 = 10;

fn content(seed: u64, file: u64) -> Vec<u8> {
    noise(seed * FILES + file, 20_000)
}

fn layer(seed: u64) -> Layer {
    let tar = (0..FILES).fold(Tar::new().directory("d", 0o755), |tar, file| {
        tar.file(&format!("d/{seed}-{file}"), &content(seed, file))
    });
    Layer::new(tar, As::Gzip)
}

fn assert_whole(world: &World, layer: &Layer) {
    let directory =
        world.path("images/layers").join(layer.diff_id().strip_prefix("sha256:").unwrap()).join("d");
    let names = crate::entries(&directory);
    assert_eq!(names.len() as u64, FILES, "{names:?}");
    for name in names {
        let (seed, file) = name.split_once('-').unwrap();
        let wanted = content(seed.parse().unwrap(), file.parse().unwrap());
        assert!(std::fs::read(directory.join(&name)).unwrap() == wanted, "{name} is not whole");
    }
}
