//! What people run: volumes and their updates, init and sidecar containers, probes, hooks, logs, copies, jobs; each for a pod on the node's
//! kernel and for a virtual machine.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings, kubectl_command};
use crate::images::{BUSYBOX, UNREACHABLE};
use crate::machine::{DIRECTORY, NAME};
use crate::pods::UNTRUSTED;
use crate::runtime::is_peer;
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let usual = Settings::default();
    tests.add_for_all("workloads::see_volumes_change", &usual, |c| each_kind(c, see_volumes_change));
    tests.add_for_all("workloads::have_init_and_sidecars", &usual, |c| each_kind(c, have_init_and_sidecars));
    tests.add_for_all("workloads::are_probed_and_restarted", &usual, |c| {
        each_kind(c, are_probed_and_restarted)
    });
    tests.add_for_all("workloads::are_looked_into", &usual, |c| each_kind(c, are_looked_into));
    tests.add_for_all("workloads::come_to_an_end", &usual, |c| each_kind(c, come_to_an_end));
    tests.add_for_all("workloads::are_resized", &usual, |c| each_kind(c, are_resized));
    tests.add_for_all("workloads::say_why_no_image_came", &usual, say_why_no_image_came);
}

/// Which kind of pod a test is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Trusted,
    Machine,
}

impl Kind {
    /// A pod of that kind with this specification.
    pub(crate) fn pod(self, name: &str, spec: &Value) -> Value {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"terminationGracePeriodSeconds": 1},
        });
        pod["metadata"]["annotations"] = self.annotations();
        for (key, value) in spec.as_object().into_iter().flatten() {
            pod["spec"][key] = value.clone();
        }
        pod
    }

    /// What makes a pod one of that kind.
    pub(crate) fn annotations(self) -> Value {
        if self == Self::Machine { json!({UNTRUSTED: "true"}) } else { json!({}) }
    }
}

/// Runs a test with pods of both kinds, one after the other.
pub(crate) fn each_kind(cluster: &mut Cluster, test: impl Fn(&Cluster, Kind) -> Result<()>) -> Result<()> {
    test(cluster, Kind::Trusted).context("trusted")?;
    // The peer has no machines.
    if is_peer() { Ok(()) } else { test(cluster, Kind::Machine).context("virtual machine") }
}

/// A container that waits, with more to it.
pub(crate) fn waits(name: &str, more: &Value) -> Value {
    runs(name, "trap exit TERM; while :; do sleep 0.2; done", more)
}

/// The same without ever waking up, which is a burden to a guest of an emulated processor's.
pub(crate) fn idle(name: &str, more: &Value) -> Value {
    runs(name, "trap exit TERM; sleep 1000000 & wait", more)
}

/// A container that runs a script, with more to it.
pub(crate) fn runs(name: &str, script: &str, more: &Value) -> Value {
    let mut container = json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]});
    for (key, value) in more.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    container
}

