//! torch's caching allocator for CUDA, as a state machine: what is reserved on the device for what is allocated.
//!
//! Requests are rounded up to 512 bytes. Those up to 1 MiB live in one pool, larger ones in another. A request takes the
//! smallest free block of its pool that holds it, and leaves what it doesn't need as a free block; a freed block joins
//! its free neighbours. Where no block is free, memory is reserved:
//!
//! - in segments: 2 MiB for a small request, 20 MiB for one below 10 MiB, else the request rounded up to 2 MiB. In the
//!   large pool a block is only divided where more than 1 MiB would be left over.
//! - with expandable segments: pages of 2 MiB (small) or 20 MiB (large) at the end of one range of addresses a pool, as
//!   far as the free block before them is too short. Every remainder of 512 bytes is left free.
//!
//! Where the device is full, what is cached and wholly free goes back to it, and the request is tried once more.
//! One device, one stream, and the defaults of `PYTORCH_ALLOC_CONF` but for `expandable_segments`.
//!
//! Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of torch 2.14.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Event;
use crate::error::{Error, Result};

const MIB: u64 = 1 << 20;
const ROUND: u64 = 512;
const SMALL: u64 = MIB;
const SMALL_SEGMENT: u64 = 2 * MIB;
const LARGE_SEGMENT: u64 = 20 * MIB;
const OWN_SEGMENT: u64 = 10 * MIB;
const ROUND_LARGE: u64 = 2 * MIB;

/// How the allocator is set, and what the device has.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Bytes that may be reserved.
    pub capacity: u64,
    /// `expandable_segments:True`.
    pub expandable: bool,
}

/// The most that a trace reserves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Bytes reserved on the device at the worst moment.
    pub bytes: u64,
    /// Bytes of the blocks in use at the worst moment for these.
    pub allocated: u64,
    /// Index of the event at which the device had no room, if there is one; what follows it is not replayed.
    pub out_of_memory: Option<usize>,
}

/// The peak of what is reserved while `events` are replayed.
///
/// # Errors
/// A trace that frees what does not live or allocates what lives.
pub fn reserved(events: &[Event], device: Device) -> Result<Reserved> {
    let mut allocator = Allocator::new(device);
    let mut found = Reserved::default();
    for (index, event) in events.iter().enumerate() {
        match *event {
            Event::Allocate { id, bytes, .. } => {
                if !allocator.allocate(id, bytes)? {
                    found.out_of_memory = Some(index);
                    return Ok(found);
                }
                found.bytes = found.bytes.max(allocator.reserved);
                found.allocated = found.allocated.max(allocator.allocated);
            }
            Event::Free { id } => allocator.free(id)?,
        }
    }
    Ok(found)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Used,
    Free,
    /// Addresses without memory behind them, in an expandable segment.
    Unmapped,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    size: u64,
    state: State,
}

/// A range of addresses, cut in blocks without gaps.
#[derive(Debug)]
struct Segment {
    small: bool,
    blocks: BTreeMap<u64, Block>,
}

/// Where a block is: (size, segment, offset), the order in which blocks are tried.
type Place = (u64, usize, u64);

/// The allocator's state.
#[derive(Debug)]
pub struct Allocator {
    device: Device,
    segments: Vec<Segment>,
    /// Free blocks, of the large and of the small pool.
    free: [BTreeSet<Place>; 2],
    unmapped: [BTreeSet<Place>; 2],
    used: HashMap<u64, (usize, u64)>,
    /// Storages without bytes, which have no block.
    empty: BTreeSet<u64>,
    reserved: u64,
    allocated: u64,
}

impl Allocator {
    /// An allocator that has nothing yet.
    pub fn new(device: Device) -> Self {
        Self {
            device,
            segments: Vec::new(),
            free: Default::default(),
            unmapped: Default::default(),
            used: HashMap::new(),
            empty: BTreeSet::new(),
            reserved: 0,
            allocated: 0,
        }
    }

