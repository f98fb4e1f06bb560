//! Configurations as operators write them: files, drop-ins, mistakes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use podvisor_config::{
    CgroupDriver, Config, ConfigError, Handler, HandlerKind, LogFormat, NetworkMode, Problem, ProblemKind,
    Trust,
};
use tempfile::TempDir;

const FILE: &str = "/etc/podvisor/config.toml";

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new(FILE), text)
}

fn problems(text: &str) -> Vec<Problem> {
    match parse(text) {
        Err(ConfigError::Invalid { problems }) => problems,
        other => panic!("expected problems in {text:?}, got {other:?}"),
    }
}

/// The message for a text with exactly one mistake, without the file's name.
fn problem(text: &str) -> String {
    let problems = problems(text);
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0].to_string().strip_prefix(FILE).expect("the file is named").to_owned()
}

fn oci(path: &str, root: &str, arguments: &[&str]) -> HandlerKind {
    let arguments = arguments.iter().map(ToString::to_string).collect();
    HandlerKind::Oci { path: path.into(), root: root.into(), arguments, sandbox_container: false }
}

/// A configuration whose every key differs from its default.
const EVERYTHING: &str = r#"
root = "/srv/podvisor"
run = "/run/other"
socket = "/run/other.sock"

[log]
level = "info,podvisor::pod=debug"
format = "json"

[metrics]
address = "127.0.0.1:9471"

[streaming]
address = "0.0.0.0:10010"
tls_cert = "/etc/podvisor/cert.pem"
tls_key = "/etc/podvisor/key.pem"
token_lifetime = 30
idle_timeout = 3_600

[runtime]
cgroup_driver = "cgroupfs"
trusted_handler = "youki"
untrusted_handler = "runsc"
default_workload_trust = "untrusted"
monitor = "/opt/podvisor/podvisor-monitor"
monitor_cgroup = "/monitors/of/podvisor"
seccomp_profile = "/etc/podvisor/seccomp.json"
seccomp_root = "/etc/seccomp"
cdi_spec_dirs = ["/opt/cdi"]
monitor_pool = 0

[runtime.handlers]
crun = false
youki = { type = "oci" }

[runtime.handlers.runc]
path = "/usr/local/bin/runc"
arguments = ["--debug", "--log=\"x\\y\t\u007f"]

[runtime.handlers.runsc]
type = "oci"
root = "/run/runsc"
sandbox_container = true
annotations = ["dev.gvisor.*", "example.com/exact"]
aliases = ["gvisor"]

[runtime.handlers.vm]
hypervisor = "qemu"
allow_emulation = true
qemu = "/opt/qemu"
machine = "microvm"
guest = "0123456789abcdef"
default_memory = 256
guest_reserve = 64
max_memory = 4096
default_cpus = 2
max_cpus = 4
rootfs = "fs"
share_images = "pod"
writable = "disk"
writable_size = 100
aliases = ["kata"]

[image]
pause_image = "registry.k8s.io/pause:3.10.2"
registries_conf = "/etc/registries.conf"
certs_dir = "/etc/certs.d"
auth_files = []
default_registries = ["quay.io", "[::1]:5000"]
parallel_layers = 0x10
progress_timeout = 5

[network]
mode = "builtin"
cni_config_dir = "/etc/cni/other"
cni_bin_dirs = ["/usr/libexec/cni"]
cni_cache_dir = "/var/lib/cni-other"
cni_timeout = 10
bridge = "br-pods"
subnets = ["fd00:1::/64", "192.168.0.0/24"]

[nri]
enabled = false
socket = "/run/nri-other.sock"
plugin_dir = "/usr/libexec/nri"
plugin_config_dir = "/etc/nri/other"
registration_timeout = 9
request_timeout = 8
disable_connections = true

[limits]
exec_sync_output = 1024
log_line = 4096
pids = 512
drain_timeout = 0
runtime_timeout = 5
grpc_message = 4194304
"#;

