//! The daemon's own process, with the names that Prometheus' client libraries use.

use std::fs;

use super::text::{Kind, Page};

/// What cannot be read is left out.
#[allow(clippy::cast_precision_loss)]
pub(super) fn write(page: &mut Page) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let uptime = fs::read_to_string("/proc/stat").unwrap_or_default();
    if let Some(figures) = figures(&stat) {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let cpu = "CPU time used in user mode and in the kernel.";
        page.single("process_cpu_seconds_total", Kind::Counter, cpu, figures.cpu_ticks as f64 / ticks);
        page.single("process_threads", Kind::Gauge, "Threads.", figures.threads as f64);
        let memory = "Address space, bytes.";
        page.single("process_virtual_memory_bytes", Kind::Gauge, memory, figures.virtual_bytes as f64);
        let resident = figures.resident_pages as f64 * rustix::param::page_size() as f64;
        page.single("process_resident_memory_bytes", Kind::Gauge, "Memory in use, bytes.", resident);
        if let Some(booted) = boot_time(&uptime) {
            let started = booted as f64 + figures.start_ticks as f64 / ticks;
            page.single("process_start_time_seconds", Kind::Gauge, "Unix time of the start.", started);
        }
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        // One of them is the directory that is being read.
        let open = entries.count().saturating_sub(1);
        page.single("process_open_fds", Kind::Gauge, "Open file descriptors.", open as f64);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if let Some(limit) = limit {
        page.single("process_max_fds", Kind::Gauge, "Most file descriptors.", limit as f64);
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Figures {
    cpu_ticks: u64,
    threads: u64,
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

/// proc_pid_stat(5). The name in parentheses may contain anything.
fn figures(stat: &str) -> Option<Figures> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // The first here is the third there.
    let field = |number: usize| fields.get(number - 3)?.parse().ok();
    Some(Figures {
        cpu_ticks: field(14)? + field(15)?,
        threads: field(20)?,
        start_ticks: field(22)?,
        virtual_bytes: field(23)?,
        resident_pages: field(24)?,
    })
}

/// `btime` in proc_stat(5).
fn boot_time(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_stat() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 50 25 8 9 20 0 12 0 777 4096000 300 18446744073709551615 1";
        let expected = Figures {
            cpu_ticks: 75,
            threads: 12,
            start_ticks: 777,
            virtual_bytes: 4_096_000,
            resident_pages: 300,
        };
        assert_eq!(figures(stat), Some(expected));
        assert_eq!(figures("garbage"), None);
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\n"), Some(1_700_000_000));
    }

    #[test]
    fn this_process_has_all() {
        let mut page = Page::default();
        write(&mut page);
        assert_eq!(page.finish().lines().filter(|line| line.starts_with("# TYPE process_")).count(), 7);
    }
}