    /// Bytes reserved on the device.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Bytes of the blocks in use.
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// Finds room for a storage; false where the device has none.
    ///
    /// # Errors
    /// A storage that lives already.
    pub fn allocate(&mut self, id: u64, bytes: u64) -> Result<bool> {
        if self.used.contains_key(&id) || self.empty.contains(&id) {
            return Err(Error::failure(format!("trace: storage {id} is allocated twice")));
        }
        if bytes == 0 {
            self.empty.insert(id);
            return Ok(true);
        }
        let size = bytes.max(1).div_ceil(ROUND).saturating_mul(ROUND);
        let small = size <= SMALL;
        let mut found = self.cached(small, size).or_else(|| self.more(small, size));
        if found.is_none() {
            self.give_back();
            found = self.more(small, size);
        }
        let Some(place) = found else { return Ok(false) };
        let (segment, offset) = self.take(place, small, size);
        self.used.insert(id, (segment, offset));
        Ok(true)
    }

    /// Gives a storage's block back to its pool.
    ///
    /// # Errors
    /// A storage that does not live.
    pub fn free(&mut self, id: u64) -> Result<()> {
        if self.empty.remove(&id) {
            return Ok(());
        }
        let (segment, offset) = self
            .used
            .remove(&id)
            .ok_or_else(|| Error::failure(format!("trace: storage {id} is freed but not in use")))?;
        self.allocated -= self.segments[segment].blocks[&offset].size;
        self.settle(segment, offset, State::Free);
        Ok(())
    }

    /// The smallest free block that holds `size`.
    fn cached(&self, small: bool, size: u64) -> Option<Place> {
        let mut fitting = self.free[usize::from(small)].range((size, 0, 0)..).copied();
        let first = fitting.next()?;
        if !self.device.expandable {
            return Some(first);
        }
        // a block that could grow counts as long as it could become, so that the open end stays free
        let mut best = first;
        for next in fitting {
            if self.could_be(next) >= self.could_be(best) {
                break;
            }
            best = next;
        }
        Some(best)
    }

    fn could_be(&self, (size, segment, offset): Place) -> u64 {
        let next = self.segments[segment].blocks.get(&(offset + size));
        size + next.filter(|block| block.state == State::Unmapped).map_or(0, |block| block.size)
    }

    /// A free block of new memory.
    fn more(&mut self, small: bool, size: u64) -> Option<Place> {
        if self.device.expandable {
            return self.expand(small, size);
        }
        let bytes = match size {
            _ if small => SMALL_SEGMENT,
            _ if size < OWN_SEGMENT => LARGE_SEGMENT,
            _ => size.div_ceil(ROUND_LARGE) * ROUND_LARGE,
        };
        if self.reserved.checked_add(bytes)? > self.device.capacity {
            return None;
        }
        self.reserved += bytes;
        let segment = self.range_of_addresses(small, bytes, State::Free);
        Some((bytes, segment, 0))
    }

    /// Maps pages after a free block, or at the beginning of what is unmapped, until `size` is free.
    fn expand(&mut self, small: bool, size: u64) -> Option<Place> {
        let (segment, mut at) = self.run_of(small, size).unwrap_or_else(|| {
            let page = page(small);
            let span = self.device.capacity.max(size).div_ceil(page) * page;
            (self.range_of_addresses(small, span, State::Unmapped), 0)
        });
        loop {
            let block = self.segments[segment].blocks[&at];
            if block.state == State::Free && block.size >= size {
                return Some((block.size, segment, at));
            }
            let (unmapped, lacking) = match block.state {
                State::Unmapped => (at, size.min(block.size)),
                _ => (at + block.size, size - block.size),
            };
            at = self.map(segment, unmapped, lacking)?;
        }
    }

    /// Where a run of free and unmapped blocks of `size` begins.
    fn run_of(&self, small: bool, size: u64) -> Option<(usize, u64)> {
        self.unmapped[usize::from(small)].iter().find_map(|&(_, segment, offset)| {
            let blocks = &self.segments[segment].blocks;
            let before = blocks.range(..offset).next_back().filter(|(_, block)| block.state != State::Used);
            let start = before.map_or(offset, |(&before, _)| before);
            let run = blocks.range(start..).map(|(_, block)| block).take_while(|block| block.state != State::Used);
            (run.map(|block| block.size).sum::<u64>() >= size).then_some((segment, start))
        })
    }

