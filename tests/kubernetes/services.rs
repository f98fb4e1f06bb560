//! Pods of both kinds behind Services: each reaches every other by address and by name, over TCP and UDP.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings, is_ready, name};
use crate::images::AGNHOST;
use crate::machine::ADDRESS;
use crate::pods::{UNTRUSTED, host_kernel, pod, serving};
use crate::runtime::is_peer;
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let usual = Settings::default();
    tests.add_for_all("services::join_three_pods_of_both_kinds", &usual, |cluster| join(cluster, 2, 1));
    tests.add_for_all("services::join_ten_pods_of_both_kinds", &usual, |cluster| join(cluster, 5, 5));
    tests.add_for_all("services::outlive_kube_proxy", &usual, outlive_kube_proxy);
}

fn deployment(name: &str, replicas: usize, annotations: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "echo", "kind": name}},
            "template": {
                "metadata": {"labels": {"app": "echo", "kind": name}, "annotations": annotations},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "c", "image": AGNHOST, "args": ["netexec"],
                        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}},
                    }],
                },
            },
        },
    })
}

pub(crate) fn service(name: &str, more: &Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {
            "selector": {"app": "echo"},
            "ports": [
                {"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"},
                {"name": "udp", "port": 81, "targetPort": 8081, "protocol": "UDP"},
            ],
        },
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        service["spec"][key] = value.clone();
    }
    service
}

/// A pod of the Deployments.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) address: String,
}

fn join(cluster: &mut Cluster, trusted: usize, machines: usize) -> Result<()> {
    cluster.apply(&deployment("trusted", trusted, &json!({})))?;
    // Where there are no machines, all are trusted.
    let annotations = if is_peer() { json!({}) } else { json!({UNTRUSTED: "true"}) };
    cluster.apply(&deployment("machines", machines, &annotations))?;
    cluster.apply(&service("echo", &json!({"type": "NodePort"})))?;
    cluster.apply(&service("headless", &json!({"clusterIP": "None"})))?;
    let peers = until("all replicas are ready", || ready_peers(cluster, trusted + machines))?;
    if !is_peer() {
        let host = host_kernel();
        let kernels: Vec<String> = peers.iter().map(|p| cluster.kernel(&p.name)).collect::<Result<_>>()?;
        let own = kernels.iter().filter(|kernel| **kernel != host).count();
        ensure!(own == machines, "{own} pods of {machines} have a kernel of their own");
    }
    let echo = cluster.get(&["service", "echo"])?;
    let cluster_address = echo["spec"]["clusterIP"].as_str().context("no address")?;
    let all: BTreeSet<String> = peers.iter().map(|peer| peer.name.clone()).collect();
    for peer in &peers {
        for other in &peers {
            // CoreDNS knows every pod by its address.
            let by_name = format!("{}.default.pod.cluster.local", other.address.replace('.', "-"));
            for target in [&other.address, &by_name] {
                let (http, udp) = (
                    dial(cluster, peer, target, "http", 8080, 1)?,
                    dial(cluster, peer, target, "udp", 8081, 1)?,
                );
                let wanted = BTreeSet::from([other.name.clone()]);
                ensure!(
                    http == wanted && udp == wanted,
                    "{peer:?} to {target} ({other:?}): {http:?} {udp:?}"
                );
            }
        }
        // Every replica answers sooner or later, the pod itself among them (hairpin).
        for target in [cluster_address, "echo", "echo.default.svc.cluster.local", "headless"] {
            let (http, udp) = if target == "headless" { (8080, 8081) } else { (80, 81) };
            until(&format!("{} reaches all behind {target}", peer.name), || {
                let answered = dial(cluster, peer, target, "http", http, 40)?;
                // A name with many addresses: the first is taken, in an order that the name server changes.
                ensure!(answered == all || target == "headless" && !answered.is_empty(), "{answered:?}");
                ensure!(!dial(cluster, peer, target, "udp", udp, 5)?.is_empty(), "no answer over UDP");
                Ok(())
            })?;
        }
    }
    let port = echo["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")?;
    let mut answered = BTreeSet::new();
    until("every replica answers at the node's port", || {
        answered.insert(get(ADDRESS, u16::try_from(port)?, "/hostname")?);
        ensure!(answered == all, "{answered:?}");
        Ok(())
    })?;
    cluster.kubectl(&[
        "delete",
        "deployment/trusted",
        "deployment/machines",
        "service/echo",
        "service/headless",
    ])?;
    until("the pods are gone", || {
        let left = cluster.get(&["pods", "--selector", "app=echo"])?;
        ensure!(left["items"].as_array().is_some_and(Vec::is_empty), "they are not");
        Ok(())
    })
}

