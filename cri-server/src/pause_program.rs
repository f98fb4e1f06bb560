//! The built-in pause as a program: what runs as a pod's sandbox container where the OCI runtime wants one. It needs no image
//! and no libraries, so it is written out here instruction by instruction.

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// ELF header and one program header (elf(5)).
const HEADERS: u64 = 64 + 56;
const CODE: [u8; 40] = [
    // A child that ends is not waited for by anybody: with SIGCHLD ignored the kernel reaps it (wait(2), NOTES).
    0x48, 0x8d, 0x35, 33, 0, 0, 0, // lea rsi, [rip + 33]: the end of this code
    0xb8, 13, 0, 0, 0, // mov eax, 13: rt_sigaction
    0xbf, 17, 0, 0, 0, // mov edi, 17: SIGCHLD
    0x31, 0xd2, // xor edx, edx: the old action is not wanted
    0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8: size of a signal set
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // mov eax, 34: pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp back to the mov
    0x90, 0x90, 0x90, 0x90, // so that what follows is aligned
];
/// The kernel's `struct sigaction`: handler 1 is SIG_IGN, then flags, restorer and mask.
const ACTION: [u64; 4] = [1, 0, 0, 0];

/// A static executable that ignores its children and waits for SIGKILL; `None` for a processor that it is not written for.
pub(crate) fn program() -> Option<Vec<u8>> {
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    let size = HEADERS + CODE.len() as u64 + 8 * ACTION.len() as u64;
    let mut elf = Vec::new();
    // 64 bits, little endian, version 1, System V.
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // ET_EXEC, EM_X86_64.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, no section headers.
    for number in [BASE + HEADERS, 64, 0] {
        elf.extend(number.to_le_bytes());
    }
    // Flags; sizes and counts: this header, a program header, one of them, no sections.
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable: the whole file.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for number in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(number.to_le_bytes());
    }
    elf.extend(CODE);
    elf.extend(ACTION.into_iter().flat_map(u64::to_le_bytes));
    Some(elf)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    /// Sleeping in `pause` (system call 34) is as far as it comes.
    #[test]
    fn it_runs_and_waits_until_it_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pause");
        std::fs::write(&path, program().unwrap()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o555)).unwrap();
        let mut child = Command::new(&path).spawn().unwrap();
        let call = format!("/proc/{}/syscall", child.id());
        let deadline = Instant::now() + Duration::from_secs(20);
        while !std::fs::read_to_string(&call).unwrap().starts_with("34 ") {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
            std::thread::yield_now();
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        assert_eq!(u64::from_str_radix(ignored, 16).unwrap() >> 16 & 1, 1, "SIGCHLD");
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}
