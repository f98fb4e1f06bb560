//! Annotations of the spec: what runtimes other than runc (gVisor, Kata, NRI-like tools) read about the pod a container belongs to.
//! Keys are those of containerd, which they know.

use std::collections::HashMap;

use crate::Input;

pub(crate) fn of_container(input: &Input<'_>) -> HashMap<String, String> {
    let pod = input.sandbox.metadata.clone().unwrap_or_default();
    let name = input.config.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default();
    // What the handler passes on comes first: it must not be able to say that a container belongs to another pod.
    let mut annotations: HashMap<String, String> = input.annotations.clone().into_iter().collect();
    for (key, value) in [
        ("container-type", "container".to_owned()),
        ("sandbox-id", input.sandbox_id.to_owned()),
        ("sandbox-name", pod.name),
        ("sandbox-namespace", pod.namespace),
        ("sandbox-uid", pod.uid),
        ("container-name", name),
        ("image-name", input.image_name.to_owned()),
    ] {
        annotations.insert(format!("io.kubernetes.cri.{key}"), value);
    }
    annotations
}
