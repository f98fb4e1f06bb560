//! The signature at a module's end. It says who built the module, which matters where files can be exchanged; a guest's modules are held
//! by the manifest's digests. Checking it takes the kernel longer than all the rest of loading (README.md), so it is cut off, unless the
//! kernel loads nothing without.
//!
//! The file is the module, the signature, `struct module_signature` (12 bytes, whose last four are the signature's length, big endian) and a
//! text (`include/linux/module_signature.h`, `scripts/sign-file.c`).

use std::fs;
use std::path::Path;

const TEXT: &[u8] = b"~Module signature appended~\n";
const FRAME: usize = 12;

/// Cuts off the signature, if there is one.
pub(crate) fn strip(module: &mut Vec<u8>) {
    if let Some(length) = unsigned_length(module) {
        module.truncate(length);
    }
}

fn unsigned_length(module: &[u8]) -> Option<usize> {
    let rest = module.strip_suffix(TEXT)?;
    let (_, length) = rest.split_last_chunk::<4>()?;
    let signature = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    rest.len().checked_sub(FRAME)?.checked_sub(signature)
}

/// Whether the kernel was built to load nothing without a signature, by its configuration: beside it, or with its modules, where
/// distributions put it. Without one the answer is no: such kernels are rare, and the guest says so at its first start.
pub(crate) fn is_enforced(vmlinuz: &Path, modules: &Path, release: &str) -> bool {
    let beside = vmlinuz.with_file_name(format!("config-{release}"));
    [beside, modules.join("config")]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .any(|text| text.lines().any(|line| line == "CONFIG_MODULE_SIG_FORCE=y"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_cut_off_and_nothing_else() {
        let signed = |length: u32| {
            let frame = [&[0; 8][..], &length.to_be_bytes()].concat();
            [b"\x7fELF module", &b"signature"[..], &frame, TEXT].concat()
        };
        let stripped = |mut module: Vec<u8>| {
            strip(&mut module);
            module
        };
        assert_eq!(stripped(signed(9)), b"\x7fELF module");
        assert_eq!(stripped(signed(1000)), signed(1000), "longer than the file");
        for whole in [&b"\x7fELF module"[..], TEXT, b""] {
            assert_eq!(stripped(whole.to_vec()), whole);
        }
    }

    #[test]
    fn the_kernel_s_configuration_decides() {
        let directory = tempfile::tempdir().unwrap();
        let (vmlinuz, modules) = (directory.path().join("vmlinuz-6.1"), directory.path().join("modules"));
        fs::create_dir(&modules).unwrap();
        let is = || is_enforced(&vmlinuz, &modules, "6.1");
        assert!(!is());
        fs::write(
            directory.path().join("config-6.1"),
            "CONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not set\n",
        )
        .unwrap();
        assert!(!is());
        fs::write(modules.join("config"), "CONFIG_MODULE_SIG_FORCE=y\n").unwrap();
        assert!(is());
    }
}
