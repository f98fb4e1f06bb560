//! OCI artifacts (image-spec, manifest.md, "Guidelines for Artifact Usage"): content that is no container image, as a tree of files.
//!
//! A blob is a file named by its title annotation, as ORAS and CRI-O have it; a tar of an image's media type without a title, or with ORAS's
//! word that it is to be unpacked, is unpacked. (ORAS calls a plain file without a type of its own a tar: the title decides.)
//! Titles come from whoever pushed: what is no plain way down into the tree is refused.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Compression, Content, LayerDescriptor, RawDescriptor, compression, digest, garbage};
use crate::digest::Digest;
use crate::failure::{Failure, printable};

/// Files of one artifact. Each becomes an inode and a download.
const BLOBS_MAX: usize = 1024;
/// Bytes of a file's path.
const PATH_MAX: usize = 1024;
/// Bytes of one name (the kernel's NAME_MAX).
const NAME_MAX: usize = 255;

const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const TITLE: &str = "org.opencontainers.image.title";
/// Set by ORAS at directories that it packed.
const UNPACK: &str = "io.deis.oras.content.unpack";

/// What an artifact is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Its `artifactType`, or the type of its configuration.
    pub kind: String,
    /// Files: the [`LayerDescriptor::diff_id`] of the blob that one is, and its path below the artifact's root, without `.` and `..`.
    pub files: Vec<(Digest, String)>,
}

/// The artifact and its blobs in order.
pub(super) fn check(
    kind: String,
    layers: Vec<RawDescriptor>,
) -> Result<(Artifact, Vec<LayerDescriptor>), Failure> {
    if layers.len() > BLOBS_MAX {
        let count = layers.len();
        return Err(Failure::Unsupported(format!(
            "is an OCI artifact of {count} blobs, more than {BLOBS_MAX}"
        )));
    }
    let mut blobs = Vec::with_capacity(layers.len());
    let mut files: BTreeMap<String, Digest> = BTreeMap::new();
    for layer in layers {
        let annotation = |name: &str| layer.annotations.as_ref()?.get(name).and_then(Value::as_str);
        let title = annotation(TITLE);
        if layer.media_type == EMPTY && title.is_none() {
            continue;
        }
        let blob = digest(&layer.digest)?;
        let unpacked = match title {
            None => true,
            Some(_) => annotation(UNPACK) == Some("true"),
        };
        let (content, compression) = match compression(&layer) {
            Ok(compression) if unpacked => (Content::Archive, compression),
            _ => (Content::File, Compression::None),
        };
        let kept = stand_in(content, &blob);
        if content == Content::File {
            let path = match title {
                Some(title) => path(title)?,
                None => format!("{}-{}", blob.algorithm().name(), blob.hex()),
            };
            if files.insert(path.clone(), kept.clone()).is_some_and(|other| other != kept) {
                return Err(unusable(&path, "names two blobs"));
            }
        }
        blobs.push(LayerDescriptor { digest: blob, size: layer.size, compression, diff_id: kept, content });
    }
    let within = files.keys().find(|path| {
        path.match_indices('/').any(|(at, _)| path.get(..at).is_some_and(|above| files.contains_key(above)))
    });
    if let Some(path) = within {
        return Err(unusable(path, "is below a file"));
    }
    let files = files.into_iter().map(|(path, kept)| (kept, path)).collect();
    Ok((Artifact { kind, files }, blobs))
}

/// What a blob is kept by whose uncompressed digest nobody has said. It depends on how the blob is used, so that no tar and no
/// file that happen to be the same bytes are taken for each other.
fn stand_in(content: Content, blob: &Digest) -> Digest {
    Digest::sha256(format!("podvisor {content:?} {blob}").as_bytes())
}

fn path(title: &str) -> Result<String, Failure> {
    if title.starts_with('/') {
        return Err(unusable(title, "is an absolute path"));
    }
    if title.len() > PATH_MAX || title.contains('\0') {
        return Err(unusable(title, "contains a NUL byte or is too long"));
    }
    let mut names = Vec::new();
    for name in title.split('/') {
        match name {
            "" | "." => {}
            ".." => return Err(unusable(title, "leads out of the artifact")),
            name if name.len() > NAME_MAX => return Err(unusable(title, "has too long a name")),
            name => names.push(name),
        }
    }
    if names.is_empty() {
        return Err(unusable(title, "names no file"));
    }
    Ok(names.join("/"))
}