#[test]
fn the_documented_default_file_is_the_default() {
    assert_eq!(parse(Config::default_toml()).unwrap(), Config::default());
    assert_eq!(parse("").unwrap(), Config::default());
}

/// The assignments of a TOML text in the simple form that default file and printer have: dotted key → value.
fn assignments(text: &str) -> BTreeMap<String, String> {
    let mut section = String::new();
    let mut assignments = BTreeMap::new();
    for line in text.lines() {
        if let Some(header) = line.strip_prefix('[') {
            section = format!("{}.", header.trim_end_matches(']').replace('"', ""));
        } else if let Some((key, value)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            assignments.insert(format!("{section}{key}"), value.to_owned());
        }
    }
    assignments
}

#[test]
fn the_documented_default_file_has_every_key_with_a_comment() {
    // What is printed takes Config apart completely, so it has every key.
    let text = Config::default_toml();
    assert!(assignments(text).keys().eq(assignments(&Config::default().to_toml()).keys()));

    // A key is explained right above it; the second of two like handlers or files is explained by the first.
    let lines: Vec<&str> = text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) else { continue };
        let said = |above: &&str| above.starts_with('#') || above.starts_with(&format!("{key} = "));
        let explained = lines[..at].last().is_some_and(said)
            || lines[..at].contains(&line.replace("crun", "runc").as_str());
        assert!(explained || key == "tls_key", "line {}: {key} has no comment", at + 1);
    }
}

#[test]
fn every_key_is_read() {
    let config = parse(EVERYTHING).unwrap();
    assert_eq!(config.root, Path::new("/srv/podvisor"));
    assert_eq!(config.socket, Path::new("/run/other.sock"));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.metrics.address, Some("127.0.0.1:9471".parse().unwrap()));
    assert_eq!(config.streaming.address, "0.0.0.0:10010".parse().unwrap());
    assert_eq!(config.streaming.idle_timeout, 3600);
    assert_eq!(config.runtime.cgroup_driver, CgroupDriver::Cgroupfs);
    assert_eq!(config.runtime.default_workload_trust, Trust::Untrusted);
    assert_eq!(config.runtime.untrusted_handler.as_deref(), Some("runsc"));
    assert_eq!(config.image.parallel_layers, 16);
    assert_eq!(config.network.mode, NetworkMode::Builtin);
    assert_eq!(config.network.subnets[1], ("192.168.0.0".parse().unwrap(), 24));
    assert_eq!(config.limits.pids, 512);
    let handlers: Vec<_> = config.handlers.keys().map(String::as_str).collect();
    assert_eq!(handlers, ["runc", "runsc", "vm", "youki"]);
    let annotations = vec!["dev.gvisor.*".to_owned(), "example.com/exact".to_owned()];
    let kind = HandlerKind::Oci {
        path: "runsc".into(),
        root: "/run/runsc".into(),
        arguments: Vec::new(),
        sandbox_container: true,
    };
    assert_eq!(config.handlers["runsc"], Handler { kind, annotations, aliases: vec!["gvisor".to_owned()] });
    assert_eq!(config.handlers["youki"].kind, oci("youki", "/run/other/youki", &[]));
    let arguments = ["--debug", "--log=\"x\\y\t\u{7f}"];
    assert_eq!(config.handlers["runc"].kind, oci("/usr/local/bin/runc", "/run/other/runc", &arguments));

    // No line was without effect, and no key was forgotten above.
    let (changed, default) = (assignments(&config.to_toml()), assignments(&Config::default().to_toml()));
    for (key, value) in default.iter().filter(|(key, _)| changed.contains_key(*key)) {
        let same = ["runc.type", "runc.annotations", "runc.sandbox_container", "runc.aliases", "vm.type"]
            .iter()
            .any(|shown_elsewhere| *key == format!("runtime.handlers.{shown_elsewhere}"));
        assert!(same || changed[key] != *value, "{key} = {value}");
    }
}

