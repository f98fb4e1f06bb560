//! Every rule of handler selection, and what must hold for every combination.

use std::collections::BTreeMap;
use std::path::Path;

use podvisor_config::trust::{Node, Pod, TrustError, select};
use podvisor_config::{Config, Handler, Trust};

const HANDLERS: &str = "[runtime]\nuntrusted_handler = \"kata\"\n[runtime.handlers]\ncrun = false\nvm = false\nkata = { type = \"vm\" }\nyouki = { type = \"oci\" }";

fn handlers() -> BTreeMap<String, Handler> {
    Config::parse(Path::new("config.toml"), HANDLERS).unwrap().handlers
}

/// One row of the table: a node with handlers kata (untrusted), runc (trusted) and youki, and a pod.
#[derive(Clone, Copy)]
struct Row {
    handler: &'static str,
    untrusted: Option<&'static str>,
    trusted: Option<&'static str>,
    host: &'static [&'static str],
    privileged: bool,
    default: Trust,
    node_untrusted: Option<&'static str>,
    broken: &'static str,
}

const PLAIN: Row = Row {
    handler: "",
    untrusted: None,
    trusted: None,
    host: &[],
    privileged: false,
    default: Trust::Trusted,
    node_untrusted: Some("kata"),
    broken: "",
};

fn run<'a>(row: &Row, handlers: &'a BTreeMap<String, Handler>) -> Result<&'a str, TrustError> {
    let mut unusable = BTreeMap::new();
    if !row.broken.is_empty() {
        unusable.insert(row.broken.to_owned(), "its program is missing".to_owned());
    }
    let pod = Pod {
        handler: row.handler,
        untrusted_workload: row.untrusted,
        trusted_sandbox: row.trusted,
        host_namespaces: row.host.to_vec(),
        privileged: row.privileged,
    };
    let node = Node {
        handlers,
        unusable: &unusable,
        trusted: "runc",
        untrusted: row.node_untrusted,
        default_trust: row.default,
    };
    // The name that comes back is one of the map's, whatever the pod's and node's strings were.
    select(&pod, &node).map(|name| handlers.get_key_value(name).unwrap().0.as_str())
}

const UNTRUSTED: Row = Row { default: Trust::Untrusted, ..PLAIN };
const HOST: &[&str] = &["network", "pid"];

