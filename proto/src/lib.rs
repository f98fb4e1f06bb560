//! The protocols that podvisor speaks: generated code, and a `Debug` that keeps passwords to itself.
//!
//! - [`cri`]: the Kubernetes Container Runtime Interface v1 as of Kubernetes 1.37
//!   (message and field numbers from `k8s.io/cri-api` v0.37);
//! - [`monitor`]: what the daemon and a pod's monitor say to each other.

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
}
