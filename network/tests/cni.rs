//! CNI with the reference plugins, and with plugins that misbehave.

mod lab;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lab::{Pod, eventually, ip, isolated, listen, names, run, wait};
use podvisor_network::{
    Attachment, BuiltinOptions, CniOptions, Kind, Network, NetworkError, Options, Protocol, namespace,
};
use serde_json::{Value, json};

/// Where Debian's package containernetworking-plugins puts them.
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";
const PATIENCE: Duration = Duration::from_secs(60);

fn open_with(timeout: Duration) -> Network {
    fs::create_dir_all("/run/conf").unwrap();
    let options = Options {
        mode: Kind::Cni,
        cni: CniOptions {
            config_dir: "/run/conf".into(),
            bin_dirs: vec!["/run/plugins".into(), REFERENCE_PLUGINS.into()],
            cache_dir: "/run/cache".into(),
            timeout,
        },
        builtin: BuiltinOptions {
            bridge: "podvisor0".into(),
            subnets: vec![("10.88.0.0".parse().unwrap(), 16)],
            state_dir: "/run/state".into(),
        },
    };
    wait(Network::open(options)).unwrap()
}

fn open() -> Network {
    open_with(Duration::from_secs(60))
}

fn configure(file: &str, configuration: &Value) {
    fs::create_dir_all("/run/conf").unwrap();
    fs::write(Path::new("/run/conf").join(file), configuration.to_string()).unwrap();
}

/// A plugin that logs its calls, its variables and what it reads, and then does what `/run/do/NAME.COMMAND` says.
fn script(name: &str) {
    let text = r#"#!/bin/sh
name=${0##*/}
cat > "/run/log/$name.$CNI_COMMAND.json"
env | grep ^CNI_ | sort > "/run/log/$name.$CNI_COMMAND.env"
echo "$CNI_COMMAND $name" >> /run/log/calls
if [ -f "/run/do/$name.$CNI_COMMAND" ]; then . "/run/do/$name.$CNI_COMMAND"
elif [ "$CNI_COMMAND" = ADD ]; then
  echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"address":"10.1.2.3/24","interface":0}]}'
