//! Pod sandboxes: their life, attributes, files, namespaces, network.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    ContainerState, DnsConfig, ListPodSandboxRequest, NamespaceMode, NamespaceOption, PodSandboxFilter,
    PodSandboxState, PodSandboxStateValue, PortMapping, RunPodSandboxRequest,
};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("pods::run_stop_and_go", run_stop_and_go);
    tests.add("pods::keep_their_attributes", keep_their_attributes);
    tests.add("pods::are_filtered", are_filtered);
    tests.add("pods::of_the_same_name_are_one", of_the_same_name_are_one);
    tests.add("pods::stop_their_containers", stop_their_containers);
    tests.add("pods::have_dns_hosts_and_hostname", have_dns_hosts_and_hostname);
    tests.add("pods::have_an_address_of_their_own", have_an_address_of_their_own);
    tests.add("pods::reach_each_other", reach_each_other);
    tests.add("pods::map_host_ports", map_host_ports);
    tests.add("pods::may_use_the_hosts_network", may_use_the_hosts_network);
    tests.add("pods::share_or_separate_pid_namespaces", share_or_separate_pid_namespaces);
    tests.add("pods::reap_orphans_in_a_shared_pid_namespace", reap_orphans);
    tests.add("pods::share_ipc_and_uts", share_ipc_and_uts);
    tests.add("pods::apply_sysctls", apply_sysctls);
    tests.add("pods::with_an_unknown_handler_are_refused", unknown_handler);
    tests.add("pods::run_ten_at_once", run_ten_at_once);
}

async fn run_stop_and_go(f: &mut Fixture) -> Result<()> {
    let pod = f.pod("life").await?;
    ensure!(pod.id.len() == 64, "{}", pod.id);
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    for _ in 0..2 {
        f.cri.stop_pod(&pod.id).await?;
        ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxNotready);
    }
    for _ in 0..2 {
        f.cri.remove_pod(&pod.id).await?;
    }
    let error = f.cri.pod_status(&pod.id).await.err().context("a removed pod has a status")?;
    ensure!(error.code() == Code::NotFound, "{error:?}");
    ensure!(f.cri.pods().await?.is_empty());
    Ok(())
}

async fn keep_their_attributes(f: &mut Fixture) -> Result<()> {
    let before = now();
    let pod = f.pod("attributes").await?;
    let status = f.cri.pod_status(&pod.id).await?;
    ensure!(status.metadata == pod.config.metadata, "{status:?}");
    ensure!(status.labels == pod.config.labels && status.annotations == pod.config.annotations, "{status:?}");
    ensure!((before..=now()).contains(&status.created_at), "created_at is {}", status.created_at);
    let options = status.linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options);
    ensure!(options.as_ref().map(NamespaceOption::pid) == Some(NamespaceMode::Container), "{options:?}");
    let listed = f.cri.pods().await?;
    ensure!(listed.len() == 1 && listed[0].metadata == pod.config.metadata, "{listed:?}");
    ensure!(listed[0].labels == pod.config.labels && listed[0].created_at == status.created_at, "{listed:?}");
    Ok(())
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

async fn are_filtered(f: &mut Fixture) -> Result<()> {
    let (a, b) = (f.pod("a").await?, f.pod("b").await?);
    f.cri.stop_pod(&b.id).await?;
    let state = |state: PodSandboxState| Some(PodSandboxStateValue { state: state.into() });
    let selector = |name: &str| HashMap::from([("app".to_owned(), name.to_owned())]);
    let cases = [
        (PodSandboxFilter::default(), vec![&a.id, &b.id]),
        (PodSandboxFilter { id: a.id.clone(), ..Default::default() }, vec![&a.id]),
        // kubectl and crictl shorten ids.
        (PodSandboxFilter { id: a.id[..13].to_owned(), ..Default::default() }, vec![&a.id]),
        (PodSandboxFilter { state: state(PodSandboxState::SandboxReady), ..Default::default() }, vec![&a.id]),
        (
            PodSandboxFilter { state: state(PodSandboxState::SandboxNotready), ..Default::default() },
            vec![&b.id],
        ),
        (PodSandboxFilter { label_selector: selector("b"), ..Default::default() }, vec![&b.id]),
        (PodSandboxFilter { id: a.id.clone(), label_selector: selector("b"), ..Default::default() }, vec![]),
    ];
    for (filter, expected) in cases {
        let request = ListPodSandboxRequest { filter: Some(filter.clone()) };
        let found = f.cri.runtime.list_pod_sandbox(request).await?.into_inner().items;
        let mut found: Vec<&String> = found.iter().map(|pod| &pod.id).collect();
        let mut expected = expected;
        found.sort();
        expected.sort();
        ensure!(found == expected, "{filter:?}: {found:?}");
    }
    Ok(())
}

