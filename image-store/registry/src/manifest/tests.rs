//! Documents as registries serve them, and as an attacker would.

use serde_json::{Value, json};

use super::*;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn descriptor(media_type: &str, seed: &str) -> Value {
    json!({"mediaType": media_type, "digest": Digest::sha256(seed.as_bytes()).as_str(), "size": 3})
}

fn manifest(layers: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(OCI_CONFIG, "config"), "layers": layers})
}

fn for_platform(platform: &Value, seed: &str) -> Value {
    let mut entry = descriptor(OCI_MANIFEST, seed);
    entry["platform"] = platform.clone();
    entry
}

fn parse(document: &Value, stated: Option<&str>) -> Result<Document, Failure> {
    Document::parse(document.to_string().as_bytes(), stated)
}

fn config(diff_ids: usize) -> Config {
    let ids: Vec<_> = (0..diff_ids).map(|n| Digest::sha256(n.to_string().as_bytes()).to_string()).collect();
    let text = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": ids}});
    Config::parse(text.to_string().as_bytes()).unwrap()
}

#[test]
fn reads_images_of_both_kinds() {
    let oci =
        manifest(&[descriptor(LAYER, "a"), descriptor("application/vnd.oci.image.layer.v1.tar+zstd", "b")]);
    let docker = json!({
        "schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": descriptor(DOCKER_CONFIG, "config"),
        "layers": [
            descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", "a"),
            descriptor("application/vnd.docker.image.rootfs.diff.tar", "b"),
        ],
    });
    for (document, stated, expected) in [
        (&oci, Some(OCI_MANIFEST), [Compression::Gzip, Compression::Zstd]),
        (&oci, Some("application/json; charset=utf-8"), [Compression::Gzip, Compression::Zstd]),
        (&docker, None, [Compression::Gzip, Compression::None]),
    ] {
        let Document::Manifest(manifest) = parse(document, stated).unwrap() else { panic!() };
        let layers = manifest.layers(&config(2)).unwrap();
        assert_eq!(layers.iter().map(|layer| layer.compression).collect::<Vec<_>>(), expected);
        assert_eq!(layers[0].digest, Digest::sha256(b"a"));
        assert_eq!(layers[1].diff_id, Digest::sha256(b"1"));
    }
}

#[test]
fn the_right_platform_wherever_it_stands() {
    let host = HostPlatform::detect();
    let ours = host.to_string();
    let ours = ours.split('/').nth(1).unwrap();
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        for_platform(&json!({"os": "unknown", "architecture": "unknown"}), "attestation"),
        for_platform(&json!({"os": "linux", "architecture": "s390x"}), "other"),
        for_platform(&json!({"os": "windows", "architecture": ours}), "windows"),
        descriptor(OCI_MANIFEST, "unnamed"),
        descriptor("application/vnd.example.thing", "thing"),
        for_platform(&json!({"os": "linux", "architecture": ours, "os.version": "1"}), "ours"),
        for_platform(&json!({"os": "linux", "architecture": ours}), "second"),
    ]});
    let Document::Index(index) = parse(&index, Some(OCI_INDEX)).unwrap() else { panic!() };
    let found: Vec<_> = index.candidates(host).iter().map(|entry| entry.digest.clone()).collect();
    assert_eq!(found, [Digest::sha256(b"ours"), Digest::sha256(b"second"), Digest::sha256(b"unnamed")]);
    assert!(index.platforms().contains("windows/"));
    assert!(!index.platforms().contains("unknown"));
}

#[test]
fn ambiguous_and_broken_documents_are_refused() {
    let mut both = manifest(&[]);
    both["manifests"] = json!([]);
    let mut negative = manifest(&[descriptor(LAYER, "a")]);
    negative["layers"][0]["size"] = json!(-1);
    let mut huge = manifest(&[descriptor(LAYER, "a")]);
    huge["layers"][0]["size"] = json!(u64::MAX);
    let mut traversal = manifest(&[descriptor(LAYER, "a")]);
    traversal["layers"][0]["digest"] = json!("sha256:../../../etc/passwd");
    let mut lying = manifest(&[]);
    lying["mediaType"] = json!(OCI_INDEX);
    for (document, stated) in [
        (json!({}), None),
        (json!([]), None),
        (json!({"schemaVersion": 3}), None),
        (json!({"schemaVersion": 2}), None),
        (both, None),
        (negative, None),
        (huge, None),
        (traversal, None),
        (lying, None),
        (manifest(&[]), Some(DOCKER_LIST)),
    ] {
        let failure = parse(&document, stated).expect_err(&document.to_string());
        assert_eq!(failure.kind(), crate::ErrorKind::Corrupt, "{document}: {failure}");
    }
    let twice = br#"{"schemaVersion":2,"manifests":[],"manifests":[]}"#;
    assert!(Document::parse(twice, None).is_err(), "duplicate keys are ambiguous");
    for garbage in [&b"<html>"[..], b"", b"\xff\xfe", b"null"] {
        assert!(Document::parse(garbage, None).is_err());
    }
    let deep = "[".repeat(100_000);
    assert!(Document::parse(deep.as_bytes(), None).is_err());
}

#[test]
fn intact_but_unusable_documents_say_why() {
    let mut foreign =
        manifest(&[descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "a")]);
    foreign["layers"][0]["urls"] = json!(["https://elsewhere.net/x"]);
    let many: Vec<_> = (0..=LAYERS_MAX).map(|n| descriptor(LAYER, &n.to_string())).collect();
    let mut large_config = manifest(&[]);
    large_config["config"]["size"] = json!(CONFIG_MAX + 1);
    for (document, stated, part) in [
        (foreign, None, "foreign layer"),
        (manifest(&[descriptor("application/vnd.oci.image.layer.v1.tar+lzma", "a")]), None, "tar+lzma"),
        (manifest(&[descriptor("", "a")]), None, "unknown type"),
        (manifest(&many), None, "513 layers"),
        (large_config, None, "bytes, more than"),
        (json!({"schemaVersion": 1, "fsLayers": []}), None, "schema 1"),
        (manifest(&[]), Some(SCHEMA_1[1]), "schema 1"),
        (manifest(&[]), Some("text/html"), "text/html"),
    ] {
        let failure = parse(&document, stated).expect_err(part);
        assert_eq!(failure.kind(), crate::ErrorKind::Unsupported, "{failure}");
        assert!(failure.to_string().contains(part), "{failure}");
    }
    // Without addresses the registry itself has the layer.
    let kept = manifest(&[descriptor("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "a")]);
    assert!(parse(&kept, None).is_ok());
}

#[test]
fn configurations_have_one_diff_id_per_layer() {
    let Document::Manifest(manifest) = parse(&manifest(&[descriptor(LAYER, "a")]), None).unwrap() else {
        panic!()
    };
    assert!(manifest.layers(&config(1)).is_ok());
    for count in [0, 2] {
        let failure = manifest.layers(&config(count)).unwrap_err();
        assert_eq!(failure.kind(), crate::ErrorKind::Corrupt, "{failure}");
    }
    for text in [
        "{}",
        r#"{"rootfs": {"type": "other"}}"#,
        r#"{"rootfs": {"type": "layers", "diff_ids": ["sha256:zz"]}}"#,
        r#"{"rootfs": {"type": "layers", "diff_ids": 5}}"#,
        "garbage",
    ] {
        assert!(Config::parse(text.as_bytes()).is_err(), "{text}");
    }
    let bare = Config::parse(br#"{"rootfs": {"type": "layers"}}"#).unwrap();
    assert!(bare.platform.is_none());
}