#[test]
fn what_is_printed_reads_back() {
    for text in ["", EVERYTHING, "run = \"/run/x\"\n[runtime.handlers]\ncrun = false"] {
        let config = parse(text).unwrap();
        assert_eq!(parse(&config.to_toml()).unwrap(), config);
    }
}

#[test]
fn what_lies_in_the_run_directory_moves_with_it() {
    let config = parse("run = \"/run/second\"\n[runtime.handlers.crun]\nroot = \"/run/crun\"").unwrap();
    assert_eq!(config.socket, Path::new("/run/second/podvisor.sock"));
    assert_eq!(config.handlers["runc"].kind, oci("runc", "/run/second/runc", &[]));
    assert_eq!(config.handlers["crun"].kind, oci("crun", "/run/crun", &[]));
}

#[test]
fn mistakes_name_file_line_key_and_what_is_allowed() {
    let cases = [
        // Keys that there are not.
        ("\n[log]\nlvel = \"info\"", ":3: unknown key log.lvel; the nearest known key is log.level"),
        ("[stremaing]\naddress = \"\"", ":1: unknown key stremaing; the nearest known key is streaming"),
        (
            "cgroup_driver = \"auto\"",
            ":1: unknown key cgroup_driver; the nearest known key is runtime.cgroup_driver",
        ),
        (
            "[runtime.handlers.runc]\npth = \"runc\"",
            ":2: unknown key runtime.handlers.runc.pth; the nearest known key is runtime.handlers.runc.path",
        ),
        ("\"a\\nb\" = 1", ":1: unknown key a\\nb; the nearest known key is run"),
        // Types and words.
        ("log = 1", ":1: log = 1: allowed is a table"),
        ("[log]\nformat = \"yaml\"", ":2: log.format = \"yaml\": allowed is \"text\" or \"json\""),
        (
            "[log]\nlevel = \"loud\"",
            ":2: log.level = \"loud\": allowed is off, error, warn, info, debug or trace, or a list like \
             info,podvisor::pod=debug",
        ),
        (
            "[runtime]\ncgroup_driver = true",
            ":2: runtime.cgroup_driver = true: allowed is \"auto\" or \"cgroupfs\" or \"systemd\"",
        ),
        // Ranges.
        (
            "[image]\nparallel_layers = 65",
            ":2: image.parallel_layers = 65: allowed is an integer from 1 to 64 (layers)",
        ),
        (
            "[limits]\nexec_sync_output = 99999999999999999999",
            ":2: limits.exec_sync_output = 99999999999999999999: allowed is an integer from 1 to 16777216 (bytes)",
        ),
        (
            "[limits]\npids = 0",
            ":2: limits.pids = 0: allowed is -1 (no limit) or an integer from 1 to 4194304",
        ),
        (
            "[limits]\nlog_line = 1.5",
            ":2: limits.log_line = 1.5: allowed is an integer from 256 to 1048576 (bytes)",
        ),
        // Paths.
        (
            "root = \"var/lib\"",
            ":1: root = \"var/lib\": allowed is an absolute path without \"..\", and not / itself",
        ),
        ("root = \"/\"", ":1: root = \"/\": allowed is an absolute path without \"..\", and not / itself"),
        (
            "run = \"/run/../tmp\"",
            ":1: run = \"/run/../tmp\": allowed is an absolute path without \"..\", and not / itself",
        ),
        (
            "[image]\nauth_files = [\n  \"/a\",\n  \"b\",\n]",
            ":4: image.auth_files = \"b\": allowed is an absolute path without \"..\"",
        ),
        (
            "[runtime.handlers.runc]\npath = \"bin/runc\"",
            ":2: runtime.handlers.runc.path = \"bin/runc\": allowed is an absolute path without \"..\", or a bare name \
             that is looked up in PATH",
        ),
        (
            "[runtime]\nmonitor = \"podvisor-monitor\"",
            ":2: runtime.monitor = \"podvisor-monitor\": allowed is an absolute path without \"..\", or \"\" for none",
        ),
        // Handlers.
        (
            "[runtime.handlers.kata]\ntype = \"kata\"",
            ":2: runtime.handlers.kata.type = \"kata\": allowed is \"oci\" or \"vm\"",
        ),
        (
            "[runtime.handlers.youki]\npath = \"youki\"",
            ":1: runtime.handlers.youki: a new handler needs a type; allowed are type = \"oci\" and type = \"vm\"",
        ),
        (
            "[runtime.handlers.vm]\npath = \"vm\"",
            ":2: unknown key runtime.handlers.vm.path; the nearest known key is runtime.handlers.vm.qemu",
        ),
        (
            "[runtime.handlers.vm]\nguest = \"6.12\"",
            ":2: runtime.handlers.vm.guest = \"6.12\": allowed is the id of a guest (16 hex digits, see podvisor guest \
             list), or \"\" for the current one",
        ),
        (
            "[runtime.handlers.other]\ntype = \"vm\"\naliases = [\"kata\"]",
            ":3: runtime.handlers.vm.aliases: \"kata\" is an alias of handler \"other\" already",
        ),
        (
            "[runtime]\ntrusted_handler = \"vm\"\nuntrusted_handler = \"\"",
            ":2: runtime.trusted_handler: \"vm\" is no handler of type \"oci\"; there are: crun, runc, vm",
        ),
        (
            "[runtime.handlers]\nrunc = \"runc\"",
            ":2: runtime.handlers.runc = \"runc\": allowed is a table, or false to remove the handler",
        ),
        (
            "[runtime.handlers.Kata_FC]\ntype = \"oci\"",
            ":1: name of runtime.handlers.Kata_FC = \"Kata_FC\": allowed is at most 63 lowercase letters, digits and \
             \"-\", beginning and ending with a letter or digit",
        ),
        (
            "[runtime]\n\ntrusted_handler = \"youki\"",
            ":3: runtime.trusted_handler: \"youki\" is no handler of type \"oci\"; there are: crun, runc, vm",
        ),
        (
            "\n[runtime.handlers]\nrunc = false",
            ":3: runtime.trusted_handler: \"runc\" is no handler of type \"oci\"; there are: crun, vm",
        ),
        (
            "[runtime]\nuntrusted_handler = \"gvisor\"",
            ":2: runtime.untrusted_handler: \"gvisor\" is no handler; there are: crun, runc, vm",
        ),
        (
            "[runtime]\nuntrusted_handler = \"runc\"",
            ":2: runtime.untrusted_handler: \"runc\" is the trusted handler and cannot be the untrusted one too",
        ),
        (
            "[runtime]\ndefault_workload_trust = \"untrusted\"\nuntrusted_handler = \"\"",
            ":2: runtime.default_workload_trust: \"untrusted\" needs runtime.untrusted_handler, which names the \
             handler of such pods",
        ),
        // Addresses.
        (
            "[streaming]\naddress = \"localhost:0\"",
            ":2: streaming.address = \"localhost:0\": allowed is an address and port like 127.0.0.1:0 or [::1]:10010",
        ),
        (
            "[streaming]\naddress = \"10.0.0.1:0\"",
            ":2: streaming.address: 10.0.0.1:0 is not a loopback address, so tls_cert and tls_key must be set; \
             without them allowed is 127.0.0.1 or [::1]",
        ),
        ("[streaming]\ntls_cert = \"/cert.pem\"", ":2: streaming.tls_key: tls_cert needs tls_key as well"),
        ("[streaming]\ntls_key = \"/key.pem\"", ":2: streaming.tls_cert: tls_key needs tls_cert as well"),
        (
            "[network]\nsubnets = [\"10.88.0.1/16\"]",
            ":2: network.subnets = \"10.88.0.1/16\": allowed is the range itself without host bits: 10.88.0.0/16",
        ),
        (
            "[network]\nsubnets = [\"10.0.0.0/16\", \"10.1.0.0/16\"]",
            ":2: network.subnets = \"10.1.0.0/16\": allowed is at most one IPv4 and one IPv6 range",
        ),
        (
            "[network]\nmode = \"builtin\"\nsubnets = []",
            ":3: network.subnets: the built-in network needs at least one range, like [\"10.88.0.0/16\"]",
        ),
        // Contradictions and syntax.
        ("run = \"/var/lib/podvisor\"", ":1: root: root and run must be different directories"),
        (
            "[runtime]\nmonitor_cgroup = \"/a/b\"",
            ":2: runtime.monitor_cgroup: \"/a/b\" must be the name of a slice like podvisor.slice, unless \
             cgroup_driver is \"cgroupfs\"",
        ),
        ("root = \"/a\"\nroot = \"/b\"", ":2: not valid TOML: duplicate key"),
    ];
    for (text, expected) in cases {
        assert_eq!(problem(text), expected, "{text}");
    }
}

