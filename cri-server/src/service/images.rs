//! The image service: every answer comes from the store's memory, only PullImage waits for anybody.

use std::collections::HashMap;
use std::time::Instant;

use podvisor_image_store::{Credentials, ImageError};
use podvisor_proto::cri;
use tonic::Status;

use super::answers::{filesystem, image};
use crate::error::{PodError, chain, image_code};
use crate::node::{Node, now};

fn failed(error: ImageError) -> Status {
    Status::new(image_code(&error), chain(&error))
}

fn wanted(spec: Option<&cri::ImageSpec>) -> Result<&str, Status> {
    let name = spec.map(|spec| spec.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return Err(PodError::invalid("image.image", "must not be empty").into());
    }
    if name.len() > 4096 {
        return Err(PodError::invalid("image.image", "is longer than 4096 bytes").into());
    }
    Ok(name)
}

pub(super) fn list_images(node: &Node, filter: Option<&cri::ImageFilter>) -> Vec<cri::Image> {
    let name = filter.and_then(|filter| filter.image.as_ref()).map(|spec| spec.image.as_str());
    match name {
        None | Some("") => node.images.list().iter().map(image).collect(),
        Some(name) => node.images.get(name).iter().map(image).collect(),
    }
}

pub(super) fn image_status(
    node: &Node,
    request: &cri::ImageStatusRequest,
) -> Result<cri::ImageStatusResponse, Status> {
    // No such image is an answer, not an error.
    let Some(found) = node.images.get(wanted(request.image.as_ref())?) else {
        return Ok(cri::ImageStatusResponse::default());
    };
    let mut info = HashMap::new();
    if request.verbose {
        let shown = if let Some(kind) = &found.artifact {
            serde_json::json!({ "artifactType": kind })
        } else {
            let spec: serde_json::Value = serde_json::from_str(&found.raw_config).unwrap_or_default();
            serde_json::json!({ "imageSpec": spec })
        };
        info.insert("info".to_owned(), shown.to_string());
    }
    Ok(cri::ImageStatusResponse { image: Some(image(&found)), info })
}

pub(super) async fn pull_image(
    node: &Node,
    request: cri::PullImageRequest,
) -> Result<cri::PullImageResponse, Status> {
    let name = wanted(request.image.as_ref())?;
    let credentials = request.auth.map(|auth| Credentials {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    });
    let credentials = credentials.filter(|credentials| *credentials != Credentials::default());
    let begin = Instant::now();
    let pulled = node.images.pull(name, credentials).await;
    node.telemetry.pull(&pulled, begin.elapsed());
    podvisor_fault::point("pull.done");
    Ok(cri::PullImageResponse { image_ref: pulled.map_err(failed)?.id })
}

pub(super) async fn remove_image(
    node: &Node,
    request: cri::RemoveImageRequest,
) -> Result<cri::RemoveImageResponse, Status> {
    node.images.remove(wanted(request.image.as_ref())?).await.map_err(failed)?;
    Ok(cri::RemoveImageResponse {})
}

pub(super) fn image_fs_info(node: &Node) -> cri::ImageFsInfoResponse {
    let (images, containers) = node.images.fs_info();
    let time = now();
    cri::ImageFsInfoResponse {
        image_filesystems: vec![filesystem(&images, time)],
        container_filesystems: vec![filesystem(&containers, time)],
    }
}