/// kubelet repeats a request whose answer it did not get; the second must not make a second pod.
async fn of_the_same_name_are_one(f: &mut Fixture) -> Result<()> {
    let config = f.ask_pod("same");
    let (first, second) = tokio::join!(f.cri.run_pod(&config), f.cri.run_pod(&config));
    let ids: Vec<String> = [first, second].into_iter().flatten().collect();
    ensure!(!ids.is_empty(), "neither request made a pod");
    ensure!(f.cri.pods().await?.len() == 1, "two pods of one name");
    ensure!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let mut next = config.clone();
    next.metadata.as_mut().context("no metadata")?.attempt = 1;
    ensure!(f.cri.run_pod(&next).await? != ids[0], "the next attempt is another pod");
    Ok(())
}

async fn stop_their_containers(f: &mut Fixture) -> Result<()> {
    let (pod, container) = f.running("stop", &ask::waiting("c")).await?;
    f.cri.stop_pod(&pod.id).await?;
    let status = f.cri.status(&container).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
    // The log stays until the pod is removed, and kubelet removes it itself.
    pod.log("c.log")?;
    f.cri.remove_pod(&pod.id).await?;
    let error = f.cri.status(&container).await.err().context("a container outlived its pod")?;
    ensure!(error.code() == Code::NotFound, "{error:?}");
    Ok(())
}

async fn have_dns_hosts_and_hostname(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod("files");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.96.0.10".to_owned(), "fd00::10".to_owned()],
        searches: vec!["tests.svc.cluster.local".to_owned(), "cluster.local".to_owned()],
        options: vec!["ndots:5".to_owned(), "edns0".to_owned()],
    });
    let pod = f.run(config).await?;
    let (output, code) =
        pod.script("c", "cat /etc/resolv.conf; echo --; cat /etc/hostname; hostname; cat /etc/hosts").await?;
    ensure!(code == 0, "{output}");
    let (resolv, rest) = output.split_once("--\n").context("no separator")?;
    ensure!(
        resolv
            == "search tests.svc.cluster.local cluster.local\nnameserver 10.96.0.10\nnameserver fd00::10\noptions ndots:5 edns0\n",
        "{resolv}"
    );
    ensure!(rest.starts_with("files\nfiles\n"), "{rest}");
    Ok(())
}

async fn have_an_address_of_their_own(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let (a, b) = (f.pod("a").await?, f.pod("b").await?);
    let mut addresses = Vec::new();
    for pod in [&a, &b] {
        let network = f.cri.pod_status(&pod.id).await?.network.context("no network")?;
        network.ip.parse::<std::net::Ipv4Addr>().with_context(|| format!("{network:?}"))?;
        let (output, _) =
            pod.script("ip", "ip -o addr show dev eth0; ip route; ip -o addr show dev lo").await?;
        ensure!(output.contains(&format!("{}/", network.ip)), "{network:?} is not in:\n{output}");
        ensure!(output.contains("default via "), "no default route:\n{output}");
        ensure!(output.contains("127.0.0.1/8"), "loopback is down:\n{output}");
        addresses.push(network.ip);
    }
    ensure!(addresses[0] != addresses[1], "{addresses:?}");
    f.cri.stop_pod(&a.id).await?;
    ensure!(
        f.cri.pod_status(&a.id).await?.network.is_none_or(|network| network.ip.is_empty()),
        "address after stop"
    );
    Ok(())
}

