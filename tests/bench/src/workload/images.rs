//! What kubelet's image manager asks, on a node that has more and more images.

use std::time::Instant;

use anyhow::Result;
use podvisor_proto::cri::{ImageFsInfoRequest, ImageStatusRequest, ListImagesRequest};
use podvisor_tests::cri::spec;

use crate::images::{MANY, MANY_COUNT, reference};
use crate::subject::Subject;
use crate::wire::Sample;

const STEPS: [u32; 3] = [1, 10, MANY_COUNT - 1];
const ASKED: u32 = 20;

pub(super) async fn run(subject: &Subject) -> Result<Vec<Sample>> {
    let name = |number: u32| reference(MANY, &number.to_string());
    let mut images = subject.cri.images.clone();
    let mut samples = Vec::new();
    let mut there = 0;
    for step in STEPS {
        for number in there..step {
            subject.cri.pull(&name(number)).await?;
        }
        there = step;
        let mut last = Instant::now();
        let mut lap = |series: &str| {
            samples.push(Sample::milliseconds(series, last.elapsed()).among(step, "images"));
            last = Instant::now();
        };
        for _ in 0..ASKED {
            images.list_images(ListImagesRequest::default()).await?;
            lap("ListImages");
            let request = ImageStatusRequest { image: Some(spec(&name(0))), verbose: false };
            images.image_status(request).await?;
            lap("ImageStatus");
            images.image_fs_info(ImageFsInfoRequest {}).await?;
            lap("ImageFsInfo");
        }
        // One more comes and goes.
        for _ in 0..ASKED / 4 {
            subject.cri.pull(&name(step)).await?;
            lap("pull of a small image");
            subject.cri.remove_image(&name(step)).await?;
            lap("RemoveImage of a small image");
        }
    }
    for number in 0..there {
        subject.cri.remove_image(&name(number)).await?;
    }
    Ok(samples)
}
