//! What we put on the wire against an independent client's reading of it: crate `k8s-cri`, the CRI as of about
//! Kubernetes 1.32.
//!
//! The same messages are written down once, by names, and built with either crate's types: the bytes must be the
//! same, and each side must read the other's. (Numbers alone would not show two fields that are swapped.)

use std::fmt::Debug;

use prost::Message;

/// The messages in our types.
mod ours {
    use podvisor_proto::cri as v1;
    include!("wire/messages.rs");
}

/// The same messages in the other crate's types.
mod theirs {
    use k8s_cri::v1;
    include!("wire/messages.rs");
}

fn agree<O, T>(ours: &O, theirs: &T)
where
    O: Message + Default + PartialEq + Debug,
    T: Message + Default + PartialEq + Debug,
{
    let (our_bytes, their_bytes) = (ours.encode_to_vec(), theirs.encode_to_vec());
    assert!(our_bytes.len() > 2, "an empty message shows nothing");
    assert_eq!(our_bytes, their_bytes);
    assert_eq!(T::decode(our_bytes.as_slice()).expect("they read ours"), *theirs);
    assert_eq!(O::decode(their_bytes.as_slice()).expect("we read theirs"), *ours);
}

macro_rules! agreements {
    ($($message:ident)*) => {
        $(
            #[test]
            fn $message() {
                agree(&ours::$message(), &theirs::$message());
            }
        )*
    };
}

agreements! {
    run_pod_sandbox
    create_container
    pod_sandbox_status
    container_status
    list_containers
    list_pod_sandboxes
    update_container_resources
    exec_sync
    exec
    attach
    port_forward
    pull_image
    images
    image_fs_info
    pod_sandbox_stats
    metrics
    status
    runtime_config
    event
}

/// A client that does not know our newest fields reads the rest.
#[test]
fn newer_fields_do_not_disturb_an_older_client() {
    use podvisor_proto::cri as v1;

    let mut status = ours::container_status();
    let container = status.status.as_mut().expect("filled in");
    container.stop_signal = v1::Signal::Sigusr1.into();
    container.mounts[0].image_sub_path = "a/b".to_owned();
    container.mounts[0].mount_options = vec!["noexec".to_owned()];
    let read = k8s_cri::v1::ContainerStatusResponse::decode(status.encode_to_vec().as_slice());
    assert_eq!(read.expect("they read ours"), theirs::container_status());

    let mut status = ours::status();
    status.features.as_mut().expect("filled in").mount_options = true;
    let read = k8s_cri::v1::StatusResponse::decode(status.encode_to_vec().as_slice());
    assert_eq!(read.expect("they read ours"), theirs::status());
}

/// A request with credentials may be logged.
#[test]
fn credentials_are_not_printed() {
    let printed = format!("{:?}", ours::pull_image());
    assert!(printed.contains("registry.example") && printed.contains("somebody"), "{printed}");
    for secret in ["a-password", "an-auth", "an-identity", "a-bearer"] {
        assert!(
            ours::pull_image().encode_to_vec().windows(secret.len()).any(|part| part == secret.as_bytes())
        );
        assert!(!printed.contains(secret), "{printed}");
    }
}
