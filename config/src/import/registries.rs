//! What belongs in files that podvisor shares with the other daemons: registries.conf(5), hosts.toml, the pause image.

use toml::Value;

use super::draft::Draft;
use super::source::Leaf;

/// Pause images that the other daemons come with: nobody has chosen them.
const SHIPPED: [&str; 4] =
    ["registry.k8s.io/pause:", "k8s.gcr.io/pause:", "gcr.io/google_containers/pause", "kubernetes/pause"];

/// The image of the process that holds a pod's namespaces. The built-in one needs no image, so only one that was chosen is taken over.
pub(super) fn pause_image(draft: &mut Draft, leaf: Option<Leaf>) {
    let Some(leaf) = leaf else { return };
    match leaf.text() {
        Some(image) if SHIPPED.iter().any(|shipped| image.starts_with(shipped)) => {
            draft.needless(&leaf, "podvisor's pause is built in and is never pulled");
        }
        _ => draft.copy("image", "pause_image", Some(leaf)),
    }
}

/// Registries without TLS, or with a certificate that nobody knows.
pub(super) fn insecure(draft: &mut Draft, leaf: Option<Leaf>) {
    let Some(leaf) = leaf else { return };
    let entry = |registry: &String| {
        let location = Value::String(registry.clone());
        format!("[[registry]]\nlocation = {location}\ninsecure = true\n")
    };
    let entries: Vec<_> = leaf.texts().iter().map(entry).collect();
    if entries.is_empty() {
        return draft.needless(&leaf, "says nothing");
    }
    let file = "/etc/containers/registries.conf.d/insecure.conf";
    draft.by_hand(&leaf, format!("write this to {file}:\n{}", entries.join("\n").trim_end()));
}

/// A registry's mirrors, as containerd had them in its own configuration.
pub(super) fn mirrors(draft: &mut Draft, host: &str, leaf: &Leaf, certs_dir: &str) {
    let endpoints: Vec<_> = leaf.texts().iter().map(|text| Value::String(text.clone())).collect();
    let directory = if host == "*" { "_default" } else { host };
    let entries: Vec<_> = endpoints
        .iter()
        .map(|endpoint| format!("[host.{endpoint}]\ncapabilities = [\"pull\", \"resolve\"]\n"))
        .collect();
    let text = entries.join("\n");
    draft.by_hand(leaf, format!("write this to {certs_dir}/{directory}/hosts.toml:\n{}", text.trim_end()));
}
