//! Pods as tests ask for them, and what the node says of them.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::PATIENCE;
use crate::cluster::Cluster;
use crate::images::AGNHOST;
use crate::machine::NAME;

/// What asks for a virtual machine without a RuntimeClass.
pub(crate) const UNTRUSTED: &str = "io.kubernetes.cri.untrusted-workload";

/// The same in CRI-O's words.
pub(crate) const TRUSTED_SANDBOX: &str = "io.kubernetes.cri-o.TrustedSandbox";

/// A pod whose only container does `agnhost netexec`, which answers on port 8080 (`/hostname`, `/clientip`, `/shell` …).
pub(crate) fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}, "annotations": {}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": AGNHOST, "args": ["netexec"]}],
        },
    })
}

/// The same, as a virtual machine.
pub(crate) fn machine(name: &str) -> Value {
    let mut pod = pod(name);
    pod["metadata"]["annotations"][UNTRUSTED] = "true".into();
    pod
}

/// The same, by a RuntimeClass.
pub(crate) fn of_class(name: &str, class: &str) -> Value {
    let mut pod = pod(name);
    pod["spec"]["runtimeClassName"] = class.into();
    pod
}

/// The same, ready when it answers, and not only when it runs.
pub(crate) fn serving(mut pod: Value) -> Value {
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "timeoutSeconds": 20});
    pod
}

impl Cluster {
    /// Makes pods, and returns when all are ready.
    pub(crate) fn run(&self, pods: &[Value]) -> Result<()> {
        for pod in pods {
            self.apply(pod)?;
        }
        for pod in pods {
            self.wait_ready(crate::cluster::name(pod))?;
        }
        Ok(())
    }

    /// Waits until a pod is ready.
    pub(crate) fn wait_ready(&self, name: &str) -> Result<()> {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        let waited = self.kubectl(&["wait", "--for=condition=Ready", &timeout, &format!("pod/{name}")]);
        waited.map(drop).or_else(|error| {
            let pod = self.get(&["pod", name])?;
            Err(error.context(format!("pod {name} is not ready: {}", pod["status"])))
        })
    }

    /// Deletes pods, and returns when they are gone.
    pub(crate) fn delete(&self, names: &[&str]) -> Result<()> {
        self.kubectl(&[&["delete", "pod", "--now"], names].concat()).map(drop)
    }

    /// Runs a command in a pod; what it printed.
    pub(crate) fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "--"], command].concat())
    }

    /// The kernel that a pod runs on, by `kubectl exec POD -- uname -r`.
    pub(crate) fn kernel(&self, pod: &str) -> Result<String> {
        Ok(self.exec(pod, &["uname", "-r"])?.trim().to_owned())
    }

    /// What `crictl inspectp` shows of the ready sandbox of a pod: the whole of it.
    pub(crate) fn sandbox(&self, name: &str) -> Result<Value> {
        let ids = self.crictl(&["pods", "--name", &format!("^{name}$"), "--state", "ready", "--quiet"])?;
        let id = ids.split_whitespace().next().with_context(|| format!("no sandbox of pod {name}"))?;
        Ok(serde_json::from_str(&self.crictl(&["inspectp", id])?)?)
    }

    /// How the sandbox of a pod runs: the handler's name.
    pub(crate) fn handler(&self, pod: &str) -> Result<String> {
        let sandbox = self.sandbox(pod)?;
        let handler = sandbox["info"]["handler"].as_str();
        Ok(handler.with_context(|| format!("no handler in {sandbox}"))?.to_owned())
    }

    /// A page of kubelet's, through the API server.
    pub(crate) fn kubelet_page(&self, path: &str) -> Result<String> {
        self.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{NAME}/proxy/{path}")])
    }
}

/// The kernel of the node.
pub(crate) fn host_kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
