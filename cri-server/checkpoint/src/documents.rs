//! The JSON documents of an archive.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

/// `config.dump`: what Podman once wrote of a container, and everybody else after it. Times are RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)]
pub struct Config {
    pub id: String,
    pub name: String,
    /// As the container asks for it.
    pub rootfs_image: String,
    /// What that was: an identity.
    pub rootfs_image_ref: String,
    pub rootfs_image_name: String,
    /// Name of the handler.
    pub runtime: String,
    pub created_time: String,
    pub checkpointed_time: String,
    pub restored_time: String,
    pub restored: bool,
}

/// One of `bind.mounts`: whoever restores the container has to know whether a source that is missing is a file or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct BindMount {
    pub source: String,
    pub destination: String,
    /// `directory` or `file`.
    pub file_type: &'static str,
    /// Permission bits.
    pub permissions: u32,
}

/// The bind mounts of an OCI spec. A source that is gone is left out.
pub fn bind_mounts(spec: &Value) -> Vec<BindMount> {
    use std::os::unix::fs::PermissionsExt;
    let mounts = spec["mounts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let bound = mounts.iter().filter(|mount| mount["type"] == "bind");
    bound
        .filter_map(|mount| {
            let source = mount["source"].as_str()?;
            let found = std::fs::metadata(Path::new(source)).ok()?;
            Some(BindMount {
                source: source.to_owned(),
                destination: mount["destination"].as_str()?.to_owned(),
                file_type: if found.is_dir() { "directory" } else { "file" },
                permissions: found.permissions().mode() & 0o777,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_have_the_names_that_others_read() {
        let config = Config {
            id: "1".into(),
            name: "web".into(),
            rootfs_image: "app:1".into(),
            rootfs_image_ref: "sha256:2".into(),
            rootfs_image_name: "app@sha256:3".into(),
            runtime: "runc".into(),
            created_time: "2026-01-01T00:00:00Z".into(),
            checkpointed_time: "2026-01-02T00:00:00Z".into(),
            restored_time: "0001-01-01T00:00:00Z".into(),
            restored: false,
        };
        let value = serde_json::to_value(&config).unwrap();
        let names: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "checkpointedTime",
                "createdTime",
                "id",
                "name",
                "restored",
                "restoredTime",
                "rootfsImage",
                "rootfsImageName",
                "rootfsImageRef",
                "runtime"
            ]
        );
    }

    #[test]
    fn mounts_that_are_bound() {
        let spec = serde_json::json!({"mounts": [
            {"type": "proc", "source": "proc", "destination": "/proc"},
            {"type": "bind", "source": "/etc/passwd", "destination": "/file"},
            {"type": "bind", "source": "/usr", "destination": "/directory"},
            {"type": "bind", "source": "/never-there", "destination": "/gone"},
        ]});
        let found = bind_mounts(&spec);
        let shown: Vec<_> = found.iter().map(|it| (it.destination.as_str(), it.file_type)).collect();
        assert_eq!(shown, [("/file", "file"), ("/directory", "directory")]);
        assert_eq!(bind_mounts(&Value::Null), []);
    }
}
