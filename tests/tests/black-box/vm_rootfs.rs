//! Root file systems of containers in machines: the image in the guest's memory where the machine can have it, through the file server where not;
//! nothing in the container tells which.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_critest::contents;
use podvisor_critest::image::Image;
use podvisor_critest::layer::{Compression, Layer, digest_of};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::ContainerConfig;
use podvisor_tests::cri::spec;
use podvisor_tests::images::HOST;
use podvisor_tests::{Fixture, Pod, ask, eventually};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};
use serde_json::json;

use super::Tests;
use super::vm::machine;
use super::vm_volumes::tools;

/// The same handler but for the form of its images, and for who shares them.
const OTHERS: &str = "[runtime.handlers.served]\ntype = \"vm\"\nallow_emulation = true\nrootfs = \"fs\"\n\
    [runtime.handlers.plugged]\ntype = \"vm\"\nallow_emulation = true\nrootfs = \"block\"\n\
    [runtime.handlers.disks]\ntype = \"vm\"\nallow_emulation = true\nrootfs = \"block\"\n\
    writable = \"disk\"\nwritable_size = 64\n\
    [runtime.handlers.alone]\ntype = \"vm\"\nallow_emulation = true\nshare_images = \"pod\"\n";

/// Everything about every file but what differs from one container to the next: kind and mode, owner, links, device, time, content.
const TREE: &str = "cd /; find . -xdev -type d | sort | xargs stat -c '%n %f %u %g'; \
    find . -xdev ! -type d ! -path './etc/host*' ! -path ./etc/resolv.conf | sort | xargs stat -c '%N %f %u %g %h %t %T %Y %s'; \
    find . -xdev -type f ! -path './etc/host*' ! -path ./etc/resolv.conf | sort | xargs md5sum; \
    for f in special/*; do /special/attributes attributes $f | sort; done";

/// How long it may take, where the processor of a machine in a machine is translated.
const SECONDS: i64 = 300;

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), more: OTHERS.to_owned(), ..Options::default() };
    tests.add_with("vm_rootfs::is_the_same_in_every_form", options(), is_the_same_in_every_form);
    tests.add_with("vm_rootfs::is_written_to_like_any", options(), is_written_to_like_any);
    tests.add_with("vm_rootfs::is_written_to_on_a_disk", options(), is_written_to_on_a_disk);
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

/// busybox, and a layer with something of everything that a file can be. Gives its reference.
fn image(f: &Fixture) -> Result<String> {
    let root = f.node.path("layer");
    let at = |name: &str| root.join("special").join(name);
    fs::create_dir_all(at(""))?;
    fs::copy(tools(f)?.join("v"), at("attributes"))?;
    for (name, mode) in [("owned", 0o640), ("set-user-id", 0o6755), ("attributed", 0o600), ("capable", 0o755)]
    {
        fs::write(at(name), name.repeat(3000))?;
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode))?;
    }
    chown(at("owned"), Some(100_000), Some(3))?;
    fs::hard_link(at("owned"), root.join("linked"))?;
    let holes = File::create(at("holes"))?;
    holes.set_len((3 << 20) + 5)?;
    holes.write_all_at(b"middle", 2_000_000)?;
    std::os::unix::fs::symlink("x/".repeat(1000), at("long"))?;
    for (name, kind, device) in [
        ("fifo", FileType::Fifo, 0),
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("disk", FileType::BlockDevice, makedev(7, 300)),
    ] {
        mknodat(CWD, at(name), kind, Mode::from(0o640), device)?;
    }
    setxattr(at("attributed"), c"user.one", b"1", XattrFlags::empty())?;
    setxattr(at("attributed"), c"user.two", &[2; 300], XattrFlags::empty())?;
    // CAP_NET_RAW, effective (linux/capability.h, VFS_CAP_REVISION_2).
    let capability: Vec<u8> =
        [0x0200_0001_u32, 1 << 13, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    setxattr(at("capable"), c"security.capability", &capability, XattrFlags::empty())?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=pax", "--sparse", "--xattrs", "--xattrs-include=*", "--numeric-owner"]);
    let tar =
        tar.arg("--directory").arg(&root).args(["special", "linked"]).output().context("running tar")?;
    ensure!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    let diff_id = digest_of(&tar.stdout);
    let layer = Layer { blob: tar.stdout, compression: Compression::Plain, diff_id };
    let base = contents::busybox()?.pack(Compression::Gzip)?;
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let image = Image::new(vec![base, layer], json!({"Cmd": ["sh"], "Env": [path]}));
    f.images.registry().push("test/everything", &["1"], &image.bundle()?)?;
    Ok(format!("{HOST}/test/everything:1"))
}

