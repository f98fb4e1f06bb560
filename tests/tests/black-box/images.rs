//! Pulling through a mirror, listing, status, removal, and one identity for an image everywhere.

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    Image, ImageFilter, ImageFsInfoRequest, ImageStatusRequest, ListImagesRequest, RemoveImageRequest,
};
use podvisor_tests::cri::spec;
use podvisor_tests::images::{BUSYBOX, CONFIGURED, HOST, TAGGED};
use podvisor_tests::{Fixture, ask};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("images::are_pulled_through_a_mirror_listed_and_removed", pulled_listed_and_removed);
    tests.add("images::are_found_by_every_kind_of_reference", found_by_every_kind_of_reference);
    tests.add("images::have_one_identity_everywhere", one_identity_everywhere);
    tests.add("images::lose_all_tags_when_one_is_removed", lose_all_tags_when_one_is_removed);
    tests.add("images::in_use_lose_names_at_once_and_files_later", in_use_lose_names_at_once);
    tests.add("images::that_do_not_exist_are_not_found", that_do_not_exist_are_not_found);
    tests.add("images::name_their_user", name_their_user);
    tests.add("images::survive_a_restart", survive_a_restart);
    tests.add("images::report_where_they_are_kept", report_where_they_are_kept);
    tests.add("images::pulled_twice_at_once_are_pulled_once", pulled_twice_at_once);
    tests.add("images::cannot_be_pulled_while_the_registry_is_gone", registry_gone);
}

async fn list(f: &Fixture) -> Result<Vec<Image>> {
    Ok(f.cri.images.clone().list_images(ListImagesRequest::default()).await?.into_inner().images)
}

async fn status(f: &Fixture, image: &str) -> Result<Option<Image>> {
    let request = ImageStatusRequest { image: Some(spec(image)), verbose: false };
    Ok(f.cri.images.clone().image_status(request).await?.into_inner().image)
}

async fn remove(f: &Fixture, image: &str) -> Result<()> {
    f.cri.images.clone().remove_image(RemoveImageRequest { image: Some(spec(image)) }).await?;
    Ok(())
}

async fn pulled_listed_and_removed(f: &mut Fixture) -> Result<()> {
    ensure!(list(f).await?.is_empty(), "a new node has no images");
    ensure!(status(f, BUSYBOX).await?.is_none(), "status of an image that is not here");
    f.cri.pull(BUSYBOX).await?;
    let images = list(f).await?;
    ensure!(images.len() == 1, "{images:?}");
    ensure!(images[0].repo_tags == [BUSYBOX], "{images:?}");
    ensure!(images[0].repo_digests.len() == 1, "{images:?}");
    let repository = format!("{HOST}/library/busybox@sha256:");
    ensure!(images[0].repo_digests[0].starts_with(&repository), "{images:?}");
    ensure!(images[0].size > 1 << 20, "{images:?}");
    ensure!(status(f, BUSYBOX).await?.as_ref() == Some(&images[0]), "status and list differ");
    let filter = |image: &str| ListImagesRequest { filter: Some(ImageFilter { image: Some(spec(image)) }) };
    let found = f.cri.images.list_images(filter(BUSYBOX)).await?.into_inner().images;
    ensure!(found == images, "{found:?}");
    let found = f.cri.images.list_images(filter(CONFIGURED)).await?.into_inner().images;
    ensure!(found.is_empty(), "{found:?}");
    remove(f, BUSYBOX).await?;
    ensure!(list(f).await?.is_empty(), "the image was removed");
    // Idempotent, as kubelet's garbage collection expects.
    remove(f, BUSYBOX).await
}

async fn found_by_every_kind_of_reference(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let image = status(f, BUSYBOX).await?.context("no image")?;
    let without_tag = BUSYBOX.trim_end_matches(":latest");
    let hex = image.id.trim_start_matches("sha256:");
    for reference in [without_tag, &image.repo_digests[0], &image.id, hex] {
        let found = status(f, reference).await?;
        ensure!(found.as_ref() == Some(&image), "{reference}: {found:?}");
    }
    f.cri.pull(&image.repo_digests[0]).await?;
    ensure!(list(f).await? == [image], "the same image by its digest");
    Ok(())
}

async fn one_identity_everywhere(f: &mut Fixture) -> Result<()> {
    let pulled = f.cri.pull(BUSYBOX).await?;
    let image = status(f, BUSYBOX).await?.context("no image")?;
    ensure!(image.id == pulled, "PullImage answered {pulled}, ImageStatus {}", image.id);
    let pod = f.pod("identity").await?;
    let mut by_id = ask::waiting("by-id");
    by_id.image = Some(spec(&pulled));
    for config in [ask::waiting("by-name"), by_id] {
        let container = pod.start(&config).await?;
        let status = f.cri.status(&container).await?;
        ensure!(status.image_id == pulled, "ContainerStatus.image_id is {}", status.image_id);
        let listed = f.cri.containers().await?;
        let listed = listed.iter().find(|listed| listed.id == container).context("not listed")?;
        ensure!(listed.image_id == pulled, "Container.image_id is {}", listed.image_id);
        // What the container was asked for with, and what it got.
        ensure!(status.image == config.image, "{:?}", status.image);
        ensure!(!status.image_ref.is_empty(), "no image_ref");
        ensure!(
            self::status(f, &status.image_ref).await?.map(|image| image.id) == Some(pulled.clone()),
            "{status:?}"
        );
    }
    Ok(())
}

