//! The protocols that podvisor speaks: generated code, and a `Debug` that keeps passwords to itself.
//!
//! - [`cri`]: the Kubernetes Container Runtime Interface v1 as of Kubernetes 1.37
//!   (message and field numbers from `k8s.io/cri-api` v0.37);
//! - [`monitor`]: what the daemon and a pod's monitor say to each other;
//! - [`agent`]: what a pod's monitor and the agent in its guest say to each other;
//! - [`hypervisor`]: what a pod's monitor and the hypervisor of its machine say to each other;
//! - [`nri`]: the Node Resource Interface, in the envelopes of [`ttrpc`].

/// Kubernetes CRI v1: package `runtime.v1`, services `RuntimeService` and `ImageService`.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::all)]
pub mod cri {
    tonic::include_proto!("runtime.v1");

    /// Shows what identifies the credentials, and of the secrets only which are set: requests end up in logs.
    impl std::fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            // Taken apart completely: a new field has to decide whether it is a secret.
            let Self { username, password, auth, server_address, identity_token, registry_token } = self;
            let shown = |secret: &str| if secret.is_empty() { "" } else { "<secret>" };
            f.debug_struct("AuthConfig")
                .field("username", username)
                .field("password", &shown(password))
                .field("auth", &shown(auth))
                .field("server_address", server_address)
                .field("identity_token", &shown(identity_token))
                .field("registry_token", &shown(registry_token))
                .finish()
        }
    }
}

/// The monitor protocol: length-prefixed [`prost`] messages on a unix socket, one per pod.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::all)]
pub mod monitor {
    include!(concat!(env!("OUT_DIR"), "/podvisor.monitor.v1.rs"));

    /// The version this build speaks. A monitor answers [`Hello`] with its own, and the daemon adapts to a
    /// lower one: monitors outlive the daemon that started them, so an older monitor is the normal case
    /// after an upgrade.
    pub const PROTOCOL_VERSION: u32 = 1;

    /// Longest frame either side accepts, in bytes. An ExecSync reply with both outputs at their cap fits.
    pub const MAX_FRAME: usize = 40 << 20;

    /// Most bytes and files of a volume that a guest gets a copy of (`FollowedVolume`).
    pub const FOLLOWED_BYTES: u64 = 4 << 20;
    pub const FOLLOWED_FILES: usize = 1024;
    /// Most bytes of all of them that a pod has. Each is there twice while it is exchanged.
    pub const FOLLOWED_BYTES_OF_A_POD: u64 = 16 << 20;
}

/// The agent protocol: what a pod's monitor and the agent in its guest say to each other, on vsock.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::all)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/podvisor.agent.v1.rs"));

    /// The version this build speaks. An agent is older than its monitor whenever podvisor was upgraded and the guest was not, and each
    /// sandbox keeps the guest it began with.
    pub const PROTOCOL_VERSION: u32 = 1;

    /// Longest frame either side accepts, in bytes.
    pub const MAX_FRAME: usize = 4 << 20;

    /// The port that takes control connections.
    pub const CONTROL_PORT: u32 = 1024;

    /// The port that takes stream connections.
    pub const STREAM_PORT: u32 = 1025;
}

/// The hypervisor protocol: what a pod's monitor and the hypervisor of the pod's machine say to each other, on a socket pair.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::all)]
pub mod hypervisor {
    include!(concat!(env!("OUT_DIR"), "/podvisor.hypervisor.v1.rs"));

    /// Longest frame either side accepts, in bytes.
    pub const MAX_FRAME: usize = 1 << 20;
}

/// Node Resource Interface: what plugins and podvisor say to each other.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::all)]
pub mod nri {
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

/// ttRPC's envelopes.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::all)]
pub mod ttrpc {
    include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
}
