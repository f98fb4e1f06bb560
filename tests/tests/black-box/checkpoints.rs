//! CheckpointContainer as far as it goes without CRIU: whom it is refused, and what becomes of what CRIU writes, in whose place the OCI
//! runtime does what the test tells it. (CRIU itself: `tests/lab/checkpoint.rs`.)

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{CheckpointContainerRequest, CheckpointPodRequest, RestorePodRequest};
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask, eventually};
use tonic::{Code, Status};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("checkpoints::are_refused_with_their_reason", refused);
    tests.add("checkpoints::become_an_archive", archive);
    tests.add("checkpoints::that_fail_leave_nothing", failing);
    tests.add("checkpoints::end_with_their_time_and_their_caller", abandoned);
}

fn asking(container: &str, location: &Path, timeout: i64) -> CheckpointContainerRequest {
    CheckpointContainerRequest {
        container_id: container.to_owned(),
        location: location.display().to_string(),
        timeout,
    }
}

async fn checkpoint(f: &Fixture, container: &str, location: &Path, timeout: i64) -> Result<(), Status> {
    let request = asking(container, location, timeout);
    f.cri.runtime.clone().checkpoint_container(request).await.map(drop)
}

/// A handler whose `checkpoint` is a script of the test's: what it writes is in `images` and `work`. And something called criu in PATH.
async fn scripted(f: &mut Fixture, script: &str) -> Result<Pod> {
    let place = f.node.path("scripted");
    fs::create_dir_all(place.join("bin"))?;
    let write = |path: PathBuf, text: String| -> Result<PathBuf> {
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    };
    write(place.join("bin/criu"), "#!/bin/sh\nexit 1\n".to_owned())?;
    let runc = podvisor_critest::tools_dir().join("runc");
    let program = write(
        place.join("runtime"),
        format!(
            "#!/bin/sh\nplace={place}\nfor word; do [ \"$word\" != checkpoint ] || verb=checkpoint; done\n\
             [ \"$verb\" = checkpoint ] || exec {runc} \"$@\"\n\
             while [ $# -gt 0 ]; do\n  case $1 in --image-path) images=$2 ;; --work-path) work=$2 ;; esac; shift\ndone\n\
             {script}\n",
            place = place.display(),
            runc = runc.display(),
        ),
    )?;
    let directory = f.node.path("config.toml.d");
    fs::create_dir_all(&directory)?;
    let table =
        format!("[runtime.handlers.scripted]\ntype = \"oci\"\npath = {:?}\n", program.display().to_string());
    fs::write(directory.join("scripted.toml"), table)?;
    f.stop()?;
    let path = format!("{}:{}", place.join("bin").display(), std::env::var("PATH")?);
    f.start_with(&[("PATH", &path)])?;
    f.cri.pull(BUSYBOX).await?;
    let config = f.ask_pod("checkpoints");
    fs::create_dir_all(&config.log_directory)?;
    let id = f.cri.run_pod_by(&config, "scripted").await?;
    Ok(Pod::known(&id, &config, &f.cri))
}

/// What CRIU leaves.
const WRITE: &str =
    "echo image >$images/inventory.img; echo log >$work/dump.log; echo stats >$work/stats-dump";

/// Counts in its log, and has changed its root.
fn counting(name: &str) -> podvisor_proto::cri::ContainerConfig {
    ask::script(
        name,
        "echo mine >/root/file; rm /etc/group; i=0; while :; do i=$((i + 1)); echo $i; sleep 0.05; done",
    )
}

/// How far a container has counted.
fn count(pod: &Pod, name: &str) -> Result<usize> {
    let output = pod.log(&format!("{name}.log"))?.stdout();
    let numbers: Vec<usize> = output.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(numbers.iter().copied().eq(1..=numbers.len()), "there is a gap in {numbers:?}");
    Ok(numbers.len())
}

/// It goes on from where it is now.
async fn runs_on(pod: &Pod, name: &str) -> Result<()> {
    let before = count(pod, name)?;
    eventually("the container counts on", || async {
        let now = count(pod, name)?;
        ensure!(now > before + 2, "{before}, then {now}");
        Ok(())
    })
    .await
}

