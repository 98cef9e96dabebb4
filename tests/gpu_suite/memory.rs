//! The memory of one step: inputs and outputs with canaries, an image of them on the host, and a workspace.

use super::device::{ALIGNMENT, Device};

/// How parts lie on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// In one allocation, each between canaries; the workspace is dirty from earlier steps.
    Together,
    /// Each in an allocation of its own size, and a workspace that nobody has written: a sanitizer sees every step
    /// beside a part and every read of what was never written.
    Apart,
}

/// Parts of a step.
pub(crate) struct Memory<'a> {
    device: &'a Device,
    packing: Packing,
    /// (address, bytes) of each allocation: one, or as many as parts.
    blocks: Vec<(u64, usize)>,
    scratch: (u64, usize),
    image: Vec<u8>,
    parts: Vec<Part>,
}

/// A part of [`Memory`]: its number, where it starts in the image, and its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    index: usize,
    at: usize,
    pub(crate) len: usize,
}

const CANARY: u8 = 0xA5;
/// Bytes after the workspace that must not change.
const SCRATCH_CANARY: usize = 1024;
/// Least bytes of canaries after a part.
const MARGIN: usize = 256;
/// All bits set: NaN in each float type, -1 in integers.
pub(crate) const POISON: u8 = 0xFF;

/// What a step's inputs and outputs are, on the host.
impl<'a> Memory<'a> {
    pub(crate) fn new(device: &'a Device, packing: Packing) -> Self {
        let (blocks, parts, image) = (Vec::new(), Vec::new(), Vec::new());
        Self { device, packing, blocks, scratch: (0, 0), image, parts }
    }

    pub(crate) fn clear(&mut self) {
        self.image.clear();
        self.image.resize(ALIGNMENT, CANARY);
        self.parts.clear();
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) -> Part {
        let at = self.image.len();
        self.image.extend_from_slice(bytes);
        self.close(at)
    }

    pub(crate) fn add_poison(&mut self, len: usize) -> Part {
        let at = self.image.len();
        self.image.resize(at + len, POISON);
        self.close(at)
    }

    fn close(&mut self, at: usize) -> Part {
        let part = Part { index: self.parts.len(), at, len: self.image.len() - at };
        let end = (self.image.len() + MARGIN).next_multiple_of(ALIGNMENT);
        self.image.resize(end, CANARY);
        self.parts.push(part);
        part
    }

    pub(crate) fn bytes(&self, part: Part) -> &[u8] {
        &self.image[part.at..part.at + part.len]
    }
}