#[test]
fn table() {
    let rows: &[(Row, Result<&str, &str>)] = &[
        // 1. RuntimeClass.
        (Row { handler: "youki", ..PLAIN }, Ok("youki")),
        (Row { handler: "kata", ..PLAIN }, Ok("kata")),
        (Row { handler: "runc", ..UNTRUSTED }, Ok("runc")),
        (Row { handler: "kata", host: HOST, ..PLAIN }, Ok("kata")),
        (Row { handler: "youki", trusted: Some("false"), ..PLAIN }, Ok("youki")),
        (Row { handler: "kata", node_untrusted: None, ..PLAIN }, Ok("kata")),
        (
            Row { handler: "kata-fc", ..PLAIN },
            Err("no runtime handler is named \"kata-fc\"; handlers: kata, runc, youki"),
        ),
        (
            Row { handler: "kata-fc", untrusted: Some("true"), broken: "kata", ..PLAIN },
            Err("no runtime handler is named \"kata-fc\"; handlers: kata (cannot be used now), runc, youki"),
        ),
        (
            Row { handler: "youki", broken: "youki", ..PLAIN },
            Err("runtime handler \"youki\" cannot be used: its program is missing; \
                 handlers: kata, runc, youki (cannot be used now)"),
        ),
        (Row { handler: "youki", broken: "runc", ..PLAIN }, Ok("youki")),
        // 2. containerd's annotation.
        (Row { untrusted: Some("true"), ..PLAIN }, Ok("kata")),
        (Row { untrusted: Some("true"), privileged: true, ..PLAIN }, Ok("kata")),
        (Row { untrusted: Some("true"), trusted: Some("true"), ..PLAIN }, Ok("kata")),
        (Row { untrusted: Some("false"), ..PLAIN }, Ok("runc")),
        (Row { untrusted: Some("True"), ..PLAIN }, Ok("runc")),
        (Row { untrusted: Some(""), ..UNTRUSTED }, Ok("kata")),
        (Row { untrusted: Some("true"), handler: "kata", ..PLAIN }, Ok("kata")),
        (
            Row { untrusted: Some("true"), handler: "runc", ..PLAIN },
            Err(
                "annotation io.kubernetes.cri.untrusted-workload is \"true\", but the RuntimeClass names handler \
                 \"runc\", which is not the untrusted one (kata); handlers: kata, runc, youki",
            ),
        ),
        (
            Row { untrusted: Some("true"), handler: "youki", node_untrusted: None, ..PLAIN },
            Err(
                "annotation io.kubernetes.cri.untrusted-workload is \"true\", but the RuntimeClass names handler \
                 \"youki\", which is not the untrusted one (there is none); handlers: kata, runc, youki",
            ),
        ),
        (
            Row { untrusted: Some("true"), host: HOST, ..PLAIN },
            Err(
                "annotation io.kubernetes.cri.untrusted-workload makes the pod untrusted, but it uses the host's \
                 network and pid namespace; handlers: kata, runc, youki",
            ),
        ),
        (
            Row { untrusted: Some("true"), host: &["ipc"], handler: "kata", ..PLAIN },
            Err(
                "annotation io.kubernetes.cri.untrusted-workload makes the pod untrusted, but it uses the host's \
                 ipc namespace; handlers: kata, runc, youki",
            ),
        ),
        (
            Row { untrusted: Some("true"), node_untrusted: None, ..PLAIN },
            Err(
                "annotation io.kubernetes.cri.untrusted-workload makes the pod untrusted, but no untrusted handler \
                 is configured: set untrusted_handler in section [runtime] of podvisor's configuration; \
                 handlers: kata, runc, youki",
            ),
        ),
        (
            Row { untrusted: Some("true"), broken: "kata", ..PLAIN },
            Err("runtime handler \"kata\" cannot be used: its program is missing; \
                 handlers: kata (cannot be used now), runc, youki"),
        ),
        (
            Row { untrusted: Some("true"), node_untrusted: Some("gone"), ..PLAIN },
            Err("no runtime handler is named \"gone\"; handlers: kata, runc, youki"),
        ),
        // 3. CRI-O's annotation.
        (Row { trusted: Some("true"), ..PLAIN }, Ok("runc")),
        (Row { trusted: Some("true"), ..UNTRUSTED }, Ok("kata")),
        (Row { trusted: Some("true"), privileged: true, ..UNTRUSTED }, Ok("runc")),
        (Row { trusted: Some("false"), ..PLAIN }, Ok("kata")),
        (Row { trusted: Some("True"), ..PLAIN }, Ok("kata")),
        (Row { trusted: Some(""), ..PLAIN }, Ok("kata")),
        (Row { trusted: Some("false"), privileged: true, ..UNTRUSTED }, Ok("kata")),
        (
            Row { trusted: Some("false"), host: &["pid"], ..UNTRUSTED },
            Err(
                "annotation io.kubernetes.cri-o.TrustedSandbox makes the pod untrusted, but it uses the host's pid \
                 namespace; handlers: kata, runc, youki",
            ),
        ),
        (
            Row { trusted: Some("no"), node_untrusted: None, ..PLAIN },
            Err(
                "annotation io.kubernetes.cri-o.TrustedSandbox makes the pod untrusted, but no untrusted handler is \
                 configured: set untrusted_handler in section [runtime] of podvisor's configuration; \
                 handlers: kata, runc, youki",
            ),
        ),
        // 4. The node's default.
        (PLAIN, Ok("runc")),
        (Row { host: HOST, privileged: true, ..PLAIN }, Ok("runc")),
        (UNTRUSTED, Ok("kata")),
        (Row { privileged: true, ..UNTRUSTED }, Ok("runc")),
        (Row { host: &["ipc"], ..UNTRUSTED }, Ok("runc")),
        (
            Row { broken: "runc", ..PLAIN },
            Err("runtime handler \"runc\" cannot be used: its program is missing; \
                 handlers: kata, runc (cannot be used now), youki"),
        ),
        (
            Row { node_untrusted: None, ..UNTRUSTED },
            Err("default_workload_trust is \"untrusted\", but no untrusted handler is configured: set \
                 untrusted_handler in section [runtime] of podvisor's configuration; handlers: kata, runc, youki"),
        ),
    ];
    let handlers = handlers();
    for (at, (row, expected)) in rows.iter().enumerate() {
        let got = run(row, &handlers).map_err(|error| error.to_string());
        assert_eq!(got.as_ref().map(|name| *name).map_err(String::as_str), *expected, "row {at}");
    }
}

#[test]
fn every_combination() {
    let handlers = handlers();
    let mut count = 0;
    for handler in ["", "runc", "kata", "youki", "nope"] {
        for untrusted in [None, Some("true"), Some("false"), Some("")] {
            for trusted in [None, Some("true"), Some("false"), Some("")] {
                for host in [&[][..], &["network"], &["pid"], &["ipc"]] {
                    for privileged in [false, true] {
                        for default in [Trust::Trusted, Trust::Untrusted] {
                            for node_untrusted in [None, Some("kata")] {
                                for broken in ["", "runc", "kata", "youki"] {
                                    let row = Row {
                                        handler,
                                        untrusted,
                                        trusted,
                                        host,
                                        privileged,
                                        default,
                                        node_untrusted,
                                        broken,
                                    };
                                    check(&row, &run(&row, &handlers));
                                    count += 1;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert_eq!(count, 5 * 4 * 4 * 4 * 2 * 2 * 2 * 4);
}

fn check(row: &Row, result: &Result<&str, TrustError>) {
    let asks = row.untrusted == Some("true")
        || row.handler.is_empty() && row.trusted.is_some_and(|value| value != "true");
    match result {
        Ok(name) => {
            assert_ne!(*name, row.broken, "a handler that does not work is never chosen");
            if !row.handler.is_empty() {
                assert_eq!(*name, row.handler, "a RuntimeClass gets its handler or an error");
            }
            if asks {
                assert_eq!(Some(*name), row.node_untrusted, "who asks to be untrusted is untrusted");
                assert!(row.host.is_empty(), "and has no namespace of the host");
            }
            if row.handler.is_empty() && !asks {
                let by_default = row.default == Trust::Untrusted && !row.privileged && row.host.is_empty();
                assert_eq!(*name, if by_default { "kata" } else { "runc" });
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("kata") && text.contains("runc") && text.contains("youki"), "{text}");
            let wanted_works =
                !asks && row.broken.is_empty() && row.handler != "nope" && row.node_untrusted.is_some();
            assert!(!wanted_works, "an error without a reason: {text}");
        }
    }
}