/// Nothing of a request is left below the state directory.
async fn nothing_is_left(f: &Fixture) -> Result<()> {
    let directory = f.node.path("root/checkpoints");
    eventually("what was written for the checkpoint goes", || async {
        let left: Vec<_> =
            fs::read_dir(&directory).into_iter().flatten().flatten().map(|it| it.path()).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

async fn refused(f: &mut Fixture) -> Result<()> {
    let place = f.node.path("checkpoints");
    fs::create_dir_all(&place)?;
    let location = place.join("archive.tar");
    let pod = scripted(f, WRITE).await?;
    let id = pod.start(&ask::waiting("running")).await?;
    let created = pod.create(&ask::waiting("created")).await?;

    for (location, timeout) in [
        (Path::new("archive.tar"), 0),
        (Path::new(""), 0),
        (Path::new("/"), 0),
        (&place.join("../archive.tar"), 0),
        (&place, 0),
        (&place.join("no/archive.tar"), 0),
        (&location, -1),
    ] {
        let error = checkpoint(f, &id, location, timeout).await.unwrap_err();
        ensure!(error.code() == Code::InvalidArgument, "{}: {error}", location.display());
    }
    let error = checkpoint(f, &"0".repeat(64), &location, 0).await.unwrap_err();
    ensure!(error.code() == Code::NotFound, "{error}");
    let error = checkpoint(f, &created, &location, 0).await.unwrap_err();
    ensure!(error.code() == Code::FailedPrecondition, "{error}");

    // An OCI runtime that says nothing of CRIU: Debian's crun is built without it, and the script may say that it is older.
    let mut config = f.ask_pod("without");
    config.hostname = "without".to_owned();
    fs::create_dir_all(&config.log_directory)?;
    let crun = f.cri.run_pod_by(&config, "crun").await?;
    let with_crun = Pod::known(&crun, &config, &f.cri).start(&ask::waiting("crun")).await?;
    let version = Command::new("crun").arg("--version").output()?;
    if !String::from_utf8_lossy(&version.stdout).contains("+CRIU") {
        let error = checkpoint(f, &with_crun, &location, 0).await.unwrap_err();
        ensure!(error.code() == Code::Unimplemented, "{error}");
        ensure!(
            error.message().contains("handler crun") && error.message().contains("without CRIU"),
            "{error}"
        );
    }

    // Pods are another matter, and no criu is found in this PATH.
    let error = f.cri.runtime.clone().checkpoint_pod(CheckpointPodRequest::default()).await.unwrap_err();
    ensure!(
        error.code() == Code::Unimplemented && error.message().contains("one container at a time"),
        "{error}"
    );
    let error = f.cri.runtime.clone().restore_pod(RestorePodRequest::default()).await.unwrap_err();
    ensure!(error.code() == Code::Unimplemented, "{error}");
    f.stop()?;
    let empty = f.node.path("scripted/empty");
    fs::create_dir_all(&empty)?;
    for program in ["nft", "ip"] {
        let found = std::env::split_paths(&std::env::var_os("PATH").context("no PATH")?)
            .map(|directory| directory.join(program))
            .find(|path| path.exists());
        if let Some(found) = found {
            std::os::unix::fs::symlink(found, empty.join(program))?;
        }
    }
    f.start_with(&[("PATH", &empty.display().to_string())])?;
    let error = checkpoint(f, &id, &location, 0).await.unwrap_err();
    ensure!(
        error.code() == Code::Unimplemented && error.message().contains("CRIU is not installed"),
        "{error}"
    );
    ensure!(fs::read_dir(&place)?.count() == 0, "something was written");
    f.stop()?;
    f.start()
}

/// The archive's entries, with the content of small ones.
fn entries(location: &Path) -> Result<BTreeMap<String, String>> {
    let directory = location.with_extension("unpacked");
    fs::create_dir_all(&directory)?;
    let unpacked = Command::new("tar").arg("-xf").arg(location).arg("-C").arg(&directory).status()?;
    ensure!(unpacked.success(), "tar cannot read it");
    let listed = Command::new("tar").arg("-tf").arg(location).output()?;
    let names = String::from_utf8(listed.stdout)?;
    let entries = names.lines().map(|name| {
        let content = fs::read(directory.join(name)).unwrap_or_default();
        (name.to_owned(), String::from_utf8_lossy(&content).into_owned())
    });
    Ok(entries.collect())
}

async fn archive(f: &mut Fixture) -> Result<()> {
    let pod = scripted(f, &format!("{WRITE}; sleep 0.3")).await?;
    let volume = f.node.path("volume");
    fs::create_dir_all(&volume)?;
    let mut config = counting("counting");
    config.mounts.push(podvisor_proto::cri::Mount {
        container_path: "/volume".to_owned(),
        host_path: volume.display().to_string(),
        ..Default::default()
    });
    let id = pod.start(&config).await?;
    eventually("it counts", || async {
        ensure!(count(&pod, "counting")? > 1, "not yet");
        Ok(())
    })
    .await?;
    let place = f.node.path("checkpoints");
    fs::create_dir_all(&place)?;
    let location = place.join("archive.tar");
    // A second one replaces the first.
    for _ in 0..2 {
        checkpoint(f, &id, &location, 0).await?;
        ensure!(fs::metadata(&location)?.permissions().mode() & 0o7777 == 0o600);
        ensure!(fs::read_dir(&place)?.count() == 1, "something beside it");
    }
    let entries = entries(&location)?;
    let names: Vec<&str> = entries.keys().map(String::as_str).collect();
    ensure!(
        names
            == [
                "bind.mounts",
                "checkpoint/",
                "checkpoint/inventory.img",
                "config.dump",
                "container.log",
                "deleted.files",
                "dump.log",
                "rootfs-diff.tar",
                "spec.dump",
                "stats-dump",
                "status.dump",
            ],
        "{names:?}"
    );
    let json =
        |name: &str| serde_json::from_str::<serde_json::Value>(&entries[name]).context(name.to_owned());
    let config = json("config.dump")?;
    ensure!(
        config["id"] == id && config["name"] == "counting" && config["runtime"] == "scripted",
        "{config}"
    );
    ensure!(config["rootfsImage"] == BUSYBOX, "{config}");
    ensure!(
        config["checkpointedTime"].as_str().is_some_and(|time| time.starts_with("20") && time.ends_with('Z'))
    );
    let spec = json("spec.dump")?;
    ensure!(spec["annotations"]["io.kubernetes.cri.container-name"] == "counting", "{spec}");
    ensure!(spec["annotations"]["io.kubernetes.cri-o.Metadata"] == "{\"attempt\":0,\"name\":\"counting\"}");
    ensure!(json("status.dump")?["id"] == id);
    ensure!(json("deleted.files")? == serde_json::json!(["/etc/group"]));
    let mounts = json("bind.mounts")?;
    let kind = |path: &str| {
        let found = mounts.as_array().and_then(|all| all.iter().find(|it| it["destination"] == path));
        found.map(|it| it["file_type"].clone())
    };
    ensure!(
        kind("/volume") == Some("directory".into()) && kind("/etc/hosts") == Some("file".into()),
        "{mounts}"
    );
    ensure!(entries["container.log"].contains(" stdout F 1\n"));
    let tar = location.with_extension("unpacked").join("rootfs-diff.tar");
    let listed = Command::new("tar").arg("-tf").arg(tar).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    ensure!(listed.contains("root/file\n") && !listed.contains("etc/hosts"), "{listed}");
    ensure!(!listed.contains("volume/"), "{listed}");
    runs_on(&pod, "counting").await?;
    nothing_is_left(f).await
}

async fn failing(f: &mut Fixture) -> Result<()> {
    let script = format!(
        "{WRITE}\nif [ -e $place/plain ]; then echo 'criu failed: type NOTIFY errno 0' >&2; rm $work/dump.log; exit 1; fi\n\
         echo '(00.01) Error (criu/files-reg.c:17): This cannot be dumped' >>$work/dump.log\n\
         echo 'criu failed: type DUMP errno 0' >&2; exit 1"
    );
    let pod = scripted(f, &script).await?;
    let id = pod.start(&counting("counting")).await?;
    let place = f.node.path("checkpoints");
    fs::create_dir_all(&place)?;
    for words in ["CRIU says: This cannot be dumped", "criu failed: type NOTIFY errno 0"] {
        let error = checkpoint(f, &id, &place.join("archive.tar"), 0).await.unwrap_err();
        ensure!(error.code() == Code::Internal && error.message().contains(words), "{error}");
        ensure!(error.message().contains(&id), "{error}");
        ensure!(fs::read_dir(&place)?.count() == 0, "something is left");
        runs_on(&pod, "counting").await?;
        nothing_is_left(f).await?;
        fs::write(f.node.path("scripted/plain"), "")?;
    }
    Ok(())
}

async fn abandoned(f: &mut Fixture) -> Result<()> {
    // Comes to its end when the directory is taken away, as CRIU does.
    let script = format!(
        "{WRITE}\ntouch $place/reached\nwhile [ -e $place/hang ] && [ -d $images ]; do sleep 0.02; done"
    );
    let pod = scripted(f, &script).await?;
    let id = pod.start(&counting("counting")).await?;
    let place = f.node.path("checkpoints");
    fs::create_dir_all(&place)?;
    let location = place.join("archive.tar");
    let hang = f.node.path("scripted/hang");
    fs::write(&hang, "")?;

    let error = checkpoint(f, &id, &location, 1).await.unwrap_err();
    ensure!(error.code() == Code::DeadlineExceeded, "{error}");
    runs_on(&pod, "counting").await?;
    nothing_is_left(f).await?;

    // A caller that gives up, and meanwhile a second one.
    let reached = f.node.path("scripted/reached");
    fs::remove_file(&reached)?;
    let calling = tokio::spawn({
        let (mut runtime, request) = (f.cri.runtime.clone(), asking(&id, &location, 0));
        async move { runtime.checkpoint_container(request).await }
    });
    eventually("it is being written", || async {
        ensure!(reached.exists(), "not yet");
        Ok(())
    })
    .await?;
    let error = checkpoint(f, &id, &location, 0).await.unwrap_err();
    ensure!(error.code() == Code::FailedPrecondition, "{error}");
    calling.abort();
    runs_on(&pod, "counting").await?;
    nothing_is_left(f).await?;

    // A daemon that dies.
    fs::remove_file(&reached)?;
    let calling = tokio::spawn({
        let (mut runtime, request) = (f.cri.runtime.clone(), asking(&id, &location, 0));
        async move { runtime.checkpoint_container(request).await }
    });
    eventually("it is being written", || async {
        ensure!(reached.exists(), "not yet");
        Ok(())
    })
    .await?;
    f.kill()?;
    ensure!(calling.await?.is_err(), "nobody was left to answer");
    f.start()?;
    runs_on(&pod, "counting").await?;
    nothing_is_left(f).await?;
    ensure!(fs::read_dir(&place)?.count() == 0, "something is left");
    Ok(())
}