fn unusable(title: &str, problem: &str) -> Failure {
    let title: String = title.chars().take(200).collect();
    garbage(format!("the title {:?} of one of its blobs {problem}", printable(&title)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Document;
    use super::*;

    const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
    const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn blob(media_type: &str, seed: &str, title: Option<&str>) -> Value {
        let mut blob =
            json!({"mediaType": media_type, "digest": Digest::sha256(seed.as_bytes()).as_str(), "size": 3});
        if let Some(title) = title {
            blob["annotations"] = json!({TITLE: title});
        }
        blob
    }

    fn read(blobs: &[Value]) -> Result<(Artifact, Vec<LayerDescriptor>), Failure> {
        let config = blob(EMPTY, "{}", None);
        let manifest = json!({
            "schemaVersion": 2, "artifactType": "application/vnd.example.model", "config": config, "layers": blobs,
        });
        let Document::Manifest(manifest) = Document::parse(manifest.to_string().as_bytes(), None)? else {
            panic!("no manifest")
        };
        Ok(manifest.artifact().expect("an artifact"))
    }

    #[test]
    fn titles_make_files_and_tars_are_unpacked() {
        let mut packed = blob(GZIP, "packed", Some("directory"));
        packed["annotations"][UNPACK] = json!("true");
        let (artifact, blobs) = read(&[
            blob("application/vnd.example.weights", "weights", Some("./model//weights.bin")),
            // What ORAS makes of a file without a type.
            blob(TAR, "text", Some("README.txt")),
            blob(GZIP, "tar", None),
            packed,
            blob("text/plain", "nameless", None),
            blob(EMPTY, "{}", None),
            blob("text/plain", "weights", Some("same-blob-again")),
        ])
        .unwrap();
        assert_eq!(artifact.kind, "application/vnd.example.model");
        let contents: Vec<_> = blobs.iter().map(|blob| (blob.content, blob.compression)).collect();
        assert_eq!(
            contents,
            [
                (Content::File, Compression::None),
                (Content::File, Compression::None),
                (Content::Archive, Compression::Gzip),
                (Content::Archive, Compression::Gzip),
                (Content::File, Compression::None),
                (Content::File, Compression::None),
            ]
        );
        let nameless = format!("sha256-{}", Digest::sha256(b"nameless").hex());
        let paths: Vec<_> = artifact.files.iter().map(|(_, path)| path.as_str()).collect();
        assert_eq!(paths, ["README.txt", "model/weights.bin", "same-blob-again", nameless.as_str()]);
        assert_eq!(artifact.files[1].0, blobs[0].diff_id);
        assert_eq!(artifact.files[2].0, blobs[0].diff_id);
        assert!(blobs.iter().all(|blob| blob.diff_id != blob.digest));
        assert_ne!(stand_in(Content::File, &blobs[0].digest), stand_in(Content::Archive, &blobs[0].digest));
        assert_eq!(read(&[]).unwrap().0.files, []);
    }

    #[test]
    fn hostile_titles_are_refused() {
        let long = "x".repeat(256);
        let deep = "x/".repeat(513);
        for title in [
            "",
            ".",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../../x",
            "a/..",
            "a\0b",
            long.as_str(),
            deep.as_str(),
        ] {
            let failure = read(&[blob("text/plain", "a", Some(title))]).expect_err(title);
            assert_eq!(failure.kind(), crate::ErrorKind::Corrupt, "{title:?}: {failure}");
            assert!(failure.to_string().len() < 500, "{failure}");
        }
        for (first, second, part) in [
            ("a", "a", "two blobs"),
            ("a", "./a", "two blobs"),
            ("a", "a/b", "below a file"),
            ("a/b/c", "a/b", "below"),
        ] {
            let blobs = [blob("text/plain", "1", Some(first)), blob("text/plain", "2", Some(second))];
            let failure = read(&blobs).expect_err(second);
            assert!(failure.to_string().contains(part), "{failure}");
        }
        // The same once more says nothing new.
        let twice = [blob("text/plain", "1", Some("a")), blob("text/plain", "1", Some("a"))];
        assert_eq!(read(&twice).unwrap().0.files.len(), 1);
        let many: Vec<_> =
            (0..=BLOBS_MAX).map(|n| blob("text/plain", &n.to_string(), Some(&n.to_string()))).collect();
        let failure = read(&many).expect_err("too many");
        assert_eq!(failure.kind(), crate::ErrorKind::Unsupported, "{failure}");
        assert!(failure.to_string().contains("1025 blobs"), "{failure}");
        // Annotations of other shapes are nobody's business.
        for annotations in [json!(null), json!([1]), json!({TITLE: 5})] {
            let mut odd = blob("text/plain", "1", None);
            odd["annotations"] = annotations;
            assert!(read(&[odd]).unwrap().0.files[0].1.starts_with("sha256-"));
        }
    }
}