/// What they are on the device.
impl Memory<'_> {
    /// Copies the image to the device; addresses hold from here to the next push.
    pub(crate) fn push(&mut self) {
        let wanted: Vec<usize> = match self.packing {
            Packing::Together => vec![self.image.len()],
            Packing::Apart => self.parts.iter().map(|part| part.len.max(1)).collect(),
        };
        let fits = self.packing == Packing::Together
            && self.blocks.first().is_some_and(|block| block.1 >= wanted[0]);
        if !fits {
            self.release_blocks();
            let room = |bytes: usize| match self.packing {
                Packing::Together => bytes.next_power_of_two(),
                Packing::Apart => bytes,
            };
            self.blocks = wanted.iter().map(|&b| (self.device.allocate(room(b)), room(b))).collect();
        }
        if self.packing == Packing::Together {
            self.device.write(self.blocks[0].0, &self.image);
            return;
        }
        for part in &self.parts {
            self.device.write(self.place(*part), self.bytes(*part));
        }
    }

    /// Waits, and copies everything from the device to the image.
    pub(crate) fn pull(&mut self) {
        self.device.sync();
        if self.packing == Packing::Together {
            self.device.read(self.blocks[0].0, &mut self.image);
            return;
        }
        for part in self.parts.clone() {
            let from = self.place(part);
            self.device.read(from, &mut self.image[part.at..part.at + part.len]);
        }
    }

    /// Writes one part, in the image and on the device.
    pub(crate) fn set(&mut self, part: Part, bytes: &[u8]) {
        self.image[part.at..part.at + bytes.len()].copy_from_slice(bytes);
        self.device.write(self.place(part), bytes);
    }

    /// Writes bytes of one part, in the image and on the device.
    pub(crate) fn set_at(&mut self, part: Part, offset: usize, bytes: &[u8]) {
        let at = part.at + offset;
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
        self.device.write(self.place(part) + offset as u64, bytes);
    }

    /// Sets bytes of one part on the device.
    pub(crate) fn fill_at(&self, part: Part, offset: usize, byte: u8, bytes: usize) {
        self.device.fill(self.place(part) + offset as u64, byte, bytes);
    }

    /// Waits; bytes of one part as they are on the device now.
    pub(crate) fn get_at(&self, part: Part, offset: usize, bytes: usize) -> Vec<u8> {
        let mut got = vec![0; bytes];
        self.device.sync();
        self.device.read(self.place(part) + offset as u64, &mut got);
        got
    }

    /// Poisons one part on the device.
    pub(crate) fn poison(&self, part: Part) {
        self.device.write(self.place(part), &vec![POISON; part.len]);
    }

    /// Waits; one part as it is on the device now.
    pub(crate) fn get(&self, part: Part) -> Vec<u8> {
        let mut bytes = vec![0; part.len];
        self.device.sync();
        self.device.read(self.place(part), &mut bytes);
        bytes
    }

    pub(crate) fn address(&self, part: Part) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.place(part) as usize)
    }

    fn place(&self, part: Part) -> u64 {
        match self.packing {
            Packing::Together => self.blocks[0].0 + part.at as u64,
            Packing::Apart => self.blocks[part.index].0,
        }
    }

    /// A workspace; canaries stand after it where it has no allocation of its own.
    pub(crate) fn workspace(&mut self, bytes: usize) -> *mut u8 {
        let (apart, wanted) = (self.packing == Packing::Apart, bytes + SCRATCH_CANARY);
        if apart || wanted > self.scratch.1 {
            self.device.release(self.scratch.0, self.scratch.1);
            let room = if apart { bytes.max(1) } else { wanted.next_power_of_two() };
            self.scratch = (self.device.allocate(room), room);
            if !apart {
                self.device.write(self.scratch.0, &vec![POISON; room]);
            }
        }
        if !apart {
            self.device.write(self.scratch.0 + bytes as u64, &[CANARY; SCRATCH_CANARY]);
        }
        std::ptr::with_exposed_provenance_mut(self.scratch.0 as usize)
    }

    /// What earlier steps have left in the workspace is gone.
    pub(crate) fn forget_workspace(&self) {
        self.device.sync();
        self.device.fill(self.scratch.0, POISON, self.scratch.1);
    }

    /// Whether everything beside the parts, and after a workspace of that size, is as it was. After a pull.
    pub(crate) fn canaries_hold(&self, workspace_bytes: usize) -> bool {
        if self.packing == Packing::Apart {
            return true;
        }
        let mut from = 0;
        let ends = self.parts.iter().map(|part| (part.at, part.at + part.len));
        let whole = ends.chain([(self.image.len(), 0)]).all(|(start, end)| {
            let gap = &self.image[from..start];
            from = end;
            gap.iter().all(|&byte| byte == CANARY)
        });
        let mut after = [0; SCRATCH_CANARY];
        self.device.read(self.scratch.0 + workspace_bytes as u64, &mut after);
        whole && after == [CANARY; SCRATCH_CANARY]
    }

    fn release_blocks(&mut self) {
        for (address, bytes) in self.blocks.drain(..) {
            self.device.release(address, bytes);
        }
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        // After a fault of the device every call fails; a panic while panicking would hide the first one.
        if !std::thread::panicking() {
            self.release_blocks();
            self.device.release(self.scratch.0, self.scratch.1);
        }
    }
}
