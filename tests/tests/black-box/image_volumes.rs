//! Images mounted as volumes: what a container sees of them, what is refused, what keeps them, and that nothing is left.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use podvisor_critest::image::{Dialect, Image};
use podvisor_critest::layer::{Compression, Files};
use podvisor_proto::cri::{ListImagesRequest, Mount, RemoveImageRequest, StatusRequest};
use podvisor_tests::cri::spec;
use podvisor_tests::images::{BUSYBOX, HOST};
use podvisor_tests::{Fixture, ask, eventually};
use serde_json::json;
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("image_volumes::show_the_image_read_only", show_the_image_read_only);
    tests.add("image_volumes::resolve_sub_paths_inside_the_image", resolve_sub_paths_inside_the_image);
    tests.add("image_volumes::that_cannot_be_are_refused", that_cannot_be_are_refused);
    tests.add("image_volumes::keep_their_image_until_the_last_container_goes", keep_their_image);
    tests.add("image_volumes::survive_a_restart", survive_a_restart);
    tests.add("image_volumes::go_with_a_reboot", go_with_a_reboot);
    tests.add("volumes::take_mount_options", take_mount_options);
}

/// An image of two layers with what a hostile one may have in it. The other tag's layers are its own.
fn push(f: &Fixture, tag: &str) -> Result<String> {
    let below = Files::new()
        .file("hidden/by-the-layer-above", 0o644, "gone")
        .file("data/value", 0o644, format!("value of {tag}"))
        .file("data/run", 0o4755, "#!/bin/sh\necho it runs\n")
        .pack(Compression::Gzip)?;
    let above = Files::new()
        .file("hidden/.wh.by-the-layer-above", 0o644, "")
        .file("data/deep/tag", 0o644, tag)
        .file("etc/shadow", 0o644, "the image's own")
        .symlink("out", "../../../../../../etc/shadow")
        .symlink("root", "/")
        .symlink("nowhere", "/no/such/thing")
        .pack(Compression::Gzip)?;
    let image = Image::new(vec![below, above], json!({})).dialect(Dialect::Oci).single();
    f.images.registry().push("test/volume", &[tag], &image.bundle()?)?;
    Ok(format!("{HOST}/test/volume:{tag}"))
}

async fn listed(f: &Fixture) -> Result<BTreeSet<String>> {
    let images = f.cri.images.clone().list_images(ListImagesRequest::default()).await?.into_inner().images;
    Ok(images.into_iter().map(|image| image.id).collect())
}

async fn remove(f: &Fixture, image: &str) -> Result<()> {
    f.cri.images.clone().remove_image(RemoveImageRequest { image: Some(spec(image)) }).await?;
    Ok(())
}

/// How many layers are on the node's disk.
fn layers(f: &Fixture) -> Result<usize> {
    Ok(fs::read_dir(f.node.path("root/images/layers"))?.count())
}

async fn show_the_image_read_only(f: &mut Fixture) -> Result<()> {
    let name = push(f, "ro")?;
    f.cri.pull(BUSYBOX).await?;
    let id = f.cri.pull(&name).await?;
    let pod = f.pod("read-only").await?;
    let text = "cat /volume/data/value; echo; ls /volume /volume/hidden; grep ' /volume ' /proc/mounts; \
                touch /volume/x 2>&1; echo $?; rm /volume/data/value 2>&1; echo $?; /volume/data/run";
    let mut config = ask::script("c", text);
    let mut mount = ask::image_mount(&id, "", "/volume");
    mount.image.as_mut().context("no image")?.user_specified_image = name.clone();
    config.mounts = vec![mount];
    let container = pod.start(&config).await?;
    let status = f.cri.wait_exited(&container).await?;
    let output = pod.log("c.log")?.stdout();
    ensure!(status.exit_code == 0, "{output}");
    ensure!(output.starts_with("value of ro\n"), "{output}");
    ensure!(output.contains("\ndata\n") && output.contains("\nhidden\n"), "{output}");
    ensure!(!output.contains("by-the-layer-above"), "a whiteout does not hide: {output}");
    ensure!(output.matches("Read-only file system").count() == 2, "{output}");
    ensure!(output.ends_with("it runs\n"), "{output}");
    let flags = output.lines().find(|line| line.contains(" /volume ")).context("no mount")?;
    ensure!(["ro", "nosuid", "nodev"].iter().all(|flag| flags.contains(flag)), "{flags}");
    // What kubelet reads: the identity for its garbage collection, the digest for people.
    ensure!(status.mounts.len() == 1, "{status:?}");
    let shown = status.mounts[0].image.as_ref().context("no image in the status")?;
    ensure!(shown.image == id && shown.user_specified_image == name, "{shown:?}");
    ensure!(shown.image_ref.starts_with(&format!("{HOST}/test/volume@sha256:")), "{shown:?}");
    // The same for a container of that image.
    let found = f.cri.images.clone();
    let request =
        podvisor_proto::cri::ImageStatusRequest { image: Some(spec(&shown.image_ref)), verbose: false };
    let found = found.clone().image_status(request).await?.into_inner().image;
    ensure!(found.is_some_and(|image| image.id == id), "the digest does not name the image");
    Ok(())
}