async fn is_the_same_in_every_form(f: &mut Fixture) -> Result<()> {
    let image = image(f)?;
    f.cri.pull(&image).await?;
    let mut trees = Vec::new();
    for (handler, form) in
        [(VM, "pmem"), ("alone", "pmem"), ("plugged", "vd"), ("disks", "vd"), ("served", "")]
    {
        let pod = pod_of(f, handler, handler).await?;
        let container =
            pod.start(&ContainerConfig { image: Some(spec(&image)), ..ask::waiting("c") }).await?;
        let said = f.cri.exec(&container, &["sh", "-c", TREE], SECONDS).await?;
        let tree = String::from_utf8(said.stdout)?;
        ensure!(said.exit_code == 0 && tree.lines().count() > 50, "{} {tree}", said.exit_code);
        let mounts = f.cri.output(&container, &["cat", "/proc/mounts"]).await?;
        let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).unwrap_or_default();
        let is_overlay = root.split(' ').nth(2) == Some("overlay");
        let wanted = form == "vd" || form == "pmem" && maps(f, &pod).await?;
        ensure!(is_overlay == wanted, "{handler}: {root}");
        // The disks of this machine that have an image.
        let disks = f.cri.output(&container, &["sh", "-c", "cd /sys/block; echo [pv][md]*"]).await?;
        ensure!(!wanted || disks.split_whitespace().any(|disk| disk.starts_with(form)), "{handler}: {disks}");
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

/// What a container writes to a disk of its own: as much as there is room for, counted as the container's, kept while the container is, and gone with it.
async fn is_written_to_on_a_disk(f: &mut Fixture) -> Result<()> {
    const SIZE: u64 = 64 << 20;
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    let pod = pod_of(f, "pod", "disks").await?;
    let first = pod.start(&ask::waiting("first")).await?;
    let run = async |container: &str, script: &str| f.cri.output(container, &["sh", "-c", script]).await;
    let used = async |container: &str| -> Result<u64> {
        let stats = f.cri.container_stats(container).await?;
        let used = stats.writable_layer.and_then(|layer| layer.used_bytes).context("it is not known yet")?;
        Ok(used.value)
    };
    let said =
        run(&first, "echo kept >/kept; dd if=/dev/zero of=/big bs=1M count=100 2>&1; stat -c %s /big; sync")
            .await?;
    let written: u64 = said.lines().last().unwrap_or_default().parse().context(said.clone())?;
    ensure!(said.contains("No space left on device") && (SIZE / 2..SIZE).contains(&written), "{said}");
    eventually("what is written is not counted", || async {
        let used = used(&first).await?;
        ensure!((written..SIZE + (4 << 20)).contains(&used), "{used} {written}");
        Ok(())
    })
    .await?;
    let said = run(&first, "rm /big; sync; df -m / | tail -n 1; cat /kept").await?;
    ensure!(said.ends_with("kept\n"), "{said}");
    eventually("what is removed is still counted", || async {
        let used = used(&first).await?;
        ensure!(used < SIZE / 4, "{used}");
        Ok(())
    })
    .await?;

    // Nobody else has it, and a daemon that is killed does not matter.
    let second = pod.start(&ask::waiting("second")).await?;
    ensure!(run(&second, "ls /kept 2>/dev/null; echo other >/kept; cat /kept").await? == "other\n");
    f.kill()?;
    f.start()?;
    let run = async |container: &str, script: &str| f.cri.output(container, &["sh", "-c", script]).await;
    ensure!(run(&first, "cat /kept; echo more >>/kept; cat /kept").await? == "kept\nkept\nmore\n");
    ensure!(disks(f)?.len() == 2, "{:?}", disks(f)?);
    f.cri.stop(&first, 1).await?;
    f.cri.remove(&first).await?;
    eventually("the disk is still there", || async {
        let disks = disks(f)?;
        ensure!(disks.len() == 1, "{disks:?}");
        Ok(())
    })
    .await?;
    ensure!(run(&second, "cat /kept").await? == "other\n");
    Ok(())
}

/// The files that containers' disks are.
fn disks(f: &Fixture) -> Result<Vec<String>> {
    let found = Command::new("find")
        .arg(f.node.path(""))
        .args(["-type", "f", "-path", "*/snapshots/*/upper/disk"])
        .output()?;
    // Directories go while they are looked at.
    Ok(String::from_utf8(found.stdout)?.lines().map(str::to_owned).collect())
}
