//! Huge pages: part of the guest's memory that its kernel sets aside for who asks for pages of that size.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use podvisor_proto::agent::HugePages;

use crate::failure::Failure;

/// One directory for each size that the kernel and the processor know (Documentation/admin-guide/mm/hugetlbpage.rst).
pub(crate) const SIZES: &str = "/sys/kernel/mm/hugepages";

/// Makes the kernel put pages that are in use together, so that those between them become large ones (Documentation/admin-guide/sysctl/vm.rst).
const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// Bytes of all of them.
pub(crate) fn bytes(all: &[HugePages]) -> u64 {
    all.iter().fold(0, |sum, pages| sum.saturating_add(pages.page_size.saturating_mul(pages.count)))
}

/// From then on `wanted` is set aside, and none of other sizes. Gives what has changed, as it was; nothing is changed when there is no room.
pub(crate) fn set_aside(sizes: &Path, wanted: &[HugePages]) -> Result<Vec<HugePages>, Failure> {
    let before =
        present(sizes).map_err(|error| Failure::system(&format!("read {}", sizes.display()), error))?;
    if let Some(unknown) =
        wanted.iter().find(|wanted| !before.iter().any(|known| known.page_size == wanted.page_size))
    {
        let why = format!("the guest has no huge pages of {} KiB", unknown.page_size >> 10);
        return Err(Failure::unsupported(why));
    }
    let mut changed = Vec::new();
    for had in &before {
        let count =
            wanted.iter().find(|pages| pages.page_size == had.page_size).map_or(0, |pages| pages.count);
        if count == had.count {
            continue;
        }
        changed.push(*had);
        if let Err(failure) = change(sizes, HugePages { count, ..*had }) {
            restore(sizes, &changed);
            return Err(failure);
        }
    }
    Ok(changed)
}

/// Takes back what [`set_aside`] has changed.
pub(crate) fn restore(sizes: &Path, changed: &[HugePages]) {
    for had in changed {
        // The first failure is the one to tell.
        let _ = fs::write(number(sizes, had.page_size), had.count.to_string());
    }
}

/// The pages of each size that the kernel knows.
fn present(sizes: &Path) -> io::Result<Vec<HugePages>> {
    let mut present = Vec::new();
    let entries = match fs::read_dir(sizes) {
        Ok(entries) => entries,
        // A kernel that has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(present),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name();
        let size = name.to_str().and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
        let Some(size) = size.and_then(|size| size.parse::<u64>().ok()) else { continue };
        let page_size = size << 10;
        present.push(HugePages { page_size, count: count(sizes, page_size)? });
    }
    Ok(present)
}

fn number(sizes: &Path, page_size: u64) -> PathBuf {
    sizes.join(format!("hugepages-{}kB/nr_hugepages", page_size >> 10))
}

fn count(sizes: &Path, page_size: u64) -> io::Result<u64> {
    Ok(fs::read_to_string(number(sizes, page_size))?.trim().parse().unwrap_or(0))
}

/// The kernel takes as many as it finds, and says how many that were.
fn change(sizes: &Path, wanted: HugePages) -> Result<(), Failure> {
    let HugePages { page_size, count: wanted } = wanted;
    let failed =
        |error| Failure::system(&format!("set {wanted} huge pages of {} KiB aside", page_size >> 10), error);
    let mut found = 0;
    for _ in 0..2 {
        fs::write(number(sizes, page_size), wanted.to_string()).map_err(failed)?;
        found = count(sizes, page_size).map_err(failed)?;
        if found >= wanted {
            return Ok(());
        }
        let _ = fs::write(COMPACT, "1");
    }
    Err(Failure::state(format!(
        "the guest finds room for {found} of {wanted} huge pages of {} KiB: its memory is in use, or in pieces that are smaller",
        page_size >> 10
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel_with(pages: &[(u64, u64)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (size, count) in pages {
            let of_size = directory.path().join(format!("hugepages-{}kB", size >> 10));
            fs::create_dir(&of_size).unwrap();
            fs::write(of_size.join("nr_hugepages"), format!("{count}\n")).unwrap();
        }
        directory
    }

    #[test]
    fn what_is_not_named_goes() {
        let kernel = kernel_with(&[(2 << 20, 3), (1 << 30, 1)]);
        let sizes = kernel.path();
        let pages = |page_size, count| HugePages { page_size, count };
        let mut changed = set_aside(sizes, &[pages(2 << 20, 8)]).unwrap();
        changed.sort_by_key(|pages| pages.page_size);
        assert_eq!(changed, [pages(2 << 20, 3), pages(1 << 30, 1)]);
        let now = |size| count(sizes, size).unwrap();
        assert_eq!((now(2 << 20), now(1 << 30)), (8, 0));
        assert!(set_aside(sizes, &[pages(2 << 20, 8)]).unwrap().is_empty());
        restore(sizes, &changed);
        assert_eq!((now(2 << 20), now(1 << 30)), (3, 1));
    }

    #[test]
    fn a_size_that_the_guest_does_not_have_is_refused() {
        let kernel = kernel_with(&[(2 << 20, 3)]);
        let failure = set_aside(kernel.path(), &[HugePages { page_size: 1 << 30, count: 1 }]).unwrap_err();
        assert!(format!("{failure:?}").contains("no huge pages of 1048576 KiB"), "{failure:?}");
        assert_eq!(count(kernel.path(), 2 << 20).unwrap(), 3);
    }

    #[test]
    fn all_together() {
        let pages = |page_size, count| HugePages { page_size, count };
        assert_eq!(bytes(&[pages(2 << 20, 3), pages(1 << 30, 1)]), (6 << 20) + (1 << 30));
        assert_eq!(bytes(&[pages(u64::MAX, 2), pages(1, 1)]), u64::MAX);
    }
}
