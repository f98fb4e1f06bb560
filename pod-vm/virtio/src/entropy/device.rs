//! The device.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::device::{Buffers, Device, Memory, Misuse, Queues, Wake};
use crate::state::{DeviceState, RestoreError};

/// Random bytes for a request: what Linux asks for is less. The rest is left.
const MOST: usize = 4096;

/// The device has no state.
#[derive(Debug, Default)]
pub struct Entropy;

impl Device for Entropy {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }

    fn queues(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> &[u8] {
        &[]
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn state(&self) -> DeviceState {
        DeviceState::Entropy
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        match state {
            DeviceState::Entropy => Ok(()),
            _ => Err(RestoreError::Differs("it has none")),
        }
    }

    fn serve(&mut self, _wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        queues.take(0, |chain| {
            let buffers = Buffers::new(chain, usize::MAX)?;
            let mut bytes = [0; MOST];
            let wanted = &mut bytes[..buffers.lengths[1].min(MOST)];
            if wanted.is_empty() {
                return Err(Misuse::Request("there is no room for random bytes"));
            }
            let mut filled = 0;
            while filled < wanted.len() {
                match getrandom(&mut wanted[filled..], GetRandomFlags::empty()) {
                    Ok(count) => filled += count,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(Misuse::Gone(error.into())),
                }
            }
            let written = buffers.write(memory, 0, wanted)?;
            Ok(u32::try_from(written).unwrap_or(0))
        })
    }
}
