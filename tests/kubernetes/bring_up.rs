//! kubeadm on a node where the pause image's registry cannot be reached: whichever of kubeadm and the runtime is told of another repository,
//! and wherever the mirrors are written down, the cluster comes up, and kubeadm warns exactly when the two differ.

use anyhow::{Context, Result, anyhow, ensure};

use crate::cluster::{Cluster, Settings};
use crate::images::{OTHER_REPOSITORY, UNREACHABLE};
use crate::pods::pod;
use crate::runtime::{DEAD_MIRRORS, Mirrors, Setup, is_peer};
use crate::{Tests, until};

/// The pause images of kubeadm's two repositories, as the runtime is told of them.
const DEFAULT_PAUSE: &str = "registry.k8s.io/pause:3.10.2";
const OTHER_PAUSE: &str = "mirror.example.invalid/k8s/pause:3.10.2";

pub(crate) fn add(tests: &mut Tests) {
    let settings = |pause_image, image_repository, mirrors| Settings {
        setup: Setup { pause_image, mirrors, ..Setup::default() },
        image_repository,
        ..Settings::default()
    };
    tests.add(
        "bring_up::with_another_repository_for_both",
        &settings(OTHER_PAUSE, OTHER_REPOSITORY, Mirrors::HostsToml),
        warns_not,
    );
    tests.add(
        "bring_up::with_another_repository_for_kubeadm",
        &settings(DEFAULT_PAUSE, OTHER_REPOSITORY, Mirrors::RegistriesConf),
        warns_of_the_difference,
    );
    tests.add(
        "bring_up::with_another_repository_for_the_runtime",
        &settings(OTHER_PAUSE, "", Mirrors::HostsToml),
        warns_of_the_difference,
    );
    // The other tests' cluster: the built-in pause.
    tests.add_for_all("bring_up::with_neither", &Settings::default(), warns_not);
    tests.add("bring_up::says_what_was_tried", &Settings::default(), says_what_was_tried);
}

/// What kubeadm says of a pause image.
const WARNING: &str = "detected that the sandbox image";

fn warns_not(cluster: &mut Cluster) -> Result<()> {
    // The peer's is older than what kubeadm names.
    ensure!(is_peer() || !cluster.said.contains(WARNING), "{}", cluster.said);
    has_pulled_pause(cluster)
}

fn warns_of_the_difference(cluster: &mut Cluster) -> Result<()> {
    let repository = cluster.settings.image_repository;
    let kubeadms = if repository.is_empty() { DEFAULT_PAUSE } else { OTHER_PAUSE };
    let ours = cluster.settings.setup.pause_image;
    let wanted = format!(
        "{WARNING} \"{ours}\" of the container runtime is inconsistent with that used by kubeadm. \
         It is recommended to use \"{kubeadms}\" as the CRI sandbox image."
    );
    let lines: Vec<&str> = cluster.said.lines().filter(|line| line.contains(WARNING)).collect();
    ensure!(lines.len() == 1 && lines[0].contains(&wanted), "{lines:?} instead of {wanted:?}");
    has_pulled_pause(cluster)
}

/// Where a pause image is named, it is what the pods stand on; where none is, kubeadm's own pull is the only one.
fn has_pulled_pause(cluster: &Cluster) -> Result<()> {
    let named = cluster.settings.setup.pause_image;
    if named.is_empty() {
        return Ok(());
    }
    let images = cluster.crictl(&["images", "--output", "json"])?;
    ensure!(images.contains(named), "{named} is not among {images}");
    Ok(())
}

/// With a pause image that nobody has, pods start all the same. One whose own image nobody has says which addresses were asked for it.
fn says_what_was_tried(cluster: &mut Cluster) -> Result<()> {
    let pause = format!("{UNREACHABLE}/pause:1");
    cluster.runtime.set_pause_image(&pause)?;
    cluster.runtime.reload()?;
    let result = runs_without(cluster, &pause);
    cluster.runtime.set_pause_image(cluster.settings.setup.pause_image)?;
    cluster.runtime.reload()?;
    result
}

fn runs_without(cluster: &Cluster, pause: &str) -> Result<()> {
    let image = format!("{UNREACHABLE}/image:1");
    let mut without_image = pod("no-image");
    without_image["spec"]["containers"][0]["image"] = image.as_str().into();
    cluster.apply(&without_image)?;
    cluster.run(&[pod("no-pause")])?;
    let all_named = |said: &str, image: &str| {
        let missing = DEAD_MIRRORS.into_iter().chain([image, UNREACHABLE]).find(|part| !said.contains(part));
        missing.map_or(Ok(()), |part| Err(anyhow!("{part} is not named in {said:?}")))
    };
    until("an event says what was tried", || {
        let events = cluster.get(&["events", "--field-selector", "involvedObject.name=no-image"])?;
        let events = events["items"].as_array().context("no list")?;
        let messages = events.iter().filter(|event| event["reason"] == "Failed").map(|e| &e["message"]);
        let said = messages.filter_map(|message| message.as_str()).find(|said| said.contains(&image));
        all_named(said.context("no such event")?, &image)
    })?;
    until("the log says what was tried for the pause", || {
        let log = cluster.runtime.log();
        let said = log.lines().find(|line| line.contains("pods start without it") && line.contains(pause));
        all_named(said.context("it does not")?, pause)
    })?;
    cluster.delete(&["no-image", "no-pause"])
}
