//! Block devices of the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A loop device on a file; gone with it, or when the last who has it open closes it.
#[derive(Debug)]
pub struct BlockVolume {
    device: PathBuf,
    file: PathBuf,
}

impl BlockVolume {
    /// Makes the file, 1 MiB that begins with `text`, and the device.
    pub fn of(file: &Path, text: &str) -> Result<Self> {
        let mut content = text.as_bytes().to_vec();
        content.resize(1 << 20, 0);
        fs::write(file, content).with_context(|| format!("writing {}", file.display()))?;
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output()?;
        ensure!(made.status.success(), "losetup: {}", String::from_utf8_lossy(&made.stderr));
        let device = String::from_utf8(made.stdout)?.trim().into();
        Ok(Self { device, file: file.to_owned() })
    }

    /// The device's node.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// What stands at the beginning of the file.
    pub fn text(&self) -> Result<String> {
        let content = fs::read(&self.file)?;
        let end = content.iter().position(|byte| *byte == 0).unwrap_or(content.len());
        Ok(String::from_utf8_lossy(&content[..end]).into_owned())
    }

    /// Takes the device away from its file; it is still there for those who have it open.
    pub fn detach(&self) -> Result<()> {
        let done = Command::new("losetup").arg("--detach").arg(&self.device).output()?;
        ensure!(done.status.success(), "losetup: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    /// Whether it has its file still.
    pub fn is_attached(&self) -> bool {
        let name = self.device.file_name().unwrap_or_default();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        fs::read_to_string(backing).is_ok_and(|path| Path::new(path.trim()) == self.file)
    }
}

impl Drop for BlockVolume {
    fn drop(&mut self) {
        if self.is_attached() {
            let _ = self.detach();
        }
    }
}
