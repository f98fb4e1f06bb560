//! NRI: plugins see every hook in its order, change what is created and what runs, and hold up nobody when they fail.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::Options;
use podvisor_proto::cri::{
    LinuxContainerResources, UpdateContainerResourcesRequest, UpdatePodSandboxResourcesRequest,
};
use podvisor_proto::nri::{ContainerEviction, UpdateContainersRequest};
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::nri::Plugin;
use podvisor_tests::nri_peer::{Peer, frame};
use podvisor_tests::{Fixture, ask, eventually};
use prost::Message;
use serde_json::{Value, json};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("nri::every_hook_comes_in_its_order", every_hook_in_order);
    tests.add("nri::hooks_come_also_for_what_fails", hooks_for_what_fails);
    tests.add("nri::plugins_adjust_what_is_created", adjust_what_is_created);
    tests.add("nri::a_plugin_moves_a_container_to_another_cgroup", another_cgroup);
    tests.add("nri::plugins_update_what_exists", update_what_exists);
    tests.add("nri::plugins_that_contradict_each_other_are_refused", contradiction);
    tests.add("nri::a_validator_has_the_last_word", validator);
    tests.add("nri::a_hook_that_fails_undoes_everything", a_hook_fails);
    tests.add_with("nri::a_plugin_that_hangs_is_dropped", impatient(), a_plugin_hangs);
    tests.add("nri::a_plugin_that_dies_is_dropped", a_plugin_dies);
    tests.add("nri::who_joins_late_hears_of_everything_once", join_late);
    tests.add("nri::plugins_of_the_directory_start_with_the_daemon", started_plugins);
    tests.add("nri::plugins_come_back_after_a_restart", restart);
    tests.add("nri::a_plugin_evicts_a_container", evict);
    tests.add_with("nri::bytes_that_are_no_plugin_do_no_harm", impatient(), hostile);
    tests.add_with("nri::can_be_switched_off", off(), switched_off);
}

fn impatient() -> Options {
    Options { nri: "registration_timeout = 60\nrequest_timeout = 1\n".to_owned(), ..Options::default() }
}

fn off() -> Options {
    Options { nri: "enabled = false\n".to_owned(), ..Options::default() }
}

const POD: [&str; 3] = ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"];

async fn remove(f: &Fixture, pod: &Pod) -> Result<()> {
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    Ok(())
}

async fn resize(f: &Fixture, container: &str, linux: LinuxContainerResources) -> Result<()> {
    let container_id = container.to_owned();
    let request = UpdateContainerResourcesRequest { container_id, linux: Some(linux), ..Default::default() };
    f.cri.runtime.clone().update_container_resources(request).await?;
    Ok(())
}

