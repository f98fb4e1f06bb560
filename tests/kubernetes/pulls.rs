//! How kubelet gets images and gets rid of them: from a registry that knows its users, several at once, and by its garbage collection.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::registry::{Access, PASSWORD, Registry, USER};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings};
use crate::images::{AGNHOST, BUSYBOX, DEFAULT_REPOSITORY, kubeadms, storage};
use crate::machine::DIRECTORY;
use crate::workloads::{Kind, each_kind, waits};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    tests.add_for_all("pulls::with_image_pull_secrets", &Settings::default(), |c| {
        each_kind(c, with_image_pull_secrets)
    });
    let two_at_once = Settings {
        kubelet: r#"{"serializeImagePulls": false, "maxParallelImagePulls": 2}"#,
        ..Settings::default()
    };
    tests.add_for_all("pulls::two_at_once", &two_at_once, two_at_once_and_no_more);
    // Every file system is that full.
    let collecting = Settings {
        kubelet: r#"{"imageGCHighThresholdPercent": 1, "imageGCLowThresholdPercent": 0, "imageMinimumGCAge": "2m0s"}"#,
        ..Settings::default()
    };
    tests.add_for_all("pulls::collect_unused_images", &collecting, collect_unused_images);
}

/// A registry that refuses strangers: without a secret the pod says so, with a wrong one too, with the right one it runs.
fn with_image_pull_secrets(cluster: &Cluster, kind: Kind) -> Result<()> {
    let registry = Registry::start(&storage(), Access::Private)?;
    // By its address, so that no mirror answers in its place.
    let image = BUSYBOX.replace(DEFAULT_REPOSITORY, &registry.address().to_string());
    let mut names = Vec::new();
    for (name, password) in [("stranger", None), ("mistaken", Some("wrong")), ("known", Some(PASSWORD))] {
        names.push(name);
        let mut spec =
            json!({"containers": [waits("c", &json!({"image": image, "imagePullPolicy": "Always"}))]});
        if let Some(password) = password {
            let server = format!("--docker-server={}", registry.address());
            let (user, password) =
                (format!("--docker-username={USER}"), format!("--docker-password={password}"));
            cluster.kubectl(&["create", "secret", "docker-registry", name, &server, &user, &password])?;
            spec["imagePullSecrets"] = json!([{"name": name}]);
        }
        cluster.apply(&kind.pod(name, &spec))?;
    }
    cluster.wait_ready("known")?;
    for name in ["stranger", "mistaken"] {
        until(&format!("the {name} is refused"), || {
            let field = format!("involvedObject.name={name},reason=Failed");
            let events = cluster.get(&["events", "--field-selector", &field])?;
            let events = events["items"].as_array().context("no list")?;
            let refused = |said: &str| said.contains(&image) && is_refusal(said);
            ensure!(events.iter().any(|event| event["message"].as_str().is_some_and(refused)), "{events:?}");
            let pod = cluster.get(&["pod", name])?;
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
            let reason = waiting["reason"].as_str().unwrap_or_default();
            ensure!(["ErrImagePull", "ImagePullBackOff"].contains(&reason), "{waiting}");
            Ok(())
        })?;
    }
    cluster.delete(&names)?;
    cluster.kubectl(&["delete", "secret", "mistaken", "known"])?;
    // The next kind of pod is not to find it there.
    cluster.crictl(&["rmi", &image]).map(drop)
}

/// Whether a message says that the registry asked who one is.
fn is_refusal(said: &str) -> bool {
    let said = said.to_lowercase();
    ["401", "unauthorized", "authorization failed", "no basic auth credentials"]
        .iter()
        .any(|sign| said.contains(sign))
}

