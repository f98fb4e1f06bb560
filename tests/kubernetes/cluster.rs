//! A cluster of one node: kubeadm, kubelet with what kubeadm wrote, and kubectl.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::registry::Registry;
use podvisor_critest::tools_dir;
use podvisor_tests::world::World;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::emulated;
use crate::images::{kubernetes_version, program};
use crate::machine::{
    ADDRESS, ADDRESS6, DIRECTORY, Machine, NAME, remove_cgroups, resolv_conf, run, with_tunables,
};
use crate::runtime::{Runtime, Setup};
use crate::unit::{self, Unit};
use crate::{PATIENCE, until};

/// Where kubeadm puts what the administrator needs.
pub(crate) const ADMIN: &str = "/etc/kubernetes/admin.conf";

/// How long kubeadm may take. It has limits of its own, of some minutes each.
const INIT: Duration = Duration::from_secs(900);

/// What a cluster is made with. Tests that agree on it share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The runtime's.
    pub(crate) setup: Setup,
    /// kubeadm's `--image-repository`; "": its own.
    pub(crate) image_repository: &'static str,
    /// kubelet's feature gate: pods' figures come from the runtime, not from cAdvisor.
    pub(crate) stats_from_cri: bool,
    /// Pods and Services have addresses of both families, IPv4 first.
    pub(crate) dual_stack: bool,
    /// More of kubelet's configuration, as JSON; "": nothing more.
    pub(crate) kubelet: &'static str,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            setup: Setup::default(),
            image_repository: "",
            stats_from_cri: true,
            dual_stack: false,
            kubelet: if Unit::is_wanted() { unit::KUBELET } else { "" },
        }
    }
}

/// A running cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// What it was made with.
    pub(crate) settings: Settings,
    /// What kubeadm said during `init`.
    pub(crate) said: String,
    /// The runtime below it.
    pub(crate) runtime: Runtime,
    kubelet: Option<Child>,
    /// What was there when only the runtime ran.
    before: World,
    machine: Option<Machine>,
}

impl Cluster {
    /// Makes one, and returns when the node is ready and every pod of the control plane runs.
    pub(crate) fn up(settings: &Settings, registry: &Registry) -> Result<Self> {
        let machine = Machine::prepare()?;
        let runtime = Runtime::start(&settings.setup, registry)?;
        let mut cluster = Self {
            settings: settings.clone(),
            said: String::new(),
            runtime,
            kubelet: None,
            before: World::now(),
            machine: Some(machine),
        };
        if let Err(error) = cluster.init() {
            cluster.keep_logs("up");
            return Err(error);
        }
        Ok(cluster)
    }