async fn every_hook_in_order(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let first = Plugin::connect(f, "10-first", json!([])).await?;
    let second = Plugin::connect(f, "20-second", json!([])).await?;
    let pod = f.pod("ordered").await?;
    let id = pod.start(&ask::waiting("c")).await?;
    resize(f, &id, LinuxContainerResources { cpu_shares: 512, ..Default::default() }).await?;
    f.cri.stop(&id, 10).await?;
    f.cri.remove(&id).await?;
    // One that ends by itself, and is removed with its pod.
    let brief = pod.start(&ask::script("brief", "exit 3")).await?;
    f.cri.wait_exited(&brief).await?;
    second.wait_for("StopContainer", 2).await?;
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(LinuxContainerResources { cpu_shares: 256, ..Default::default() }),
    };
    f.cri.runtime.clone().update_pod_sandbox_resources(request).await?;
    let seen = &first.last("UpdatePodSandbox", "ordered")?["resources"];
    ensure!(seen["cpu"]["shares"]["value"] == json!("256"), "{seen}");
    let seen = &first.last("PostUpdatePodSandbox", "ordered")?["podDetails"]["linux"]["podResources"];
    ensure!(seen["cpu"]["shares"]["value"] == json!("256"), "{seen}");
    remove(f, &pod).await?;
    for plugin in [&first, &second] {
        let hooks = plugin.hooks("ordered", "")?;
        let wanted = [
            "RunPodSandbox",
            "UpdatePodSandbox",
            "PostUpdatePodSandbox",
            "StopPodSandbox",
            "RemovePodSandbox",
        ];
        ensure!(hooks == wanted, "{hooks:?}");
        let hooks = plugin.hooks("ordered", "c")?;
        let wanted = [
            "CreateContainer",
            "PostCreateContainer",
            "StartContainer",
            "PostStartContainer",
            "UpdateContainer",
            "PostUpdateContainer",
            "StopContainer",
            "RemoveContainer",
        ];
        ensure!(hooks == wanted, "{hooks:?}");
        let hooks = plugin.hooks("ordered", "brief")?;
        let wanted = [
            "CreateContainer",
            "PostCreateContainer",
            "StartContainer",
            "PostStartContainer",
            "StopContainer",
            "RemoveContainer",
        ];
        ensure!(hooks == wanted, "{hooks:?}");
        // The pod's end comes after that of its containers.
        let all: Vec<Value> = plugin.lines()?;
        let place = |event: &str| all.iter().rposition(|line| line["event"] == json!(event));
        ensure!(place("StopContainer") < place("StopPodSandbox"), "{all:?}");
        ensure!(place("RemoveContainer") < place("RemovePodSandbox"), "{all:?}");
    }
    let seen = &first.last("RunPodSandbox", "ordered")?["podDetails"];
    ensure!(seen["namespace"] == json!("tests") && seen["labels"]["app"] == json!("ordered"), "{seen}");
    ensure!(seen["ips"].as_array().is_some_and(|ips| !ips.is_empty()), "{seen}");
    ensure!(seen["linux"]["namespaces"][0]["type"] == json!("network"), "{seen}");
    let seen = &first.last("PostStartContainer", "c")?["containerDetails"];
    ensure!(seen["state"] == json!("CONTAINER_RUNNING") && seen["pid"].as_u64() > Some(1), "{seen}");
    ensure!(seen["args"][0] == json!("sh") && seen["labels"]["container"] == json!("c"), "{seen}");
    let seen = &first.last("PostUpdateContainer", "c")?["containerDetails"]["linux"]["resources"];
    ensure!(seen["cpu"]["shares"]["value"] == json!("512"), "{seen}");
    let seen = &first.last("StopContainer", "brief")?["containerDetails"];
    ensure!(seen["state"] == json!("CONTAINER_STOPPED") && seen["exitCode"] == json!(3), "{seen}");
    Ok(())
}

async fn hooks_for_what_fails(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let plugin = Plugin::connect(f, "10-a", json!([])).await?;
    let pod = f.pod("failing").await?;
    // runc refuses to create it.
    ensure!(pod.create(&ask::container("absent", &["/does/not/exist"])).await.is_err());
    plugin
        .wait_for_hooks("failing", "absent", &["CreateContainer", "StopContainer", "RemoveContainer"])
        .await?;
    // Refused before anything is made.
    let mut config = ask::waiting("never");
    config.image.get_or_insert_default().image = "registry.invalid/none:1".to_owned();
    ensure!(pod.create(&config).await.is_err());
    ensure!(plugin.hooks("failing", "never")?.is_empty());
    // Removed while it runs, without a stop.
    pod.start(&ask::waiting("killed")).await?;
    remove(f, &pod).await?;
    let hooks = plugin.hooks("failing", "killed")?;
    ensure!(hooks[hooks.len() - 2..] == ["StopContainer", "RemoveContainer"], "{hooks:?}");
    Ok(())
}