async fn reach_each_other(f: &mut Fixture) -> Result<()> {
    let server = ask::script("server", "while :; do echo answered | nc -l -p 8080; done");
    let (server, _) = f.running("server", &server).await?;
    let address = f.cri.pod_status(&server.id).await?.network.context("no network")?.ip;
    let client = f.pod("client").await?;
    let text = format!(
        "for i in $(seq 100); do nc -w 2 {address} 8080 </dev/null && exit 0; sleep 0.1; done; exit 1"
    );
    let (output, code) = client.script("client", &text).await?;
    ensure!(code == 0 && output == "answered\n", "{code}: {output}");
    Ok(())
}

async fn map_host_ports(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod("ports");
    config.port_mappings =
        vec![PortMapping { container_port: 8080, host_port: 18080, ..PortMapping::default() }];
    let pod = f.run(config).await?;
    pod.start(&ask::script("server", "while :; do echo answered | nc -l -p 8080; done")).await?;
    podvisor_tests::eventually("the host's port leads into the pod", || async {
        let mut text = String::new();
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", 18080)).await?;
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await?;
        ensure!(text == "answered\n", "{text:?}");
        Ok(())
    })
    .await?;
    f.cri.stop_pod(&pod.id).await?;
    let closed = tokio::net::TcpStream::connect(("127.0.0.1", 18080)).await;
    ensure!(closed.is_err(), "the port still leads somewhere");
    Ok(())
}

async fn may_use_the_hosts_network(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod("host-network");
    ask::pod_namespaces(&mut config).network = NamespaceMode::Node.into();
    // kubelet leaves the host name to the runtime here.
    config.hostname = String::new();
    let pod = f.run(config).await?;
    let mut container = ask::script("c", "readlink /proc/self/ns/net; hostname");
    ask::container_namespaces(&mut container).network = NamespaceMode::Node.into();
    let id = pod.start(&container).await?;
    f.cri.wait_exited(&id).await?;
    let host = fs::read_link("/proc/self/ns/net")?.display().to_string();
    let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let output = pod.log("c.log")?.stdout();
    ensure!(output == format!("{host}\n{name}"), "{output}");
    ensure!(
        f.cri.pod_status(&pod.id).await?.network.is_none_or(|network| network.ip.is_empty()),
        "an address"
    );
    Ok(())
}

async fn share_or_separate_pid_namespaces(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let host = fs::read_link("/proc/self/ns/pid")?.display().to_string();
    for (mode, name) in
        [(NamespaceMode::Container, "container"), (NamespaceMode::Pod, "pod"), (NamespaceMode::Node, "node")]
    {
        let mut config = f.ask_pod(name);
        ask::pod_namespaces(&mut config).pid = mode.into();
        let pod = f.run(config).await?;
        let mut seen = Vec::new();
        for container in ["one", "two"] {
            let mut config = ask::waiting(container);
            ask::container_namespaces(&mut config).pid = mode.into();
            let id = pod.start(&config).await?;
            seen.push(f.cri.output(&id, &["readlink", "/proc/self/ns/pid"]).await?.trim_end().to_owned());
            let first = f.cri.output(&id, &["cat", "/proc/1/comm"]).await?;
            ensure!((first == "sh\n") == (mode == NamespaceMode::Container), "{name}: PID 1 is {first}");
        }
        ensure!((seen[0] == seen[1]) == (mode != NamespaceMode::Container), "{name}: {seen:?}");
        ensure!((seen[0] == host) == (mode == NamespaceMode::Node), "{name}: {seen:?}, host {host}");
    }
    // A container may join another one's (kubectl debug --target).
    let pod = f.pod("target").await?;
    let target = pod.start(&ask::waiting("target")).await?;
    let mut config = ask::waiting("joins");
    let options = ask::container_namespaces(&mut config);
    options.pid = NamespaceMode::Target.into();
    options.target_id = target.clone();
    let joins = pod.start(&config).await?;
    let [theirs, own] = [&target, &joins];
    let link = ["readlink", "/proc/self/ns/pid"];
    ensure!(f.cri.output(theirs, &link).await? == f.cri.output(own, &link).await?);
    Ok(())
}

