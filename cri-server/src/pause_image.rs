//! The configured pause image: pulled through the mirrors like any image, pinned, and reported in Status. No pod waits for it or
//! fails without it, because the pause itself is built in; it is there for those who count on finding it on the node.

use std::sync::Arc;
use std::time::Duration;

use crate::node::Node;

/// First pause between two tries; doubled each time.
const FIRST: Duration = Duration::from_secs(10);
/// Longest pause between two tries.
const LONGEST: Duration = Duration::from_secs(600);

/// Pins what is configured now and fetches it in the background. Called at the start and after each reload.
pub(crate) fn keep(node: Arc<Node>) {
    tokio::spawn(async move {
        let name = node.config().image.pause_image.clone();
        let names = if name.is_empty() { Vec::new() } else { vec![name.clone()] };
        if let Err(error) = node.images.pin(&names).await {
            tracing::error!(image = name, error = crate::error::chain(&error), "cannot pin the pause image");
            return;
        }
        let mut wait = FIRST;
        // Another one may have been configured meanwhile: then another task sees to that.
        while !name.is_empty() && name == node.config().image.pause_image && node.images.get(&name).is_none()
        {
            match node.images.pull(&name, None).await {
                Ok(_) => tracing::info!(image = name, "pulled the pause image"),
                Err(error) => {
                    tracing::warn!(
                        image = name,
                        error = crate::error::chain(&error),
                        again_in = ?wait,
                        "cannot pull the pause image; pods start without it"
                    );
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(LONGEST);
                }
            }
        }
    });
}
