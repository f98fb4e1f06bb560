//! The device.

use serde::{Deserialize, Serialize};

use crate::device::{Buffers, Device, Memory, Misuse, Queues, Wake};
use crate::state::{DeviceState, RestoreError};
use crate::sys;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The next one that is negotiated: there are neither statistics nor hints.
const REPORT: usize = 2;
/// `VIRTIO_BALLOON_F_REPORTING`
const REPORTING: u64 = 1 << 5;
/// Bytes of the configuration (`struct virtio_balloon_config`): no page is wanted.
const CONFIGURATION: [u8; 16] = [0; 16];
/// Bytes that one report may name: Linux names at most 32 pieces of the largest size that it has.
const MOST: usize = 1 << 30;
/// Bytes of a page's number, and of a page.
const NUMBER: usize = 4;
const PAGE: u64 = 4096;
/// Numbers of pages in one request (`VIRTIO_BALLOON_ARRAY_PFNS_MAX` in Linux).
const NUMBERS: usize = 256;

/// What has become of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Bytes that the guest has told of, over and over again perhaps.
    pub reported: u64,
}

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    state: State,
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON
    }

    fn queues(&self) -> &'static [u16] {
        &[32, 32, 64]
    }

    fn features(&self) -> u64 {
        REPORTING
    }

    fn configuration(&self) -> &[u8] {
        &CONFIGURATION
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(self.state)
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else {
            return Err(RestoreError::Differs("it is no balloon's"));
        };
        self.state = state;
        Ok(())
    }

    fn serve(&mut self, wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        match wake {
            Wake::Queue(REPORT) => {
                let state = &mut self.state;
                queues.take(REPORT, |chain| {
                    let buffers = Buffers::new(chain, MOST)?;
                    let told = buffers.each(memory, true, 0, buffers.lengths[1], |part, _| {
                        sys::discard(&part);
                        Ok(())
                    })?;
                    state.reported = state.reported.saturating_add(told as u64);
                    Ok(0)
                })
            }
            // Nobody has asked for them, but pages that are given up are given up.
            Wake::Queue(INFLATE) => queues.take(INFLATE, |chain| {
                let buffers = Buffers::new(chain, NUMBERS * NUMBER)?;
                let mut numbers = vec![0; buffers.lengths[0]];
                buffers.read(memory, 0, &mut numbers)?;
                for number in numbers.chunks_exact(NUMBER) {
                    let mut bytes = [0; NUMBER];
                    bytes.copy_from_slice(number);
                    let address = u64::from(u32::from_le_bytes(bytes)) * PAGE;
                    sys::discard_at(memory, address, PAGE);
                }
                Ok(0)
            }),
            Wake::Queue(DEFLATE) => {
                queues.take(DEFLATE, |chain| Buffers::new(chain, NUMBERS * NUMBER).map(|_| 0))
            }
            _ => Ok(false),
        }
    }
}