fi
"#;
    for directory in ["/run/plugins", "/run/log", "/run/do"] {
        fs::create_dir_all(directory).unwrap();
    }
    // Written by another process: one that this process forks meanwhile would keep the file "busy" for execve.
    let path = format!("/run/plugins/{name}");
    run("sh", &["-c", r#"printf %s "$1" > "$0" && chmod +x "$0""#, &path, text]);
}

/// What the plugin does at `command`, as shell text; `None`: as usual again.
fn make(name: &str, command: &str, text: Option<&str>) {
    let path = format!("/run/do/{name}.{command}");
    match text {
        Some(text) => fs::write(path, text).unwrap(),
        None => fs::remove_file(path).unwrap(),
    }
}

/// The calls since the last time.
fn calls() -> Vec<String> {
    let text = fs::read_to_string("/run/log/calls").unwrap_or_default();
    let _ = fs::remove_file("/run/log/calls");
    text.lines().map(str::to_owned).collect()
}

fn read_json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn setup(network: &Network, pod: &Pod) -> Result<Attachment, NetworkError> {
    wait(network.setup(&pod.sandbox))
}

fn teardown(network: &Network, pod: &Pod) {
    wait(network.teardown(Kind::Cni, &pod.sandbox)).unwrap();
}

/// The messages of an error and its causes.
fn words(error: &NetworkError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn single(version: &str, plugins: &[&str]) -> Value {
    let plugins: Vec<_> = plugins.iter().map(|name| json!({"type": name})).collect();
    json!({"cniVersion": version, "name": "net", "plugins": plugins})
}

#[test]
fn not_ready_says_why_and_becomes_ready() {
    isolated(|| {
        let network = open();
        assert_eq!(network.kind(), Kind::Cni);
        assert_eq!(network.ready(), Err("no CNI configuration in /run/conf".into()));
        let pod = Pod::new("pod");
        let error = setup(&network, &pod).unwrap_err();
        assert_eq!(words(&error), "no CNI configuration in /run/conf");
        teardown(&network, &pod);

        fs::write("/run/conf/10-net.conflist", "{").unwrap();
        let reason = network.ready().unwrap_err();
        assert!(
            reason.starts_with("no usable CNI configuration in /run/conf: 10-net.conflist is not JSON: EOF"),
            "{reason}"
        );
        configure("10-net.conflist", &single("1.0.0", &["missing"]));
        let missing = "CNI plugin missing not found in /run/plugins, /usr/lib/cni";
        assert_eq!(network.ready(), Err(missing.into()));
        assert_eq!(words(&setup(&network, &pod).unwrap_err()), missing);
        script("missing");
        assert_eq!(network.ready(), Ok(()));
        fs::remove_file("/run/conf/10-net.conflist").unwrap();
        assert_eq!(network.ready(), Err("no CNI configuration in /run/conf".into()));
        wait(network.set_pod_cidr("whatever kubelet sends")).unwrap();
        namespace::release(&pod.namespaces).unwrap();
    });
}

#[test]
fn the_reference_plugins_connect_pods() {
    isolated(|| {
        for plugin in ["bridge", "host-local", "portmap", "bandwidth", "tuning"] {
            let path = Path::new(REFERENCE_PLUGINS).join(plugin);
            assert!(
                path.exists(),
                "{} is missing: install Debian's containernetworking-plugins",
                path.display()
            );
        }
        configure(
            "10-real.conflist",
            &json!({"cniVersion": "1.0.0", "name": "real", "plugins": [
                {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
                 "ipam": {"type": "host-local", "dataDir": "/run/ipam",
                          "ranges": [[{"subnet": "10.7.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
                {"type": "tuning", "mtu": 1300},
                {"type": "portmap", "capabilities": {"portMappings": true}},
                {"type": "bandwidth", "capabilities": {"bandwidth": true}},
            ]}),
        );
        let network = open();
        assert_eq!(network.ready(), Ok(()));
        let mut client = Pod::new("client");
        let mut server = Pod::new("server").port(Protocol::Tcp, None, 8080, 80);
        // Both: the plugin's CHECK (1.1.1) crashes where there is no limit. portmap's fails where a pod with host ports has no
        // IPv6, so it is the client that is checked.
        for pod in [&mut client, &mut server] {
            pod.sandbox.ingress_bandwidth = Some(100_000_000);
            pod.sandbox.egress_bandwidth = Some(100_000_000);
        }
        let of_client = setup(&network, &client).unwrap();
        let of_server = setup(&network, &server).unwrap();
        assert_eq!(of_client.addresses, ["10.7.0.2".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(of_server.addresses, ["10.7.0.3".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(of_server.cni_result["ips"][0]["gateway"], "10.7.0.1");

        let ask = |to: &str| {
            let to: SocketAddr = to.parse().unwrap();
            let listener = server.inside(|| listen("0.0.0.0:80"));
            let answering =
                std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"hello").unwrap());
            let mut text = String::new();
            let stream = client.inside(|| TcpStream::connect_timeout(&to, PATIENCE));
            stream.unwrap().read_to_string(&mut text).unwrap();
            answering.join().unwrap();
            text
        };
        assert_eq!(ask("10.7.0.3:80"), "hello");
        assert_eq!(ask("10.7.0.1:8080"), "hello");
        assert!(ip("-n server link show eth0").contains("mtu 1300"));
        assert!(run("tc", &["qdisc", "show"]).contains("tbf"), "{}", run("tc", &["qdisc", "show"]));

        // What libcni would find.
        let cached = read_json("/run/cache/results/real-server-eth0");
        assert_eq!(cached["kind"], "cniCacheV1");
        assert_eq!((&cached["containerId"], &cached["networkName"]), (&json!("server"), &json!("real")));
        assert_eq!(cached["ifName"], "eth0");
        assert_eq!(cached["result"], of_server.cni_result);
        assert_eq!(cached["cniArgs"][0], json!(["IgnoreUnknown", "1"]));
        assert_eq!(cached["capabilityArgs"]["portMappings"][0]["hostPort"], 8080);

        wait(network.check(Kind::Cni, &client.sandbox)).unwrap();
        ip("-n client address del 10.7.0.2/24 dev eth0");
        let error = wait(network.check(Kind::Cni, &client.sandbox)).unwrap_err();
        assert!(words(&error).starts_with("CNI plugin bridge failed at CHECK: code"), "{}", words(&error));

        // Another process, another configuration by now, and one namespace gone.
        drop(network);
        script("other");
        configure("00-other.conflist", &single("1.0.0", &["other"]));
        let network = open();
        namespace::release(&client.namespaces).unwrap();
        teardown(&network, &client);
        teardown(&network, &server);
        assert_eq!(calls(), [""; 0], "undone with the plugins it was made with");
        teardown(&network, &server);
        assert_eq!(calls(), ["DEL other"]);
        let addresses: Vec<_> =
            names("/run/ipam/real").into_iter().filter(|name| name.starts_with("10.")).collect();
        assert_eq!(addresses, [""; 0]);
        assert_eq!(names("/run/cache/results"), [""; 0]);
        namespace::release(&server.namespaces).unwrap();
        assert!(!ip("link show").contains("veth"), "{}", ip("link show"));
    });
}

#[test]
fn plugins_get_what_the_specification_says() {
    isolated(|| {
        script("first");
        script("second");
        make(
            "first",
            "ADD",
            Some(r#"echo '{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.2.3/24"}]}'"#),
        );
        make(
            "second",
            "ADD",
            Some(
                r#"echo '{"cniVersion":"0.4.0","ips":[{"version":"6","address":"fd00::3/64"},{"version":"4","address":"10.1.2.3/24"}]}'"#,
            ),
        );
        configure(
            "10-net.conflist",
            &json!({"cniVersion": "0.4.0", "name": "net", "plugins": [
                {"type": "first", "option": 7},
                {"type": "second", "capabilities":
                    {"portMappings": true, "bandwidth": true, "dns": true, "cgroupPath": true, "mac": true}},
            ]}),
        );
        let network = open();
        let mut pod = Pod::new("pod").port(Protocol::Udp, Some("192.0.2.1"), 53, 5353);
        pod.sandbox.egress_bandwidth = Some(5000);
        pod.sandbox.dns_servers = vec!["192.0.2.53".into()];
        let attachment = setup(&network, &pod).unwrap();
        assert_eq!(
            attachment.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["fd00::3", "10.1.2.3"]
        );
        assert_eq!(calls(), ["ADD first", "ADD second"]);
        assert_eq!(
            fs::read_to_string("/run/log/first.ADD.env").unwrap(),
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=name-pod;\
             K8S_POD_INFRA_CONTAINER_ID=pod;K8S_POD_UID=uid-pod\n\
             CNI_COMMAND=ADD\nCNI_CONTAINERID=pod\nCNI_IFNAME=eth0\nCNI_NETNS=/run/netns/pod\n\
             CNI_PATH=/run/plugins:/usr/lib/cni\n"
        );
        let first = json!({"cniVersion": "0.4.0", "name": "net", "type": "first", "option": 7});
        assert_eq!(read_json("/run/log/first.ADD.json"), first);
        let second = read_json("/run/log/second.ADD.json");
        assert_eq!(
            second["runtimeConfig"],
            json!({
                "portMappings": [{"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.1"}],
                "bandwidth": {"egressRate": 5000, "egressBurst": 2_147_483_647},
                "dns": {"servers": ["192.0.2.53"], "searches": [], "options": []},
                "cgroupPath": "/kubepods/pod",
            })
        );
        assert_eq!(second["prevResult"]["ips"][0]["address"], "10.1.2.3/24");
        wait(network.check(Kind::Cni, &pod.sandbox)).unwrap();
        assert_eq!(calls(), ["CHECK first", "CHECK second"]);
        assert_eq!(read_json("/run/log/first.CHECK.json")["prevResult"], attachment.cni_result);

        // After a restart of the machine the namespace's file may be an ordinary one.
        namespace::release(&pod.namespaces).unwrap();
        fs::write("/run/netns/pod", "").unwrap();
        teardown(&network, &pod);
        assert_eq!(calls(), ["DEL second", "DEL first"]);
        assert_eq!(read_json("/run/log/first.DEL.json")["prevResult"], attachment.cni_result);
        assert!(fs::read_to_string("/run/log/first.DEL.env").unwrap().contains("CNI_NETNS=\n"));
        assert_eq!(names("/run/cache/results"), [""; 0]);

        // 0.3.1 knows neither CHECK nor a result at DEL.
        make(
            "first",
            "ADD",
            Some(r#"echo '{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.1.2.3/24"}]}'"#),
        );
        configure("10-net.conflist", &single("0.3.1", &["first"]));
        setup(&network, &pod).unwrap();
        wait(network.check(Kind::Cni, &pod.sandbox)).unwrap();
        teardown(&network, &pod);
        assert_eq!(calls(), ["ADD first", "DEL first"]);
        assert_eq!(read_json("/run/log/first.DEL.json").get("prevResult"), None);
        let error = wait(network.check(Kind::Cni, &pod.sandbox)).unwrap_err();
        assert_eq!(words(&error), "sandbox pod has no cached CNI result to check");
    });
}

#[test]
fn a_failed_add_is_undone() {
    isolated(|| {
        script("first");
        script("second");
        configure("10-net.conflist", &single("1.0.0", &["first", "second"]));
        let network = open();
        let pod = Pod::new("pod");
        make(
            "second",
            "ADD",
            Some(r#"echo '{"cniVersion":"1.0.0","code":11,"msg":"try again","details":"later"}'; exit 1"#),
        );
        let error = setup(&network, &pod).unwrap_err();
        assert_eq!(words(&error), "CNI plugin second failed at ADD: code 11: try again (later)");
        assert_eq!(calls(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
        assert_eq!(names("/run/cache/results"), [""; 0]);

        // When that fails too, what is needed to try once more is kept, and every plugin is tried.
        make("second", "DEL", Some("exit 1"));
        setup(&network, &pod).unwrap_err();
        assert_eq!(calls(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
        assert_eq!(names("/run/cache/results"), ["net-pod-eth0"]);
        make("second", "DEL", None);
        configure("10-net.conflist", &single("1.0.0", &["first"]));
        teardown(&network, &pod);
        assert_eq!(calls(), ["DEL second", "DEL first"]);
        assert_eq!(names("/run/cache/results"), [""; 0]);
        namespace::release(&pod.namespaces).unwrap();
    });
}

#[test]
fn misbehaving_plugins_are_bounded_and_quoted() {
    isolated(|| {
        script("bad");
        configure("10-net.conflist", &single("1.0.0", &["bad"]));
        let network = open();
        let pod = Pod::new("pod");
        let long = "x".repeat(1000);
        for (doing, expected) in [
            (
                "echo hello world",
                "CNI plugin bad answered ADD unintelligibly (expected value at line 1 column 1): \"hello world\\n\"",
            ),
            (
                ":",
                "CNI plugin bad answered ADD unintelligibly (EOF while parsing a value at line 1 column 0): \"\"",
            ),
            ("echo '[1]'", "CNI plugin bad answered ADD unintelligibly (not a JSON object): \"[1]\\n\""),
            (&format!("echo {long}"), &format!("{}\"", "x".repeat(200))),
            ("echo '{\"ips\":[{\"address\":\"nowhere\"}]}'", "(\"nowhere\" is no address)"),
            ("echo '{\"ips\":[]}'", "network net gave the pod no address on eth0"),
            (
                "echo gone wrong >&2; exit 3",
                "CNI plugin bad failed at ADD with exit status 3: \"gone wrong\\n\"",
            ),
            ("echo not an error object; exit 3", "with exit status 3: \"not an error object\\n\""),
            ("kill -9 $$", "CNI plugin bad failed at ADD with signal 9: \"\""),
            (
                "head -c 2000000 /dev/zero",
                "CNI plugin bad answered ADD with more than 1048576 bytes and was killed",
            ),
            ("head -c 20000000 /dev/zero >&2; exit 4", "with exit status 4: \"\\0\\0"),
            (
                "sleep 1000 & echo $! > /run/log/lingering; echo '{}'",
                "ended at ADD but something it started keeps its output open",
            ),
        ] {
            make("bad", "ADD", Some(doing));
            let error = words(&setup(&network, &pod).unwrap_err());
            assert!(error.contains(expected), "{doing}: {error}");
            assert!(error.len() < 600, "{error}");
            assert_eq!(calls(), ["ADD bad", "DEL bad"], "{doing}");
            assert_eq!(names("/run/cache/results"), [""; 0]);
        }
        // One that closes its output before it works on is no error, nor one that does not read.
        make("bad", "ADD", Some("echo '{\"ips\":[{\"address\":\"10.0.0.2/8\"}]}'; exec >&- 2>&-; sleep 0.1"));
        setup(&network, &pod).unwrap();
        teardown(&network, &pod);
        namespace::release(&pod.namespaces).unwrap();
        run("sh", &["-c", "kill $(cat /run/log/lingering)"]);
    });
}

/// The hanging plugin and what it started have ended.
fn assert_killed() {
    for file in ["child", "parent"] {
        let pid = fs::read_to_string(format!("/run/log/{file}")).unwrap();
        let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
        eventually("the process is gone", || {
            wait(tokio::task::yield_now());
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
    }
}

#[test]
fn a_plugin_that_hangs_is_killed_with_its_children() {
    isolated(|| {
        script("bad");
        configure("10-net.conflist", &single("1.0.0", &["bad"]));
        let network = open_with(Duration::from_millis(300));
        let pod = Pod::new("pod");
        make("bad", "ADD", Some("sleep 1000 & echo $! > /run/log/child; echo $$ > /run/log/parent; wait"));
        let started = Instant::now();
        let error = words(&setup(&network, &pod).unwrap_err());
        assert_eq!(error, "CNI plugin bad did not answer ADD within 0.3 s and was killed");
        assert!(started.elapsed() < Duration::from_secs(60));
        assert_killed();
        assert_eq!(calls(), ["ADD bad", "DEL bad"]);
        // A setup that is given up kills the plugin too.
        fs::remove_file("/run/log/parent").unwrap();
        let pending = async {
            tokio::select! {
                _ = network.setup(&pod.sandbox) => panic!("it hangs"),
                () = async { while !Path::new("/run/log/parent").exists() { tokio::task::yield_now().await } } => {}
            }
        };
        wait(pending);
        assert_killed();
        assert_eq!(names("/run/cache/results"), ["net-pod-eth0"], "what was begun is known");
        teardown(&network, &pod);
        namespace::release(&pod.namespaces).unwrap();
    });
}

#[test]
fn status_of_a_1_1_network_counts() {
    isolated(|| {
        script("plugin");
        make("plugin", "STATUS", Some(r#"echo '{"cniVersion":"1.1.0","code":50,"msg":"no agent"}'; exit 1"#));
        configure("10-net.conflist", &single("1.1.0", &["plugin"]));
        let network = open();
        let refusal = "CNI plugin plugin failed at STATUS: code 50: no agent";
        assert_eq!(network.ready(), Err(refusal.into()));
        assert_eq!(calls(), ["STATUS plugin"]);
        assert_eq!(network.ready(), Err(refusal.into()), "not asked again at once");
        make("plugin", "STATUS", None);
        // A new configuration is asked; until it answers the network is not ready.
        configure(
            "10-net.conflist",
            &json!({"cniVersion": "1.1.0", "name": "new", "plugins": [{"type": "plugin"}]}),
        );
        assert_eq!(network.ready(), Err("the plugins of CNI network new are being asked for STATUS".into()));
        eventually("STATUS is answered", || {
            wait(async { tokio::time::sleep(Duration::from_millis(5)).await });
            network.ready() == Ok(())
        });
        assert_eq!(calls(), ["STATUS plugin"]);
    });
}

#[test]
fn retain_removes_what_nobody_knows() {
    isolated(|| {
        script("plugin");
        make("plugin", "ADD", Some(r#"echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.2.3/24"}]}'"#));
        configure("10-net.conflist", &single("1.1.0", &["plugin"]));
        let network = open();
        let (kept, lost) = (Pod::new("kept"), Pod::new("lost"));
        setup(&network, &kept).unwrap();
        setup(&network, &lost).unwrap();
        namespace::release(&lost.namespaces).unwrap();
        // Another runtime shares the directory; garbage lies about.
        let foreign = json!({"kind": "cniCacheV1", "containerId": "foreign", "config": "", "ifName": "eth0",
                             "networkName": "net", "result": {}});
        fs::write("/run/cache/results/net-foreign-eth0", foreign.to_string()).unwrap();
        fs::write("/run/cache/results/net-torn-eth0", "").unwrap();
        calls();
        drop(network);
        let network = open();
        wait(network.retain(std::slice::from_ref(&kept.sandbox))).unwrap();
        assert_eq!(calls(), ["STATUS plugin", "DEL plugin", "GC plugin"]);
        let variables = fs::read_to_string("/run/log/plugin.DEL.env").unwrap();
        assert!(
            variables.contains("CNI_CONTAINERID=lost\n") && variables.contains("CNI_NETNS=\n"),
            "{variables}"
        );
        assert!(variables.contains("K8S_POD_NAME=name-lost;"), "{variables}");
        let mut valid =
            read_json("/run/log/plugin.GC.json")["cni.dev/valid-attachments"].as_array().unwrap().clone();
        valid.sort_by_key(ToString::to_string);
        let of = |id: &str| json!({"containerID": id, "ifname": "eth0"});
        assert_eq!(valid, [of("foreign"), of("kept")]);
        let gc = fs::read_to_string("/run/log/plugin.GC.env").unwrap();
        assert_eq!(gc, "CNI_COMMAND=GC\nCNI_PATH=/run/plugins:/usr/lib/cni\n");
        assert_eq!(names("/run/cache/results"), ["net-foreign-eth0", "net-kept-eth0", "net-torn-eth0"]);
        // A torn entry of a sandbox that is being torn down: by the current configuration.
        let torn = Pod::new("torn");
        teardown(&network, &torn);
        assert_eq!(calls(), ["DEL plugin"]);
        teardown(&network, &kept);
        for pod in [&torn, &kept] {
            namespace::release(&pod.namespaces).unwrap();
        }
    });
}

#[test]
fn hostile_sandboxes_are_refused() {
    isolated(|| {
        script("plugin");
        configure("10-net.conflist", &single("1.0.0", &["plugin"]));
        let network = open();
        let pod = Pod::new("pod");
        let mut sandbox = pod.sandbox.clone();
        sandbox.name = "a;K8S_POD_NAMESPACE=kube-system".into();
        let error = words(&wait(network.setup(&sandbox)).unwrap_err());
        assert!(
            error.starts_with("K8S_POD_NAME \"a;K8S_POD_NAMESPACE=kube-system\" cannot be part of CNI_ARGS"),
            "{error}"
        );
        sandbox.id = "../../etc/x".into();
        assert!(words(&wait(network.setup(&sandbox)).unwrap_err()).starts_with("sandbox id \"../../etc/x\""));
        assert!(words(&wait(network.teardown(Kind::Cni, &sandbox)).unwrap_err()).starts_with("sandbox id"));
        assert_eq!(calls(), [""; 0]);
        namespace::release(&pod.namespaces).unwrap();
    });
}
