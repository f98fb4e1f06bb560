//! Edits as vendors write them, and what a spec looks like afterwards.

use oci_spec::runtime::{Process, User};
use serde_json::{Value, json};

use super::*;

fn spec(uid: u32) -> Spec {
    let mut user = User::default();
    user.set_uid(uid).set_gid(uid);
    let mut process = Process::default();
    process.set_user(user).set_env(Some(vec!["PATH=/bin".into(), "A=old".into()]));
    let mount = |destination: &str| {
        let mut mount = OciMount::default();
        mount.set_destination(destination.into()).set_source(None).set_typ(None).set_options(None);
        mount
    };
    let mut linux = Linux::default();
    linux.set_resources(None).set_devices(None).set_namespaces(None);
    let mut spec = Spec::default();
    spec.set_process(Some(process))
        .set_mounts(Some(vec![mount("/proc"), mount("/dev"), mount("/dev/shm"), mount("/data")]))
        .set_linux(Some(linux));
    spec
}

fn host(path: &Path) -> io::Result<HostNode> {
    match path.to_str() {
        Some("/dev/gpu0") => Ok(HostNode { kind: 'c', major: 195, minor: 7, mode: 0o660 }),
        Some("/dev/disk") => Ok(HostNode { kind: 'b', major: 8, minor: 1, mode: 0o600 }),
        Some("/dev/pipe") => Ok(HostNode { kind: 'p', major: 0, minor: 0, mode: 0o622 }),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The spec after these edits, as JSON.
fn edited(uid: u32, edits: Value) -> Result<Value, CdiError> {
    let edits: ContainerEdits = serde_json::from_value(edits).unwrap();
    let mut spec = spec(uid);
    apply(&mut spec, &edits, host)?;
    Ok(serde_json::to_value(spec).unwrap())
}

#[test]
fn nodes_are_completed_from_the_host() {
    let node = |kind: &str, major: i64, minor: i64, mode: Value, owner: Value| {
        let mut node = json!({"path": "/dev/x", "type": kind, "major": major, "minor": minor});
        if !mode.is_null() {
            node["fileMode"] = mode;
        }
        if !owner.is_null() {
            node["uid"] = owner.clone();
            node["gid"] = owner;
        }
        node
    };
    let rule = |kind: &str, major: i64, minor: i64, access: &str| json!([{"allow": true, "type": kind, "major": major, "minor": minor, "access": access}]);
    #[rustfmt::skip]
    let table = [
        (0, json!({"path": "/dev/x", "hostPath": "/dev/gpu0"}),
         node("c", 195, 7, json!(0o660), Value::Null), rule("c", 195, 7, "rwm")),
        (0, json!({"path": "/dev/x", "hostPath": "/dev/disk", "type": "b", "permissions": "r"}),
         node("b", 8, 1, json!(0o600), Value::Null), rule("b", 8, 1, "r")),
        // Everything is said: nobody has to be there.
        (0, json!({"path": "/dev/x", "type": "c", "major": 5, "minor": 6}),
         node("c", 5, 6, Value::Null, Value::Null), rule("c", 5, 6, "rwm")),
        (0, json!({"path": "/dev/x", "hostPath": "/dev/gpu0", "type": "c", "major": 5, "fileMode": 438}),
         node("c", 5, 0, json!(0o666), Value::Null), rule("c", 5, 0, "rwm")),
        // The container's user, unless somebody else is meant.
        (1000, json!({"path": "/dev/x", "hostPath": "/dev/gpu0"}),
         node("c", 195, 7, json!(0o660), json!(1000)), rule("c", 195, 7, "rwm")),
        (1000, json!({"path": "/dev/x", "hostPath": "/dev/gpu0", "uid": 0, "gid": 0}),
         node("c", 195, 7, json!(0o660), json!(0)), rule("c", 195, 7, "rwm")),
        (0, json!({"path": "/dev/x", "hostPath": "/dev/pipe"}),
         node("p", 0, 0, json!(0o622), Value::Null), Value::Null),
    ];
    for (uid, asked, made, rules) in table {
        let spec = edited(uid, json!({"deviceNodes": [asked.clone()]})).unwrap();
        assert_eq!(spec["linux"]["devices"], json!([made]), "{asked}");
        assert_eq!(spec["linux"]["resources"]["devices"], rules, "{asked}");
    }
    for (asked, part) in [
        (json!({"path": "/dev/none"}), "device node /dev/none"),
        (json!({"path": "/dev/x", "hostPath": "/dev/none", "type": "c"}), "device node /dev/none"),
        (json!({"path": "/dev/gpu0", "type": "b"}), "has type c, not b"),
    ] {
        let error = edited(0, json!({"deviceNodes": [asked]})).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    // The last word about a path counts.
    let twice = json!([{"path": "/dev/gpu0"}, {"path": "/dev/gpu0", "type": "c", "major": 1, "minor": 3}]);
    let spec = edited(0, json!({"deviceNodes": twice})).unwrap();
    assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
    assert_eq!(spec["linux"]["devices"][0]["major"], 1);
}

#[test]
fn variables_groups_and_network_devices() {
    let spec = edited(
        0,
        json!({
            "env": ["A=new", "B=1=2", "B=3"],
            "additionalGids": [44, 0, 44, 107],
            "netDevices": [{"hostInterfaceName": "eth7", "name": "rdma0"}],
        }),
    )
    .unwrap();
    assert_eq!(spec["process"]["env"], json!(["PATH=/bin", "A=new", "B=3"]));
    assert_eq!(spec["process"]["user"]["additionalGids"], json!([44, 107]));
    assert_eq!(spec["linux"]["netDevices"], json!({"eth7": {"name": "rdma0"}}));
}

#[test]
fn mounts_in_an_order_that_hides_none() {
    let spec = edited(
        0,
        json!({"mounts": [
            {"hostPath": "/usr/lib/x.so", "containerPath": "/usr/lib/deep/x.so", "options": ["ro", "bind"]},
            {"hostPath": "/other", "containerPath": "/data/"},
            {"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs", "options": ["size=1m"]},
        ]}),
    )
    .unwrap();
    let mounts = spec["mounts"].as_array().unwrap();
    let order: Vec<_> = mounts.iter().map(|mount| mount["destination"].as_str().unwrap()).collect();
    assert_eq!(order, ["/proc", "/dev", "/data", "/t", "/dev/shm", "/usr/lib/deep/x.so"]);
    assert_eq!(mounts[2], json!({"destination": "/data", "source": "/other", "options": ["rbind"]}));
    assert_eq!(mounts[3]["type"], "tmpfs");
    assert_eq!(mounts[3]["options"], json!(["size=1m"]));
    assert_eq!(mounts[5]["options"], json!(["ro", "bind"]));
}

#[test]
fn hooks_and_cache() {
    let hook = |name: &str| json!({"hookName": name, "path": "/bin/hook", "args": ["hook", name], "env": ["X=1"], "timeout": 5});
    let names = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    let spec = edited(
        0,
        json!({
            "hooks": names.map(hook).to_vec(),
            "intelRdt": {"closID": "gold", "l3CacheSchema": "L3:0=f", "schemata": ["MB:0=50"], "enableMonitoring": true},
        }),
    )
    .unwrap();
    for name in names {
        let expected = json!([{"path": "/bin/hook", "args": ["hook", name], "env": ["X=1"], "timeout": 5}]);
        assert_eq!(spec["hooks"][name], expected, "{name}");
    }
    let rdt = json!({"closID": "gold", "l3CacheSchema": "L3:0=f", "schemata": ["MB:0=50"], "enableMonitoring": true});
    assert_eq!(spec["linux"]["intelRdt"], rdt);
}