fn see_volumes_change(cluster: &Cluster, kind: Kind) -> Result<()> {
    let map = |value: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "map"}, "data": {"key": value, "other": "still"}});
    let secret = |value: &str| json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "secret"}, "stringData": {"key": value}});
    let on_host = format!("{DIRECTORY}/volume");
    fs::create_dir_all(&on_host)?;
    fs::write(format!("{on_host}/file"), "of the node\n")?;
    cluster.apply(&map("first"))?;
    cluster.apply(&secret("first"))?;
    let mounts = json!([
        {"name": "map", "mountPath": "/map"},
        {"name": "map", "mountPath": "/single", "subPath": "other"},
        {"name": "secret", "mountPath": "/secret"},
        {"name": "disk", "mountPath": "/disk"},
        {"name": "memory", "mountPath": "/memory"},
        {"name": "host", "mountPath": "/host"},
        {"name": "downward", "mountPath": "/downward"},
    ]);
    let environment = json!([
        {"name": "FROM_MAP", "valueFrom": {"configMapKeyRef": {"name": "map", "key": "key"}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]);
    let pod = kind.pod(
        "volumes",
        &json!({
            "containers": [
                waits("a", &json!({"volumeMounts": mounts, "env": environment})),
                waits("b", &json!({"volumeMounts": mounts})),
            ],
            "volumes": [
                {"name": "map", "configMap": {"name": "map"}},
                {"name": "secret", "secret": {"secretName": "secret", "defaultMode": 256}},
                {"name": "disk", "emptyDir": {}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
                {"name": "host", "hostPath": {"path": on_host, "type": "Directory"}},
                {"name": "downward", "downwardAPI": {"items": [
                    {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                ]}},
            ],
        }),
    );
    cluster.run(&[pod])?;
    let run = |container: &str, script: &str| {
        cluster.kubectl(&["exec", "volumes", "--container", container, "--", "sh", "-c", script])
    };
    ensure!(run("a", "cat /map/key /secret/key /single /host/file")? == "firstfirststillof the node\n");
    ensure!(run("a", "stat -L -c %a /secret/key")? == "400\n");
    let address =
        cluster.get(&["pod", "volumes"])?["status"]["podIP"].as_str().context("no address")?.to_owned();
    ensure!(run("a", "echo $FROM_MAP $POD_IP")? == format!("first {address}\n"));
    // Between containers, and to the node and back.
    run("a", "echo disk >/disk/file; echo memory >/memory/file; echo pod >/host/new")?;
    ensure!(run("b", "cat /disk/file /memory/file")? == "disk\nmemory\n");
    ensure!(fs::read_to_string(format!("{on_host}/new"))? == "pod\n");
    ensure!(
        run("a", "dd if=/dev/zero of=/memory/more bs=1M count=17 2>&1 || true")?.contains("No space left")
    );
    // The token of the service account is one that the API server takes.
    let token = run("a", "cat /var/run/secrets/kubernetes.io/serviceaccount/token")?;
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let file = format!("{DIRECTORY}/review.json");
    fs::write(&file, review.to_string())?;
    let reviewed: Value =
        serde_json::from_str(&cluster.kubectl(&["create", "--output", "json", "--filename", &file])?)?;
    ensure!(reviewed["status"]["user"]["username"] == "system:serviceaccount:default:default", "{reviewed}");

    cluster.apply(&map("second"))?;
    cluster.apply(&secret("second"))?;
    cluster.kubectl(&["label", "pod", "volumes", "changed=yes"])?;
    until("changes arrive in the pod", || {
        let seen = run("b", "cat /map/key /secret/key /downward/labels")?;
        ensure!(seen.starts_with("secondsecond") && seen.contains("changed=\"yes\""), "{seen}");
        Ok(())
    })?;
    // subPath is a copy of that moment, by definition.
    ensure!(run("a", "cat /single")? == "still");
    cluster.delete(&["volumes"])?;
    cluster.kubectl(&["delete", "configmap/map", "secret/secret"])?;
    fs::remove_dir_all(on_host).context("removing the volume")
}

fn have_init_and_sidecars(cluster: &Cluster, kind: Kind) -> Result<()> {
    let mounts = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
    let sidecar = json!({"volumeMounts": mounts["volumeMounts"], "restartPolicy": "Always"});
    let pod = kind.pod(
        "init",
        &json!({
            "restartPolicy": "Never",
            "initContainers": [
                runs("first", "echo first >>/v/order", &mounts),
                runs("sidecar", "echo sidecar >>/v/order; trap 'echo sidecar ends >/dev/termination-log; exit 0' TERM; while :; do sleep 0.2; done", &sidecar),
                runs("second", "echo second >>/v/order", &mounts),
            ],
            "containers": [runs("main", "cat /v/order; while [ ! -e /v/end ]; do sleep 0.2; done; exit 3", &mounts)],
            "volumes": [{"name": "v", "emptyDir": {}}],
        }),
    );
    cluster.run(&[pod])?;
    until("all have run in their order", || {
        let log = cluster.kubectl(&["logs", "init", "--container", "main"])?;
        ensure!(log == "first\nsidecar\nsecond\n", "{log}");
        Ok(())
    })?;
    // An ephemeral container shares the network, and the processes of the one it is for.
    cluster.kubectl(&[
        "debug",
        "init",
        "--image",
        BUSYBOX,
        "--container",
        "debugger",
        "--target",
        "main",
        "--profile",
        "general",
        "--",
        "sh",
        "-c",
        "ps; echo debugged; sleep 1000",
    ])?;
    until("the debugger has seen the pod", || {
        let seen = cluster.kubectl(&["logs", "init", "--container", "debugger"])?;
        ensure!(seen.contains("debugged") && seen.contains("/v/end"), "{seen}");
        Ok(())
    })?;
    cluster.kubectl(&["exec", "init", "--container", "main", "--", "touch", "/v/end"])?;
    until("the sidecar ends after its pod", || {
        let pod = cluster.get(&["pod", "init"])?;
        let status = &pod["status"];
        ensure!(status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3, "{status}");
        let init = status["initContainerStatuses"].as_array().context("none")?;
        let ended = init.iter().find(|one| one["name"] == "sidecar").context("no sidecar")?;
        ensure!(ended["state"]["terminated"]["message"] == "sidecar ends\n", "{ended}");
        ensure!(status["phase"] == "Failed", "{}", status["phase"]);
        Ok(())
    })?;
    cluster.delete(&["init"])
}

fn are_probed_and_restarted(cluster: &Cluster, kind: Kind) -> Result<()> {
    let often = |kind: &str, what: Value| {
        let mut probe = json!({"periodSeconds": 1, "failureThreshold": 3, "timeoutSeconds": 20});
        probe[kind] = what;
        probe
    };
    let serving = "while :; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\n' | nc -l -p 8000 >/dev/null; done & echo $((1 + $(cat /v/starts 2>/dev/null || echo 0))) >/v/starts; while [ ! -e /dies ]; do sleep 0.2; done; echo gone >/dev/termination-log; exit 7";
    let pod = kind.pod(
        "probed",
        &json!({
            "containers": [
                runs("http", serving, &json!({
                    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                    "startupProbe": often("tcpSocket", json!({"port": 8000})),
                    "readinessProbe": often("httpGet", json!({"path": "/", "port": 8000})),
                    "lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "echo started >>/v/hooks"]}}},
                })),
                runs("exec", "touch /alive; while :; do sleep 0.2; done", &json!({
                    "livenessProbe": often("exec", json!({"command": ["test", "-e", "/alive"]})),
                })),
            ],
            "volumes": [{"name": "v", "emptyDir": {}}],
        }),
    );
    cluster.run(&[pod])?;
    let run = |container: &str, script: &str| {
        cluster.kubectl(&["exec", "probed", "--container", container, "--", "sh", "-c", script])
    };
    ensure!(run("http", "cat /v/starts /v/hooks")? == "1\nstarted\n");
    run("http", "touch /dies")?;
    run("exec", "rm /alive")?;
    until("both containers are started again", || {
        let pod = cluster.get(&["pod", "probed"])?;
        let statuses = pod["status"]["containerStatuses"].as_array().context("none")?;
        for status in statuses {
            ensure!(status["restartCount"] == 1 && status["ready"] == true, "{status}");
            let ended = &status["lastState"]["terminated"];
            if status["name"] == "http" {
                ensure!(ended["exitCode"] == 7 && ended["message"] == "gone\n", "{ended}");
            } else {
                ensure!(ended["exitCode"] == 137, "{ended}");
            }
        }
        Ok(())
    })?;
    ensure!(run("http", "cat /v/starts /v/hooks")? == "2\nstarted\nstarted\n");
    cluster.delete(&["probed"])
}

fn are_looked_into(cluster: &Cluster, kind: Kind) -> Result<()> {
    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done";
    cluster.run(&[kind.pod("seen", &json!({"containers": [runs("c", script, &json!({}))]}))])?;
    until("the log has its first lines", || {
        let log = cluster.kubectl(&["logs", "seen", "--limit-bytes", "14"])?;
        ensure!(log == "line 0\nline 1\n", "{log:?}");
        Ok(())
    })?;
    // By SPDY and by WebSocket.
    for sockets in ["true", "false"] {
        let mut command = kubectl_command();
        command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", sockets);
        command.args(["exec", "seen", "--", "sh", "-c", "echo out; echo err >&2; exit 5"]);
        let output = command.output()?;
        ensure!(output.stdout == b"out\n", "{output:?}");
        ensure!(output.stderr.starts_with(b"err\n") && output.status.code() == Some(5), "{output:?}");
    }
    // To the pod and back.
    let (there, back) = (format!("{DIRECTORY}/there"), format!("{DIRECTORY}/back"));
    fs::write(&there, vec![b'y'; 3 << 20])?;
    cluster.kubectl(&["cp", &there, "seen:/copied"])?;
    cluster.kubectl(&["cp", "seen:copied", &back])?;
    ensure!(fs::read(&there)? == fs::read(&back)?, "the copy differs");
    fs::remove_file(there)?;
    fs::remove_file(back)?;
    cluster.delete(&["seen"])
}

fn come_to_an_end(cluster: &Cluster, kind: Kind) -> Result<()> {
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"},
        "spec": {
            "completions": 2, "parallelism": 1, "backoffLimit": 0,
            "template": {
                "metadata": {"annotations": kind.annotations()},
                "spec": {"restartPolicy": "Never", "containers": [runs("c", "echo done", &json!({}))]},
            },
        },
    });
    cluster.apply(&job)?;
    cluster.kubectl(&["wait", "--for=condition=Complete", "job/job", "--timeout=240s"])?;
    let logs = cluster.kubectl(&["logs", "--selector", "job-name=job"])?;
    ensure!(logs == "done\ndone\n", "{logs:?}");
    cluster.kubectl(&["delete", "job", "job"])?;
    let crashing = kind.pod("crashing", &json!({"containers": [runs("c", "exit 9", &json!({}))]}));
    cluster.apply(&crashing)?;
    until("the pod is started again and again, more and more seldom", || {
        let pod = cluster.get(&["pod", "crashing"])?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["lastState"]["terminated"]["exitCode"] == 9, "{status}");
        ensure!(status["restartCount"].as_u64().is_some_and(|count| count >= 2), "{status}");
        // kubelet shows CrashLoopBackOff only when it looks again before the next start.
        let events =
            cluster.get(&["events", "--field-selector", "involvedObject.name=crashing,reason=BackOff"])?;
        ensure!(events["items"].as_array().is_some_and(|events| !events.is_empty()), "no event");
        Ok(())
    })?;
    cluster.delete(&["crashing"])
}