    fn init(&mut self) -> Result<()> {
        let configuration = format!("{DIRECTORY}/kubeadm.json");
        let log = format!("{DIRECTORY}/kubeadm.log");
        fs::write(&configuration, self.configuration()?).context("writing kubeadm's configuration")?;
        let output = File::create(&log)?;
        let mut kubeadm = emulated::spared(&mut Command::new(program("kubeadm")))
            .args(["init", "--ignore-preflight-errors=all", "--config", &configuration])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("starting kubeadm")?;
        let deadline = Instant::now() + INIT * emulated::slowness();
        let status = loop {
            self.supervise()?;
            if let Some(status) = kubeadm.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                kubeadm.kill()?;
                break kubeadm.wait()?;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        self.said = fs::read_to_string(&log)?;
        ensure!(status.success(), "kubeadm init: {status}\n{}", self.said);
        self.wait()
    }

    /// Waits for the node and the control plane.
    pub(crate) fn wait(&self) -> Result<()> {
        until("the node is ready and the control plane runs", || self.is_ready())
    }

    /// Runs a program that uses the cluster to its end, while kubelet is kept running.
    pub(crate) fn run_beside(&mut self, command: &mut Command) -> Result<ExitStatus> {
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            self.supervise()?;
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// kubelet as a unit of systemd's would be: started once its configuration is there, and again whenever it has ended.
    fn supervise(&mut self) -> Result<()> {
        if let Some(kubelet) = &mut self.kubelet
            && kubelet.try_wait()?.is_none()
        {
            return Ok(());
        }
        self.kubelet = None;
        let flags = Path::new("/var/lib/kubelet/kubeadm-flags.env");
        if flags.exists() && Path::new("/var/lib/kubelet/config.yaml").exists() {
            self.start_kubelet()?;
        }
        Ok(())
    }

    /// Starts kubelet with the arguments of kubeadm's own drop-in for systemd.
    pub(crate) fn start_kubelet(&mut self) -> Result<()> {
        let flags = fs::read_to_string("/var/lib/kubelet/kubeadm-flags.env")?;
        let flags = flags.trim().trim_start_matches("KUBELET_KUBEADM_ARGS=").trim_matches('"').to_owned();
        let log = File::options().create(true).append(true).open(format!("{DIRECTORY}/kubelet.log"))?;
        let mut command = with_tunables();
        emulated::spared(&mut command)
            .arg(program("kubelet"))
            .args([
                "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf",
                "--kubeconfig=/etc/kubernetes/kubelet.conf",
                "--config=/var/lib/kubelet/config.yaml",
            ])
            .args(flags.split_whitespace())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.kubelet = Some(command.spawn().context("starting kubelet")?);
        Ok(())
    }

    /// Ends kubelet as systemd does.
    pub(crate) fn stop_kubelet(&mut self) -> Result<()> {
        let Some(mut kubelet) = self.kubelet.take() else { return Ok(()) };
        kill_process(Pid::from_child(&kubelet), Signal::TERM).context("stopping kubelet")?;
        let deadline = Instant::now() + PATIENCE;
        while kubelet.try_wait()?.is_none() {
            if Instant::now() > deadline {
                kubelet.kill()?;
                kubelet.wait()?;
                bail!("kubelet did not end within {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn configuration(&self) -> Result<String> {
        let mut cluster = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "ClusterConfiguration",
            "kubernetesVersion": kubernetes_version()?,
            "networking": {"podSubnet": "10.244.0.0/16"},
            // Nobody waits for a second replica here.
            "controllerManager": {
                "extraArgs": [{"name": "flex-volume-plugin-dir", "value": "/var/lib/kubelet/volumeplugins"}],
            },
        });
        let mut addresses = ADDRESS.to_owned();
        if self.settings.dual_stack {
            cluster["networking"] = json!({
                "podSubnet": "10.244.0.0/16,fd00:244::/56",
                "serviceSubnet": "10.96.0.0/12,fd00:96::/112",
            });
            addresses = format!("{ADDRESS},{ADDRESS6}");
        }
        emulated::spare(&mut cluster);
        if !self.settings.image_repository.is_empty() {
            cluster["imageRepository"] = self.settings.image_repository.into();
        }
        let mut kubelet = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": false,
            "failSwapOn": false,
            "resolvConf": resolv_conf(),
            "volumePluginDir": "/var/lib/kubelet/volumeplugins",
            // Looks at volumes more often than once a minute.
            "volumeStatsAggPeriod": "10s",
            // Logs soon have the size at which they are rotated.
            "containerLogMaxSize": "1Mi",
            "containerLogMonitorInterval": "3s",
            "featureGates": {"PodAndContainerStatsFromCRI": self.settings.stats_from_cri},
            // What else lies on the machine's disk is not the tests' business.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        });
        emulated::spare_kubelet(&mut kubelet);
        if !self.settings.kubelet.is_empty() {
            let more: serde_json::Map<String, Value> =
                serde_json::from_str(self.settings.kubelet).context("the test's configuration of kubelet")?;
            more.into_iter().for_each(|(key, value)| kubelet[key] = value);
        }
        let mut init = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "InitConfiguration",
            "localAPIEndpoint": {"advertiseAddress": ADDRESS},
            "timeouts": {
                "kubernetesAPICall": format!("{}m0s", 5 * emulated::slowness()),
                "controlPlaneComponentHealthCheck": format!("{}m0s", 6 * emulated::slowness()),
            },
            "nodeRegistration": {
                "name": NAME,
                "criSocket": self.runtime.endpoint(),
                "kubeletExtraArgs": [{"name": "node-ip", "value": addresses}],
                // Workloads run on this node too.
                "taints": [],
            },
        });
        emulated::spare_init(&mut init, &Path::new(DIRECTORY).join("patches"))?;
        let documents = [
            init,
            cluster,
            kubelet,
            json!({
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "nftables",
                // Set for the whole machine.
                "conntrack": {"maxPerCore": 0, "min": 0},
            }),
        ];
        // kubeadm reads YAML, of which JSON is a part.
        Ok(documents.map(|document| document.to_string()).join("\n---\n"))
    }

    fn is_ready(&self) -> Result<()> {
        let node = self.get(&["node", NAME])?;
        let conditions = node["status"]["conditions"].as_array().context("no conditions")?;
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready");
        ensure!(ready.is_some_and(|ready| ready["status"] == "True"), "the node is not ready: {ready:?}");
        let pods = self.get(&["pods", "--namespace", "kube-system"])?;
        let pods = pods["items"].as_array().context("no pods")?;
        for part in
            ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns"]
        {
            let of_part = pods.iter().filter(|pod| name(pod).starts_with(part));
            ensure!(of_part.clone().count() > 0, "{part} has no pod");
            for pod in of_part {
                ensure!(is_ready(pod), "{} is not ready: {}", name(pod), pod["status"]);
            }
        }
        Ok(())
    }

    /// Runs kubectl; what it printed.
    #[allow(clippy::unused_self)] // There is no other way to a cluster.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        run(kubectl_command().args(arguments))
    }

