//! What a container may see and change: groups, read-only mounts.

use std::fs;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{Int64Value, Mount, RunPodSandboxRequest, StatusRequest, SupplementalGroupsPolicy};
use podvisor_tests::cri::spec;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{ACCOUNTS, BUSYBOX};
use podvisor_tests::{Fixture, ask};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("security::supplemental_groups_by_policy", supplemental_groups);
    tests.add("security::read_only_with_all_that_is_below", recursive_read_only);
}

/// KEP-3619: `Merge` adds the groups that the image gives the user, `Strict` does not; the status says what the first process got.
async fn supplemental_groups(f: &mut Fixture) -> Result<()> {
    use SupplementalGroupsPolicy::{Merge, Strict};
    f.cri.pull(ACCOUNTS).await?;
    let pod = f.pod("groups").await?;
    let number = |value| Some(Int64Value { value });
    #[rustfmt::skip]
    let table = [
        // The image's own user.
        ("image", Merge, None, None, vec![], "1000:1001", vec![1001, 44, 50]),
        ("image-strict", Strict, None, None, vec![], "1000:1001", vec![1001]),
        ("asked", Merge, number(1000), None, vec![2000, 44], "1000:1001", vec![1001, 44, 50, 2000]),
        ("asked-strict", Strict, number(1000), None, vec![2000, 44], "1000:1001", vec![1001, 44, 2000]),
        ("other-group", Merge, number(1000), number(3000), vec![], "1000:3000", vec![3000, 44, 50]),
        ("other-group-strict", Strict, number(1000), number(3000), vec![], "1000:3000", vec![3000]),
        // Somebody whom the image does not know is in no group of it.
        ("unknown", Merge, number(4000), None, vec![7], "4000:0", vec![0, 7]),
        ("unknown-strict", Strict, number(4000), number(5), vec![7], "4000:5", vec![5, 7]),
    ];
    for (name, policy, user, group, groups, ids, wanted) in table {
        let mut config =
            ask::script(name, "echo $(id -u):$(id -g); grep Groups: /proc/self/status | cut -f2");
        config.image = Some(spec(ACCOUNTS));
        let context = ask::context(&mut config);
        (context.run_as_user, context.run_as_group) = (user, group);
        context.supplemental_groups = groups;
        context.supplemental_groups_policy = policy.into();
        let id = pod.start(&config).await?;
        let status = f.cri.wait_exited(&id).await?;
        let output = pod.log(&format!("{name}.log"))?.stdout();
        let (said, listed) = output.split_once('\n').context("two lines")?;
        ensure!(said == ids, "{name}: {output}");
        let mut seen: Vec<i64> = listed.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let mut sorted = wanted.clone();
        sorted.sort_unstable();
        seen.sort_unstable();
        ensure!(seen == sorted, "{name}: {seen:?}");
        let told = status.user.and_then(|user| user.linux).context("no user in the status")?;
        ensure!(told.supplemental_groups == wanted, "{name}: {told:?}");
        ensure!(format!("{}:{}", told.uid, told.gid) == ids, "{name}: {told:?}");
    }
    let features = f.cri.runtime.status(StatusRequest::default()).await?.into_inner().features;
    ensure!(features.is_some_and(|features| features.supplemental_groups_policy), "not a feature");
    Ok(())
}

/// KEP-3857: also what is mounted below. A handler that cannot do it refuses instead of leaving a hole.
async fn recursive_read_only(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let volume = f.node.path("volume");
    let below = volume.join("below");
    fs::create_dir_all(&below)?;
    mount("below", &below, "tmpfs", MountFlags::empty(), None)?;
    let checked = check_recursion(f, &volume.display().to_string()).await;
    unmount(&below, UnmountFlags::DETACH)?;
    checked
}

async fn check_recursion(f: &mut Fixture, volume: &str) -> Result<()> {
    let pod = f.pod("read-only").await?;
    let mut config = ask::script(
        "c",
        "for file in /all/x /all/below/x /top/x /top/below/x; do echo $(touch $file 2>&1 && echo written $file); done",
    );
    let read_only = |path: &str, recursive_read_only| Mount {
        container_path: path.to_owned(),
        host_path: volume.to_owned(),
        readonly: true,
        recursive_read_only,
        ..Mount::default()
    };
    config.mounts = vec![read_only("/all", true), read_only("/top", false)];
    let id = pod.start(&config).await?;
    let status = f.cri.wait_exited(&id).await?;
    let output = pod.log("c.log")?.stdout();
    let refused = |file: &str| format!("touch: {file}: Read-only file system\n");
    let wanted =
        [refused("/all/x"), refused("/all/below/x"), refused("/top/x"), "written /top/below/x\n".to_owned()];
    ensure!(output == wanted.concat(), "{output}");
    let told: Vec<_> = status.mounts.iter().map(|mount| mount.recursive_read_only).collect();
    ensure!(told == [true, false], "{:?}", status.mounts);

    // Debian's crun tells nobody its features.
    let ask = f.ask_pod("crun");
    let request = RunPodSandboxRequest { config: Some(ask.clone()), runtime_handler: "crun".to_owned() };
    fs::create_dir_all(&ask.log_directory)?;
    let id = f.cri.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let pod = Pod::known(&id, &ask, &f.cri);
    let error = f.cri.create(&pod.id, &config, &pod.config).await.err().context("crun does it after all")?;
    ensure!(error.code() == Code::Unimplemented, "{error:?}");
    ensure!(error.message().contains("config.mounts[0].recursive_read_only"), "{error:?}");
    Ok(())
}
