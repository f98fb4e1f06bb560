//! CDI devices: what a vendor's file does to a container, who may ask, and what is refused.

use std::fs;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{CdiDevice, ContainerConfig, Int64Value};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("cdi::devices_reach_the_container", devices_reach_the_container);
    tests.add("cdi::changed_files_count_at_once", changed_files_count_at_once);
    tests.add("cdi::unknown_devices_are_refused", unknown_devices_are_refused);
}

/// Where the tests write specs. The sandbox has a /run of its own.
const DIRECTORIES: [&str; 2] = ["/run/podvisor-tests-cdi/etc", "/run/podvisor-tests-cdi/run"];

/// Removes the directories when the test is over, however it ends.
struct Specs;

impl Specs {
    /// Tells the node's daemon where to look.
    fn new(f: &mut Fixture) -> Result<Self> {
        let [first, second] = DIRECTORIES;
        fs::create_dir(f.node.path("config.toml.d"))?;
        let text = format!("[runtime]\ncdi_spec_dirs = [{first:?}, {second:?}]\n");
        fs::write(f.node.path("config.toml.d/cdi.toml"), text)?;
        f.stop()?;
        f.start()?;
        for directory in DIRECTORIES {
            fs::create_dir_all(directory).context("making a directory for specs")?;
        }
        Ok(Self)
    }
}

fn write(directory: usize, name: &str, text: &str) -> Result<()> {
    fs::write(format!("{}/{name}", DIRECTORIES[directory]), text).context("writing a spec")
}

impl Drop for Specs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all("/run/podvisor-tests-cdi");
    }
}

fn asking(mut config: ContainerConfig, names: &[&str]) -> ContainerConfig {
    config.cdi_devices = names.iter().map(|name| CdiDevice { name: (*name).to_owned() }).collect();
    config
}

async fn devices_reach_the_container(f: &mut Fixture) -> Result<()> {
    let _specs = Specs::new(f)?;
    let library = f.node.path("library");
    fs::write(&library, "a vendor's library")?;
    let hooked = f.node.path("hooked");
    let yaml = format!(
        "---\ncdiVersion: 0.7.0\nkind: vendor.com/net\nannotations:\n  made: by a test\ncontainerEdits:\n  env:\n  - VENDOR=yes\n  \
         mounts:\n  - hostPath: {library}\n    containerPath: /usr/lib/vendor/lib.so\n    options: [ro, nosuid, nodev, rbind]\n  \
         hooks:\n  - hookName: createRuntime\n    path: /bin/touch\n    args: [touch, {hooked}]\ndevices:\n- name: 0\n  \
         containerEdits:\n    deviceNodes:\n    - path: /dev/vendor0\n      hostPath: /dev/zero\n      permissions: rw\n    \
         additionalGids: [4711]\n- name: one\n  containerEdits:\n    env: [\"ONE=1\"]\n",
        library = library.display(),
        hooked = hooked.display(),
    );
    write(0, "vendor.yaml", &yaml)?;
    let json = r#"{"cdiVersion": "0.3.0", "kind": "other.org/dev", "devices": [
        {"name": "full", "containerEdits": {"deviceNodes": [
            {"path": "/dev/other", "type": "c", "major": 1, "minor": 7, "fileMode": 438}]}}]}"#;
    write(1, "other.json", json)?;
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("cdi").await?;
    let text = "head -c 3 /dev/vendor0 | od -An -tx1; cat /usr/lib/vendor/lib.so; echo; echo $VENDOR $ONE; id -G; \
                echo x > /dev/other; ls -l /dev/vendor0 /dev/other; touch /usr/lib/vendor/lib.so";
    let mut config = asking(ask::script("c", text), &["vendor.com/net=0", "other.org/dev=full"]);
    // As device plugins asked before there was a field for it.
    config
        .annotations
        .insert("cdi.k8s.io/vendor_one".to_owned(), "vendor.com/net=one,vendor.com/net=0".to_owned());
    ask::context(&mut config).run_as_user = Some(Int64Value { value: 1000 });
    let id = pod.start(&config).await?;
    let ended = f.cri.wait_exited(&id).await?;
    let log = pod.log("c.log")?;
    let output = log.stdout();
    ensure!(output.starts_with(" 00 00 00\na vendor's library\nyes 1\n"), "{log:?}");
    ensure!(
        output.lines().nth(3).is_some_and(|groups| groups.split(' ').any(|gid| gid == "4711")),
        "{log:?}"
    );
    // The node is the user's, as else he could not open it.
    let node = output.lines().find(|line| line.ends_with("/dev/vendor0")).context("no node")?;
    ensure!(node.starts_with('c') && node.contains(" 1000 "), "{node}");
    ensure!(log.stderr().contains("No space left on device"), "/dev/other is no full device: {log:?}");
    ensure!(ended.exit_code != 0 && log.stderr().contains("lib.so"), "the mount is writable: {log:?}");
    ensure!(hooked.exists(), "the hook was not called");
    let user = ended.user.and_then(|user| user.linux).context("no user")?;
    ensure!(user.supplemental_groups.contains(&4711), "{user:?}");
    // One that did not ask has nothing of it.
    let (output, _) = pod.script("plain", "ls /dev /usr/lib; echo $VENDOR").await?;
    ensure!(!output.contains("vendor") && !output.contains("yes"), "{output}");
    Ok(())
}

