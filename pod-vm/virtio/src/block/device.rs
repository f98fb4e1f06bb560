//! The device.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};

use super::medium::Medium;
use super::request::{HEADER, Kind, Outcome, Request, SEGMENT, Segment};
use crate::device::{Buffers, Device, Memory, Misuse, Queues, Wake};
use crate::state::{DeviceState, RestoreError};

/// What sectors are counted in, whatever the disk's own are.
const SECTOR: u64 = 512;
/// Buffers of a request's data; with the header and the status not more than the queue has places.
const SEGMENTS: u32 = 126;
/// Bytes of a request's data. Linux asks for less than two megabytes at once.
const MOST: usize = 4 << 20;
/// Ranges that can be discarded with one request, and sectors of each.
const RANGES: u32 = 64;
const RANGE_SECTORS: u32 = 1 << 22;
/// Bytes that are moved at once.
const STEP: usize = 64 << 10;
/// Bytes of the configuration (`struct virtio_blk_config` up to `write_zeroes_may_unmap`, padded).
const CONFIGURATION: usize = 60;

/// What a disk is, and what has become of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its name, at most 20 bytes.
    pub serial: String,
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// The guest may only read.
    pub read_only: bool,
    /// Requests that have failed.
    pub failed: u64,
}

/// The device.
#[derive(Debug)]
pub struct Disk {
    medium: Medium,
    state: State,
    configuration: [u8; CONFIGURATION],
    step: Vec<u8>,
}

impl Disk {
    /// A disk in `file`, of the size that it has now.
    pub fn new(file: File, serial: &str, read_only: bool) -> io::Result<Self> {
        Ok(Self::with(Medium::one(file)?, serial, read_only))
    }

    /// A disk that cannot be written, of files one after the other, each whole sectors long.
    pub fn joined(files: Vec<File>, serial: &str) -> io::Result<Self> {
        Ok(Self::with(Medium::joined(files, SECTOR)?, serial, true))
    }

    fn with(medium: Medium, serial: &str, read_only: bool) -> Self {
        let sectors = medium.length() / SECTOR;
        let mut configuration = [0; CONFIGURATION];
        let mut put = |at: usize, bytes: &[u8]| configuration[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &512u32.to_le_bytes());
        // One queue; then discarding and writing zeros: sectors of a range, ranges, alignment.
        put(34, &1u16.to_le_bytes());
        put(36, &RANGE_SECTORS.to_le_bytes());
        put(40, &RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &RANGE_SECTORS.to_le_bytes());
        put(52, &RANGES.to_le_bytes());
        put(56, &[1]);
        let state = State { serial: serial.to_owned(), sectors, read_only, failed: 0 };
        Self { medium, state, configuration, step: Vec::new() }
    }

    /// Where a range begins, in bytes; `None`: it is not on the disk.
    fn place(&self, sector: u64, bytes: u64) -> Option<u64> {
        let begin = sector.checked_mul(SECTOR)?;
        let end = begin.checked_add(bytes)?;
        (end <= self.state.sectors * SECTOR).then_some(begin)
    }

