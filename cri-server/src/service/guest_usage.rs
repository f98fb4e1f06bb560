//! What pods in virtual machines use, as their agents say: asked through the monitors beforehand, all at once, so that the reading of
//! statistics waits for nobody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use podvisor_cgroup::{CpuStats, IoStats, MemoryStats, Pressure, PressureLine, Stats, SwapStats};
use podvisor_proto::agent;
use podvisor_proto::monitor::GuestStats;
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;

use crate::id::PodId;
use crate::pod::view::PodView;

/// A guest that does not answer by then has no figures this time.
const PATIENCE: Duration = Duration::from_secs(2);

/// One guest.
#[derive(Debug, Default)]
pub(super) struct GuestUsage {
    /// All containers together.
    pub(super) pod: Option<Stats>,
    containers: BTreeMap<String, Stats>,
}

impl GuestUsage {
    pub(super) fn of_container(&self, id: &str) -> Option<&Stats> {
        self.containers.get(id)
    }
}

/// By pod; those that are virtual machines and answer.
pub(super) type Guests = BTreeMap<PodId, GuestUsage>;

/// Asks the agents of those pods that have one.
pub(super) async fn ask<'a>(views: impl IntoIterator<Item = &'a Arc<PodView>>) -> Guests {
    let asked = views.into_iter().filter(|view| view.record.runtime.vm().is_some() && view.is_ready());
    let answers = asked.filter_map(|view| {
        let (id, monitor) = (view.record.id.clone(), view.monitor.clone()?);
        Some(async move {
            let call = monitor.call(Verb::GuestStats(GuestStats::default()));
            match tokio::time::timeout(PATIENCE, call).await {
                Ok(Ok(Answer::GuestStats(stats))) => Some((id, usage(stats))),
                Ok(Ok(_)) => None,
                Ok(Err(error)) => {
                    tracing::debug!(pod = %id, error = crate::error::chain(&error), "a guest tells no figures");
                    None
                }
                Err(_) => None,
            }
        })
    });
    futures_util::future::join_all(answers).await.into_iter().flatten().collect()
}

fn usage(stats: agent::StatsReply) -> GuestUsage {
    let containers = stats.containers.into_iter().filter_map(|container| {
        let stats = container.usage.as_ref().map(figures)?;
        Some((container.container_id, stats))
    });
    GuestUsage { pod: stats.pod.as_ref().map(figures), containers: containers.collect() }
}

fn figures(usage: &agent::Usage) -> Stats {
    let limit = Some(usage.memory_limit).filter(|limit| *limit > 0);
    Stats {
        timestamp: SystemTime::now(),
        cpu: Some(CpuStats {
            usage_ns: usage.cpu_ns,
            user_ns: Some(usage.cpu_user_ns),
            system_ns: Some(usage.cpu_system_ns),
            pressure: usage.cpu_pressure.as_ref().map(pressure),
            ..CpuStats::default()
        }),
        memory: Some(MemoryStats {
            usage: usage.memory_usage,
            working_set: usage.memory_working_set,
            available: limit.map(|limit| limit.saturating_sub(usage.memory_working_set)),
            limit,
            rss: usage.memory_rss,
            page_faults: usage.page_faults,
            major_page_faults: usage.major_page_faults,
            pressure: usage.memory_pressure.as_ref().map(pressure),
            ..MemoryStats::default()
        }),
        swap: Some(SwapStats { usage: usage.swap_usage, ..SwapStats::default() }),
        pids: Some(usage.pids),
        io: Some(IoStats { pressure: usage.io_pressure.as_ref().map(pressure), ..IoStats::default() }),
    }
}

fn pressure(pressure: &agent::Pressure) -> Pressure {
    let line = |line: &Option<agent::PressureLine>| {
        let line = line.unwrap_or_default();
        PressureLine { avg10: line.avg10, avg60: line.avg60, avg300: line.avg300, total_us: line.total_us }
    };
    Pressure { some: line(&pressure.some), full: line(&pressure.full) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_guest() {
        let container = agent::ContainerStats {
            container_id: "c".into(),
            usage: Some(agent::Usage {
                cpu_ns: 7,
                memory_working_set: 30,
                memory_limit: 100,
                pids: 3,
                ..Default::default()
            }),
            ..Default::default()
        };
        let unlimited = agent::Usage { memory_working_set: 30, ..Default::default() };
        let usage = usage(agent::StatsReply {
            containers: vec![container, agent::ContainerStats::default()],
            pod: Some(unlimited),
            ..Default::default()
        });
        let stats = usage.of_container("c").unwrap();
        assert_eq!(stats.cpu.unwrap().usage_ns, 7);
        assert_eq!(stats.memory.unwrap().available, Some(70));
        assert_eq!(stats.pids, Some(3));
        assert!(usage.of_container("").is_none());
        let pod = usage.pod.unwrap().memory.unwrap();
        assert_eq!((pod.limit, pod.available), (None, None));
    }
}
