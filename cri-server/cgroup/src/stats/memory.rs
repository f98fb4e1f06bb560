//! Memory and swap, which have the most figures and differ the most between the versions.

use std::path::Path;

use super::{MemoryStats, SwapStats, pressure};
use crate::Result;
use crate::files::{keyed, read_number, read_optional};

/// Version 1 says "no limit" with the largest page-aligned i64; anything near is none, whatever the page size.
const V1_UNLIMITED: u64 = 0x7fff_ffff_ff00_0000;

pub(super) fn memory_v2(directory: &Path) -> Result<Option<MemoryStats>> {
    let Some(stat) = read_optional(&directory.join("memory.stat"))? else { return Ok(None) };
    // The root has memory.stat alone; its usage is what the pages of it sum up to.
    let key = |name| keyed(&stat, name).unwrap_or(0);
    let usage = match read_number(&directory.join("memory.current"))? {
        Some(usage) => usage,
        None => key("anon").saturating_add(key("file")),
    };
    let limit = read_number(&directory.join("memory.max"))?.filter(|limit| *limit != u64::MAX);
    let working_set = usage.saturating_sub(key("inactive_file"));
    Ok(Some(MemoryStats {
        usage,
        working_set,
        available: limit.map(|limit| limit.saturating_sub(working_set)),
        limit,
        rss: key("anon"),
        page_faults: key("pgfault"),
        major_page_faults: key("pgmajfault"),
        peak: read_number(&directory.join("memory.peak"))?,
        cache: key("file"),
        mapped_file: key("file_mapped"),
        kernel: keyed(&stat, "kernel"),
        active_file: key("active_file"),
        inactive_file: key("inactive_file"),
        dirty: key("file_dirty"),
        writeback: key("file_writeback"),
        scanned: keyed(&stat, "pgscan"),
        reclaimed: keyed(&stat, "pgsteal"),
        refaults_file: keyed(&stat, "workingset_refault_file"),
        refaults_anon: keyed(&stat, "workingset_refault_anon"),
        pressure: pressure(&directory.join("memory.pressure"))?,
    }))
}

pub(super) fn memory_v1(directory: &Path) -> Result<Option<MemoryStats>> {
    let Some(usage) = read_number(&directory.join("memory.usage_in_bytes"))? else { return Ok(None) };
    let stat = read_optional(&directory.join("memory.stat"))?.unwrap_or_default();
    let key = |name| keyed(&stat, name).unwrap_or(0);
    let limit = limit_v1(directory, "memory.limit_in_bytes")?;
    let working_set = usage.saturating_sub(key("total_inactive_file"));
    Ok(Some(MemoryStats {
        usage,
        working_set,
        available: limit.map(|limit| limit.saturating_sub(working_set)),
        limit,
        rss: key("total_rss"),
        page_faults: key("total_pgfault"),
        major_page_faults: key("total_pgmajfault"),
        peak: read_number(&directory.join("memory.max_usage_in_bytes"))?,
        cache: key("total_cache"),
        mapped_file: key("total_mapped_file"),
        kernel: read_number(&directory.join("memory.kmem.usage_in_bytes"))?,
        active_file: key("total_active_file"),
        inactive_file: key("total_inactive_file"),
        dirty: key("total_dirty"),
        writeback: key("total_writeback"),
        scanned: None,
        reclaimed: None,
        refaults_file: keyed(&stat, "total_workingset_refault_file"),
        refaults_anon: keyed(&stat, "total_workingset_refault_anon"),
        pressure: None,
    }))
}

fn limit_v1(directory: &Path, file: &str) -> Result<Option<u64>> {
    Ok(read_number(&directory.join(file))?.filter(|limit| *limit < V1_UNLIMITED))
}

pub(super) fn swap_v2(directory: &Path) -> Result<Option<SwapStats>> {
    let Some(usage) = read_number(&directory.join("memory.swap.current"))? else { return Ok(None) };
    let limit = read_number(&directory.join("memory.swap.max"))?.filter(|limit| *limit != u64::MAX);
    Ok(Some(SwapStats { usage, available: limit.map(|limit| limit.saturating_sub(usage)) }))
}

pub(super) fn swap_v1(directory: &Path) -> Result<Option<SwapStats>> {
    let stat = read_optional(&directory.join("memory.stat"))?.unwrap_or_default();
    let Some(usage) = keyed(&stat, "total_swap") else { return Ok(None) };
    // memsw is memory and swap together.
    let both = limit_v1(directory, "memory.memsw.limit_in_bytes")?;
    let memory = limit_v1(directory, "memory.limit_in_bytes")?;
    let limit = both.zip(memory).map(|(both, memory)| both.saturating_sub(memory));
    Ok(Some(SwapStats { usage, available: limit.map(|limit| limit.saturating_sub(usage)) }))
}
