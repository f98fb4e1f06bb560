//! OCI artifacts on disk. A file of one comes in like a layer, verified by its digest, as a directory with one file. When all are there they
//! are linked under their titles into one layer of the artifact's own, and the directories go again: so an artifact of a thousand
//! files is one lower directory to overlayfs, which takes some hundred at most.

use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use podvisor_registry::{Algorithm, Artifact, Digest, Hasher, LayerDescriptor};

use crate::database::LayerRecord;
use crate::error::ImageError;
use crate::tree::Scratch;

/// The one file in the directory of a blob that is a file.
const BLOB: &str = "blob";

/// Writes a blob as it comes, and says its digest. Blocking.
pub(crate) fn receive(mut source: impl Read, scratch: &Scratch) -> Result<(String, u64), ImageError> {
    let path = scratch.file(BLOB);
    let failed = |operation| ImageError::io(operation, &path);
    let mut file = File::create_new(&path).map_err(failed("make"))?;
    file.set_permissions(Permissions::from_mode(0o644)).map_err(failed("set the mode of"))?;
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        let count = source.read(&mut buffer).map_err(failed("receive"))?;
        if count == 0 {
            return Ok((hasher.finish().to_string(), size));
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(failed("write"))?;
        size += count as u64;
    }
}

/// The layer that has an artifact's files under their titles: what it is kept by. `None`: it has no files.
pub(crate) fn files_layer(artifact: &Artifact, manifest: &Digest) -> Option<String> {
    let name = || Digest::sha256(format!("podvisor files of {manifest}").as_bytes()).to_string();
    (!artifact.files.is_empty()).then(name)
}

/// What the layers of an artifact are, lowest first: its tars in order, its files above them.
pub(crate) fn layers<'a>(
    blobs: &'a [LayerDescriptor],
    files: Option<&'a String>,
) -> impl Iterator<Item = String> + 'a {
    use podvisor_registry::Content;
    let tars = blobs.iter().filter(|blob| blob.content != Content::File);
    tars.map(|blob| blob.diff_id.to_string()).chain(files.cloned())
}

/// Links the files of `artifact` into `scratch`; `blob` says which directory a file came into. Blocking.
///
/// Nothing but these directories and links is ever in there, and no path has `..` in it: so none leads out.
pub(crate) fn assemble<'a>(
    artifact: &Artifact,
    scratch: &Scratch,
    blob: impl Fn(&Digest) -> (std::path::PathBuf, &'a LayerRecord),
) -> Result<LayerRecord, ImageError> {
    let mut record = LayerRecord::default();
    for (kept, path) in &artifact.files {
        let mut directory = scratch.file("");
        let (above, _) = path.rsplit_once('/').unwrap_or(("", path));
        for name in above.split('/').filter(|name| !name.is_empty()) {
            directory.push(name);
            record.inodes += u64::from(make(&directory)?);
        }
        let (from, file) = blob(kept);
        let to = scratch.file(path);
        std::fs::hard_link(from.join(BLOB), &to).map_err(ImageError::io("link", to))?;
        // A file under two titles is there once: counted too much rather than too little.
        record.size = record.size.saturating_add(file.size);
        record.inodes += 1;
    }
    Ok(record)
}

/// Whether the directory was not there before.
fn make(directory: &Path) -> Result<bool, ImageError> {
    match std::fs::create_dir(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(ImageError::io("make", directory)(error)),
    }
    std::fs::set_permissions(directory, Permissions::from_mode(0o755))
        .map_err(ImageError::io("set the mode of", directory))?;
    Ok(true)
}
