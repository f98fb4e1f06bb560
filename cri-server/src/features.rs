//! What handlers can do beyond the ordinary: asked of the OCI runtime (runtime-spec, features.md) and tried on this kernel, never assumed.

use std::path::Path;

use podvisor_image_store::ImageStore;
use podvisor_network::namespace::{self, IdRange, UserMappings};
use podvisor_proto::cri;

use crate::node::{Handlers, kernel_version, output};

/// What the kernel can do for a pod's user namespace, with whatever OCI runtime.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    user_namespaces: Result<(), String>,
}

impl Kernel {
    /// Makes a user namespace and mounts the layers of images with its ids. Blocking, some milliseconds.
    pub(crate) fn probe(images: &ImageStore) -> Self {
        Self { user_namespaces: try_user_namespace(images) }
    }

    /// Why a pod cannot have one, with whatever handler.
    pub(crate) fn user_namespaces(&self) -> Result<(), String> {
        self.user_namespaces.clone()
    }
}

fn try_user_namespace(images: &ImageStore) -> Result<(), String> {
    use std::os::fd::AsFd;
    // Any range will do, if it is not the node's own.
    let range = IdRange { inside: 0, outside: 1 << 16, length: 1 << 16 };
    let user = namespace::user_namespace(&UserMappings { uids: range, gids: range })
        .map_err(|error| crate::error::chain(&error))?;
    images.try_ids(user.as_fd()).map_err(|error| crate::error::chain(&error))
}

/// What a handler can, and why it cannot run pods with a user namespace, or checkpoint containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) features: cri::RuntimeHandlerFeatures,
    pub(crate) without_user_namespaces: Option<String>,
    pub(crate) without_checkpoints: Option<String>,
}

/// Calls the program once. `version` is what it has said to `--version`; `sandbox_container` is the handler's.
pub(crate) fn of_program(program: &Path, version: &str, sandbox_container: bool, kernel: &Kernel) -> Found {
    let said = output(program, "features");
    let mut found = said_by(program, said.as_deref().ok(), kernel, kernel_version());
    // crun says it there, also where it is older than its features.
    if version.split_whitespace().any(|word| word == "+CRIU") {
        found.without_checkpoints = None;
    }
    if sandbox_container && found.without_user_namespaces.is_none() {
        // runsc makes user namespaces and says so, but joins none: setns(2) lets no program with several threads into one, and a pod's
        // is there before its containers.
        let why = "a runtime with a kernel of its own (sandbox_container) joins no user namespace";
        found.without_user_namespaces = Some(why.to_owned());
        found.features.user_namespaces = false;
    }
    found
}

fn said_by(program: &Path, said: Option<&str>, kernel: &Kernel, version: (u32, u32)) -> Found {
    let said: serde_json::Value = said.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let lists = |list: &serde_json::Value, wanted: &str| {
        list.as_array().is_some_and(|list| list.iter().any(|item| item == wanted))
    };
    let linux = &said["linux"];
    let without_user_namespaces = if said.is_null() {
        Some(format!("{} does not tell its features; runc 1.2 and crun 1.9 do", program.display()))
    } else if !lists(&linux["namespaces"], "user") {
        Some(format!("{} knows no user namespaces", program.display()))
    } else if linux["mountExtensions"]["idmap"]["enabled"] != true {
        Some(format!("{} has no id-mapped mounts; runc has them from 1.2 on", program.display()))
    } else {
        kernel.user_namespaces.clone().err()
    };
    // `org.opencontainers.runc.checkpoint.enabled`, `run.oci.crun.checkpoint.enabled`.
    let checkpoints = said["annotations"].as_object().is_some_and(|annotations| {
        annotations.iter().any(|(name, value)| name.ends_with(".checkpoint.enabled") && value == "true")
    });
    let features = cri::RuntimeHandlerFeatures {
        // mount_setattr(2) came with Linux 5.12; the program lists what it understands, not what it can.
        recursive_read_only_mounts: lists(&said["mountOptions"], "rro") && version >= (5, 12),
        user_namespaces: without_user_namespaces.is_none(),
    };
    let without_checkpoints = (!checkpoints).then(|| {
        format!(
            "{} was built without CRIU, or is no OCI runtime that drives it: neither its features nor its version name it",
            program.display()
        )
    });
    Found { features, without_user_namespaces, without_checkpoints }
}