async fn adjust_what_is_created(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let shared = f.node.path("shared");
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("file"), "from the plugin\n")?;
    let marker = f.node.path("hook-ran");
    let hook = f.node.path("hook.sh");
    fs::write(&hook, format!("#!/bin/sh\ncat > {}\n", marker.display()))?;
    fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let devices = f.node.path("cdi");
    fs::create_dir_all(&devices)?;
    let device = json!({
        "cdiVersion": "0.6.0", "kind": "plugin.test/thing",
        "devices": [{ "name": "one", "containerEdits": { "env": ["FROM_CDI=yes"] } }]
    });
    fs::write(devices.join("thing.json"), device.to_string())?;
    fs::create_dir_all(f.node.path("config.toml.d"))?;
    fs::write(
        f.node.path("config.toml.d/cdi.toml"),
        format!("[runtime]\ncdi_spec_dirs = [\"{}\"]\n", devices.display()),
    )?;
    f.stop()?;
    f.start()?;
    let adjust = json!({
        "CDIDevices": [{ "name": "plugin.test/thing=one" }],
        "annotations": { "from.plugin/a": "1", "-example.invalid/restarts": "" },
        "env": [{ "key": "FROM_PLUGIN", "value": "yes" }, { "key": "-TAKEN" }, { "key": "KEPT", "value": "changed" }],
        "mounts": [{ "destination": "/shared", "type": "bind", "source": shared, "options": ["rbind", "ro"] }],
        "hooks": { "createRuntime": [{ "path": hook, "args": ["hook.sh"] }] },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": "123", "soft": "77" }],
        "linux": {
            "devices": [{ "path": "/dev/plugged", "type": "c", "major": "1", "minor": "5", "fileMode": { "value": 438 } }],
            "oomScoreAdj": { "value": "555" },
            "resources": { "memory": { "limit": { "value": "67108864" } }, "pids": { "limit": "99" } },
            "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 6 },
            "seccompPolicy": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": { "value": 13 } }]
            },
            "namespaces": [{ "type": "ipc" }],
            "sysctl": { "kernel.shm_rmid_forced": "1" },
            "scheduler": { "policy": "SCHED_BATCH" }
        }
    });
    let rules = json!([
        { "event": "CreateContainer", "of": "adjusted", "do": "adjust", "adjust": adjust },
        { "event": "CreateContainer", "of": "args", "do": "adjust", "adjust": { "args": ["sh", "-c", "echo other"] } }
    ]);
    let _plugin = Plugin::connect(f, "10-a", rules).await?;
    let later = Plugin::connect(f, "20-b", json!([])).await?;
    let pod = f.pod("adjusted").await?;
    let mut config = ask::waiting("adjusted");
    for (key, value) in [("TAKEN", "1"), ("KEPT", "original")] {
        config.envs.push(podvisor_proto::cri::KeyValue { key: key.into(), value: value.into() });
    }
    let id = pod.start(&config).await?;
    let output = async |command: &str| f.cri.output(&id, &["sh", "-c", command]).await;
    // The environment of PID 1, not that of exec.
    let environment = output("tr '\\0' '\\n' < /proc/1/environ").await?;
    ensure!(environment.contains("FROM_PLUGIN=yes") && environment.contains("KEPT=changed"), "{environment}");
    ensure!(environment.contains("FROM_CDI=yes"), "{environment}");
    ensure!(!environment.contains("TAKEN"), "{environment}");
    ensure!(output("cat /shared/file").await? == "from the plugin\n");
    ensure!(output("touch /shared/x 2>&1 || true").await?.contains("Read-only"));
    let limits = output("grep 'open files' /proc/1/limits").await?;
    ensure!(limits.split_whitespace().any(|n| n == "77") && limits.contains("123"), "{limits}");
    ensure!(output("head -c 4 /dev/plugged | od -An -tx1").await?.trim() == "00 00 00 00");
    ensure!(output("cat /proc/1/oom_score_adj").await?.trim() == "555");
    ensure!(output("mkdir /tmp/x 2>&1 || true").await?.contains("Permission denied"));
    ensure!(output("cat /proc/sys/kernel/shm_rmid_forced").await?.trim() == "1");
    // Field 41 of stat(5) is the scheduling policy, 3 is batch.
    ensure!(output("cut -d' ' -f41 /proc/1/stat").await?.trim() == "3");
    let limits = eventually("the status has the limits", || async {
        let status = f.cri.status(&id).await?;
        status.resources.and_then(|resources| resources.linux).context("resources")
    })
    .await?;
    ensure!(limits.memory_limit_in_bytes == 64 << 20, "{limits:?}");
    let state: Value = serde_json::from_slice(&fs::read(&marker)?)?;
    ensure!(state["annotations"]["from.plugin/a"] == json!("1"), "{state}");
    ensure!(state["annotations"]["example.invalid/restarts"].is_null(), "{state}");
    // The next plugin was shown all of it.
    let seen = &later.last("CreateContainer", "adjusted")?["containerDetails"];
    ensure!(seen["env"].as_array().is_some_and(|env| env.contains(&json!("FROM_PLUGIN=yes"))), "{seen}");
    ensure!(seen["linux"]["resources"]["pids"]["limit"] == json!("99"), "{seen}");
    let (out, _) = pod.script("args", "echo mine").await?;
    ensure!(out == "other\n", "{out}");
    Ok(())
}