/// kube-proxy starts again, by itself or as another pod: Services of before go on, and those that come meanwhile follow.
fn outlive_kube_proxy(cluster: &mut Cluster) -> Result<()> {
    let mut behind = serving(pod("behind"));
    behind["metadata"]["labels"]["app"] = "echo".into();
    cluster.run(&[behind])?;
    let mut services = vec!["before".to_owned()];
    cluster.apply(&service("before", &json!({})))?;
    until("the API server's Service answers", || api_answers(cluster))?;
    for turn in 0..8 {
        let (pod, container) = kube_proxy(cluster)?;
        // kubelet lets one that ends again and again wait.
        if turn == 0 {
            cluster.crictl(&["stop", "--timeout", "0", &container])?;
        } else {
            cluster.kubectl(&["delete", "pod", "--namespace", "kube-system", &pod])?;
        }
        let meanwhile = format!("meanwhile-{turn}");
        cluster.apply(&service(&meanwhile, &json!({})))?;
        until("another kube-proxy runs", || {
            let (_, now) = kube_proxy(cluster)?;
            ensure!(now != container, "{now} is the one of before");
            Ok(())
        })?;
        // It has made rules when this answers, and then there must be those of all others.
        until("the new Service answers", || answers(cluster, &meanwhile))?;
        services.push(meanwhile);
        for service in &services {
            answers(cluster, service).with_context(|| format!("turn {turn}"))?;
        }
        api_answers(cluster).with_context(|| format!("turn {turn}"))?;
    }
    for service in &services {
        cluster.kubectl(&["delete", "service", service])?;
    }
    cluster.delete(&["behind"])
}

/// kube-proxy's pod, and the id of the container that runs in it.
fn kube_proxy(cluster: &Cluster) -> Result<(String, String)> {
    let pods = cluster.get(&["pods", "--namespace", "kube-system", "--selector", "k8s-app=kube-proxy"])?;
    let pods = pods["items"].as_array().context("no pods")?;
    ensure!(
        pods.len() == 1 && is_ready(&pods[0]),
        "{} pods of kube-proxy, or one that is not ready",
        pods.len()
    );
    let id = pods[0]["status"]["containerStatuses"][0]["containerID"].as_str().context("no container")?;
    Ok((name(&pods[0]).to_owned(), id.rsplit('/').next().unwrap_or(id).to_owned()))
}

fn api_answers(cluster: &Cluster) -> Result<()> {
    let api = cluster.get(&["service", "kubernetes"])?;
    let api = api["spec"]["clusterIP"].as_str().context("no address")?;
    TcpStream::connect((api, 443)).map(drop).context("the API server's Service")
}

/// Asks a Service from the node.
fn answers(cluster: &Cluster, service: &str) -> Result<()> {
    let object = cluster.get(&["service", service])?;
    let address = object["spec"]["clusterIP"].as_str().context("no address")?;
    let said = get(address, 80, "/hostname").with_context(|| format!("Service {service}"))?;
    ensure!(said == "behind", "Service {service}: {said:?}");
    Ok(())
}

fn ready_peers(cluster: &Cluster, wanted: usize) -> Result<Vec<Peer>> {
    let pods = cluster.get(&["pods", "--selector", "app=echo"])?;
    let pods = pods["items"].as_array().context("no pods")?;
    let ready = pods.iter().filter(|pod| is_ready(pod));
    let peers: Vec<Peer> = ready
        .map(|pod| {
            let address = pod["status"]["podIP"].as_str().unwrap_or_default().to_owned();
            Peer { name: name(pod).to_owned(), address }
        })
        .collect();
    ensure!(peers.len() == wanted, "{} of {wanted} are ready", peers.len());
    Ok(peers)
}

/// Who answers when a pod asks a target so many times.
pub(crate) fn dial(
    cluster: &Cluster,
    from: &Peer,
    target: &str,
    protocol: &str,
    port: u16,
    tries: u32,
) -> Result<BTreeSet<String>> {
    let url = format!(
        "http://127.0.0.1:8080/dial?host={target}&port={port}&protocol={protocol}&request=hostname&tries={tries}"
    );
    let said = cluster.exec(&from.name, &["wget", "-qO-", "-T", "60", &url])?;
    let answer: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    ensure!(answer["errors"].is_null(), "{} to {target}: {said}", from.name);
    let responses = answer["responses"].as_array().with_context(|| said.clone())?;
    Ok(responses.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// A page from a server, asked by the node itself.
pub(crate) fn get(address: &str, port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect((address, port)).context("connecting")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("reading the answer")?;
    let (_, body) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
    Ok(body.to_owned())
}
