//! OCI artifacts: pulled, listed and removed like images, mounted as volumes, and nothing else.

use anyhow::{Context, Result, ensure};
use podvisor_critest::image::{Bundle, Document};
use podvisor_critest::layer::{Compression, Files, digest_of};
use podvisor_proto::cri::{ImageStatusRequest, ListImagesRequest, RemoveImageRequest};
use podvisor_tests::cri::spec;
use podvisor_tests::images::{BUSYBOX, HOST};
use podvisor_tests::{Fixture, ask, eventually};
use serde_json::{Value, json};
use tonic::Code;

use super::Tests;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const KIND: &str = "application/vnd.example.model.v1";

pub(crate) fn add(tests: &mut Tests) {
    tests.add("artifacts::are_volumes_and_nothing_else", are_volumes_and_nothing_else);
    tests.add("artifacts::with_hostile_titles_are_refused", with_hostile_titles_are_refused);
    tests.add("artifacts::survive_a_restart_and_go_when_unused", survive_a_restart_and_go_when_unused);
}

/// Pushes an artifact; the answer is its name and the digest of its manifest.
fn push(f: &Fixture, tag: &str, blobs: &[(&str, Option<&str>, &[u8])]) -> Result<(String, String)> {
    let mut bundle = Bundle::default();
    let mut descriptor = |media_type: &str, title: Option<&str>, bytes: &[u8]| -> Value {
        let digest = digest_of(bytes);
        if !bundle.blobs.iter().any(|(known, _)| *known == digest) {
            bundle.blobs.push((digest.clone(), bytes.to_vec()));
        }
        let mut descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        if let Some(title) = title {
            descriptor["annotations"] = json!({"org.opencontainers.image.title": title});
        }
        descriptor
    };
    let config = descriptor(EMPTY, None, b"{}");
    let layers: Vec<_> = blobs.iter().map(|(kind, title, bytes)| descriptor(kind, *title, bytes)).collect();
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": KIND, "config": config, "layers": layers});
    let body = manifest.to_string().into_bytes();
    let digest = digest_of(&body);
    bundle.documents.push(Document { media_type: MANIFEST, digest: digest.clone(), body });
    f.images.registry().push("test/artifact", &[tag], &bundle)?;
    Ok((format!("{HOST}/test/artifact:{tag}"), digest))
}

async fn are_volumes_and_nothing_else(f: &mut Fixture) -> Result<()> {
    let tar = Files::new().file("docs/a", 0o644, "from the tar").pack(Compression::Gzip)?;
    let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
    let (name, digest) = push(
        f,
        "model",
        &[
            ("application/octet-stream", Some("weights/model.bin"), b"weights"),
            ("text/plain", Some("README"), b"read me"),
            (gzip, None, &tar.blob),
        ],
    )?;
    f.cri.pull(BUSYBOX).await?;
    let id = f.cri.pull(&name).await?;
    ensure!(id == digest, "one identity, the manifest's: {id}");
    let images = f.cri.images.clone().list_images(ListImagesRequest::default()).await?.into_inner().images;
    let listed = images.iter().find(|image| image.id == id).context("not listed")?;
    ensure!(listed.repo_tags == [name.clone()] && listed.size > 14, "{listed:?}");
    ensure!(listed.repo_digests == [format!("{HOST}/test/artifact@{digest}")], "{listed:?}");
    let request = ImageStatusRequest { image: Some(spec(&name)), verbose: true };
    let status = f.cri.images.clone().image_status(request).await?.into_inner();
    ensure!(status.image.as_ref() == Some(listed), "status and list differ: {status:?}");
    ensure!(status.info["info"].contains(KIND), "{:?}", status.info);

    let pod = f.pod("artifact").await?;
    let text = "cat /m/weights/model.bin /m/README /m/docs/a /one; stat -c ' %a %u %F' /m/README; touch /m/x";
    let mut config = ask::script("c", text);
    config.mounts = vec![ask::image_mount(&id, "", "/m"), ask::image_mount(&name, "README", "/one")];
    let container = pod.start(&config).await?;
    let ended = f.cri.wait_exited(&container).await?;
    let log = pod.log("c.log")?;
    ensure!(log.stdout() == "weightsread mefrom the tarread me 644 0 regular file\n", "{log:?}");
    ensure!(ended.exit_code == 1 && log.stderr().contains("Read-only"), "{log:?}");
    let shown = ended.mounts[1].image.as_ref().context("no image in the status")?;
    ensure!(shown.image == id && shown.image_ref.ends_with(&digest), "{shown:?}");

    let mut program = ask::waiting("program");
    program.image = Some(spec(&name));
    let refused = f.cri.create(&pod.id, &program, &pod.config).await.err().context("it ran")?;
    ensure!(refused.code() == Code::InvalidArgument, "{refused:?}");
    ensure!(refused.message().contains("OCI artifact") && refused.message().contains(KIND), "{refused:?}");
    Ok(())
}

async fn with_hostile_titles_are_refused(f: &mut Fixture) -> Result<()> {
    for (number, title) in ["../../../../etc/cron.d/x", "/etc/passwd", "a/../../b", ".."].iter().enumerate() {
        let (name, _) = push(f, &format!("hostile{number}"), &[("text/plain", Some(title), b"x")])?;
        let refused = f.cri.pull(&name).await.err().context(*title)?;
        ensure!(refused.message().contains("title"), "{title}: {refused:?}");
    }
    let (name, _) = push(f, "twice", &[("text/plain", Some("a"), b"1"), ("text/plain", Some("a"), b"2")])?;
    let refused = f.cri.pull(&name).await.err().context("two files of one name")?;
    ensure!(refused.message().contains("two blobs"), "{refused:?}");
    let images = f.cri.images.clone().list_images(ListImagesRequest::default()).await?.into_inner().images;
    ensure!(images.is_empty(), "{images:?}");
    Ok(())
}

async fn survive_a_restart_and_go_when_unused(f: &mut Fixture) -> Result<()> {
    let (name, digest) = push(f, "kept", &[("text/plain", Some("file"), b"content")])?;
    f.cri.pull(&name).await?;
    let mut config = ask::waiting("c");
    config.mounts = vec![ask::image_mount(&digest, "file", "/file")];
    let (_, container) = f.running("artifact-kept", &config).await?;
    f.kill()?;
    f.start()?;
    f.cri.images.clone().remove_image(RemoveImageRequest { image: Some(spec(&name)) }).await?;
    ensure!(f.cri.output(&container, &["cat", "/file"]).await? == "content");
    let layers = || -> Result<usize> { Ok(std::fs::read_dir(f.node.path("root/images/layers"))?.count()) };
    let held = layers()?;
    f.cri.stop(&container, 10).await?;
    f.cri.remove(&container).await?;
    eventually("its files go", || async {
        ensure!(layers()? + 1 == held, "{} of {held}", layers()?);
        Ok(())
    })
    .await
}