/// A guest's: every kernel that guests are built from has mount_setattr(2), and the agent speaks for itself.
/// The layers of images are mapped on the host.
pub(crate) fn of_guest(kernel: &Kernel) -> cri::RuntimeHandlerFeatures {
    cri::RuntimeHandlerFeatures {
        recursive_read_only_mounts: true,
        user_namespaces: kernel.user_namespaces.is_ok(),
    }
}

/// The nameless handler's: what a pod without RuntimeClass can rely on. Where one can become untrusted, that is what both handlers can.
pub(crate) fn of_nameless(
    handlers: &Handlers,
    trusted: &str,
    untrusted: Option<&str>,
) -> cri::RuntimeHandlerFeatures {
    let of = |name: &str| handlers.features.get(name).copied().unwrap_or_default();
    // No pod can become untrusted while that handler cannot be used.
    let untrusted = untrusted.filter(|name| !handlers.unusable.contains_key(*name));
    let (first, second) = (of(trusted), untrusted.map_or_else(|| of(trusted), of));
    cri::RuntimeHandlerFeatures {
        recursive_read_only_mounts: first.recursive_read_only_mounts && second.recursive_read_only_mounts,
        user_namespaces: first.user_namespaces && second.user_namespaces,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNC: &str = r#"{"ociVersionMin": "1.0.0", "mountOptions": ["ro", "rro"],
        "linux": {"namespaces": ["mount", "user"], "mountExtensions": {"idmap": {"enabled": true}}}}"#;

    fn features(said: Option<&str>, kernel: Result<(), String>, version: (u32, u32)) -> (bool, String) {
        let kernel = Kernel { user_namespaces: kernel };
        let found = said_by(Path::new("/bin/oci"), said, &kernel, version);
        assert_eq!(found.features.user_namespaces, found.without_user_namespaces.is_none());
        (found.features.recursive_read_only_mounts, found.without_user_namespaces.unwrap_or_default())
    }

    #[test]
    fn only_what_program_and_kernel_can() {
        assert_eq!(features(Some(RUNC), Ok(()), (6, 1)), (true, String::new()));
        assert_eq!(features(Some(RUNC), Err("no layers".into()), (5, 11)), (false, "no layers".into()));
        for (said, rro, why) in [
            (None, false, "does not tell its features"),
            (Some("no json"), false, "does not tell its features"),
            (Some("{}"), false, "knows no user namespaces"),
            (
                Some(r#"{"mountOptions": ["rro"], "linux": {"namespaces": ["user"]}}"#),
                true,
                "no id-mapped mounts",
            ),
            (
                Some(
                    r#"{"linux": {"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": false}}}}"#,
                ),
                false,
                "no id-mapped mounts",
            ),
        ] {
            let (found, text) = features(said, Ok(()), (6, 1));
            assert!(found == rro && text.contains(why), "{said:?}: {text}");
        }
    }

    #[test]
    fn checkpoints_are_what_a_program_says_of_itself() {
        let kernel = Kernel { user_namespaces: Ok(()) };
        for (said, can) in [
            (Some(r#"{"annotations": {"org.opencontainers.runc.checkpoint.enabled": "true"}}"#), true),
            (Some(r#"{"annotations": {"run.oci.crun.checkpoint.enabled": "true"}}"#), true),
            (Some(r#"{"annotations": {"run.oci.crun.checkpoint.enabled": "false"}}"#), false),
            (Some("{}"), false),
            (None, false),
        ] {
            let found = said_by(Path::new("/bin/oci"), said, &kernel, (6, 1));
            assert_eq!(found.without_checkpoints.is_none(), can, "{said:?}");
        }
    }

    #[test]
    fn the_nameless_handler_has_what_both_have() {
        let both = cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };
        let one = cri::RuntimeHandlerFeatures { user_namespaces: false, ..both };
        let handlers = Handlers {
            features: [("runc".to_owned(), both), ("vm".to_owned(), one)].into(),
            ..Handlers::default()
        };
        assert_eq!(of_nameless(&handlers, "runc", None), both);
        assert_eq!(of_nameless(&handlers, "runc", Some("vm")), one);
        assert_eq!(of_nameless(&handlers, "runc", Some("gone")), cri::RuntimeHandlerFeatures::default());
        let unusable = [("vm".to_owned(), "no guest".to_owned())].into();
        assert_eq!(of_nameless(&Handlers { unusable, ..handlers }, "runc", Some("vm")), both);
    }
}