fn are_resized(cluster: &Cluster, kind: Kind) -> Result<()> {
    let limits = |memory: &str, cpu: &str| json!({"memory": memory, "cpu": cpu});
    let resources = |limits: Value| json!({"resources": {"limits": limits.clone(), "requests": limits}});
    let container = waits("c", &resources(limits("64Mi", "200m")));
    cluster.run(&[kind.pod("resized", &json!({"containers": [container]}))])?;
    let limit = || -> Result<String> {
        let script =
            "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
        Ok(cluster.exec("resized", &["sh", "-c", script])?.trim().to_owned())
    };
    ensure!(limit()? == (64 << 20).to_string(), "{}", limit()?);
    let patch = |memory: &str, cpu: &str| {
        let mut container = resources(limits(memory, cpu));
        container["name"] = "c".into();
        let patch = json!({"spec": {"containers": [container]}}).to_string();
        cluster.kubectl(&["patch", "pod", "resized", "--subresource", "resize", "--patch", &patch])
    };
    for (memory, cpu) in [("128Mi", "400m"), ("96Mi", "300m")] {
        patch(memory, cpu)?;
        let wanted: u64 = memory.trim_end_matches("Mi").parse::<u64>()? << 20;
        until("the pod has its new size", || {
            let pod = cluster.get(&["pod", "resized"])?;
            let status = &pod["status"]["containerStatuses"][0];
            ensure!(status["resources"]["limits"] == limits(memory, cpu), "{status}");
            ensure!(limit()? == wanted.to_string(), "{}", limit()?);
            ensure!(status["restartCount"] == 0, "{status}");
            Ok(())
        })?;
    }
    // More than the node has is refused at once; more than is left has to wait.
    let refused = patch("900Gi", "300m").err().context("900 GiB were given")?;
    ensure!(format!("{refused:#}").contains("enough allocatable"), "{refused:#}");
    let node = cluster.get(&["node", NAME])?;
    let allocatable = node["status"]["allocatable"]["memory"].as_str().context("no memory")?;
    let all: u64 = allocatable.trim_end_matches("Ki").parse().context("the node's memory")?;
    patch(&format!("{}Ki", all - 1024), "300m")?;
    until("kubelet says that it has to wait", || {
        let pod = cluster.get(&["pod", "resized"])?;
        let conditions = pod["status"]["conditions"].as_array().context("none")?;
        let pending =
            conditions.iter().find(|one| one["type"] == "PodResizePending").context("not pending")?;
        ensure!(pending["reason"] == "Deferred", "{pending}");
        Ok(())
    })?;
    ensure!(limit()? == (96 << 20).to_string(), "{}", limit()?);
    patch("96Mi", "300m")?;
    until("nothing is pending", || {
        let pod = cluster.get(&["pod", "resized"])?;
        let conditions = pod["status"]["conditions"].as_array().context("none")?;
        let pending = conditions.iter().find(|one| one["type"] == "PodResizePending");
        ensure!(pending.is_none(), "{pending:?}");
        ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 0, "{}", pod["status"]);
        Ok(())
    })?;
    cluster.delete(&["resized"])
}

