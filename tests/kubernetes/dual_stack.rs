//! A cluster with both IP families: pods of both kinds have an address of each, and reach each other and a Service by either.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings};
use crate::machine::ADDRESS6;
use crate::pods::{machine, pod, serving};
use crate::services::{Peer, dial, get, service};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let settings = Settings { dual_stack: true, ..Settings::default() };
    tests.add("dual_stack::pods_of_both_kinds_reach_each_other", &settings, reach_each_other);
}

/// The address of one family in a list of a status or a spec.
fn of_family(addresses: &Value, six: bool) -> Result<String> {
    let all = addresses.as_array().into_iter().flatten();
    let texts = all.filter_map(|one| one.as_str().or_else(|| one["ip"].as_str()));
    let is = |text: &&str| text.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6() == six);
    Ok(texts.clone().find(is).with_context(|| format!("{addresses} has none with six = {six}"))?.to_owned())
}

fn reach_each_other(cluster: &mut Cluster) -> Result<()> {
    let names = ["trusted", "guest"];
    let mut pods = [pod(names[0]), machine(names[1])].map(serving);
    for pod in &mut pods {
        pod["metadata"]["labels"]["app"] = "echo".into();
    }
    cluster.apply(&service("echo", &json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack"})))?;
    cluster.run(&pods)?;
    let all = BTreeSet::from(names.map(str::to_owned));
    let service = cluster.get(&["service", "echo"])?;
    for six in [false, true] {
        let mut peers = Vec::new();
        for name in names {
            let status = &cluster.get(&["pod", name])?["status"];
            peers.push(Peer { name: name.to_owned(), address: of_family(&status["podIPs"], six)? });
        }
        let service = of_family(&service["spec"]["clusterIPs"], six)?;
        for peer in &peers {
            for other in &peers {
                let wanted = BTreeSet::from([other.name.clone()]);
                for (protocol, port) in [("http", 8080), ("udp", 8081)] {
                    let answered = dial(cluster, peer, &other.address, protocol, port, 1)?;
                    ensure!(answered == wanted, "{peer:?} to {other:?} by {protocol}: {answered:?}");
                }
            }
            until(&format!("{peer:?} reaches both behind {service}"), || {
                let answered = dial(cluster, peer, &service, "http", 80, 20)?;
                ensure!(answered == all, "{answered:?}");
                ensure!(!dial(cluster, peer, &service, "udp", 81, 5)?.is_empty(), "no answer over UDP");
                Ok(())
            })?;
        }
    }
    for name in names {
        let records = cluster.exec(name, &["nslookup", "-type=AAAA", "echo.default.svc.cluster.local"])?;
        ensure!(records.contains(&of_family(&service["spec"]["clusterIPs"], true)?), "{records}");
    }
    let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")?;
    let mut answered = BTreeSet::new();
    until("both answer at the node's port", || {
        answered.insert(get(ADDRESS6, u16::try_from(port)?, "/hostname")?);
        ensure!(answered == all, "{answered:?}");
        Ok(())
    })?;
    cluster.kubectl(&["delete", "service/echo"])?;
    cluster.delete(&names)
}
