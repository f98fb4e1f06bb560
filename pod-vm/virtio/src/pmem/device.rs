//! The device.

use serde::{Deserialize, Serialize};

use crate::device::{Buffers, Device, Memory, Misuse, Queues, Wake};
use crate::state::{DeviceState, RestoreError};

/// Bytes of a request (`struct virtio_pmem_req`) and of its answer.
const WORD: usize = 4;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`
const FLUSH: u32 = 0;
/// What everything but that is answered.
const FAILED: u32 = 1;

/// Where the range is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it begins.
    pub begin: u64,
    /// How long it is.
    pub length: u64,
}

/// The device.
#[derive(Debug)]
pub struct Image {
    state: State,
    configuration: [u8; 16],
}

impl Image {
    /// That range of the guest's memory. Linux takes only whole parts of 2 MiB (mm/memremap.c, subsections).
    pub fn new(state: State) -> Self {
        let mut configuration = [0; 16];
        configuration[..8].copy_from_slice(&state.begin.to_le_bytes());
        configuration[8..].copy_from_slice(&state.length.to_le_bytes());
        Self { state, configuration }
    }
}

impl Device for Image {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_PMEM
    }

    fn queues(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn state(&self) -> DeviceState {
        DeviceState::Pmem(self.state)
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        if state != DeviceState::Pmem(self.state) {
            return Err(RestoreError::Differs("it is of an image in another place"));
        }
        Ok(())
    }

    fn serve(&mut self, _wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        queues.take(0, |chain| {
            let buffers = Buffers::new(chain, WORD * 64)?;
            let mut kind = [0; WORD];
            if buffers.read(memory, 0, &mut kind)? < WORD || buffers.lengths[1] < WORD {
                return Err(Misuse::Request("a request about persistent memory is too short"));
            }
            let answer = if u32::from_le_bytes(kind) == FLUSH { 0 } else { FAILED };
            let written = buffers.write(memory, 0, &answer.to_le_bytes())?;
            Ok(u32::try_from(written).unwrap_or(0))
        })
    }
}