async fn reap_orphans(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod("orphans");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let pod = f.run(config).await?;
    let mut container = ask::script(
        "c",
        "sh -c 'sh -c \"exit 3\" & sleep 0.1' & sh -c 'sleep 0.2 &' ; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done",
    );
    ask::container_namespaces(&mut container).pid = NamespaceMode::Pod.into();
    let id = pod.start(&container).await?;
    podvisor_tests::eventually("PID 1 reaps", || async {
        let states =
            f.cri.output(&id, &["sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null | cut -d' ' -f2-4"]).await?;
        // The shell that runs `cat` may show itself; orphans are those whose parent is 1.
        ensure!(!states.lines().any(|line| line.contains(" Z 1")), "{states}");
        Ok(())
    })
    .await?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    Ok(())
}

async fn share_ipc_and_uts(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("shared").await?;
    let (one, two) = (pod.start(&ask::waiting("one")).await?, pod.start(&ask::waiting("two")).await?);
    let script =
        ["sh", "-c", "readlink /proc/self/ns/ipc /proc/self/ns/uts /proc/self/ns/net; stat -c %d /dev/shm"];
    let (first, second) = (f.cri.output(&one, &script).await?, f.cri.output(&two, &script).await?);
    ensure!(first == second, "{first}{second}");
    let host = fs::read_link("/proc/self/ns/ipc")?.display().to_string();
    ensure!(!first.contains(&host), "the host's IPC namespace");
    ensure!(
        fs::metadata("/dev/shm")?.dev().to_string() != first.lines().last().unwrap_or_default(),
        "the host's shm"
    );
    Ok(())
}

async fn apply_sysctls(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod("sysctls");
    config.linux.as_mut().context("no linux")?.sysctls = [
        ("net.ipv4.ip_local_port_range".to_owned(), "4000\t5000".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
    ]
    .into();
    let pod = f.run(config).await?;
    let text = "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced";
    let (output, _) = pod.script("c", text).await?;
    ensure!(output == "4000\t5000\n1\n", "{output}");
    Ok(())
}

async fn unknown_handler(f: &mut Fixture) -> Result<()> {
    let config = f.ask_pod("handler");
    let request = RunPodSandboxRequest { config: Some(config), runtime_handler: "kata-nope".to_owned() };
    let error = f.cri.runtime.run_pod_sandbox(request).await.err().context("a pod without a handler")?;
    for word in ["kata-nope", "runc", "crun"] {
        ensure!(error.message().contains(word), "{word} is not in: {}", error.message());
    }
    ensure!(f.cri.pods().await?.is_empty());
    for handler in ["runc", "crun"] {
        let config = f.ask_pod(handler);
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let id = f.cri.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        ensure!(f.cri.pod_status(&id).await?.runtime_handler == handler);
    }
    Ok(())
}

async fn run_ten_at_once(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let f: &Fixture = f;
    let runs = (0..10).map(|number| async move {
        let pod = f.pod(&format!("p{number}")).await?;
        let container = pod.start(&ask::waiting("c")).await?;
        let output = f.cri.output(&container, &["hostname"]).await?;
        ensure!(output == format!("p{number}\n"), "{output}");
        Ok(f.cri.pod_status(&pod.id).await?.network.context("no network")?.ip)
    });
    let mut addresses = futures_util::future::try_join_all(runs).await?;
    addresses.sort();
    addresses.dedup();
    ensure!(addresses.len() == 10, "{addresses:?}");
    let stops = f.cri.pods().await?.into_iter().map(|pod| async move { f.cri.stop_pod(&pod.id).await });
    futures_util::future::try_join_all(stops).await?;
    Ok(())
}
