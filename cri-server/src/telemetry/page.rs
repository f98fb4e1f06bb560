//! The page: what was counted, and what there is at the moment. Everything comes from memory, or from the
//! kernel without a wait; looking costs nobody anything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use podvisor_proto::cri;

use super::text::{Kind, Page};
use super::{Telemetry, process};
use crate::machine_usage::{self, Memory};
use crate::meters::Meters;
use crate::node::{Node, kernel_version};
use crate::pod::Pods;

/// Who is asked.
#[derive(Debug, Clone)]
pub(crate) struct Subjects {
    pub(crate) node: Arc<Node>,
    pub(crate) pods: Arc<Pods>,
    pub(crate) meters: Arc<Meters>,
}

impl Subjects {
    pub(super) fn page(&self) -> String {
        let mut page = Page::default();
        build_info(&mut page);
        self.node.telemetry.write(&mut page);
        self.pods(&mut page);
        self.machines(&mut page);
        self.images(&mut page);
        let hanging = "Pods whose statistics cannot be read because the kernel does not answer.";
        page.single(
            "podvisor_readings_hanging",
            Kind::Gauge,
            hanging,
            number(self.meters.readings.hanging()),
        );
        process::write(&mut page);
        page.finish()
    }

    fn pods(&self, page: &mut Page) {
        let views = self.pods.views();
        let mut pods = BTreeMap::from([("ready", 0), ("not_ready", 0)]);
        let mut containers = BTreeMap::from([("created", 0), ("running", 0), ("exited", 0), ("unknown", 0)]);
        let (mut monitors, mut unobserved) = (0, 0);
        for view in &views {
            *pods.entry(if view.is_ready() { "ready" } else { "not_ready" }).or_default() += 1;
            monitors += usize::from(view.monitor.is_some());
            unobserved += usize::from(!view.observed);
            for container in view.visible_containers() {
                let state = match container.cri_state() {
                    cri::ContainerState::ContainerCreated => "created",
                    cri::ContainerState::ContainerRunning => "running",
                    cri::ContainerState::ContainerExited => "exited",
                    cri::ContainerState::ContainerUnknown => "unknown",
                };
                *containers.entry(state).or_default() += 1;
            }
        }
        let mut family = page.family("podvisor_pods", Kind::Gauge, "Pod sandboxes by state.");
        for (state, count) in pods {
            family.sample("", &[("state", state)], number(count));
        }
        let mut family = page.family("podvisor_containers", Kind::Gauge, "Containers by state.");
        for (state, count) in containers {
            family.sample("", &[("state", state)], number(count));
        }
        page.single("podvisor_monitors", Kind::Gauge, "Pods that have a living monitor.", number(monitors));
        let help = "Pods of an earlier daemon that are not yet compared with what there is.";
        page.single("podvisor_pods_unobserved", Kind::Gauge, help, number(unobserved));
    }

    fn machines(&self, page: &mut Page) {
        let views = self.pods.views();
        let used: Vec<_> = views
            .iter()
            .map(|view| (view.record.id.to_string(), view.metadata(), machine_usage::of(view)))
            .collect();
        let processes = || {
            used.iter().flat_map(|(id, metadata, processes)| {
                processes.iter().map(move |process| {
                    let labels = [
                        ("namespace", metadata.namespace.as_str()),
                        ("pod", metadata.name.as_str()),
                        ("sandbox", id.as_str()),
                        ("process", process.role),
                    ];
                    (labels, process)
                })
            })
        };
        let help = "CPU time of the processes of pods' virtual machines on the node; that of the process machine holds the guest's.";
        let mut family = page.family("podvisor_machine_cpu_seconds_total", Kind::Counter, help);
        for (labels, process) in processes() {
            family.sample("", &labels, process.cpu.as_secs_f64());
        }
        let help = "Resident memory of the processes of pods' virtual machines, bytes; the guest's is counted with the process machine, as shared by QEMU, as anonymous by podvisor-vmm.";
        let mut family = page.family("podvisor_machine_memory_bytes", Kind::Gauge, help);
        for (labels, process) in processes() {
            let Memory { anonymous, file, shared } = process.memory;
            for (kind, bytes) in [("anonymous", anonymous), ("file", file), ("shared", shared)] {
                family.sample("", &[&labels[..], &[("kind", kind)]].concat(), float(bytes));
            }
        }
    }

    fn images(&self, page: &mut Page) {
        let store = &self.node.images;
        page.single("podvisor_images", Kind::Gauge, "Images.", number(store.list().len()));
        let (images, layers) = store.fs_info();
        let mut family =
            page.family("podvisor_store_bytes", Kind::Gauge, "Disk use, as far as it is measured.");
        family.sample("", &[("kind", "images")], float(images.used_bytes));
        family.sample("", &[("kind", "writable_layers")], float(layers.used_bytes));
        let help = "Bytes of layers that registries have sent.";
        page.single("podvisor_image_pull_bytes_total", Kind::Counter, help, float(store.received_bytes()));
    }
}

impl Telemetry {
    fn write(&self, page: &mut Page) {
        let help = "Time from a request to its answer, by method and gRPC code.";
        let mut family = page.family("podvisor_rpc_duration_seconds", Kind::Histogram, help);
        for ((method, code), histogram) in &*self.rpcs.lock().expect("no panic under this lock") {
            histogram.write(&mut family, &[("method", method), ("code", code)]);
        }
        let help = "Time that pulls took, by outcome: ok, or the kind of failure.";
        let mut family = page.family("podvisor_image_pull_duration_seconds", Kind::Histogram, help);
        for (outcome, histogram) in &*self.pulls.lock().expect("no panic under this lock") {
            histogram.write(&mut family, &[("outcome", outcome)]);
        }
        let lost = float(self.monitors_lost.load(Ordering::Relaxed));
        page.single(
            "podvisor_monitors_lost_total",
            Kind::Counter,
            "Monitors that died before their pod.",
            lost,
        );
        let recovered = float(self.recovered.load(Ordering::Relaxed));
        let help = "Pods that this daemon found when it started.";
        page.single("podvisor_recovered_pods", Kind::Gauge, help, recovered);
        let took = float(self.recovery.load(Ordering::Relaxed)) / 1000.0;
        page.single("podvisor_recovery_seconds", Kind::Gauge, "Time until all of them were in lists.", took);
    }
}

fn build_info(page: &mut Page) {
    let (major, minor) = kernel_version();
    let kernel = format!("{major}.{minor}");
    let labels =
        [("version", env!("CARGO_PKG_VERSION")), ("kernel", &kernel), ("arch", std::env::consts::ARCH)];
    page.family("podvisor_build_info", Kind::Gauge, "1; what runs stands in the labels.")
        .sample("", &labels, 1.0);
}

/// The format has only this kind of number; what it cannot hold exactly is beyond 2^53.
#[allow(clippy::cast_precision_loss)]
fn float(value: u64) -> f64 {
    value as f64
}

fn number(value: usize) -> f64 {
    float(value as u64)
}