async fn resolve_sub_paths_inside_the_image(f: &mut Fixture) -> Result<()> {
    let name = push(f, "sub")?;
    f.cri.pull(BUSYBOX).await?;
    f.cri.pull(&name).await?;
    let pod = f.pod("sub-path").await?;
    let mut config =
        ask::script("c", "cat /dir/tag; echo; cat /file; echo; cat /linked; echo; cat /r/deep/tag");
    config.mounts = vec![
        ask::image_mount(&name, "data/deep", "/dir"),
        ask::image_mount(&name, "data/value", "/file"),
        ask::image_mount(&name, "out", "/linked"),
        ask::image_mount(&name, "root/data", "/r"),
    ];
    let container = pod.start(&config).await?;
    f.cri.wait_exited(&container).await?;
    let output = pod.log("c.log")?;
    ensure!(output.stdout().trim_end() == "sub\nvalue of sub\nthe image's own\nsub", "{output:?}");
    for (number, missing) in
        ["no/such", "nowhere", "data/value/below", "hidden/by-the-layer-above"].iter().enumerate()
    {
        let mut config = ask::waiting(&format!("missing{number}"));
        config.mounts = vec![ask::image_mount(&name, missing, "/v")];
        let refused = f.cri.create(&pod.id, &config, &pod.config).await.err().context(*missing)?;
        ensure!(refused.code() == Code::NotFound, "{refused:?}");
        ensure!(
            refused.message().starts_with("ImageVolumeMountFailed: config.mounts[0].image_sub_path"),
            "{refused:?}"
        );
        ensure!(refused.message().contains(missing), "{refused:?}");
    }
    Ok(())
}

type Break = fn(&mut Mount);

async fn that_cannot_be_are_refused(f: &mut Fixture) -> Result<()> {
    let name = push(f, "refused")?;
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("refused").await?;
    let mut absent = ask::waiting("absent");
    absent.mounts = vec![ask::image_mount(&name, "", "/v")];
    let refused = f.cri.create(&pod.id, &absent, &pod.config).await.err().context("no such image")?;
    ensure!(refused.code() == Code::NotFound, "{refused:?}");
    ensure!(
        refused.message().starts_with("ImageVolumeMountFailed") && refused.message().contains(&name),
        "{refused:?}"
    );
    f.cri.pull(&name).await?;
    let broken: [(&str, Break); 4] = [
        ("config.mounts[0].readonly", |mount| mount.readonly = false),
        ("config.mounts[0].host_path", |mount| mount.host_path = "/etc".to_owned()),
        ("config.mounts[0].image.image", |mount| mount.image = Some(spec(""))),
        ("config.mounts[0].container_path", |mount| mount.container_path.clear()),
    ];
    for (number, (field, break_it)) in broken.into_iter().enumerate() {
        let mut config = ask::waiting(&format!("broken{number}"));
        let mut mount = ask::image_mount(&name, "", "/v");
        break_it(&mut mount);
        config.mounts = vec![mount];
        let refused = f.cri.create(&pod.id, &config, &pod.config).await.err().context(field)?;
        ensure!(refused.code() == Code::InvalidArgument, "{field}: {refused:?}");
        ensure!(refused.message().contains(field), "{field}: {refused:?}");
    }
    ensure!(f.cri.containers().await?.is_empty(), "a refused container is listed");
    Ok(())
}

async fn keep_their_image(f: &mut Fixture) -> Result<()> {
    let name = push(f, "kept")?;
    f.cri.pull(BUSYBOX).await?;
    let before = layers(f)?;
    let id = f.cri.pull(&name).await?;
    ensure!(layers(f)? == before + 2, "{} layers", layers(f)?);
    let pod = f.pod("kept").await?;
    let mut containers = Vec::new();
    for container in ["a", "b"] {
        let mut config = ask::waiting(container);
        // The same image twice in one container.
        config.mounts = vec![ask::image_mount(&id, "", "/v"), ask::image_mount(&id, "data", "/w")];
        containers.push(pod.start(&config).await?);
    }
    remove(f, &name).await?;
    ensure!(!listed(f).await?.contains(&id), "a removed image is listed");
    for container in &containers {
        ensure!(
            f.cri.output(container, &["cat", "/v/data/value", "/w/deep/tag"]).await? == "value of keptkept"
        );
    }
    // No new use of what has no name any more.
    let mut late = ask::waiting("late");
    late.mounts = vec![ask::image_mount(&id, "", "/v")];
    let refused =
        f.cri.create(&pod.id, &late, &pod.config).await.err().context("a removed image is mounted")?;
    ensure!(refused.code() == Code::NotFound, "{refused:?}");
    f.cri.stop(&containers[0], 10).await?;
    f.cri.remove(&containers[0]).await?;
    ensure!(layers(f)? == before + 2, "the second container lost its layers");
    ensure!(f.cri.output(&containers[1], &["cat", "/v/data/value"]).await? == "value of kept");
    f.cri.stop(&containers[1], 10).await?;
    ensure!(layers(f)? == before + 2, "a stopped container lost its layers");
    f.cri.remove(&containers[1]).await?;
    eventually("the layers go with the last container", || async {
        ensure!(layers(f)? == before, "{} layers", layers(f)?);
        Ok(())
    })
    .await
}