async fn changed_files_count_at_once(f: &mut Fixture) -> Result<()> {
    let _specs = Specs::new(f)?;
    let spec = |value: &str| {
        format!(
            "cdiVersion: 0.5.0\nkind: vendor.com/dev\ndevices:\n- name: a\n  containerEdits:\n    env: [V={value}]\n"
        )
    };
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("changes").await?;
    for (number, (directory, value, seen)) in
        [(0, "first", "first"), (0, "later", "later"), (1, "above", "above"), (0, "below", "above")]
            .iter()
            .enumerate()
    {
        write(*directory, "vendor.yaml", &spec(value))?;
        let name = format!("c{number}");
        let id = pod.start(&asking(ask::script(&name, "echo $V"), &["vendor.com/dev=a"])).await?;
        f.cri.wait_exited(&id).await?;
        let output = pod.log(&format!("{name}.log"))?.stdout();
        ensure!(output.trim_end() == *seen, "{output} instead of {seen}");
    }
    Ok(())
}

async fn unknown_devices_are_refused(f: &mut Fixture) -> Result<()> {
    let _specs = Specs::new(f)?;
    write(0, "broken.yaml", "cdiVersion: 0.5.0\nkind: vendor.com/dev\nunknown: field\n")?;
    let twice =
        "cdiVersion: 0.5.0\nkind: vendor.com/twice\ndevices:\n- name: a\n  containerEdits:\n    env: [V=1]\n";
    write(1, "one.yaml", twice)?;
    write(1, "two.yaml", twice)?;
    let missing = "cdiVersion: 0.5.0\nkind: vendor.com/missing\ndevices:\n- name: a\n  containerEdits:\n    deviceNodes:\n    \
                   - path: /dev/never-there\n";
    write(0, "missing.yaml", missing)?;
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("refused").await?;
    for (number, (device, code, parts)) in [
        (
            "vendor.com/dev=7",
            Code::NotFound,
            vec![
                "vendor.com/dev=7",
                DIRECTORIES[0],
                DIRECTORIES[1],
                "broken.yaml cannot be used",
                "unknown field",
            ],
        ),
        ("vendor.com/twice=a", Code::NotFound, vec!["vendor.com/twice=a", "one.yaml", "two.yaml"]),
        (
            "vendor.com/missing=a",
            Code::FailedPrecondition,
            vec!["vendor.com/missing=a", "missing.yaml", "/dev/never-there"],
        ),
        ("gpu0", Code::InvalidArgument, vec!["config.CDI_devices[0].name", "gpu0"]),
    ]
    .into_iter()
    .enumerate()
    {
        let config = asking(ask::waiting(&format!("c{number}")), &[device]);
        let refused = f.cri.create(&pod.id, &config, &pod.config).await.err().context(device)?;
        ensure!(refused.code() == code, "{refused:?}");
        for part in parts {
            ensure!(refused.message().contains(part), "{part}: {refused:?}");
        }
    }
    ensure!(f.cri.containers().await?.is_empty(), "a refused container is listed");
    Ok(())
}
