//! Files that the specification allows, and files that it does not.

use serde_json::{Value, json};

use super::*;

fn document() -> Value {
    json!({
        "cdiVersion": "1.1.0",
        "kind": "vendor.com/device",
        "devices": [{"name": "a", "containerEdits": {"env": ["A=1"]}}],
    })
}

fn check(document: &Value) -> Result<(), String> {
    let document: Document = serde_json::from_value(document.clone()).map_err(|error| error.to_string())?;
    document.check().map_err(|error| error.to_string())
}

#[test]
fn what_is_allowed() {
    check(&document()).unwrap();
    let mut full = document();
    full["annotations"] = json!({"whatever": "is said"});
    full["containerEdits"] = Value::Null;
    // YAML without quotes.
    full["devices"][0]["name"] = json!(0);
    full["devices"][0]["containerEdits"] = json!({
        "deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/b", "type": "c", "major": 1, "minor": 2, "fileMode": 438,
                         "permissions": "rw", "uid": 1, "gid": 2}],
        "mounts": [{"hostPath": "/a", "containerPath": "/b", "options": null, "type": "bind"}],
        "hooks": [{"hookName": "createContainer", "path": "/h", "args": ["h", 1], "timeout": 1}],
        "netDevices": [{"hostInterfaceName": "e", "name": "f"}],
        "intelRdt": {"closID": "/"},
        "additionalGids": [5],
    });
    check(&full).unwrap();
    for version in ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "v1.0.0"] {
        let mut old = document();
        old["cdiVersion"] = json!(version);
        check(&old).unwrap();
    }
}

#[test]
fn what_is_refused() {
    type Break = fn(&mut Value);
    fn edits(document: &mut Value) -> &mut Value {
        &mut document["devices"][0]["containerEdits"]
    }
    #[rustfmt::skip]
    let table: [(&str, Break); 27] = [
        ("cdiVersion", |d| d["cdiVersion"] = json!("2.0.0")),
        ("cdiVersion", |d| d["cdiVersion"] = json!("")),
        ("missing field `cdiVersion`", |d| drop(d.as_object_mut().unwrap().remove("cdiVersion"))),
        ("unknown field `device`", |d| d["device"] = json!([])),
        ("kind", |d| d["kind"] = json!("vendor.com")),
        ("kind", |d| d["kind"] = json!("vendor.com/a/b")),
        ("devices", |d| d["devices"] = json!([])),
        ("devices[0].name", |d| d["devices"][0]["name"] = json!("a=b")),
        ("devices[1].name", |d| { let again = d["devices"][0].clone(); d["devices"].as_array_mut().unwrap().push(again); }),
        ("devices[0].containerEdits", |d| *edits(d) = json!({})),
        ("devices[0].containerEdits.env", |d| *edits(d) = json!({"env": ["novalue"]})),
        ("devices[0].containerEdits.env", |d| *edits(d) = json!({"env": ["=x"]})),
        ("containerEdits.env", |d| d["containerEdits"] = json!({"env": ["x"]})),
        ("deviceNodes[0].path", |d| *edits(d) = json!({"deviceNodes": [{"path": ""}]})),
        ("deviceNodes[0].path", |d| *edits(d) = json!({"deviceNodes": [{"path": "dev/x"}]})),
        ("deviceNodes[0].type", |d| *edits(d) = json!({"deviceNodes": [{"path": "/dev/x", "type": "d"}]})),
        ("deviceNodes[0].permissions", |d| *edits(d) = json!({"deviceNodes": [{"path": "/dev/x", "permissions": "rx"}]})),
        ("mounts[0].hostPath", |d| *edits(d) = json!({"mounts": [{"hostPath": "", "containerPath": "/a"}]})),
        ("mounts[0].containerPath", |d| *edits(d) = json!({"mounts": [{"hostPath": "/a", "containerPath": "a"}]})),
        ("hooks[0].hookName", |d| *edits(d) = json!({"hooks": [{"hookName": "onStart", "path": "/x"}]})),
        ("hooks[0].path", |d| *edits(d) = json!({"hooks": [{"hookName": "poststop", "path": ""}]})),
        ("hooks[0].timeout", |d| *edits(d) = json!({"hooks": [{"hookName": "poststop", "path": "/x", "timeout": 0}]})),
        ("netDevices[1].name", |d| *edits(d) = json!({"netDevices": [
            {"hostInterfaceName": "a", "name": "x"}, {"hostInterfaceName": "b", "name": "x"}]})),
        ("netDevices[0].hostInterfaceName", |d| *edits(d) = json!({"netDevices": [{"hostInterfaceName": "", "name": "x"}]})),
        ("intelRdt.closID", |d| *edits(d) = json!({"intelRdt": {"closID": "../x"}})),
        ("at least 1.1.0", |d| { d["cdiVersion"] = json!("1.0.0"); *edits(d) = json!({"intelRdt": {"enableMonitoring": true}}); }),
        ("at least 0.7.0", |d| { d["cdiVersion"] = json!("0.6.0"); *edits(d) = json!({"additionalGids": [5]}); }),
    ];
    for (part, break_it) in table {
        let mut broken = document();
        break_it(&mut broken);
        let error = check(&broken).expect_err(part);
        assert!(error.contains(part), "{part}: {error}");
    }
    for (version, needed, change) in [
        ("1.0.0", "1.1.0", json!({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]})),
        ("0.6.0", "0.7.0", json!({"intelRdt": {"closID": "a"}})),
        ("0.4.0", "0.5.0", json!({"deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/b"}]})),
        ("0.3.0", "0.4.0", json!({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]})),
    ] {
        let mut old = document();
        *edits(&mut old) = change;
        old["cdiVersion"] = json!(version);
        assert!(check(&old).unwrap_err().contains(&format!("at least {needed}")), "{old}");
        old["cdiVersion"] = json!(needed);
        check(&old).unwrap();
    }
}