#[test]
fn refused_values() {
    let cases = [
        ("network.bridge", vec!["\"\"", "\"sixteen-letters-\"", "\"a/b\"", "\"a b\"", "\"..\"", "\"a:1\""]),
        (
            "network.subnets",
            vec![
                "\"10.88.0.0/16\"",
                "[\"10.88.0.0\"]",
                "[\"10.88.0.0/33\"]",
                "[\"10.88.0.0/+8\"]",
                "[\"10.88.0.0/30\"]",
                "[\"0.0.0.0/8\"]",
                "[\"127.0.0.0/8\"]",
                "[\"224.0.0.0/8\"]",
                "[\"169.254.0.0/16\"]",
                "[\"fe80::/64\"]",
                "[\"::/64\"]",
                "[\"ff00::/16\"]",
                "[\"fd00::/128\"]",
                "[1]",
            ],
        ),
        ("image.pause_image", vec!["\"https://registry/pause\"", "\"a b\"", "1"]),
        (
            "image.default_registries",
            vec!["\"docker.io\"", "[\"https://docker.io\"]", "[\"docker.io/library\"]"],
        ),
        ("runtime.monitor_cgroup", vec!["\"\"", "\"/\"", "\"../x.slice\"", "\".slice\"", "\"a/b.slice\""]),
        ("runtime.handlers.runc.sandbox_container", vec!["1", "\"true\""]),
        ("runtime.handlers.runc.arguments", vec!["\"--debug\"", "[\"\"]", "[1]", "[\"a\\u0000\"]"]),
        ("runtime.handlers.runc.annotations", vec!["[\"\"]", "[\"a*b\"]", "[\"a b\"]"]),
        (
            "runtime.handlers.runc.path",
            vec!["\"\"", "\"..\"", "\".\"", "\"./runc\"", "\"runc/\"", "\"a\\u0000b\""],
        ),
        ("log.level", vec!["\"\"", "\"info,\"", "\"podvisor\"", "\"=info\"", "\"a=b\"", "\"[span]=info\""]),
        ("nri.enabled", vec!["1", "\"true\""]),
        ("nri.request_timeout", vec!["0", "601"]),
        ("limits.grpc_message", vec!["4194303", "67108865", "-1", "\"1\""]),
        ("socket", vec!["\"podvisor.sock\"", "\"/\""]),
    ];
    for (key, values) in cases {
        for value in values {
            let problems = problems(&format!("{key} = {value}"));
            assert_eq!(problems[0].key, key, "{value}");
            assert_eq!(problems[0].line, Some(1), "{value}");
        }
    }
    let long = format!("socket = \"/{}\"", "x".repeat(107));
    assert!(matches!(problems(&long)[0].kind, ProblemKind::BadValue { .. }));
    assert!(parse(&long.replacen('x', "", 1)).is_ok());
}