async fn another_cgroup(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let path = format!("{}/elsewhere", ask::CGROUPS);
    let rule = |of: &str, path: &str| json!({ "event": "CreateContainer", "of": of, "do": "adjust", "adjust": { "linux": { "cgroupsPath": path } } });
    let _plugin = Plugin::connect(f, "10-a", json!([rule("c", &path), rule("bad", "/a/../../b")])).await?;
    let pod = f.pod("moved").await?;
    let id = pod.start(&ask::waiting("c")).await?;
    let cgroups = f.cri.output(&id, &["cat", "/proc/1/cgroup"]).await?;
    ensure!(cgroups.contains("/elsewhere") || cgroups.lines().all(|line| line.ends_with(":/")), "{cgroups}");
    ensure!(pod.create(&ask::waiting("bad")).await.is_err(), "a path out of the hierarchy");
    f.kill()?;
    f.start()?;
    // That the cgroup goes with the container is looked at in the end.
    remove(f, &pod).await
}

fn memory(bytes: u64) -> Value {
    json!({ "memory": { "limit": { "value": bytes.to_string() } } })
}

async fn limit_of(f: &Fixture, container: &str) -> Result<i64> {
    let status = f.cri.status(container).await?;
    let linux = status.resources.and_then(|resources| resources.linux).context("resources")?;
    Ok(linux.memory_limit_in_bytes)
}

async fn update_what_exists(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let update = |event: &str, of: &str, target: &str, bytes| json!({ "event": event, "of": of, "do": "update", "update": [{ "container": target, "resources": memory(bytes) }] });
    let rules = json!([
        update("CreateContainer", "second", "first", 30 << 20),
        update("UpdateContainer", "second", "second", 40 << 20),
        update("StopContainer", "second", "first", 50 << 20),
        { "event": "CreateContainer", "of": "third", "do": "update",
          "update": [{ "container": "nobody", "resources": memory(1 << 20) }] },
        { "event": "CreateContainer", "of": "fourth", "do": "update",
          "update": [{ "container": "nobody", "resources": memory(1 << 20), "mayFail": true }] }
    ]);
    let mut plugin = Plugin::connect(f, "10-a", rules).await?;
    let pod = f.pod("updated").await?;
    let mut limited = ask::waiting("first");
    ask::resources(&mut limited).memory_limit_in_bytes = 20 << 20;
    let first = pod.start(&limited).await?;
    // By the creation of another.
    let second = pod.start(&ask::waiting("second")).await?;
    ensure!(limit_of(f, &first).await? == 30 << 20);
    // Of what kubelet asks for.
    resize(f, &second, LinuxContainerResources { memory_limit_in_bytes: 25 << 20, ..Default::default() })
        .await?;
    ensure!(limit_of(f, &second).await? == 40 << 20);
    // By the end of another.
    f.cri.stop(&second, 10).await?;
    ensure!(limit_of(f, &first).await? == 50 << 20);
    // Unsolicited.
    let outcome = plugin.ask(json!([{ "container": "first", "resources": memory(60 << 20) }])).await?;
    ensure!(outcome["error"].is_null(), "{outcome}");
    ensure!(limit_of(f, &first).await? == 60 << 20);
    let outcome = plugin.ask(json!([{ "container": "nobody", "resources": memory(1 << 20) }])).await?;
    ensure!(outcome["error"].as_str().is_some_and(|error| error.contains("nobody")), "{outcome}");
    // What must not fail fails the creation; what may does not.
    let refused = pod.create(&ask::waiting("third")).await.unwrap_err();
    ensure!(format!("{refused:#}").contains("nobody"), "{refused:#}");
    pod.create(&ask::waiting("fourth")).await?;
    Ok(())
}

fn sets(value: &str) -> Value {
    json!([{ "event": "CreateContainer", "of": "c", "do": "adjust", "adjust": { "env": [{ "key": "X", "value": value }] } }])
}

async fn contradiction(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let _first = Plugin::connect(f, "10-a", sets("1")).await?;
    let mut second = Plugin::connect(f, "20-b", sets("2")).await?;
    let pod = f.pod("contradicted").await?;
    let refused = pod.create(&ask::waiting("c")).await.unwrap_err();
    let text = format!("{refused:#}");
    ensure!(text.contains("10-a") && text.contains("20-b") && text.contains("Env"), "{text}");
    ensure!(f.cri.containers().await?.is_empty());
    second.end();
    eventually("the same container is made without the second", || async {
        pod.create(&ask::waiting("c")).await.map(drop)
    })
    .await
}

