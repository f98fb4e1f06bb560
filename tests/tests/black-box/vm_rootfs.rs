//! Root file systems of containers in machines: the image in the guest's memory where the machine can have it, through the file server where not;
//! nothing in the container tells which.

use std::fs;

use anyhow::{Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_tests::{Fixture, Pod, ask};

use super::Tests;
use super::vm::machine;

/// The same handler but for the form of its images, and for who shares them.
const OTHERS: &str = "[runtime.handlers.served]\ntype = \"vm\"\nallow_emulation = true\nrootfs = \"fs\"\n\
    [runtime.handlers.alone]\ntype = \"vm\"\nallow_emulation = true\nshare_images = \"pod\"\n";

/// Everything about every file but what differs from one container to the next: kind and mode, owner, links, device, time, content.
const TREE: &str = "cd /; find . -xdev -type d | sort | xargs stat -c '%n %f %u %g'; \
    find . -xdev ! -type d ! -path './etc/host*' ! -path ./etc/resolv.conf | sort | xargs stat -c '%N %f %u %g %h %t %T %Y %s'; \
    find . -xdev -type f ! -path './etc/host*' ! -path ./etc/resolv.conf | sort | xargs md5sum";

/// How long it may take, where the processor of a machine in a machine is translated.
const SECONDS: i64 = 300;

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), more: OTHERS.to_owned(), ..Options::default() };
    tests.add_with("vm_rootfs::is_the_same_in_every_form", options(), is_the_same_in_every_form);
    tests.add_with("vm_rootfs::is_written_to_like_any", options(), is_written_to_like_any);
}

async fn pod_of(f: &Fixture, name: &str, handler: &str) -> Result<Pod> {
    let config = f.ask_pod(name);
    fs::create_dir_all(&config.log_directory)?;
    Ok(Pod::known(&f.cri.run_pod_by(&config, handler).await?, &config, &f.cri))
}

/// Whether the machine is one that maps images.
async fn maps(f: &Fixture, pod: &Pod) -> Result<bool> {
    Ok(machine(f, &pod.id).await?["hypervisor"].as_str().is_some_and(|name| name.starts_with("podvisor-vmm")))
}

async fn is_the_same_in_every_form(f: &mut Fixture) -> Result<()> {
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    let mut trees = Vec::new();
    for (handler, mapped) in [(VM, true), ("alone", true), ("served", false)] {
        let pod = pod_of(f, handler, handler).await?;
        let container = pod.start(&ask::waiting("c")).await?;
        let said = f.cri.exec(&container, &["sh", "-c", TREE], SECONDS).await?;
        let tree = String::from_utf8(said.stdout)?;
        ensure!(said.exit_code == 0 && tree.lines().count() > 50, "{} {tree}", said.exit_code);
        let mounts = f.cri.output(&container, &["cat", "/proc/mounts"]).await?;
        let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).unwrap_or_default();
        let is_overlay = root.split(' ').nth(2) == Some("overlay");
        ensure!(is_overlay == (mapped && maps(f, &pod).await?), "{handler}: {root}");
        trees.push(tree);
        f.cri.stop_pod(&pod.id).await?;
    }
    for tree in &trees[1..] {
        let only = |these: &str, those: &str| {
            these
                .lines()
                .filter(|line| !those.lines().any(|other| other == *line))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        ensure!(*tree == trees[0], "{:#?} {:#?}", only(tree, &trees[0]), only(&trees[0], tree));
    }
    Ok(())
}

/// Copied up, removed, replaced, renamed, linked; and what one container has written another of the same image has not.
async fn is_written_to_like_any(f: &mut Fixture) -> Result<()> {
    let (pod, first) = f.running("pod", &ask::waiting("first")).await?;
    let run = async |container: &str, script: &str| f.cri.output(container, &["sh", "-c", script]).await;
    // Nodes of devices are made by whoever serves the files, who may make none.
    let script = "set -e; echo more >>/etc/group; tail -n 1 /etc/group; rm -r /usr; mkdir /usr; ls -A /usr | wc -l; \
        mv /etc/passwd /etc/other; ln /etc/other /etc/third; stat -c %h /etc/third; ln -s other /etc/passwd; \
        head -c 4 /etc/passwd; echo; mkdir /new; chmod 1751 /new; chown 7:8 /new; stat -c '%a %u %g' /new; \
        mkfifo /new/pipe; stat -c '%F' /new/pipe; dd if=/dev/zero of=/new/big bs=1M count=20 2>/dev/null; sync; \
        stat -c %s /new/big; mv /new /renamed; ls /renamed";
    let said = run(&first, script).await?;
    let wanted = "more\n0\n2\nroot\n1751 7 8\nfifo\n20971520\nbig\npipe\n";
    ensure!(said == wanted, "{said}");
    let second = pod.start(&ask::waiting("second")).await?;
    let said = run(
        &second,
        "grep -c more /etc/group; ls -A /usr | wc -l; ls -d /renamed 2>&1 | wc -l; head -c 4 /etc/passwd",
    )
    .await?;
    ensure!(said.starts_with("0\n") && !said.contains("\n0\n") && said.ends_with("1\nroot"), "{said}");
    // It stays as long as the container does, and goes with it.
    ensure!(run(&first, "ls /renamed; cat /etc/third | head -c 4").await? == "big\npipe\nroot");
    f.cri.stop(&first, 1).await?;
    f.cri.remove(&first).await?;
    let third = pod.start(&ask::waiting("third")).await?;
    ensure!(run(&third, "ls -d /renamed 2>/dev/null; head -c 4 /etc/passwd").await? == "root");
    Ok(())
}