#[test]
fn all_mistakes_are_reported_at_once_and_in_order() {
    let error = parse("[log]\nlvel = 1\nformat = 2\n[image]\nparallel_layers = 0\n[foo]\n").unwrap_err();
    let lines: Vec<_> =
        error.to_string().lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(lines, ["2", "3", "5", "6"].map(|line| format!("{FILE}:{line}:")));
}

#[test]
fn messages_are_bounded_and_printable() {
    let long = "x".repeat(100_000);
    let error =
        parse(&format!("\"{long}\" = 1\n[log]\nlevel = \"{long}\\u001b[2J\"")).unwrap_err().to_string();
    assert!(error.len() < 600, "{}", error.len());
    assert!(!error.contains('\u{1b}'));
}

struct Tree {
    directory: TempDir,
}

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

#[test]
fn drop_ins_override_key_by_key_in_lexical_order() {
    let tree = Tree::new(&[
        (
            "config.toml",
            "[log]\nlevel = \"warn\"\nformat = \"json\"\n[runtime.handlers.runsc]\ntype = \"oci\"\n",
        ),
        (
            "config.toml.d/20-b.toml",
            "[log]\nlevel = \"debug\"\n[runtime.handlers]\nrunsc.path = \"/opt/runsc\"\n",
        ),
        (
            "config.toml.d/10-a.toml",
            "[log]\nlevel = \"trace\"\n[limits]\npids = 7\n[runtime.handlers]\ncrun = false",
        ),
        ("config.toml.d/30-c.toml", "[runtime.handlers.crun]\ntype = \"oci\"\narguments = [\"--debug\"]"),
        ("config.toml.d/.99.toml", "broken"),
        ("config.toml.d/readme", "broken"),
    ]);
    let config = Config::load(&tree.path("config.toml"), true).unwrap();
    assert_eq!(config.log.level, "debug");
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.limits.pids, 7);
    assert_eq!(config.handlers["runsc"].kind, oci("/opt/runsc", "/run/podvisor/runsc", &[]));
    assert_eq!(config.handlers["crun"].kind, oci("crun", "/run/podvisor/crun", &["--debug"]));
}