    fn carry_out(&mut self, request: Request, buffers: &Buffers, memory: &Memory) -> Result<Outcome, Misuse> {
        let writes = matches!(request.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        if writes && self.state.read_only {
            return Ok(Outcome::Failed);
        }
        match request.kind {
            Kind::Read => self.read(request.sector, buffers, memory),
            Kind::Write => self.write(request.sector, buffers, memory),
            Kind::Flush => Ok(outcome(self.medium.sync())),
            Kind::Name => {
                let mut name = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (to, byte) in name.iter_mut().zip(self.state.serial.bytes()) {
                    *to = byte;
                }
                let room = (buffers.lengths[1] - 1).min(name.len());
                Ok(Outcome::Done(buffers.write(memory, 0, &name[..room])?))
            }
            Kind::Discard | Kind::WriteZeroes => self.ranges(request.kind, buffers, memory),
            Kind::Unknown => Ok(Outcome::Unsupported),
        }
    }

    fn read(&mut self, sector: u64, buffers: &Buffers, memory: &Memory) -> Result<Outcome, Misuse> {
        // The last byte is the status's.
        let length = buffers.lengths[1] - 1;
        let Some(begin) = self.place(sector, length as u64) else { return Ok(Outcome::Failed) };
        let mut done = 0;
        while done < length {
            let part = &mut self.step[..(length - done).min(STEP)];
            if self.medium.read(part, begin + done as u64).is_err() {
                return Ok(Outcome::Failed);
            }
            done += buffers.write(memory, done, part)?;
        }
        Ok(Outcome::Done(length))
    }

    fn write(&mut self, sector: u64, buffers: &Buffers, memory: &Memory) -> Result<Outcome, Misuse> {
        let length = buffers.lengths[0] - HEADER;
        let Some(begin) = self.place(sector, length as u64) else { return Ok(Outcome::Failed) };
        let mut done = 0;
        while done < length {
            let part = &mut self.step[..(length - done).min(STEP)];
            let count = buffers.read(memory, HEADER + done, part)?;
            if self.medium.write(&part[..count], begin + done as u64).is_err() {
                return Ok(Outcome::Failed);
            }
            done += count;
        }
        Ok(Outcome::Done(0))
    }

    fn ranges(&mut self, kind: Kind, buffers: &Buffers, memory: &Memory) -> Result<Outcome, Misuse> {
        let length = buffers.lengths[0] - HEADER;
        let count = length / SEGMENT;
        if !length.is_multiple_of(SEGMENT) || count == 0 || count > RANGES as usize {
            return Err(Misuse::Request("a disk's ranges have a length that is none"));
        }
        for number in 0..count {
            let mut bytes = [0; SEGMENT];
            buffers.read(memory, HEADER + number * SEGMENT, &mut bytes)?;
            let segment = Segment::decode(&bytes);
            if segment.unknown || kind == Kind::Discard && segment.unmap {
                return Ok(Outcome::Unsupported);
            }
            let bytes = u64::from(segment.sectors) * SECTOR;
            let begin = self.place(segment.sector, bytes);
            let Some(begin) = begin.filter(|_| segment.sectors <= RANGE_SECTORS) else {
                return Ok(Outcome::Failed);
            };
            if bytes == 0 {
                continue;
            }
            let done = match kind {
                // Discarding is a hint: a file system that cannot make holes keeps the bytes.
                Kind::Discard => match self.medium.punch(begin, bytes) {
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                    result => result,
                },
                _ => self.zero(begin, bytes, segment.unmap),
            };
            if done.is_err() {
                return Ok(Outcome::Failed);
            }
        }
        Ok(Outcome::Done(0))
    }

    fn zero(&mut self, begin: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let quick = if unmap { self.medium.punch(begin, bytes) } else { self.medium.zero(begin, bytes) };
        match quick {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            result => return result,
        }
        self.step.fill(0);
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(STEP as u64);
            self.medium.write(&self.step[..usize::try_from(part).unwrap_or(STEP)], begin + done)?;
            done += part;
        }
        Ok(())
    }
}

fn outcome(result: io::Result<()>) -> Outcome {
    if result.is_ok() { Outcome::Done(0) } else { Outcome::Failed }
}

impl Device for Disk {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }

    fn queues(&self) -> &'static [u16] {
        &[128]
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.state.read_only {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        self.step.resize(STEP, 0);
        Ok(())
    }

    fn reset(&mut self) {
        self.step = Vec::new();
    }

    /// Every request that was taken was answered before the next.
    fn state(&self) -> DeviceState {
        DeviceState::Block(self.state.clone())
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else { return Err(RestoreError::Differs("it is no disk's")) };
        if state != (State { failed: state.failed, ..self.state.clone() }) {
            return Err(RestoreError::Differs("it is of another disk"));
        }
        self.state = state;
        Ok(())
    }

    fn serve(&mut self, _wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        queues.take(0, |chain| {
            let buffers = Buffers::new(chain, MOST)?;
            let request = Request::read(memory, &buffers)?;
            let outcome = self.carry_out(request, &buffers, memory)?;
            let written = match outcome {
                Outcome::Done(bytes) => bytes,
                Outcome::Failed | Outcome::Unsupported => 0,
            };
            if outcome == Outcome::Failed {
                self.state.failed += 1;
            }
            let at = buffers.lengths[1] - 1;
            buffers.write(memory, at, &[outcome.status()])?;
            Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
        })
    }
}
