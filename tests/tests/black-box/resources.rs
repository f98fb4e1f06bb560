//! Huge pages and swap: limits that reach the cgroup, and what this node cannot limit.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{HugepageLimit, Mount};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("resources::huge_pages_are_limited_and_mounted", huge_pages);
    tests.add("resources::swap_is_limited_where_the_node_can", swap);
}

/// Unmounts when the test is over, however it ends.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

async fn huge_pages(f: &mut Fixture) -> Result<()> {
    ensure!(
        Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists(),
        "this kernel has no pages of 2 MiB"
    );
    let directory = f.node.path("huge");
    fs::create_dir(&directory)?;
    // As kubelet mounts an emptyDir of medium HugePages-2Mi.
    mount("none", &directory, "hugetlbfs", MountFlags::empty(), c"pagesize=2M")
        .context("mounting hugetlbfs")?;
    let _mounted = Mounted(&directory);
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("huge").await?;
    let limit = |size: &str, limit| HugepageLimit { page_size: size.to_owned(), limit };
    let text = "grep ' /huge ' /proc/mounts; cat /sys/fs/cgroup/hugetlb/hugetlb.2MB.limit_in_bytes \
                /sys/fs/cgroup/hugetlb.2MB.max 2>/dev/null; touch /huge/file && echo made";
    let mut config = ask::script("c", text);
    config.mounts = vec![Mount {
        container_path: "/huge".to_owned(),
        host_path: directory.display().to_string(),
        ..Mount::default()
    }];
    ask::resources(&mut config).hugepage_limits = vec![limit("2MB", 4 << 20), limit("1GB", 0)];
    let id = pod.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    let output = pod.log("c.log")?.stdout();
    ensure!(output.contains("hugetlbfs") && output.contains("pagesize=2M"), "{output}");
    ensure!(output.ends_with("made\n"), "{output}");
    let limited = fs::read_to_string("/proc/cgroups")?.lines().any(|line| line.starts_with("hugetlb"))
        && (Path::new("/sys/fs/cgroup/hugetlb").exists()
            || Path::new("/sys/fs/cgroup/cgroup.controllers").exists());
    ensure!(output.contains("4194304") == limited, "limited: {limited}; {output}");
    for (number, size) in ["3MB", "2M", "2048kB", "", "2MB/../x"].iter().enumerate() {
        let mut config = ask::waiting(&format!("bad{number}"));
        ask::resources(&mut config).hugepage_limits = vec![limit("2MB", 0), limit(size, 0)];
        let refused = f.cri.create(&pod.id, &config, &pod.config).await.err().context(*size)?;
        ensure!(refused.code() == Code::InvalidArgument, "{size}: {refused:?}");
        ensure!(refused.message().contains("hugepage_limits[1].page_size"), "{size}: {refused:?}");
    }
    Ok(())
}

async fn swap(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("swap").await?;
    let text = "cat /sys/fs/cgroup/memory/memory.memsw.limit_in_bytes /sys/fs/cgroup/memory.swap.max 2>/dev/null; true";
    let accounted = |id: &str| -> Result<bool> {
        let found = Command::new("sh")
            .args([
                "-c",
                "ls /sys/fs/cgroup/memory/memory.memsw.limit_in_bytes /sys/fs/cgroup/*/memory.swap.max",
            ])
            .output()
            .with_context(|| format!("looking for swap's files for {id}"))?;
        Ok(!found.stdout.is_empty())
    };
    let is_v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let (memory, both) = (64_i64 << 20, 80_i64 << 20);
    for (name, asked, v1, v2) in [
        // No swap beyond the limit of memory, unless it is asked for.
        ("none", 0, memory, 0),
        ("some", both, both, both - memory),
    ] {
        let mut config = ask::script(name, text);
        let resources = ask::resources(&mut config);
        (resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes) = (memory, asked);
        let id = pod.start(&config).await?;
        f.cri.wait_exited(&id).await?;
        let output = pod.log(&format!("{name}.log"))?.stdout();
        if accounted(&id)? {
            let expected = if is_v2 { v2 } else { v1 };
            ensure!(output.trim_end() == expected.to_string(), "{name}: {output} instead of {expected}");
        } else {
            ensure!(output.is_empty(), "{name}: {output}");
        }
    }
    Ok(())
}