#[test]
fn mistakes_of_all_files_are_reported_with_their_file() {
    let tree = Tree::new(&[
        ("config.toml", "[log]\nlevel = \"loud\"\n"),
        ("config.toml.d/10.toml", "\n\n[log]\nlevel = \"info\"\nfomat = \"text\""),
        ("config.toml.d/20.toml", "["),
    ]);
    let Err(ConfigError::Invalid { problems }) = Config::load(&tree.path("config.toml"), true) else {
        panic!()
    };
    let places: Vec<_> = problems.iter().map(|problem| (problem.file.clone(), problem.line)).collect();
    let expected = [("config.toml", 2), ("config.toml.d/10.toml", 5), ("config.toml.d/20.toml", 1)];
    assert_eq!(places, expected.map(|(name, line)| (tree.path(name), Some(line))));
}

#[test]
fn a_contradiction_is_reported_where_it_was_written() {
    let tree = Tree::new(&[
        ("config.toml", "[runtime]\ntrusted_handler = \"crun\"\n"),
        ("config.toml.d/10.toml", "[runtime.handlers]\ncrun = false"),
    ]);
    let Err(ConfigError::Invalid { problems }) = Config::load(&tree.path("config.toml"), true) else {
        panic!()
    };
    assert_eq!((&problems[0].file, problems[0].line), (&tree.path("config.toml"), Some(2)));
}

#[test]
fn files_that_are_not_there_or_not_text() {
    let tree = Tree::new(&[
        ("other.toml.d/10.toml", "[limits]\npids = 9\n"),
        ("file.toml.d", "a file where a directory is expected"),
    ]);
    let missing = tree.path("config.toml");
    assert_eq!(Config::load(&missing, false).unwrap(), Config::default());
    let error = Config::load(&missing, true).unwrap_err();
    assert!(matches!(&error, ConfigError::Read { path, .. } if *path == missing), "{error}");
    assert_eq!(Config::load(&tree.path("other.toml"), false).unwrap().limits.pids, 9);
    assert!(matches!(Config::load(&tree.path("file.toml"), false), Err(ConfigError::List { .. })));
    assert!(matches!(Config::load(tree.directory.path(), true), Err(ConfigError::Read { .. })));
    assert!(matches!(Config::load(Path::new("/dev/zero"), true), Err(ConfigError::TooLarge { .. })));

    fs::write(&missing, b"# one\n# two \xff\n").unwrap();
    let Err(ConfigError::Invalid { problems }) = Config::load(&missing, true) else { panic!() };
    assert_eq!(problems[0].line, Some(2));
}

