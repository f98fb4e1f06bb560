//! What the daemon holds of the machine's memory, and gives back when there is nothing to do.
//!
//! Two things grow with work and do not shrink by themselves:
//! - *Pages of the program.* The kernel maps up to 64 KiB around every page that is touched, so that a start, which passes through a bit
//!   of everything once, leaves three quarters of the program mapped, and its relocations, which are never looked at again. Given back,
//!   these pages stay in the page cache, where the kernel can drop them without asking anybody; what is used comes back by itself.
//! - *Pieces of the heap* that were freed between pieces which were not.
//!
//! Rejected: fewer relocations by `-z pack-relative-relocs`, which asks for glibc 2.36; an order of functions by their use, a
//! list of symbols whose names change with every build.
#![allow(unsafe_code)]

use std::ops::Range;
use std::time::Duration;

use rustix::param::page_size;
use tokio::sync::Notify;

/// So long nothing has changed when memory is given back: longer than threads wait for more work.
const REST: Duration = Duration::from_secs(10);

/// Makes glibc's allocator fit a process whose threads mostly wait. Before the second thread starts.
pub(crate) fn tune_allocator() {
    // By default there are up to eight arenas per CPU, each with what its threads have freed.
    // SAFETY: mallopt changes a parameter of the allocator and touches no memory of ours; there is no other thread yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// Gives memory back now. What is needed again costs a fault per 64 KiB, well under a millisecond in all.
pub(crate) fn give_back() {
    // SAFETY: malloc_trim takes the allocator's own locks, and returns to the kernel only pages that hold nothing.
    unsafe { libc::malloc_trim(0) };
    // Without /proc everything stays as it is.
    let Ok(smaps) = std::fs::read_to_string("/proc/self/smaps") else { return };
    let mut unwritten = unwritten(&smaps);
    // SAFETY: `segments` has the signature that is called, and `unwritten` outlives the call, to which it is lent alone.
    unsafe { libc::dl_iterate_phdr(Some(segments), (&raw mut unwritten).cast()) };
}

/// Gives back the read-only segments of the program or one of its libraries. The loader holds its lock meanwhile: none is unmapped.
unsafe extern "C" fn segments(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    data: *mut libc::c_void,
) -> i32 {
    // SAFETY: dl_iterate_phdr(3) hands out a valid object with as many headers as it says, and our caller's list.
    let (base, headers, unwritten) = unsafe {
        let object = &*object;
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers, &*data.cast::<Vec<Range<usize>>>())
    };
    let whole = |address: u64| usize::try_from(address).ok()?.checked_next_multiple_of(page_size());
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = base.saturating_add(header.p_vaddr);
        let (Some(start), Some(end)) = (whole(start), whole(start.saturating_add(header.p_memsz))) else {
            continue;
        };
        for pages in unwritten {
            let (start, end) = (start.max(pages.start), end.min(pages.end));
            if start < end {
                // SAFETY: the pages belong to a segment that the loader has mapped from a file, private and unwritable, and none has
                // been replaced by one of our own: each comes back with the same content when it is touched.
                unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
            }
        }
    }
    0
}

/// Gives memory back each time that changes are over. The first is the start.
pub(crate) async fn keep_small(changes: &Notify) {
    loop {
        while tokio::time::timeout(REST, changes.notified()).await.is_ok() {}
        if tokio::task::spawn_blocking(give_back).await.is_err() {
            return;
        }
        changes.notified().await;
    }
}

/// The private mappings of files that nobody can write to, and of which no page differs from the file: not what the loader has
/// relocated, nor a page with a debugger's breakpoint.
fn unwritten(smaps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        if let Some((range, can_only_be_read)) = header(line) {
            mapping = can_only_be_read.then_some(range);
        } else if line.strip_prefix("Anonymous:").is_some_and(|pages| pages.trim() == "0 kB") {
            found.extend(mapping.take());
        }
    }
    found
}

/// What a line says that begins a mapping (`START-END PERMISSIONS OFFSET DEVICE INODE PATH`, proc_pid_maps(5)): its range, and whether
/// it is a private one of a file that can only be read or executed.
fn header(line: &str) -> Option<(Range<usize>, bool)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    let permissions = words.next()?;
    let of_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
    Some((range, of_file && matches!(permissions, "r--p" | "r-xp")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d000000000-55d000400000 r--p 00000000 fe:00 17   /usr/bin/podvisor
Size:               4096 kB
Rss:                1872 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
55d000400000-55d000e00000 r-xp 00400000 fe:00 17   /usr/bin/podvisor (deleted)
Rss:                7876 kB
Anonymous:             0 kB
55d000e00000-55d000ec0000 r--p 00e00000 fe:00 17   /usr/bin/podvisor
Rss:                 760 kB
Anonymous:           760 kB
55d000ec0000-55d000ed0000 rw-p 00ec0000 fe:00 17   /usr/bin/podvisor
Anonymous:             0 kB
55d001000000-55d001100000 rw-p 00000000 00:00 0    [heap]
Anonymous:           196 kB
7f0000000000-7f0000200000 ---p 00000000 00:00 0 
Anonymous:             0 kB
7f0000300000-7f0000400000 r--s 00000000 fe:00 18   /var/lib/podvisor/blob
Anonymous:             0 kB
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0    [vdso]
Anonymous:             0 kB
";

    /// Resident pages of files, in KiB.
    fn mapped() -> u64 {
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let of = |name: &str| -> u64 {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        of("Rss:") - of("Anonymous:")
    }

    #[test]
    fn only_what_a_file_still_has_is_given_back() {
        assert_eq!(
            unwritten(SMAPS),
            [0x55d0_0000_0000..0x55d0_0040_0000, 0x55d0_0040_0000..0x55d0_00e0_0000]
        );
        assert!(unwritten("").is_empty());
        assert!(unwritten("Anonymous: 0 kB\n").is_empty());
    }

    #[test]
    fn a_program_goes_on_with_what_it_has_given_back() {
        let kept = vec![String::from("kept"); 1000];
        let before = mapped();
        give_back();
        let after = mapped();
        // Relocations at least, which nobody needs again.
        assert!(after < before, "{before} KiB before, {after} KiB after");
        assert!(kept.iter().all(|text| text == "kept"));
    }
}