async fn survive_a_restart(f: &mut Fixture) -> Result<()> {
    let name = push(f, "restart")?;
    let mut config = ask::waiting("c");
    config.mounts = vec![ask::image_mount(&name, "data/deep", "/v")];
    f.cri.pull(&name).await?;
    let (pod, container) = f.running("restart", &config).await?;
    let before = f.cri.status(&container).await?.mounts;
    f.kill()?;
    f.start()?;
    ensure!(f.cri.status(&container).await?.mounts == before, "the status changed");
    remove(f, &name).await?;
    ensure!(f.cri.output(&container, &["cat", "/v/tag"]).await? == "restart");
    // Also when the daemon comes back without the image.
    f.kill()?;
    f.start()?;
    ensure!(f.cri.output(&container, &["cat", "/v/tag"]).await? == "restart");
    let held = layers(f)?;
    f.cri.stop(&container, 10).await?;
    f.cri.remove(&container).await?;
    eventually("its layers go", || async {
        ensure!(layers(f)? + 2 == held, "{} layers of {held}", layers(f)?);
        Ok(())
    })
    .await?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&container), "something of the container is still mounted");
    f.cri.stop_pod(&pod.id).await?;
    Ok(())
}

async fn go_with_a_reboot(f: &mut Fixture) -> Result<()> {
    let name = push(f, "reboot")?;
    f.cri.pull(&name).await?;
    let mut config = ask::waiting("c");
    config.mounts = vec![ask::image_mount(&name, "", "/v")];
    let (_, container) = f.running("reboot", &config).await?;
    f.reboot()?;
    let status = f.cri.status(&container).await?;
    ensure!(status.mounts[0].image.is_some(), "{status:?}");
    let held = layers(f)?;
    remove(f, &name).await?;
    f.cri.remove(&container).await?;
    eventually("its layers go", || async {
        ensure!(layers(f)? + 2 == held, "{} layers of {held}", layers(f)?);
        Ok(())
    })
    .await
}

async fn take_mount_options(f: &mut Fixture) -> Result<()> {
    let status = f.cri.runtime.clone().status(StatusRequest::default()).await?.into_inner();
    ensure!(status.features.is_some_and(|features| features.mount_options), "mount_options is not announced");
    let directory = f.node.path("volume");
    fs::create_dir(&directory)?;
    fs::write(directory.join("run"), "#!/bin/sh\necho it runs\n")?;
    let mount = |path: &str, options: &[&str]| Mount {
        container_path: path.to_owned(),
        host_path: directory.display().to_string(),
        mount_options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    };
    fs::set_permissions(directory.join("run"), fs::Permissions::from_mode(0o755))?;
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("options").await?;
    let mut config =
        ask::script("c", "/plain/run; /none/run || echo refused; grep /none /proc/mounts; touch /none/new");
    config.mounts = vec![mount("/plain", &[]), mount("/none", &["noexec", "nodev", "nosuid"])];
    let container = pod.start(&config).await?;
    let ended = f.cri.wait_exited(&container).await?;
    let output = pod.log("c.log")?.stdout();
    ensure!(ended.exit_code == 0 && output.starts_with("it runs\nrefused\n"), "{output}");
    ensure!(["noexec", "nodev", "nosuid"].iter().all(|flag| output.contains(flag)), "{output}");
    ensure!(ended.mounts == config.mounts, "{:?}", ended.mounts);
    for (number, option) in
        ["exec", "dev", "suid", "remount", "bind", "noexec,dev", "NOEXEC", ""].iter().enumerate()
    {
        let mut config = ask::waiting(&format!("bad{number}"));
        config.mounts = vec![mount("/v", &["nodev", option])];
        let refused = f.cri.create(&pod.id, &config, &pod.config).await.err().context(*option)?;
        ensure!(refused.code() == Code::InvalidArgument, "{refused:?}");
        ensure!(refused.message().contains("config.mounts[0].mount_options[1]"), "{refused:?}");
    }
    Ok(())
}