    /// Puts memory behind the first bytes of an unmapped block, in whole pages; where the free block then begins.
    fn map(&mut self, segment: usize, offset: u64, lacking: u64) -> Option<u64> {
        let small = self.segments[segment].small;
        let block = self.segments[segment].blocks[&offset];
        let bytes = (lacking.div_ceil(page(small)) * page(small)).min(block.size);
        if self.reserved.checked_add(bytes)? > self.device.capacity {
            return None;
        }
        self.reserved += bytes;
        self.unmapped[usize::from(small)].remove(&(block.size, segment, offset));
        if bytes < block.size {
            let rest = Block { size: block.size - bytes, state: State::Unmapped };
            self.segments[segment].blocks.insert(offset + bytes, rest);
            self.unmapped[usize::from(small)].insert((rest.size, segment, offset + bytes));
        }
        self.segments[segment].blocks.insert(offset, Block { size: bytes, state: State::Used });
        Some(self.settle(segment, offset, State::Free))
    }

    fn range_of_addresses(&mut self, small: bool, size: u64, state: State) -> usize {
        let segment = self.segments.len();
        self.segments.push(Segment { small, blocks: BTreeMap::from([(0, Block { size, state })]) });
        self.list(small, state).insert((size, segment, 0));
        segment
    }

    /// Marks the first `size` bytes of a free block as used; what is left over stays free where it may.
    fn take(&mut self, (whole, segment, offset): Place, small: bool, size: u64) -> (usize, u64) {
        let left = whole - size;
        let divide = if small || self.device.expandable { left >= ROUND } else { left > SMALL };
        self.list(small, State::Free).remove(&(whole, segment, offset));
        let kept = if divide { size } else { whole };
        self.segments[segment].blocks.insert(offset, Block { size: kept, state: State::Used });
        if divide {
            self.segments[segment].blocks.insert(offset + size, Block { size: left, state: State::Free });
            self.list(small, State::Free).insert((left, segment, offset + size));
        }
        self.allocated += kept;
        (segment, offset)
    }

    /// Gives a used block a state, joined with its neighbours of that state; where the joined block begins.
    fn settle(&mut self, segment: usize, offset: u64, state: State) -> u64 {
        let small = self.segments[segment].small;
        let blocks = &mut self.segments[segment].blocks;
        let (mut start, mut size) = (offset, blocks[&offset].size);
        let next = blocks.get(&(offset + size)).filter(|next| next.state == state).map(|next| next.size);
        let before = blocks.range(..offset).next_back().filter(|(_, before)| before.state == state);
        let before = before.map(|(&at, before)| (at, before.size));
        let mut gone = Vec::new();
        if let Some(more) = next {
            blocks.remove(&(offset + size));
            gone.push((more, segment, offset + size));
            size += more;
        }
        if let Some((at, more)) = before {
            blocks.remove(&offset);
            gone.push((more, segment, at));
            (start, size) = (at, size + more);
        }
        blocks.insert(start, Block { size, state });
        let list = self.list(small, state);
        gone.iter().for_each(|place| {
            list.remove(place);
        });
        list.insert((size, segment, start));
        start
    }

    /// Returns to the device what is free: whole segments, or whole pages of expandable ones.
    fn give_back(&mut self) {
        for small in [false, true] {
            for (size, segment, offset) in self.free[usize::from(small)].clone() {
                if !self.device.expandable {
                    if self.segments[segment].blocks.len() == 1 {
                        self.free[usize::from(small)].remove(&(size, segment, offset));
                        self.segments[segment].blocks.clear();
                        self.reserved -= size;
                    }
                    continue;
                }
                let (first, end) = (offset.next_multiple_of(page(small)), (offset + size) / page(small) * page(small));
                if first >= end {
                    continue;
                }
                self.free[usize::from(small)].remove(&(size, segment, offset));
                for (from, to) in [(offset, first), (end, offset + size)] {
                    if from < to {
                        self.segments[segment].blocks.insert(from, Block { size: to - from, state: State::Free });
                        self.free[usize::from(small)].insert((to - from, segment, from));
                    }
                }
                self.segments[segment].blocks.insert(first, Block { size: end - first, state: State::Used });
                self.reserved -= end - first;
                self.settle(segment, first, State::Unmapped);
            }
        }
    }

    fn list(&mut self, small: bool, state: State) -> &mut BTreeSet<Place> {
        let lists = if state == State::Unmapped { &mut self.unmapped } else { &mut self.free };
        &mut lists[usize::from(small)]
    }
}

fn page(small: bool) -> u64 {
    if small { SMALL_SEGMENT } else { LARGE_SEGMENT }
}

#[cfg(test)]
mod tests;