async fn validator(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let _adjusts = Plugin::connect(f, "10-a", sets("1")).await?;
    let rules = json!([{ "event": "ValidateContainerAdjustment", "of": "c", "do": "fail" }]);
    let validator = Plugin::launch(f, "20-v", rules, &["-validate"])?;
    validator.wait_for("Synchronize", 1).await?;
    let pod = f.pod("validated").await?;
    let refused = pod.create(&ask::waiting("c")).await.unwrap_err();
    ensure!(format!("{refused:#}").contains("20-v"), "{refused:#}");
    let seen = validator.last("ValidateContainerAdjustment", "c")?;
    ensure!(seen["adjust"]["env"][0]["key"] == json!("X"), "{seen}");
    ensure!(seen["owners"].to_string().contains("10-a"), "{seen}");
    pod.create(&ask::waiting("other")).await?;
    Ok(())
}

async fn a_hook_fails(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let first = Plugin::connect(f, "10-a", json!([])).await?;
    let rules = json!([
        { "event": "RunPodSandbox", "of": "refused", "do": "fail" },
        { "event": "CreateContainer", "of": "create", "do": "fail" },
        { "event": "StartContainer", "of": "start", "do": "fail" }
    ]);
    let mut second = Plugin::connect(f, "20-b", rules).await?;
    let config = f.ask_pod("refused");
    let refused = f.run(config.clone()).await.unwrap_err();
    let status = refused.downcast_ref::<tonic::Status>().context("a status")?;
    ensure!(status.code() == Code::FailedPrecondition && status.message().contains("20-b"), "{status:?}");
    ensure!(f.cri.pods().await?.is_empty());
    // Who had agreed hears that it came to nothing.
    first.wait_for_hooks("refused", "", &POD).await?;

    let pod = f.pod("accepted").await?;
    ensure!(pod.create(&ask::waiting("create")).await.is_err());
    ensure!(f.cri.containers().await?.is_empty());
    let undone = ["CreateContainer", "StopContainer", "RemoveContainer"];
    first.wait_for_hooks("accepted", "create", &undone).await?;
    let id = pod.create(&ask::waiting("start")).await?;
    ensure!(f.cri.start(&id).await.is_err());
    let status = f.cri.wait_exited(&id).await?;
    ensure!(status.reason == "StartError" && status.exit_code == 128, "{status:?}");
    f.cri.remove(&id).await?;

    // The same names are free.
    second.end();
    eventually("the plugin is gone", || async { f.run(config.clone()).await.map(drop) }).await?;
    for name in ["create", "start"] {
        pod.start(&ask::waiting(name)).await?;
    }
    Ok(())
}

async fn a_plugin_hangs(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let rules = json!([{ "event": "CreateContainer", "of": "c", "do": "hang" }]);
    let hanging = Plugin::connect(f, "10-hangs", rules).await?;
    let mut other = Plugin::connect(f, "20-other", json!([])).await?;
    let pod = f.pod("waiting").await?;
    // Lists do not wait for it, and show nothing of what is being made.
    let config = ask::waiting("c");
    let (id, seen) = tokio::join!(pod.create(&config), async {
        hanging.wait_for("CreateContainer", 1).await?;
        let containers = f.cri.containers().await?;
        f.cri.pod_status(&pod.id).await?;
        anyhow::Ok(containers)
    });
    let id = id?;
    ensure!(seen?.is_empty(), "a container is visible before plugins have agreed");
    f.cri.start(&id).await?;
    ensure!(hanging.hooks("waiting", "c")? == ["CreateContainer"], "it is called again");
    let hooks = other.hooks("waiting", "c")?;
    ensure!(hooks.len() == 4, "the other one goes on: {hooks:?}");
    other.end();
    Ok(())
}