async fn lose_all_tags_when_one_is_removed(f: &mut Fixture) -> Result<()> {
    let [first, second] = [f.cri.pull(TAGGED[0]).await?, f.cri.pull(TAGGED[1]).await?];
    ensure!(first == second, "one image under two tags: {first}, {second}");
    let mut tags = status(f, TAGGED[0]).await?.context("no image")?.repo_tags;
    tags.sort();
    ensure!(tags == TAGGED, "{tags:?}");
    remove(f, TAGGED[0]).await?;
    ensure!(list(f).await?.is_empty(), "the other tag is still there");
    Ok(())
}

async fn in_use_lose_names_at_once(f: &mut Fixture) -> Result<()> {
    let (pod, container) = f.running("in-use", &ask::waiting("c")).await?;
    remove(f, BUSYBOX).await?;
    ensure!(list(f).await?.iter().all(|image| image.repo_tags.is_empty()), "the name is still there");
    // Its files stay as long as a container needs them.
    ensure!(f.cri.output(&container, &["ls", "/bin/busybox"]).await? == "/bin/busybox\n");
    f.cri.stop(&container, 1).await?;
    f.cri.remove(&container).await?;
    ensure!(list(f).await?.is_empty(), "the image outlived its last container");
    let again = pod.create(&ask::waiting("d")).await;
    ensure!(again.is_err(), "a container of an image that was removed");
    Ok(())
}

async fn that_do_not_exist_are_not_found(f: &mut Fixture) -> Result<()> {
    let missing = format!("{HOST}/library/missing:1");
    let error = f.cri.pull(&missing).await.err().context("a missing image was pulled")?;
    // The mirror does not have it, and the registry itself cannot be asked.
    ensure!([Code::NotFound, Code::Unavailable].contains(&error.code()), "{error:?}");
    // Each place that was tried, with what it answered.
    let mirror = f.images.registry().address().to_string();
    ensure!(error.message().contains(&mirror) && error.message().contains(HOST), "{}", error.message());
    let pod = f.pod("missing").await?;
    let mut config = ask::waiting("c");
    config.image = Some(spec(&missing));
    let error =
        f.cri.create(&pod.id, &config, &pod.config).await.err().context("a container of a missing image")?;
    ensure!(error.code() == Code::NotFound, "{error:?}");
    Ok(())
}

async fn name_their_user(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    f.cri.pull(CONFIGURED).await?;
    let plain = status(f, BUSYBOX).await?.context("no image")?;
    // kubelet takes neither uid nor name for root.
    ensure!(plain.uid.as_ref().is_none_or(|uid| uid.value == 0) && plain.username.is_empty(), "{plain:?}");
    let configured = status(f, CONFIGURED).await?.context("no image")?;
    ensure!(configured.uid.as_ref().map(|uid| uid.value) == Some(1000), "{configured:?}");
    Ok(())
}

async fn survive_a_restart(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    f.cri.pull(TAGGED[0]).await?;
    let by_id = |mut images: Vec<Image>| {
        images.sort_by(|a, b| a.id.cmp(&b.id));
        images
    };
    let before = by_id(list(f).await?);
    f.stop()?;
    f.start()?;
    ensure!(by_id(list(f).await?) == before, "after SIGTERM");
    f.kill()?;
    f.start()?;
    ensure!(by_id(list(f).await?) == before, "after SIGKILL");
    Ok(())
}

async fn report_where_they_are_kept(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let info = f.cri.images.image_fs_info(ImageFsInfoRequest {}).await?.into_inner();
    ensure!(info.image_filesystems.len() == 1 && info.container_filesystems.len() == 1, "{info:?}");
    for usage in info.image_filesystems.iter().chain(&info.container_filesystems) {
        // kubelet calls statfs on it; one path that is not there fails the whole of its summary.
        let mountpoint = &usage.fs_id.as_ref().context("no fs_id")?.mountpoint;
        ensure!(std::path::Path::new(mountpoint).is_dir(), "{mountpoint} is no directory");
        ensure!(usage.timestamp > 0, "{usage:?}");
    }
    let used = info.image_filesystems[0].used_bytes.as_ref().map_or(0, |bytes| bytes.value);
    ensure!(used > 1 << 20, "{used} bytes with an image in store");
    Ok(())
}

async fn pulled_twice_at_once(f: &mut Fixture) -> Result<()> {
    let pulls = (0..8).map(|_| {
        let cri = f.cri.clone();
        tokio::spawn(async move { cri.pull(BUSYBOX).await })
    });
    let mut references = Vec::new();
    for pull in pulls.collect::<Vec<_>>() {
        references.push(pull.await??);
    }
    references.dedup();
    ensure!(references.len() == 1, "{references:?}");
    ensure!(list(f).await?.len() == 1, "one image");
    Ok(())
}

async fn registry_gone(f: &mut Fixture) -> Result<()> {
    // A host that nothing mirrors and nothing resolves.
    let error = f.cri.pull("elsewhere.example.invalid/a/b:1").await.err().context("pulled from nowhere")?;
    ensure!(error.code() != Code::Ok && error.message().contains("elsewhere.example.invalid"), "{error:?}");
    ensure!(list(f).await?.is_empty(), "something was left of it");
    Ok(())
}
