//! Volumes of pods in virtual machines: what containers share, and what they see of the host's changes. Each boot takes seconds, so each test
//! makes of its machine what it can.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_critest::image::{Dialect, Image};
use podvisor_critest::layer::{Compression, Files};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{ContainerConfig, HugepageLimit, LinuxContainerResources, Mount};
use podvisor_tests::images::HOST;
use podvisor_tests::{Fixture, ask, eventually};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm_volumes::are_one_for_all_containers", options(), are_one_for_all_containers);
    tests.add_with("vm_volumes::are_as_on_the_host", options(), are_as_on_the_host);
    tests.add_with("vm_volumes::keep_memory_in_the_guest", options(), keep_memory_in_the_guest);
    tests.add_with("vm_volumes::are_on_huge_pages", options(), are_on_huge_pages);
    tests.add_with("vm_volumes::are_copied_within_a_bound", options(), are_copied_within_a_bound);
    tests.add_with("vm_volumes::wake_who_watches_them", options(), wake_who_watches_them);
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
pub(super) fn tools(f: &Fixture) -> Result<PathBuf> {
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

/// Mounts of kubelet's, gone with this.
#[derive(Default)]
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn add(&mut self, kind: &str, place: &Path, data: &std::ffi::CStr) -> Result<()> {
        fs::create_dir_all(place)?;
        rustix::mount::mount(kind, place, kind, rustix::mount::MountFlags::empty(), data)?;
        self.0.push(place.to_owned());
        Ok(())
    }

    fn bind(&mut self, source: &Path, place: &Path) -> Result<()> {
        fs::create_dir_all(place)?;
        rustix::mount::mount_bind(source, place)?;
        self.0.push(place.to_owned());
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for place in self.0.iter().rev() {
            let _ = rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

async fn are_as_on_the_host(f: &mut Fixture) -> Result<()> {
    let mut mounts = Mounts::default();
    let data = f.node.path("data");
    fs::create_dir_all(data.join("below"))?;
    mounts.add("tmpfs", &data.join("below"), c"size=1m")?;
    fs::write(data.join("script"), "#!/bin/sh\necho it runs\n")?;
    fs::set_permissions(data.join("script"), Permissions::from_mode(0o755))?;
    let files = Files::new().file("dir/value", 0o640, "of the image\n").pack(Compression::Gzip)?;
    let image = Image::new(vec![files], serde_json::json!({})).dialect(Dialect::Oci).single();
    f.images.registry().push("test/vm-volume", &["1"], &image.bundle()?)?;
    let name = format!("{HOST}/test/vm-volume:1");
    let id = f.cri.pull(&name).await?;
    let mut config = container("c", vec![mount(&data, "/rw"), read_only(mount(&data, "/ro"))]);
    config.mounts.push(Mount { recursive_read_only: true, ..read_only(mount(&data, "/rro")) });
    config.mounts.extend([ask::image_mount(&id, "", "/image"), ask::image_mount(&id, "dir", "/part")]);
    let (pod, id) = f.running("pod", &config).await?;
    let run = async |script: &str| f.cri.output(&id, &["sh", "-c", script]).await;

    ensure!(run("/rw/script").await? == "it runs\n");
    let writes = "for d in /rw /rw/below /ro /ro/below /rro /rro/below /image /part; do touch $d/x 2>/dev/null && echo $d; done; true";
    ensure!(run(writes).await? == "/rw\n/rw/below\n/ro/below\n");
    ensure!(
        run("cat /image/dir/value /part/value; stat -c %a /part/value").await?
            == "of the image\nof the image\n640\n"
    );
    // A mount below is a file system of its own there too.
    ensure!(run("[ $(stat -c %d /rw) != $(stat -c %d /rw/below) ] && echo differ").await? == "differ\n");
    // What the host changes is what the next look finds: names, attributes, content.
    let file = data.join("file");
    for size in 1..20 {
        fs::write(&file, "x".repeat(size))?;
        fs::set_permissions(&file, Permissions::from_mode(0o600 + u32::try_from(size % 8)?))?;
        let seen = run("stat -c '%s %a' /ro/file; cat /rw/file | wc -c").await?;
        ensure!(seen == format!("{size} 60{}\n{size}\n", size % 8), "{size}: {seen:?}");
    }
    fs::rename(&file, data.join("renamed"))?;
    ensure!(run("cat /ro/file 2>/dev/null; cat /ro/renamed | wc -c").await? == "19\n");

    let pipe = f.node.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)?;
    let refused =
        pod.create(&container("pipe", vec![mount(&pipe, "/x")])).await.err().context("it was created")?;
    ensure!(format!("{refused:#}").contains("mounts[0].host_path"), "{refused:#}");
    Ok(())
}

async fn keep_memory_in_the_guest(f: &mut Fixture) -> Result<()> {
    let mut mounts = Mounts::default();
    let scratch = f.node.path("pods/uid/volumes/kubernetes.io~empty-dir/scratch");
    mounts.add("tmpfs", &scratch, c"size=8m,mode=0777")?;
    // As kubelet does it for fsGroup, and for a subPath.
    let owned = |path: &Path, mode: u32| -> Result<()> {
        chown(path, Some(1000), Some(2000))?;
        Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
    };
    owned(&scratch, 0o2777)?;
    fs::create_dir(scratch.join("sub"))?;
    owned(&scratch.join("sub"), 0o2750)?;
    let sub = f.node.path("pods/uid/volume-subpaths/scratch/second/0");
    mounts.bind(&scratch.join("sub"), &sub)?;

    let (pod, first) = f.running("pod", &container("first", vec![mount(&scratch, "/scratch")])).await?;
    let with_sub =
        |name: &str| container(name, vec![mount(&sub, "/sub"), read_only(mount(&scratch, "/scratch"))]);
    let second = pod.start(&with_sub("second")).await?;
    let run = async |f: &Fixture, container: &str, script: &str| {
        f.cri.output(container, &["sh", "-c", script]).await
    };
    ensure!(run(f, &first, "stat -f -c %T /scratch").await? == "tmpfs\n");
    ensure!(run(f, &first, "stat -c '%a %u %g' /scratch").await? == "2777 1000 2000\n");
    ensure!(run(f, &second, "stat -c '%a %u %g' /sub").await? == "2750 1000 2000\n");
    let size = run(f, &first, "df -k /scratch | tail -n 1 | awk '{print $2}'").await?;
    ensure!(size == "8192\n", "{size}");
    run(f, &first, "echo first >/scratch/file").await?;
    run(f, &second, "echo second >/sub/file").await?;
    ensure!(run(f, &first, "cat /scratch/sub/file").await? == "second\n");
    ensure!(
        run(f, &second, "cat /scratch/file; touch /scratch/x 2>&1 || echo refused")
            .await?
            .ends_with("refused\n")
    );
    ensure!(!scratch.join("file").exists(), "it is on the host");
    let full =
        run(f, &first, "dd if=/dev/zero of=/scratch/fill bs=1M count=9 2>&1; rm /scratch/fill").await?;
    ensure!(full.contains("No space left"), "{full}");

    // It stays when a container is made anew, and when the daemon is.
    for container in [&first, &second] {
        f.cri.stop(container, 1).await?;
        f.cri.remove(container).await?;
    }
    f.kill()?;
    f.start()?;
    let again = pod.start(&container("again", vec![mount(&scratch, "/scratch")])).await?;
    ensure!(run(f, &again, "cat /scratch/file /scratch/sub/file").await? == "first\nsecond\n");
    // A link that a container puts in the way leads another one nowhere.
    run(f, &again, "rm -r /scratch/sub && ln -s /etc /scratch/sub").await?;
    let refused = pod.create(&with_sub("misled")).await.err().context("it was created")?;
    ensure!(format!("{refused:#}").contains("/sub"), "{refused:#}");
    Ok(())
}

/// Bytes of memory, of all containers or one, and of huge pages of 2 MiB, in MiB.
fn limits(memory: i64, huge: u64) -> LinuxContainerResources {
    // kubelet names every size that the node has.
    let limits = [("2MB", huge << 20), ("1GB", 0)];
    let limits = limits.map(|(size, limit)| HugepageLimit { page_size: size.to_owned(), limit });
    LinuxContainerResources {
        memory_limit_in_bytes: memory << 20,
        hugepage_limits: limits.into(),
        ..Default::default()
    }
}

async fn are_on_huge_pages(f: &mut Fixture) -> Result<()> {
    let (tools, mut mounts) = (tools(f)?, Mounts::default());
    let huge = f.node.path("pods/uid/volumes/kubernetes.io~empty-dir/huge");
    mounts.add("hugetlbfs", &huge, c"pagesize=2M,mode=0777")?;
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    let mut config = f.ask_pod("pod");
    config.linux.get_or_insert_default().resources = Some(limits(256, 0));
    let pod = f.run(config.clone()).await?;
    let with = |name: &str, mib| {
        let mut config = container(name, vec![read_only(mount(&tools, "/tools")), mount(&huge, "/huge")]);
        config.linux.get_or_insert_default().resources = Some(limits(64, mib));
        config
    };
    let run = async |f: &Fixture, container: &str, script: &str| {
        f.cri.output(container, &["sh", "-c", script]).await
    };
    let memory = async |f: &Fixture| -> Result<u64> {
        let machine = super::vm::machine(f, &pod.id).await?;
        Ok(machine["memoryBytes"].as_u64().context("no memory")? >> 20)
    };
    let none = pod.start(&with("none", 0)).await?;
    let before = memory(f).await?;
    ensure!(
        run(f, &none, "stat -f -c %T /huge; /tools/v huge - 2 2>&1 || true")
            .await?
            .contains("Cannot allocate memory")
    );

    // The machine becomes larger by what a container may use, beside its memory.
    let first = pod.start(&with("first", 8)).await?;
    let larger = memory(f).await?;
    ensure!((before + 8..=before + 12).contains(&larger), "{before} MiB became {larger}");
    ensure!(run(f, &first, "awk '/HugePages_Total/ { print $2 }' /proc/meminfo").await? == "4\n");
    ensure!(run(f, &first, "/tools/v huge - 8").await? == "4\n");
    let hungry = "dd if=/dev/zero of=/dev/null bs=50M count=1 2>/dev/null && echo done";
    ensure!(run(f, &first, hungry).await? == "done\n");

    // Volumes are on them, for all containers; whoever writes pays.
    let second = pod.start(&with("second", 4)).await?;
    ensure!(run(f, &first, "/tools/v huge /huge/file 6").await? == "3\n");
    ensure!(
        run(f, &second, "wc -c </huge/file; dd if=/huge/file bs=2M 2>/dev/null | tr -d '\\0' | wc -c")
            .await?
            == "6291456\n3\n"
    );
    ensure!(run(f, &second, "/tools/v huge - 4").await? == "2\n");
    ensure!(
        run(f, &second, "/tools/v huge - 6 2>/dev/null; echo $?").await? == "135\n",
        "its limit is 4 MiB"
    );
    ensure!(run(f, &none, "/tools/v huge - 2 2>/dev/null; echo $?").await? == "135\n", "it may use none");
    ensure!(fs::read_dir(&huge)?.next().is_none(), "it is on the host");

    // What cannot be had changes nothing. Files outlive their container, and the next one has what that had.
    let both = memory(f).await?;
    let mut huger = with("huger", 0);
    let asked = huger.linux.get_or_insert_default().resources.get_or_insert_default();
    asked.hugepage_limits[1].limit = 1 << 30;
    let refused = pod.create(&huger).await.err().context("a page of 1 GiB was there")?;
    ensure!(format!("{refused:#}").contains("huge pages of 1048576 KiB"), "{refused:#}");
    ensure!(memory(f).await? == both);
    f.cri.stop(&first, 1).await?;
    f.cri.remove(&first).await?;
    f.kill()?;
    f.start()?;
    let again = pod.start(&with("again", 8)).await?;
    ensure!(memory(f).await? == both);
    ensure!(run(f, &again, "/tools/v huge /huge/file 6; /tools/v huge - 2").await? == "3\n1\n");
    f.cri.stop_pod(&pod.id).await?;

    // A machine in the cgroup of its pod, which has declared what the machine needs and not what huge pages do.
    let mut config = f.ask_pod("declared");
    let linux = config.linux.get_or_insert_default();
    (linux.resources, linux.overhead) = (Some(limits(256, 0)), Some(limits(160, 0)));
    let declared = f.run(config.clone()).await?;
    let parent = config.linux.unwrap_or_default().cgroup_parent;
    let files = [format!("memory{parent}/memory.limit_in_bytes"), format!("{parent}/memory.max")];
    let files = files.map(|file| Path::new("/sys/fs/cgroup").join(file.trim_start_matches('/')));
    let limit = files.iter().find(|file| file.exists()).context("the pod has no cgroup for memory")?;
    fs::write(limit, ((before + 4) << 20).to_string())?;
    let refused = declared.create(&with("c", 8)).await.err().context("the cgroup has no room")?;
    let words = "hugepage_limits: need 6 MiB more than the pod's cgroup allows";
    ensure!(format!("{refused:#}").contains(words), "{refused:#}");
    f.cri.stop_pod(&declared.id).await?;

    let plain = f.run(f.ask_pod("plain")).await?;
    let refused = plain.create(&with("c", 8)).await.err().context("the machine cannot grow")?;
    ensure!(format!("{refused:#}").contains("cannot be resized as asked"), "{refused:#}");
    Ok(())
}

/// What kubelet's atomic writer does.
fn publish(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result<()> {
    let directory = volume.join(version);
    fs::create_dir_all(&directory)?;
    for (name, text) in files {
        let path = directory.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, Permissions::from_mode(0o640))?;
        chown(&path, Some(0), Some(2000))?;
    }
    let (data, new) = (volume.join("..data"), volume.join("..data_tmp"));
    let old = fs::read_link(&data).ok();
    symlink(version, &new)?;
    fs::rename(new, data)?;
    for (name, _) in files {
        if !volume.join(name).is_symlink() {
            symlink(Path::new("..data").join(name), volume.join(name))?;
        }
    }
    for entry in fs::read_dir(volume)? {
        let path = entry?.path();
        if path.is_symlink() && !path.exists() {
            fs::remove_file(path)?;
        }
    }
    old.map_or(Ok(()), |old| Ok(fs::remove_dir_all(volume.join(old))?))
}

/// Copies of volumes that kubelet changes take the guest's own memory: there is an end to it, which is told.
async fn are_copied_within_a_bound(f: &mut Fixture) -> Result<()> {
    let text = "x".repeat(3 << 20);
    let mut mounts = Vec::new();
    for number in 0..6 {
        let volume = f.node.path(&format!("pods/uid/volumes/kubernetes.io~configmap/c{number}"));
        publish(&volume, "..1", &[("value", &text)])?;
        mounts.push((volume.clone(), read_only(mount(&volume, &format!("/c{number}")))));
    }
    let some = |range: std::ops::Range<usize>| mounts[range].iter().map(|(_, mount)| mount.clone()).collect();
    let (pod, first) = f.running("pod", &container("first", some(0..4))).await?;
    let second = pod.start(&container("second", some(3..5))).await?;
    let refused = pod.create(&container("third", some(5..6))).await.err().context("there is no end to it")?;
    let told = format!("{refused:#}");
    ensure!(told.contains("can have 16777216 bytes of them") && told.contains("15728640 already"), "{told}");
    // One that grows keeps its last version as long as there is no room for the new one. (A volume may have 4 MiB.)
    let grown = "y".repeat((4 << 20) - 1024);
    let larger = "z".repeat((3 << 20) + (512 << 10));
    publish(&mounts[2].0, "..2", &[("value", &larger)])?;
    publish(&mounts[0].0, "..2", &[("value", &grown)])?;
    publish(&mounts[1].0, "..2", &[("value", "small")])?;
    let run = async |container: &str, script: &str| f.cri.output(container, &["sh", "-c", script]).await;
    eventually("a smaller version comes", || async {
        ensure!(run(&first, "cat /c1/value").await? == "small");
        Ok(())
    })
    .await?;
    // Which has made room for the other one.
    eventually("a larger version comes", || async {
        ensure!(run(&first, "head -c 1 /c0/value").await? == "y");
        Ok(())
    })
    .await?;
    // What nobody uses any more makes room too.
    f.cri.stop(&second, 0).await?;
    f.cri.remove(&second).await?;
    let third = pod.start(&container("third", some(5..6))).await?;
    ensure!(run(&third, "wc -c </c5/value").await? == format!("{}\n", text.len()));
    Ok(())
}

async fn wake_who_watches_them(f: &mut Fixture) -> Result<()> {
    let tools = tools(f)?;
    let mut mounts = Mounts::default();
    let volume = f.node.path("pods/uid/volumes/kubernetes.io~secret/secret");
    mounts.add("tmpfs", &volume, c"size=1m,mode=0755")?;
    publish(&volume, "..1", &[("value", "old\n"), ("one", "1"), ("two", "1"), ("goes", "")])?;
    // A subPath, which is of one version for ever.
    let single = f.node.path("single");
    fs::write(&single, "")?;
    rustix::mount::mount_bind(volume.join("..data/value"), &single)?;
    mounts.0.push(single.clone());
    // Too large to be copied.
    let large = f.node.path("pods/uid/volumes/kubernetes.io~configmap/large");
    publish(&large, "..1", &[("value", &"x".repeat(5 << 20))])?;
    let all = || {
        vec![
            read_only(mount(&tools, "/tools")),
            read_only(mount(&volume, "/secret")),
            read_only(mount(&single, "/single")),
            read_only(mount(&large, "/large")),
        ]
    };
    let (pod, first) = f.running("pod", &container("first", all())).await?;
    let run = async |f: &Fixture, container: &str, script: &str| {
        f.cri.output(container, &["sh", "-c", script]).await
    };
    ensure!(run(f, &first, "cat /secret/value /single").await? == "old\nold\n");
    ensure!(run(f, &first, "stat -L -c '%a %u %g' /secret/value").await? == "640 0 2000\n");
    ensure!(run(f, &first, "wc -c </large/value").await? == format!("{}\n", 5 << 20));
    ensure!(f.node.log_tail(1000).contains("inotify does not tell them"));
    run(f, &first, "/tools/v watch /secret 120 >/tmp/watch 2>&1 </dev/null &").await?;
    run(f, &first, "/tools/v compare /secret last >/tmp/compare 2>&1 </dev/null &").await?;
    eventually("it watches", || async {
        ensure!(run(f, &first, "cat /tmp/watch").await? == "watching\n");
        Ok(())
    })
    .await?;

    // Nobody but the pod's monitor sees to it.
    f.kill()?;
    for version in 2..40 {
        let text = version.to_string();
        publish(&volume, &format!("..{version}"), &[("value", "new\n"), ("one", &text), ("two", &text)])?;
    }
    publish(&volume, "..last", &[("value", "new\n"), ("one", "last"), ("two", "last"), ("comes", "")])?;
    f.start()?;
    eventually("the last version is there", || async {
        let seen = run(f, &first, "cat /tmp/watch /tmp/compare; ls /secret; cat /secret/value").await?;
        ensure!(seen == "watching\nwoken\nalways whole\ncomes\none\ntwo\nvalue\nnew\n", "{seen}");
        Ok(())
    })
    .await?;
    ensure!(run(f, &first, "cat /single").await? == "old\n");

    // Another container has the same; who comes after all have gone has what is there then.
    let second = pod.start(&container("second", all())).await?;
    ensure!(run(f, &second, "cat /secret/one /secret/value; touch /secret/x 2>&1").await.is_err());
    for container in [&first, &second] {
        f.cri.stop(container, 1).await?;
        f.cri.remove(container).await?;
    }
    publish(&volume, "..after", &[("value", "after\n")])?;
    let third = pod.start(&container("third", vec![read_only(mount(&volume, "/secret"))])).await?;
    ensure!(run(f, &third, "ls /secret; cat /secret/value").await? == "value\nafter\n");
    publish(&volume, "..end", &[("value", "end\n")])?;
    eventually("it is followed again", || async {
        ensure!(run(f, &third, "cat /secret/value").await? == "end\n");
        Ok(())
    })
    .await
}