/// With three images wanted and a registry that does not answer, two requests reach it, however long it takes; once it answers, the third
/// one follows.
fn two_at_once_and_no_more(cluster: &mut Cluster) -> Result<()> {
    let registry = Registry::start(&storage(), Access::ReadOnly)?;
    let port = registry.address().port();
    let there = |name: &str| Kind::Trusted.pod(name, &json!({"containers": [waits("c", &json!({}))]}));
    cluster.run(&[there("before")])?;
    let names = ["first", "second", "third"];
    let images =
        ["e2e-test-images/agnhost:2.66.1", "k8s/busybox:1.37.0-2", "e2e-test-images/busybox:1.37.0-2"];
    let stopped = Stopped::new(&registry)?;
    for (name, image) in names.iter().zip(images) {
        let image = format!("{}/{image}", registry.address());
        let container = waits("c", &json!({"image": image}));
        cluster.apply(&Kind::Trusted.pod(name, &json!({"containers": [container]})))?;
    }
    until("kubelet wants three images", || {
        let events = cluster.get(&["events", "--field-selector", "reason=Pulling"])?;
        let events = events["items"].as_array().context("no list")?;
        let wanted = |name: &str| events.iter().any(|event| event["involvedObject"]["name"] == name);
        ensure!(names.iter().all(|name| wanted(name)), "{events:?}");
        Ok(())
    })?;
    let two_wait = || {
        let waiting = unread(port)?;
        ensure!(waiting == 2, "{waiting} requests wait");
        Ok(())
    };
    until("two requests wait", two_wait)?;
    // Time for a third one.
    cluster.run(&[there("after")])?;
    two_wait()?;
    drop(stopped);
    for name in names {
        cluster.wait_ready(name)?;
    }
    cluster.delete(&[&names[..], &["before", "after"]].concat())
}

/// A registry that does not answer until this is dropped.
struct Stopped(rustix::process::Pid);

impl Stopped {
    fn new(registry: &Registry) -> Result<Self> {
        let pid = i32::try_from(registry.pid()).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.context("the registry's process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).context("stopping the registry")?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It fails only when the registry has ended, which the test then shows.
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
    }
}

/// How many connections to a port of the node's have sent something that nobody has read (proc(5), `/proc/net/tcp`).
fn unread(port: u16) -> Result<usize> {
    let table = fs::read_to_string("/proc/net/tcp").context("reading the table of connections")?;
    let local = format!(":{port:04X}");
    let waits = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, address, _, state, queues, ..] = fields[..] else { return false };
        let unread = queues.split(':').nth(1).is_some_and(|queue| queue.bytes().any(|digit| digit != b'0'));
        // 01 is ESTABLISHED.
        address.ends_with(&local) && state == "01" && unread
    };
    Ok(table.lines().skip(1).filter(waits).count())
}

/// kubelet looks for images to remove when it starts, and then every five minutes (`ImageGCPeriod`). At the second look one that was there
/// at the first is old enough to go, while one that came since then is younger than `imageMinimumGCAge`; what pods run stays.
fn collect_unused_images(cluster: &mut Cluster) -> Result<()> {
    const PERIOD: Duration = Duration::from_secs(300);
    let looks = || -> Result<usize> {
        let log = fs::read_to_string(format!("{DIRECTORY}/kubelet.log"))?;
        Ok(log.matches("Disk usage on image filesystem is over the high threshold").count())
    };
    let looks_again = |before: usize| {
        until("kubelet looks for images to remove", || {
            ensure!(looks()? > before, "it has not");
            Ok(())
        })
    };
    cluster.crictl(&["pull", AGNHOST])?;
    cluster.stop_kubelet()?;
    let before = looks()?;
    cluster.start_kubelet()?;
    looks_again(before)?;
    let first = Instant::now();
    cluster.crictl(&["pull", BUSYBOX])?;
    ensure!(is_there(cluster, AGNHOST)?, "an image went that kubelet had only just seen");
    let before = looks()?;
    while first.elapsed() < PERIOD {
        std::thread::sleep(Duration::from_millis(500));
    }
    looks_again(before)?;
    until("what nobody uses goes", || {
        ensure!(!is_there(cluster, AGNHOST)?, "it is still there");
        Ok(())
    })?;
    ensure!(is_there(cluster, BUSYBOX)?, "an image went that is younger than imageMinimumGCAge");
    for name in kubeadms()?.iter().filter(|name| !name.contains("/pause:")) {
        ensure!(is_there(cluster, name)?, "{name} went, which a pod runs");
    }
    Ok(())
}

/// Whether the runtime has an image of this name.
fn is_there(cluster: &Cluster, name: &str) -> Result<bool> {
    let images: Value = serde_json::from_str(&cluster.crictl(&["images", "--output", "json"])?)?;
    let images = images["images"].as_array().context("no list")?;
    Ok(images
        .iter()
        .any(|image| image["repoTags"].as_array().is_some_and(|tags| tags.iter().any(|tag| tag == name))))
}
