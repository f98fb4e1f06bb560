//! CheckpointContainer with CRIU itself: the container runs on, and `runc restore` makes of the archive one that goes on where the first
//! was, with the memory, the files and the open descriptors of that moment. Run in a sandbox in the lab, whose kernel CRIU can work with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use podvisor_critest::tools_dir;
use podvisor_proto::cri::CheckpointContainerRequest;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::{Fixture, ask, eventually};
use serde_json::Value;

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn a_container_goes_on_where_it_was() {
    crate::run(async {
        let images = Arc::new(TestImages::serve()?);
        let fixture = Fixture::new(&images)?;
        let outcome = goes_on(&fixture).await;
        // What CRIU has found out about the kernel, which it keeps.
        let _ = fs::remove_file("/run/criu.kdat");
        if let Err(error) = outcome {
            return Err(error.context(format!("the daemon's log ends with\n{}\n", fixture.node.log_tail(60))));
        }
        fixture.finish().await
    });
}

/// Its count is in its memory; it writes it to its output, and by a descriptor that stays open to a file. And it has deleted a file.
const COUNTING: &str = "rm /etc/group; exec 3>/root/counted; i=0; \
     while :; do i=$((i + 1)); echo $i; echo $i >&3; sleep 0.2; done";

/// The numbers, which have to be all from the first one on.
fn numbers(text: &str) -> Result<Vec<usize>> {
    // The last line may be half-written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let numbers: Vec<usize> = whole.lines().map(str::parse).collect::<Result<_, _>>()?;
    let first = numbers.first().copied().unwrap_or(1);
    ensure!(numbers.iter().copied().eq(first..first + numbers.len()), "there is a gap in {numbers:?}");
    Ok(numbers)
}

async fn counts_to(pod: &Pod, wanted: usize) -> Result<()> {
    eventually("the container counts", || async {
        let counted = numbers(&pod.log("counting.log")?.stdout())?;
        ensure!(counted.first() == Some(&1) && counted.len() >= wanted, "{} of {wanted}", counted.len());
        Ok(())
    })
    .await
}

fn counted(pod: &Pod) -> Result<usize> {
    Ok(numbers(&pod.log("counting.log")?.stdout())?.len())
}

async fn goes_on(f: &Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await.context("PullImage")?;
    let pod = f.pod("checkpoint").await?;
    let id = pod.start(&ask::script("counting", COUNTING)).await?;
    counts_to(&pod, 3).await?;
    let place = f.node.path("checkpoints");
    fs::create_dir_all(&place)?;
    let location = place.join("archive.tar");
    let mut before = 0;
    // The second replaces the first, and is a later moment.
    for _ in 0..2 {
        before = counted(&pod)?;
        let request = CheckpointContainerRequest {
            container_id: id.clone(),
            location: location.display().to_string(),
            timeout: 0,
        };
        f.cri.runtime.clone().checkpoint_container(request).await.context("CheckpointContainer")?;
        let after = counted(&pod)?;
        counts_to(&pod, after + 3).await?;
    }
    let mut left = fs::read_dir(f.node.path("root/checkpoints"))?;
    ensure!(left.next().is_none(), "what was written for the checkpoint is left");

    let archive = place.join("unpacked");
    fs::create_dir(&archive)?;
    run(Command::new("tar").arg("-xf").arg(&location).arg("-C").arg(&archive))?;
    for name in ["checkpoint/inventory.img", "checkpoint/pages-1.img", "dump.log", "stats-dump"] {
        ensure!(archive.join(name).exists(), "there is no {name} in the archive");
    }
    let written = numbers(
        &fs::read_to_string(archive.join("container.log"))?
            .lines()
            .fold(String::new(), |text, line| text + line.rsplit(' ').next().unwrap_or_default() + "\n"),
    )?;
    ensure!(written.len() >= before, "the log in the archive ends at {}, before {before}", written.len());

    // What another node has: the image, and the archive.
    let plain = pod.create(&ask::waiting("plain")).await?;
    let bundle = place.join("bundle");
    fs::create_dir(&bundle)?;
    let image = f.node.path(&format!("run/containers/{plain}/rootfs"));
    run(Command::new("cp").arg("-a").arg(&image).arg(bundle.join("rootfs")))?;
    run(Command::new("tar")
        .arg("-xf")
        .arg(archive.join("rootfs-diff.tar"))
        .arg("-C")
        .arg(bundle.join("rootfs")))?;
    let deleted: Vec<PathBuf> = serde_json::from_slice(&fs::read(archive.join("deleted.files"))?)?;
    ensure!(deleted == [Path::new("/etc/group")], "{deleted:?}");
    for path in deleted {
        fs::remove_file(bundle.join("rootfs").join(path.strip_prefix("/")?))?;
    }
    f.cri.stop(&id, 0).await?;
    f.cri.remove(&id).await?;
    restored(&place, &archive, &bundle, &pod).await
}

/// The container of the archive, in the pod that it came from.
async fn restored(place: &Path, archive: &Path, bundle: &Path, pod: &Pod) -> Result<()> {
    let mut spec: Value = serde_json::from_slice(&fs::read(archive.join("spec.dump"))?)?;
    spec["root"]["path"] = bundle.join("rootfs").display().to_string().into();
    fs::write(bundle.join("config.json"), spec.to_string())?;
    let files = numbers(&fs::read_to_string(bundle.join("rootfs/root/counted"))?)?;
    let last = *files.last().context("the file in the archive is empty")?;

    let output = place.join("output");
    let root = place.join("runc");
    let name = format!("restored-{}", &pod.id[..8]);
    let runc = |verb: &str| {
        let mut command = Command::new(tools_dir().join("runc"));
        command.arg("--root").arg(&root).arg(verb);
        command
    };
    let work = place.join("work");
    let outcome = async {
        run(runc("restore")
            .args(["--detach", "--file-locks", "--tcp-established"])
            .arg("--bundle")
            .arg(bundle)
            .arg("--image-path")
            .arg(archive.join("checkpoint"))
            .arg("--work-path")
            .arg(&work)
            .arg(&name)
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::options().create(true).append(true).open(place.join("errors"))?))
        .with_context(|| {
            let said = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
            let log = said(work.join("restore.log"));
            let end: Vec<&str> = log.lines().rev().take(15).collect();
            format!(
                "{}\n{}",
                said(place.join("errors")),
                end.into_iter().rev().collect::<Vec<_>>().join("\n")
            )
        })?;
        eventually("the restored container counts on", || async {
            let told = numbers(&fs::read_to_string(&output)?)?;
            ensure!(told.len() > 3, "it has said {told:?}");
            // It may have said the last number, and not yet written it.
            ensure!(told[0] == last + 1 || told[0] == last + 2, "it goes on from {} after {last}", told[0]);
            let written = numbers(&fs::read_to_string(bundle.join("rootfs/root/counted"))?)?;
            ensure!(written[0] == 1 && written.len() > last + 3, "the file has {} numbers", written.len());
            Ok(())
        })
        .await
    }
    .await;
    let deleted = run(runc("delete").arg("--force").arg(&name));
    outcome.and(deleted)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
