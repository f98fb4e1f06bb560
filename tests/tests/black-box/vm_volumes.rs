//! Volumes of pods in virtual machines: what containers share, and what they see of the host's changes. Each boot takes seconds, so each test
//! makes of its machine what it can.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{ContainerConfig, Mount};
use podvisor_tests::{Fixture, ask, eventually};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm_volumes::are_one_for_all_containers", options(), are_one_for_all_containers);
}

fn mount(host: &Path, inside: &str) -> Mount {
    Mount { host_path: host.display().to_string(), container_path: inside.to_owned(), ..Default::default() }
}

fn read_only(mount: Mount) -> Mount {
    Mount { readonly: true, ..mount }
}

fn container(name: &str, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig { mounts, ..ask::waiting(name) }
}

/// A directory with the program that `volumes.c` is.
fn tools(f: &Fixture) -> Result<PathBuf> {
    let directory = f.node.path("tools");
    fs::create_dir_all(&directory)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/black-box/volumes.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-O2", "-s", "-Wall", "-Werror", "-o"]).arg(directory.join("v")).arg(source);
    ensure!(compiler.status().context("running cc")?.success());
    Ok(directory)
}

/// What is mounted in the pod's file server below `/volumes`, with each mount's options.
async fn shared(f: &Fixture, pod: &str) -> Result<BTreeMap<String, String>> {
    let info: serde_json::Value = serde_json::from_str(&f.cri.pod_info(pod).await?)?;
    let server = &info["virtualMachine"]["fileServerPid"];
    let table = fs::read_to_string(format!("/proc/{server}/mountinfo"))?;
    let mounts = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        Some((fields[4].strip_prefix("/volumes/")?.to_owned(), fields[5].to_owned()))
    });
    Ok(mounts.collect())
}

async fn are_one_for_all_containers(f: &mut Fixture) -> Result<()> {
    let tools = tools(f)?;
    let data = f.node.path("data");
    fs::create_dir_all(&data)?;
    let mounts = || vec![read_only(mount(&tools, "/tools")), mount(&data, "/data")];
    let readers = || vec![read_only(mount(&tools, "/tools")), read_only(mount(&data, "/data"))];
    let (pod, reads) = f.running("pod", &container("reads", readers())).await?;
    let options = |shared: BTreeMap<String, String>| shared.into_values().collect::<Vec<_>>();
    // Nobody writes yet: not even the guest's kernel could.
    let both = options(shared(f, &pod.id).await?);
    ensure!(
        both.len() == 2 && both.iter().all(|options| options.starts_with("ro,nosuid,nodev,noexec")),
        "{both:?}"
    );

    let holds = pod.start(&container("holds", mounts())).await?;
    let run = async |container: &str, script: &str| f.cri.output(container, &["sh", "-c", script]).await;
    run(&holds, "/tools/v hold /data/db >/dev/null 2>&1 </dev/null &").await?;
    eventually("it holds its locks", || async {
        ensure!(run(&holds, "head -c 1 /data/db").await? == "A");
        Ok(())
    })
    .await?;
    ensure!(run(&reads, "/tools/v try /data/db").await? == "ro refused refused A\n");
    ensure!(run(&reads, "touch /data/x 2>&1 || echo refused").await?.contains("refused"));

    // What comes after the daemon has been started again joins what is there.
    f.kill()?;
    f.start()?;
    let tries = pod.start(&container("tries", mounts())).await?;
    let run = async |container: &str, script: &str| f.cri.output(container, &["sh", "-c", script]).await;
    let tried = run(&tries, "/tools/v try /data/db answer").await?;
    ensure!(tried == "rw refused refused A\n", "{tried:?}");
    ensure!(run(&reads, "/tools/v try /data/db").await? == "ro refused refused C\n");
    let now = shared(f, &pod.id).await?;
    ensure!(
        now.len() == 2 && now.values().filter(|options| options.starts_with("rw,")).count() == 1,
        "{now:?}"
    );

    // Each goes with the last who uses it, and is read-only when nobody is left who writes.
    run(&holds, r"printf '\001' | dd of=/data/db bs=1 seek=2 conv=notrunc 2>/dev/null").await?;
    for container in [&holds, &tries] {
        f.cri.stop(container, 1).await?;
        f.cri.remove(container).await?;
    }
    let left = options(shared(f, &pod.id).await?);
    ensure!(left.len() == 2 && left.iter().all(|options| options.starts_with("ro,")), "{left:?}");
    ensure!(run(&reads, "/tools/v try /data/db").await? == "ro got got C\n");
    f.cri.stop(&reads, 1).await?;
    f.cri.remove(&reads).await?;
    let left = shared(f, &pod.id).await?;
    ensure!(left.is_empty(), "{left:?}");

    // Another file of the same name is another volume.
    let single = f.node.path("single");
    fs::write(&single, "old\n")?;
    let first = pod.start(&container("first", vec![mount(&single, "/single")])).await?;
    fs::write(f.node.path("other"), "new\n")?;
    fs::rename(f.node.path("other"), &single)?;
    let second = pod.start(&container("second", vec![mount(&single, "/single")])).await?;
    ensure!(run(&first, "cat /single").await? == "old\n");
    ensure!(run(&second, "cat /single").await? == "new\n");
    Ok(())
}
