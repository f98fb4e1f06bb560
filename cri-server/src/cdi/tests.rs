//! Directories as vendors and administrators leave them.

use std::fs;

use oci_spec::runtime::Process;
use tempfile::TempDir;

use super::*;

struct Place {
    directory: TempDir,
    files: Files,
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap(), files: Files::default() };
        for name in ["etc", "run"] {
            fs::create_dir(place.directory.path().join(name)).unwrap();
        }
        place
    }

    fn directories(&self) -> Vec<PathBuf> {
        ["etc", "run", "never-there"].map(|name| self.directory.path().join(name)).to_vec()
    }

    fn write(&self, file: &str, devices: &[&str]) {
        let described = devices.iter().fold(String::new(), |text, device| {
            format!("{text}- name: \"{device}\"\n  containerEdits:\n    env: [\"{device}={file}\"]\n")
        });
        let text = format!(
            "cdiVersion: 0.6.0\nkind: vendor.com/dev\ncontainerEdits:\n  env: [\"ALL={file}\"]\ndevices:\n{described}"
        );
        fs::write(self.directory.path().join(file), text).unwrap();
    }

    /// The environment of a container that asks for these.
    fn inject(&self, devices: &[&str]) -> Result<Vec<String>, String> {
        let names: Vec<_> = devices.iter().map(|device| format!("vendor.com/dev={device}")).collect();
        let mut process = Process::default();
        process.set_env(None);
        let mut spec = Spec::default();
        spec.set_process(Some(process));
        let directories = self.directories();
        edit(&self.files.devices(&directories), &directories, &mut spec, &names)
            .map_err(|error| crate::error::chain(&error))?;
        Ok(spec.process().as_ref().unwrap().env().clone().unwrap_or_default())
    }
}

#[test]
fn later_directories_decide_and_equal_ones_conflict() {
    let place = Place::new();
    place.write("etc/a.yaml", &["0", "1"]);
    place.write("run/b.yaml", &["1", "2"]);
    assert_eq!(place.inject(&["0"]).unwrap(), ["ALL=etc/a.yaml", "0=etc/a.yaml"]);
    assert_eq!(place.inject(&["1"]).unwrap(), ["ALL=run/b.yaml", "1=run/b.yaml"]);
    // A file's own edits once, before its first device.
    assert_eq!(place.inject(&["2", "1", "2"]).unwrap(), ["ALL=run/b.yaml", "2=run/b.yaml", "1=run/b.yaml"]);
    place.write("run/c.json.yaml", &["2"]);
    let error = place.inject(&["2"]).unwrap_err();
    assert!(
        error.contains("vendor.com/dev=2") && error.contains("b.yaml") && error.contains("c.json.yaml"),
        "{error}"
    );
    assert!(place.inject(&["1"]).is_ok(), "the others are not in conflict");
    // Two that contradict each other, and one above both.
    place.write("etc/d.yaml", &["0"]);
    assert!(place.inject(&["0"]).is_err());
    place.write("run/e.yaml", &["0"]);
    assert_eq!(place.inject(&["0"]).unwrap(), ["ALL=run/e.yaml", "0=run/e.yaml"]);
}

#[test]
fn changes_count_at_once() {
    let place = Place::new();
    let error = place.inject(&["0"]).unwrap_err();
    for directory in place.directories() {
        assert!(error.contains(directory.to_str().unwrap()), "{error}");
    }
    place.write("etc/a.yaml", &["0"]);
    assert_eq!(place.inject(&["0"]).unwrap().len(), 2);
    place.write("etc/a.yaml", &["1"]);
    assert!(place.inject(&["0"]).is_err());
    assert!(place.inject(&["1"]).is_ok());
    fs::rename(place.directory.path().join("etc/a.yaml"), place.directory.path().join("etc/a.off")).unwrap();
    assert!(place.inject(&["1"]).is_err());
    assert_eq!(place.inject(&[]).unwrap(), [] as [String; 0]);
}

#[test]
fn a_file_that_cannot_be_used_is_named_where_it_may_matter() {
    let place = Place::new();
    place.write("etc/good.yaml", &["0"]);
    fs::write(place.directory.path().join("etc/bad.json"), "{\"cdiVersion\": \"0.6.0\"").unwrap();
    fs::write(place.directory.path().join("etc/newer.yaml"), "cdiVersion: 9.0.0\nkind: a/b\n").unwrap();
    fs::create_dir(place.directory.path().join("etc/directory.yaml")).unwrap();
    assert!(place.inject(&["0"]).is_ok(), "others do not suffer");
    let error = place.inject(&["7"]).unwrap_err();
    for part in ["vendor.com/dev=7", "bad.json cannot be used", "newer.yaml cannot be used", "9.0.0"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_missing_node_names_the_device_and_the_file() {
    let place = Place::new();
    let text = r#"{"cdiVersion": "0.5.0", "kind": "vendor.com/dev", "devices": [
        {"name": "x", "containerEdits": {"deviceNodes": [{"path": "/dev/never-there"}]}},
        {"name": "null", "containerEdits": {"deviceNodes": [{"path": "/dev/y", "hostPath": "/dev/null"}]}}]}"#;
    fs::write(place.directory.path().join("etc/a.json"), text).unwrap();
    let error = place.inject(&["x"]).unwrap_err();
    for part in ["vendor.com/dev=x", "a.json", "/dev/never-there"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(place.inject(&["null"]).is_ok());
}

#[test]
fn who_asks() {
    let device = |name: &str| cri::CdiDevice { name: name.into() };
    let mut config = cri::ContainerConfig {
        cdi_devices: vec![device("v.com/c=1"), device("v.com/c=2"), device("v.com/c=1")],
        annotations: [
            ("cdi.k8s.io/plugin_b".to_owned(), "v.com/c=2,v.com/c=4".to_owned()),
            ("cdi.k8s.io/plugin_a".to_owned(), "v.com/c=3".to_owned()),
            ("other/cdi.k8s.io".to_owned(), "nothing".to_owned()),
        ]
        .into(),
        ..Default::default()
    };
    assert_eq!(asked(&config).unwrap(), ["v.com/c=1", "v.com/c=2", "v.com/c=3", "v.com/c=4"]);
    config.cdi_devices.push(device("gpu"));
    assert!(asked(&config).unwrap_err().to_string().starts_with("config.CDI_devices[3].name"));
    config.cdi_devices.clear();
    config.annotations.insert("cdi.k8s.io/x".into(), String::new());
    assert!(asked(&config).unwrap_err().to_string().contains("cdi.k8s.io/x"));
}
