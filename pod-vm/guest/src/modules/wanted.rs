//! What a guest needs, each with its reason. Names are those of the modules; what depends on what is in the modules themselves.
//!
//! The list is short on purpose. A module that is loaded costs every pod time and memory, one that is only carried costs the
//! initramfs its size; who needs another one names it (`podvisor guest build --module`). File systems of volumes are not here:
//! kubelet mounts those on the host, ext4 is in the distributions' kernels. Nor is anything for hardware.

use super::When;
use super::When::{Demand, Start};

/// A module that is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) name: &'static str,
    pub(crate) when: When,
    /// Whether there is no guest without it.
    pub(crate) required: bool,
    /// What it is for.
    pub(crate) why: &'static str,
}

const fn must(name: &'static str, why: &'static str) -> Wanted {
    Wanted { name, when: Start, required: true, why }
}

const fn start(name: &'static str, why: &'static str) -> Wanted {
    Wanted { name, when: Start, required: false, why }
}

const fn demand(name: &'static str, why: &'static str) -> Wanted {
    Wanted { name, when: Demand, required: false, why }
}

/// In the order in which they are loaded, as far as they do not need each other.
pub(crate) const WANTED: &[Wanted] = &[
    // Every pod.
    must("virtio_mmio", "transport of the devices"),
    must("virtio_pci", "transport of the devices"),
    must("vmw_vsock_virtio_transport", "the host speaks to the agent through it"),
    must("virtio_net", "network"),
    must("virtiofs", "images and volumes"),
    must("overlay", "writable layer over an image"),
    start("virtio_rng", "entropy"),
    start("virtio_blk", "writable layers and block volumes"),
    // Where the machine monitor offers the device, or a container asks for it.
    demand("virtio_console", "console of `podvisor shell`"),
    demand("erofs", "images shared between virtual machines"),
    demand("virtio_pmem", "images in the host's page cache"),
    demand("nd_pmem", "block device of virtio_pmem"),
    demand("virtio_balloon", "memory that the guest gives back"),
    demand("virtio_mem", "memory that is added later"),
    demand("ptp_kvm", "the host's clock"),
    // Rules of service meshes and of network policies in a pod: nft, and iptables over it or alone.
    demand("nf_tables", "nft and iptables-nft"),
    demand("nft_compat", "iptables-nft with xtables' matches"),
    demand("nft_ct", "rules on connections"),
    demand("nft_chain_nat", "address translation"),
    demand("nft_nat", "address translation"),
    demand("nft_masq", "address translation"),
    demand("nft_redir", "connections into a proxy"),
    demand("nft_tproxy", "connections into a proxy, addresses kept"),
    demand("nft_socket", "connections into a proxy, addresses kept"),
    demand("nft_reject_inet", "refusals"),
    demand("nft_limit", "rates"),
    demand("nft_log", "logging rules"),
    demand("nft_fib_inet", "rules on local addresses"),
    demand("iptable_filter", "iptables-legacy"),
    demand("iptable_nat", "iptables-legacy"),
    demand("iptable_mangle", "iptables-legacy"),
    demand("iptable_raw", "iptables-legacy"),
    demand("ip6table_filter", "ip6tables-legacy"),
    demand("ip6table_nat", "ip6tables-legacy"),
    demand("ip6table_mangle", "ip6tables-legacy"),
    demand("ip6table_raw", "ip6tables-legacy"),
    demand("ipt_REJECT", "refusals"),
    demand("ip6t_REJECT", "refusals"),
    demand("xt_MASQUERADE", "address translation"),
    demand("xt_REDIRECT", "connections into a proxy"),
    demand("xt_TPROXY", "connections into a proxy, addresses kept"),
    demand("xt_socket", "connections into a proxy, addresses kept"),
    demand("xt_nat", "address translation"),
    demand("xt_addrtype", "rules on local addresses"),
    demand("xt_comment", "comments that tools find their rules by"),
    demand("xt_conntrack", "rules on connections"),
    demand("xt_limit", "rates"),
    demand("xt_LOG", "logging rules"),
    demand("xt_mark", "marks of packets"),
    demand("xt_connmark", "marks of connections"),
    demand("xt_multiport", "rules on several ports"),
    demand("xt_owner", "a mesh's proxy is left out by its user"),
    demand("xt_tcpudp", "rules on ports"),
    demand("xt_TCPMSS", "path MTU behind tunnels"),
    demand("nf_conntrack_netlink", "the conntrack program"),
    // Containers that run containers, or tunnels.
    demand("bridge", "containers in the pod that have a network of their own"),
    demand("br_netfilter", "rules on a bridge's packets"),
    demand("veth", "containers in the pod that have a network of their own"),
    demand("dummy", "addresses without a wire"),
    demand("tun", "tunnels in user space"),
    demand("wireguard", "tunnels"),
    demand("loop", "images mounted from files"),
    demand("tcp_diag", "the ss program"),
    demand("udp_diag", "the ss program"),
    demand("unix_diag", "the ss program"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stands_once_and_has_a_reason() {
        let mut names: Vec<&str> = WANTED.iter().map(|module| module.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(WANTED.iter().all(|module| !module.why.is_empty()));
        assert!(
            WANTED
                .iter()
                .all(|module| super::super::modinfo::name(module.name).as_deref() == Some(module.name))
        );
    }
}
