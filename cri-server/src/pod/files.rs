//! Files that a pod's containers share: host name, hosts, resolv.conf, shared memory.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use podvisor_network::namespace::UserMappings;
use podvisor_proto::cri;

use super::acquired::Acquisition;
use super::record::PodRecord;
use super::request::hostname;
use crate::error::PodError;
use crate::selinux::label_file;

/// Size of a pod's /dev/shm: what every runtime gives since Docker, 64 MiB.
const SHM_SIZE: &str = "size=67108864";

/// Host name, hosts and resolv.conf for containers whose configuration mounts none, and the pod's shared memory.
/// With a user namespace they belong to its root, who may change them as without one.
pub(super) fn files(
    record: &PodRecord,
    directory: &Path,
    user: Option<UserMappings>,
) -> Result<(), PodError> {
    let config = &record.config.0;
    let owner = user.map(|user| (user.uids.outside, user.gids.outside));
    let label = record.selinux.as_ref().map(|labels| labels.file.to_string());
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        let own = |(uid, gid)| std::os::unix::fs::chown(&path, Some(uid), Some(gid));
        std::fs::write(&path, text)
            .and_then(|()| owner.map_or(Ok(()), own))
            .map_err(|source| PodError::File { operation: "write", path: path.clone(), source })?;
        label.as_ref().map_or(Ok(()), |label| label_file(&path, label)).map_err(PodError::from)
    };
    let hostname = hostname(config);
    write("hostname", format!("{hostname}\n"))?;
    write("hosts", hosts(&hostname))?;
    write("resolv.conf", resolv_conf(config))?;
    if !config.log_directory.is_empty() {
        let path = PathBuf::from(&config.log_directory);
        std::fs::create_dir_all(&path).map_err(|source| PodError::File {
            operation: "make log directory",
            path,
            source,
        })?;
    }
    let shm = directory.join("shm");
    if record.acquired.contains(&Acquisition::Mount(shm.clone())) {
        use rustix::mount::MountFlags;
        std::fs::create_dir_all(&shm).map_err(|source| PodError::File {
            operation: "make",
            path: shm.clone(),
            source,
        })?;
        let owner = owner.map(|(uid, gid)| format!(",uid={uid},gid={gid}")).unwrap_or_default();
        // Quoted, because there are commas in it.
        let context = label.map(|label| format!(",context=\"{label}\"")).unwrap_or_default();
        let data =
            std::ffi::CString::new(format!("mode=1777,{SHM_SIZE}{owner}{context}")).expect("no NUL in it");
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("shm", &shm, "tmpfs", flags, data.as_c_str()).map_err(|error| {
            PodError::File { operation: "mount shared memory at", path: shm.clone(), source: error.into() }
        })?;
    }
    Ok(())
}

/// The host's own hosts file where there is one (kubelet mounts a better one for every pod it makes).
fn hosts(hostname: &str) -> String {
    std::fs::read_to_string("/etc/hosts")
        .unwrap_or_else(|_| format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t{hostname}\n"))
}

fn resolv_conf(config: &cri::PodSandboxConfig) -> String {
    let Some(dns) = &config.dns_config else {
        return std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    };
    let mut text = String::new();
    // In the order in which resolv.conf(5) has them and kubelet compares them.
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::request::tests::config;

    #[test]
    fn resolv_conf_is_written_in_the_order_of_the_manual() {
        let mut config = config();
        config.dns_config = Some(cri::DnsConfig {
            servers: vec!["10.96.0.10".into(), "fd00::10".into()],
            searches: vec!["shop.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        });
        assert_eq!(
            resolv_conf(&config),
            "search shop.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\nnameserver fd00::10\noptions ndots:5\n"
        );
    }
}