async fn a_plugin_dies(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let events = ["RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "RemovePodSandbox"];
    for event in events {
        let rules = json!([{ "event": event, "of": "*", "do": "die" }]);
        let _dying = Plugin::connect(f, "10-dies", rules).await?;
        let (pod, _) = f.running("survivor", &ask::waiting("c")).await.with_context(|| event.to_owned())?;
        remove(f, &pod).await.with_context(|| event.to_owned())?;
        fs::remove_file(f.node.path("nri/10-dies.log"))?;
    }
    Ok(())
}

async fn join_late(f: &mut Fixture) -> Result<()> {
    const PODS: usize = 12;
    f.cri.pull(BUSYBOX).await?;
    let (old, old_container) = f.running("old", &ask::waiting("old-container")).await?;
    let gone = f.pod("gone").await?;
    remove(f, &gone).await?;
    // Pods come, while plugins join.
    let plugins = async {
        let mut plugins = Vec::new();
        for number in 0..6 {
            plugins.push(Plugin::connect(f, &format!("1{number}-late"), json!([])).await?);
        }
        anyhow::Ok(plugins)
    };
    let pods = async {
        let mut made = Vec::new();
        for number in 0..PODS {
            let name = format!("new-{number}");
            let pod = f.pod(&name).await?;
            pod.start(&ask::waiting(&format!("{name}-container"))).await?;
            made.push(pod);
        }
        anyhow::Ok(made)
    };
    let (plugins, made) = tokio::join!(plugins, pods);
    let (plugins, _made) = (plugins?, made?);
    for plugin in &plugins {
        let lines = plugin.lines()?;
        let names = |events: [&str; 2], key: &str| -> Vec<String> {
            let told = lines.iter().filter(|line| events.iter().any(|event| line["event"] == json!(event)));
            told.filter_map(|line| line[key].as_str().map(str::to_owned)).collect()
        };
        let pods = names(["HasPod", "RunPodSandbox"], "pod");
        let containers = names(["HasContainer", "CreateContainer"], "container");
        let wanted: BTreeSet<String> =
            (0..PODS).map(|number| format!("new-{number}")).chain(["old".to_owned()]).collect();
        ensure!(
            pods.len() == PODS + 1 && pods.iter().cloned().collect::<BTreeSet<_>>() == wanted,
            "{pods:?}"
        );
        let wanted: BTreeSet<String> = wanted.iter().map(|pod| format!("{pod}-container")).collect();
        ensure!(
            containers.len() == PODS + 1 && containers.iter().cloned().collect::<BTreeSet<_>>() == wanted,
            "{containers:?}"
        );
    }
    let seen = &plugins[0].last("HasContainer", "old-container")?["containerDetails"];
    ensure!(seen["id"] == json!(old_container) && seen["state"] == json!("CONTAINER_RUNNING"), "{seen}");
    ensure!(seen["args"][0] == json!("sh") && seen["podSandboxId"] == json!(old.id), "{seen}");
    Ok(())
}

async fn started_plugins(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    f.stop()?;
    let plugin = Plugin::install(f, "10-own", sets("own"))?;
    let broken = f.node.path("nri/plugins/20-broken");
    fs::write(&broken, "#!/bin/sh\nexit 1\n")?;
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    fs::write(f.node.path("nri/plugins/30-text"), "not executable")?;
    f.start()?;
    // The first pod finds it there already.
    let pod = f.pod("first").await?;
    let (out, _) = pod.script("c", "echo $X").await?;
    ensure!(out == "own\n", "{out}");
    ensure!(plugin.hooks("first", "")? == ["RunPodSandbox"]);
    remove(f, &pod).await?;
    f.stop()?;
    plugin.wait_for("Shutdown", 1).await?;
    f.start()
}

async fn restart(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let plugin = Plugin::launch(f, "10-a", json!([]), &["-again"])?;
    plugin.wait_for("Synchronize", 1).await?;
    let (pod, id) = f.running("lasting", &ask::waiting("c")).await?;
    f.kill()?;
    f.start()?;
    plugin.wait_for("Synchronize", 2).await?;
    let seen = &plugin.last("HasContainer", "c")?["containerDetails"];
    ensure!(seen["id"] == json!(id) && seen["state"] == json!("CONTAINER_RUNNING"), "{seen}");
    let seen = &plugin.last("HasPod", "lasting")?["podDetails"];
    ensure!(seen["id"] == json!(pod.id), "{seen}");
    remove(f, &pod).await?;
    let hooks = plugin.hooks("lasting", "c")?;
    ensure!(hooks[hooks.len() - 2..] == ["StopContainer", "RemoveContainer"], "{hooks:?}");
    Ok(())
}

/// The client library has no call for it.
async fn evict(f: &mut Fixture) -> Result<()> {
    let script = "trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait; done";
    let (pod, id) = f.running("evicted", &ask::script("c", script)).await?;
    eventually("it can be told to end", || async {
        ensure!(pod.log("c.log")?.stdout() == "ready\n");
        Ok(())
    })
    .await?;
    let socket = f.node.path("nri/nri.sock");
    let evict = |container_id: &str| {
        let evict = vec![ContainerEviction { container_id: container_id.into(), reason: "no room".into() }];
        UpdateContainersRequest { evict, ..Default::default() }.encode_to_vec()
    };
    // Of event 1 only: nothing is asked of it below.
    let mut peer = Peer::join(&socket, "10", 1)?;
    let answer = peer.call("UpdateContainers", &evict(&id))?;
    ensure!(answer.status.unwrap_or_default().code == 0);
    let status = f.cri.wait_exited(&id).await?;
    ensure!(status.exit_code == 0, "its process had time to end: {status:?}");
    let answer = peer.call("NoSuchMethod", &[])?;
    ensure!(answer.status.unwrap_or_default().code == 12);
    let answer = peer.call("UpdateContainers", &[0xff])?;
    ensure!(answer.status.unwrap_or_default().code == 3);
    Ok(())
}

async fn hostile(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let socket = f.node.path("nri/nri.sock");
    let closing: [(&str, Vec<u8>); 7] = [
        ("no such connection", [7_u32, 4, 0].iter().flat_map(|n| n.to_be_bytes()).collect()),
        ("a frame of 4 GiB", [1_u32, u32::MAX].iter().flat_map(|n| n.to_be_bytes()).collect()),
        ("a message of 4 GiB", {
            let mut bytes: Vec<u8> = [2_u32, 10, u32::MAX, 1].iter().flat_map(|n| n.to_be_bytes()).collect();
            bytes.extend([1, 0]);
            bytes
        }),
        ("a message of another type", frame(&(2, 1, 3, vec![]))),
        ("a request on the wrong connection", frame(&(1, 1, 1, vec![]))),
        ("a request that is none", frame(&(2, 1, 1, vec![0xff; 9]))),
        ("an answer that is none", frame(&(1, 1, 2, vec![0xff; 9]))),
    ];
    for (what, bytes) in closing {
        // Before it has registered, and as a plugin.
        let mut stranger = Peer::connect(&socket)?;
        stranger.send(&bytes)?;
        ensure!(stranger.is_closed(), "{what}");
        let mut plugin = Peer::join(&socket, "10", 0)?;
        plugin.send(&bytes)?;
        ensure!(plugin.is_closed(), "{what}");
    }
    ensure!(Peer::join(&socket, "1x", 0).is_err(), "an index that is none");
    ensure!(Peer::join(&socket, "10", 1 << 20).is_err(), "an event that does not exist");
    let mut twice = Peer::join(&socket, "10", 0)?;
    let again = twice.call("RegisterPlugin", &[])?;
    ensure!(again.status.unwrap_or_default().code == 3, "registered twice");
    drop(twice);
    // Answers to nothing, more calls than may be in flight, a plugin that reads nothing, and many that say nothing.
    let mut odd = Peer::join(&socket, "11", 0)?;
    odd.send(&frame(&(1, 99, 2, vec![])))?;
    let mut busy = Peer::join(&socket, "12", 0)?;
    for _ in 0..200 {
        // It may have been thrown out.
        let _ = busy.send_call("UpdateContainers", &[]);
    }
    let deaf = Peer::join(&socket, "13", 0)?;
    let silent: Vec<_> = (0..20).map(|_| Peer::connect(&socket)).collect::<Result<_>>()?;
    let (pod, _) = f.running("unharmed", &ask::waiting("c")).await?;
    remove(f, &pod).await?;
    drop((odd, busy, deaf, silent));
    let plugin = Plugin::connect(f, "20-good", json!([])).await?;
    let (pod, _) = f.running("served", &ask::waiting("c")).await?;
    ensure!(plugin.hooks("served", "c")?.len() == 4);
    remove(f, &pod).await
}

async fn switched_off(f: &mut Fixture) -> Result<()> {
    ensure!(!f.node.path("nri/nri.sock").exists());
    f.running("alone", &ask::waiting("c")).await?;
    Ok(())
}