fn say_why_no_image_came(cluster: &mut Cluster) -> Result<()> {
    let images = [
        ("unreachable", format!("{UNREACHABLE}/image:1"), vec!["ErrImagePull", "ImagePullBackOff"]),
        ("unknown", "registry.k8s.io/no/such/image:1".to_owned(), vec!["ErrImagePull", "ImagePullBackOff"]),
        ("invalid", "registry.k8s.io/Not-A-Name:1".to_owned(), vec!["InvalidImageName"]),
        ("never", "registry.k8s.io/never/pulled:1".to_owned(), vec!["ErrImageNeverPull"]),
    ];
    for (name, image, _) in &images {
        let mut container = waits("c", &json!({"image": image}));
        if *name == "never" {
            container["imagePullPolicy"] = "Never".into();
        }
        cluster.apply(&Kind::Trusted.pod(name, &json!({"containers": [container]})))?;
    }
    for (name, image, reasons) in &images {
        let mut seen = Vec::new();
        until(&format!("{name} says why"), || {
            let pod = cluster.get(&["pod", name])?;
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
            let reason = waiting["reason"].as_str().unwrap_or_default().to_owned();
            if !seen.contains(&reason) {
                seen.push(reason);
            }
            ensure!(reasons.iter().any(|wanted| seen.iter().any(|seen| seen == wanted)), "{waiting}");
            ensure!(
                waiting["message"].as_str().is_some_and(|said| said.contains(image.as_str())),
                "{waiting}"
            );
            Ok(())
        })?;
    }
    cluster.delete(&images.each_ref().map(|(name, ..)| *name))
}