#[test]
fn nothing_that_is_written_makes_it_panic() {
    // Every prefix of a file with all constructs, and every single byte replaced by some that matter to TOML.
    for end in 0..EVERYTHING.len() {
        let _ = parse(&EVERYTHING[..end]);
    }
    for at in 0..EVERYTHING.len() {
        for byte in ["\"", "[", "=", "\n", "\0", "é"] {
            let _ = parse(&format!("{}{byte}{}", &EVERYTHING[..at], &EVERYTHING[at + 1..]));
        }
    }
    let _ = parse(&"[".repeat(100_000));
    let _ = parse(&format!("log = {}", "{a=".repeat(100_000)));
    let _ = parse(&"a.".repeat(100_000));
}

#[test]
fn reload_takes_over_what_can_change() {
    let running = parse("").unwrap();
    let wanted = parse(
        "[log]\nlevel = \"debug\"\n[image]\npause_image = \"pause\"\n[limits]\npids = 5\n\
         [runtime]\ntrusted_handler = \"youki\"\nuntrusted_handler = \"runsc\"\ndefault_workload_trust = \"untrusted\"\n\
         [runtime.handlers]\nyouki = { type = \"oci\" }\nrunsc = { type = \"oci\" }\n\
         runc = { path = \"/opt/runc\", annotations = [\"a\"] }",
    )
    .unwrap();
    assert_eq!(running.reload(wanted.clone()), (wanted, vec![]));
}

#[test]
fn reload_keeps_and_names_what_cannot_change() {
    let running = parse("").unwrap();
    let (config, kept) = running.reload(parse(EVERYTHING).unwrap());
    let expected = [
        "root",
        "run",
        "socket",
        "log.format",
        "metrics.address",
        "streaming.address",
        "streaming.tls_cert",
        "streaming.tls_key",
        "streaming.token_lifetime",
        "streaming.idle_timeout",
        "runtime.cgroup_driver",
        "runtime.monitor",
        "runtime.monitor_cgroup",
        "runtime.seccomp_profile",
        "runtime.seccomp_root",
        "runtime.monitor_pool",
        "runtime.handlers.crun",
        "runtime.handlers.runc.root",
        "image.registries_conf",
        "image.certs_dir",
        "image.auth_files",
        "image.default_registries",
        "image.parallel_layers",
        "image.progress_timeout",
        "network.mode",
        "network.cni_config_dir",
        "network.cni_bin_dirs",
        "network.cni_cache_dir",
        "network.cni_timeout",
        "network.bridge",
        "network.subnets",
        "nri.enabled",
        "nri.socket",
        "nri.plugin_dir",
        "nri.plugin_config_dir",
        "nri.registration_timeout",
        "nri.request_timeout",
        "nri.disable_connections",
        "limits.grpc_message",
    ];
    assert_eq!(kept, expected);
    assert_eq!(config.root, running.root);
    assert_eq!(config.network, running.network);
    assert_eq!(config.limits.grpc_message, running.limits.grpc_message);
    assert_eq!(config.limits.pids, 512);
    assert_eq!(config.handlers["crun"], running.handlers["crun"]);
    let arguments = ["--debug", "--log=\"x\\y\t\u{7f}"];
    assert_eq!(config.handlers["runc"].kind, oci("/usr/local/bin/runc", "/run/podvisor/runc", &arguments));
    assert!(config.handlers.contains_key("youki"));
}
