//! podvisor's own metrics over HTTP.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::prometheus::{self, Family};
use podvisor_tests::{Fixture, ask, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Tests;

const ADDRESS: &str = "127.0.0.1:9471";

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { more: format!("[metrics]\naddress = \"{ADDRESS}\"\n"), ..Options::default() };
    tests.add_with("telemetry::tells_what_happens", options(), tells_what_happens);
    tests.add_with("telemetry::answers_only_what_it_has", options(), answers_only_what_it_has);
    let machine = Options { handler: VM.to_owned(), ..options() };
    tests.add_with("telemetry::tells_what_virtual_machines_cost", machine, tells_what_virtual_machines_cost);
    tests.add("telemetry::is_off_unless_asked_for", is_off_unless_asked_for);
}

/// Status line and body of a request over a connection of its own.
async fn ask_http(request: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(ADDRESS).await?;
    stream.write_all(format!("{request}\r\nHost: node\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of the head")?;
    let status = head.lines().next().unwrap_or_default().to_owned();
    if status.contains("200") {
        ensure!(head.to_ascii_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    }
    Ok((status, body.to_owned()))
}

async fn page() -> Result<BTreeMap<String, Family>> {
    let (status, body) = ask_http("GET /metrics HTTP/1.1").await?;
    ensure!(status == "HTTP/1.1 200 OK", "{status}");
    prometheus::read(&body)
}

fn value(page: &BTreeMap<String, Family>, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let family = page.get(name).with_context(|| format!("no {name}"))?;
    family.value(labels).with_context(|| name.to_owned())
}

/// How many calls a histogram has counted.
fn count(page: &BTreeMap<String, Family>, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let family = page.get(name).with_context(|| format!("no {name}"))?;
    let counts = family.samples.iter().filter(|(sample, _, _)| sample.ends_with("_count"));
    let counts = Family { kind: String::new(), samples: counts.cloned().collect() };
    counts.value(labels).with_context(|| name.to_owned())
}

async fn tells_what_happens(f: &mut Fixture) -> Result<()> {
    let before = page().await?;
    ensure!(value(&before, "podvisor_pods", &[("state", "ready")])? < 0.5, "pods before the first");
    let (pod, id) = f.running("told", &ask::waiting("c")).await?;
    ensure!(f.cri.pull("registry.example/none:1").await.is_err());
    ensure!(f.cri.status("0000").await.is_err());
    let after = page().await?;
    for (name, labels, expected) in [
        ("podvisor_pods", ("state", "ready"), 1.0),
        ("podvisor_pods", ("state", "not_ready"), 0.0),
        ("podvisor_containers", ("state", "running"), 1.0),
    ] {
        let found = value(&after, name, &[labels])?;
        ensure!((found - expected).abs() < 0.5, "{name} {labels:?} is {found}");
    }
    for (name, least) in [
        ("podvisor_images", 1.0),
        ("podvisor_monitors", 1.0),
        ("podvisor_image_pull_bytes_total", 1000.0),
        ("process_resident_memory_bytes", 1_000_000.0),
        ("process_open_fds", 5.0),
        ("process_start_time_seconds", 1.6e9),
    ] {
        let found = value(&after, name, &[])?;
        ensure!(found >= least, "{name} is {found}");
    }
    for (method, code) in [
        ("RunPodSandbox", "OK"),
        ("StartContainer", "OK"),
        ("PullImage", "OK"),
        ("ContainerStatus", "NOT_FOUND"),
    ] {
        let found = count(&after, "podvisor_rpc_duration_seconds", &[("method", method), ("code", code)])?;
        ensure!(found >= 1.0, "{method} {code}: {found}");
    }
    ensure!(count(&after, "podvisor_image_pull_duration_seconds", &[("outcome", "ok")])? >= 1.0);
    let failed = after["podvisor_image_pull_duration_seconds"].samples.iter();
    ensure!(failed.clone().any(|(_, labels, _)| labels["outcome"] != "ok"), "no failed pull is counted");
    ensure!(after["podvisor_build_info"].samples[0].1["version"] == env!("CARGO_PKG_VERSION"));

    f.cri.stop(&id, 0).await?;
    f.cri.stop_pod(&pod.id).await?;
    let stopped = page().await?;
    ensure!((value(&stopped, "podvisor_pods", &[("state", "not_ready")])? - 1.0).abs() < 0.5);
    ensure!((value(&stopped, "podvisor_containers", &[("state", "exited")])? - 1.0).abs() < 0.5);
    f.kill()?;
    f.start()?;
    eventually("the next daemon tells what it has found", || async {
        let page = page().await?;
        ensure!((value(&page, "podvisor_recovered_pods", &[])? - 1.0).abs() < 0.5);
        ensure!(value(&page, "podvisor_pods_unobserved", &[])? < 0.5);
        Ok(())
    })
    .await
}

async fn tells_what_virtual_machines_cost(f: &mut Fixture) -> Result<()> {
    const MIB: f64 = 1_048_576.0;
    let (pod, container) = f.running("told", &ask::waiting("c")).await?;
    let told = super::vm::machine(f, &pod.id).await?;
    let page_before = page().await?;
    let labels = |process| [("sandbox", pod.id.as_str()), ("pod", "told"), ("process", process)];
    for process in ["machine", "hypervisor", "file_server", "monitor"] {
        let shown = &told["processes"][process];
        ensure!(shown["pid"].as_i64().is_some_and(|pid| pid > 1), "{process}: {told}");
        ensure!(
            shown["cpuSeconds"].is_f64() && shown["anonymousBytes"].as_u64() > Some(0),
            "{process}: {told}"
        );
        let of_kind = |kind| {
            let labels = [&labels(process)[..], &[("kind", kind)]].concat();
            value(&page_before, "podvisor_machine_memory_bytes", &labels)
        };
        ensure!(of_kind("anonymous")? > 0.0 && of_kind("file")? > 0.0, "{process}");
    }
    for (process, key) in
        [("machine", "pid"), ("hypervisor", "hypervisorPid"), ("file_server", "fileServerPid")]
    {
        let expected = super::vm::process(f, &pod.id, key).await?.as_raw_nonzero().get();
        ensure!(told["processes"][process]["pid"] == expected, "{key}: {told}");
    }
    // The guest's memory is in it.
    let machine = &told["processes"]["machine"];
    let resident =
        machine["anonymousBytes"].as_f64().unwrap_or(0.0) + machine["sharedBytes"].as_f64().unwrap_or(0.0);
    ensure!(resident > 16.0 * MIB, "{machine}");

    let cpu = |page: &BTreeMap<String, Family>| {
        value(page, "podvisor_machine_cpu_seconds_total", &labels("machine"))
    };
    let before = cpu(&page_before)?;
    f.cri.exec(&container, &["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"], 600).await?;
    let after = cpu(&page().await?)?;
    ensure!(after > before, "{before} {after}");
    f.cri.stop_pod(&pod.id).await?;
    ensure!(cpu(&page().await?).is_err(), "a machine that is gone is told of");
    Ok(())
}

async fn answers_only_what_it_has(f: &mut Fixture) -> Result<()> {
    for (request, expected) in [
        ("GET / HTTP/1.1", "404"),
        ("GET /metrics/x HTTP/1.1", "404"),
        ("POST /metrics HTTP/1.1", "405"),
        ("DELETE /metrics HTTP/1.1", "405"),
    ] {
        let (status, _) = ask_http(request).await?;
        ensure!(status.contains(expected), "{request}: {status}");
    }
    // Some that connect and say nothing do not keep others out.
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(TcpStream::connect(ADDRESS).await?);
    }
    page().await?;
    drop(silent);
    f.cri.pull(BUSYBOX).await?;
    Ok(())
}

async fn is_off_unless_asked_for(f: &mut Fixture) -> Result<()> {
    f.cri.version().await?;
    ensure!(TcpStream::connect(ADDRESS).await.is_err(), "something listens");
    Ok(())
}