    /// An object, or a list of some, as the API server has it.
    pub(crate) fn get(&self, arguments: &[&str]) -> Result<Value> {
        let said = self.kubectl(&[&["get", "--output", "json"], arguments].concat())?;
        Ok(serde_json::from_str(&said)?)
    }

    /// Applies an object.
    pub(crate) fn apply(&self, object: &Value) -> Result<()> {
        let file = format!("{DIRECTORY}/apply.json");
        fs::write(&file, object.to_string())?;
        self.kubectl(&["apply", "--filename", &file]).map(drop)
    }

    /// Runs crictl against the runtime; what it printed.
    pub(crate) fn crictl(&self, arguments: &[&str]) -> Result<String> {
        let endpoint = self.runtime.endpoint();
        run(Command::new(tools_dir().join("crictl"))
            .args(["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint])
            .args(arguments))
    }

    /// Keeps the logs of a failed test below `target/kubernetes/logs`.
    pub(crate) fn keep_logs(&self, test: &str) {
        let directory = podvisor_critest::target_dir().join("kubernetes/logs").join(test.replace(':', "-"));
        // Without the logs the test has failed all the same.
        let _ = fs::remove_dir_all(&directory);
        let _ = fs::create_dir_all(&directory);
        let _ = fs::write(directory.join("runtime.log"), self.runtime.log());
        for name in ["kubelet.log", "kubeadm.log"] {
            let _ = fs::copy(format!("{DIRECTORY}/{name}"), directory.join(name));
        }
        let _ = run(Command::new("cp").args(["-rL", "/var/log/pods"]).arg(directory.join("pods")));
        for (name, arguments) in [
            ("pods.txt", &["describe", "pods", "--all-namespaces"][..]),
            ("events.txt", &["get", "events", "--all-namespaces"]),
        ] {
            let _ = fs::write(directory.join(name), self.kubectl(arguments).unwrap_or_default());
        }
        println!("logs are in {}", directory.display());
    }

    /// `kubeadm reset`, after which nothing of any pod may be left on the node; then the runtime ends.
    pub(crate) fn down(mut self) -> Result<()> {
        self.stop_kubelet()?;
        let endpoint = self.runtime.endpoint();
        let said =
            run(Command::new(program("kubeadm")).args(["reset", "--force", "--cri-socket", &endpoint]))?;
        let pods = self.crictl(&["pods", "--quiet"])?;
        ensure!(pods.is_empty(), "pods outlived kubeadm reset: {pods}\n{said}");
        let containers = self.crictl(&["ps", "--all", "--quiet"])?;
        ensure!(containers.is_empty(), "containers outlived kubeadm reset: {containers}\n{said}");
        let result = until("mounts, namespaces and cgroups of the pods go", || {
            // kubelet's own, which are empty.
            remove_cgroups();
            World::now().things_since(&self.before)
        });
        self.crictl(&["rmi", "--all"])?;
        result
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // After `down` there is nothing to do.
        let _ = self.stop_kubelet();
        let _ = self.crictl(&["rmp", "--all", "--force"]);
        World::now().unmount_since(&self.before).unwrap_or_default();
        self.machine.take();
    }
}

/// An object's name.
pub(crate) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// Whether a pod has the condition.
pub(crate) fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
}

/// kubectl as the administrator, for whoever wants to start it himself.
pub(crate) fn kubectl_command() -> Command {
    let mut command = Command::new(program("kubectl"));
    emulated::spared(&mut command).env("KUBECONFIG", ADMIN).env("HOME", DIRECTORY).stdin(Stdio::null());
    command
}
