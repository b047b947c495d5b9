//! Blocks of payload memory: 4 KiB, 16 KiB, 64 KiB, 256 KiB, 1 MiB.
//!
//! All book-keeping is private to the engine. Free lists are stacks, so that the block that was used last, whose memory
//! is in the cache, is handed out first. Blocks that lay free during a whole sweep interval are given back to the system.

use netkernel_shm::Region;

pub const CLASSES: usize = 5;
/// Bytes of the largest block.
pub const MAX_BLOCK: u32 = 1 << 20;
const UNIT_SHIFT: u32 = 12;
const LARGEST: usize = CLASSES - 1;

/// A block: its offset in the region in units of 4 KiB, and its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Block {
    unit: u32,
    class: u8,
}

impl Block {
    /// No block: its size is 0.
    pub const NONE: Block = Block { unit: 0, class: u8::MAX };

    #[inline]
    pub fn size(self) -> u32 {
        if self.class == u8::MAX { 0 } else { 1 << (UNIT_SHIFT + 2 * self.class as u32) }
    }

    #[inline]
    pub fn offset(self) -> u64 {
        (self.unit as u64) << UNIT_SHIFT
    }

    pub fn is_none(self) -> bool {
        self.class == u8::MAX
    }

    /// The class whose blocks hold `bytes`, at most the largest.
    pub fn class_for(bytes: u32) -> u8 {
        (0..LARGEST as u8).find(|&c| 1 << (UNIT_SHIFT + 2 * c as u32) >= bytes).unwrap_or(LARGEST as u8)
    }

    pub fn class(self) -> u8 {
        self.class
    }
}

impl Default for Block {
    fn default() -> Self {
        Block::NONE
    }
}

#[derive(Debug, Default)]
struct Free {
    units: Vec<u32>,
    /// Least length since the last sweep: what is below was not used meanwhile.
    low: usize,
    /// What is below has no memory any more.
    clean: usize,
}

impl Free {
    fn pop(&mut self) -> Option<u32> {
        let unit = self.units.pop()?;
        let len = self.units.len();
        self.low = self.low.min(len);
        self.clean = self.clean.min(len);
        Some(unit)
    }
}

#[derive(Debug)]
pub struct Blocks {
    free: [Free; CLASSES],
    /// Next 1 MiB block never used, and the end.
    next: u32,
    end: u32,
    free_bytes: u64,
    total_bytes: u64,
    /// No coalescing below this many free bytes more than at the last failure.
    failed_at: u64,
}

impl Blocks {
    /// `offset`: start of the payload, a multiple of 4 KiB.
    pub fn new(offset: u64, bytes: u64) -> Blocks {
        let bytes = bytes / MAX_BLOCK as u64 * MAX_BLOCK as u64;
        Blocks {
            free: Default::default(),
            next: (offset >> UNIT_SHIFT) as u32,
            end: ((offset + bytes) >> UNIT_SHIFT) as u32,
            free_bytes: bytes,
            total_bytes: bytes,
            failed_at: u64::MAX,
        }
    }

    /// With these blocks in use. `None`: they overlap, or lie elsewhere.
    pub fn resume(offset: u64, bytes: u64, mut used: Vec<Block>) -> Option<Blocks> {
        let mut blocks = Blocks::new(offset, bytes);
        used.retain(|block| !block.is_none());
        used.sort_unstable_by_key(|block| block.unit);
        let mut used = used.as_slice();
        while !used.is_empty() {
            if blocks.next >= blocks.end {
                return None;
            }
            let unit = blocks.next;
            blocks.next += MAX_BLOCK >> UNIT_SHIFT;
            blocks.carve(unit, LARGEST, &mut used)?;
        }
        Some(blocks)
    }

    /// Frees of the block of `class` at `unit` what is not in use.
    fn carve(&mut self, unit: u32, class: usize, used: &mut &[Block]) -> Option<()> {
        let units = 1u32 << (2 * class);
        match used.first() {
            Some(first) if first.unit < unit => None,
            Some(first) if first.unit == unit && first.class as usize == class => {
                self.free_bytes -= first.size() as u64;
                *used = &used[1..];
                Some(())
            }
            Some(first) if first.unit < unit + units => {
                let part = class.checked_sub(1)?;
                (0..4).try_for_each(|i| self.carve(unit + i * (units / 4), part, used))
            }
            _ => {
                self.free[class].units.push(unit);
                Some(())
            }
        }
    }

    pub fn used_bytes(&self) -> u64 {
        self.total_bytes - self.free_bytes
    }

    /// True when more than a quarter is free: time to be generous.
    pub fn plenty(&self) -> bool {
        self.free_bytes > self.total_bytes / 4
    }

    pub fn take(&mut self, class: u8) -> Option<Block> {
        let class = (class as usize).min(LARGEST);
        let unit = match self.take_unit(class) {
            Some(unit) => unit,
            None => {
                if self.failed_at != u64::MAX && self.free_bytes <= self.failed_at {
                    return None;
                }
                self.coalesce();
                match self.take_unit(class) {
                    Some(unit) => unit,
                    None => {
                        self.failed_at = self.free_bytes;
                        return None;
                    }
                }
            }
        };
        let block = Block { unit, class: class as u8 };
        self.free_bytes -= block.size() as u64;
        self.failed_at = u64::MAX;
        Some(block)
    }

    fn take_unit(&mut self, class: usize) -> Option<u32> {
        if let Some(unit) = self.free[class].pop() {
            return Some(unit);
        }
        if class == LARGEST {
            if self.next >= self.end {
                return None;
            }
            let unit = self.next;
            self.next += MAX_BLOCK >> UNIT_SHIFT;
            return Some(unit);
        }
        let unit = self.take_unit(class + 1)?;
        let step = 1u32 << (2 * class);
        for i in [3, 2, 1] {
            self.free[class].units.push(unit + i * step);
        }
        Some(unit)
    }

    pub fn give(&mut self, block: Block) {
        if !block.is_none() {
            self.free_bytes += block.size() as u64;
            self.free[block.class as usize].units.push(block.unit);
        }
    }

    /// Joins complete groups of four into blocks of the next class.
    fn coalesce(&mut self) {
        for class in 0..LARGEST {
            let step = 1u32 << (2 * class);
            let mut units = std::mem::take(&mut self.free[class].units);
            units.sort_unstable();
            let mut kept = Vec::with_capacity(units.len());
            let mut i = 0;
            while i < units.len() {
                let group =
                    units.get(i..i + 4).filter(|g| g[0].is_multiple_of(4 * step) && g[3] == g[0] + 3 * step);
                if let Some(group) = group {
                    self.free[class + 1].units.push(group[0]);
                    i += 4;
                } else {
                    kept.push(units[i]);
                    i += 1;
                }
            }
            self.free[class] = Free { units: kept, low: 0, clean: 0 };
        }
        self.free[LARGEST].clean = 0;
        self.free[LARGEST].low = 0;
    }

    /// Gives the memory of blocks that nobody took since the last sweep back to the system, at most `budget` blocks.
    /// True: there is more to do.
    pub fn sweep(&mut self, region: &Region, mut budget: usize) -> bool {
        let mut more = false;
        for (class, free) in self.free.iter_mut().enumerate() {
            while free.clean < free.low && budget > 0 {
                let block = Block { unit: free.units[free.clean], class: class as u8 };
                region.discard(block.offset(), block.size() as u64);
                free.clean += 1;
                budget -= 1;
            }
            free.low = free.units.len();
            more |= free.clean < free.low;
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_never_overlap_and_all_come_back() {
        let base = 64 << 20;
        let mut blocks = Blocks::new(base, 8 << 20);
        let mut seed = 0x1234_5678u64;
        let mut random = move |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        let mut held: Vec<Block> = Vec::new();
        for _ in 0..20_000 {
            if random(2) == 0 {
                if let Some(block) = blocks.take(random(CLASSES as u64) as u8) {
                    let (start, end) = (block.offset(), block.offset() + block.size() as u64);
                    assert!(
                        start >= base && end <= base + (8 << 20) && start.is_multiple_of(block.size() as u64)
                    );
                    for other in &held {
                        let (s, e) = (other.offset(), other.offset() + other.size() as u64);
                        assert!(end <= s || e <= start);
                    }
                    held.push(block);
                }
            } else if !held.is_empty() {
                let block = held.swap_remove(random(held.len() as u64) as usize);
                blocks.give(block);
            }
        }
        for block in held {
            blocks.give(block);
        }
        assert_eq!(blocks.used_bytes(), 0);
        // Fragments join again: all of it can be had as the largest blocks.
        for _ in 0..8 {
            assert!(blocks.take(LARGEST as u8).is_some());
        }
        assert!(blocks.take(0).is_none());
    }

    #[test]
    fn what_is_free_can_be_told_from_what_is_used() {
        let base = 64 << 20;
        let mut blocks = Blocks::new(base, 8 << 20);
        let mut held: Vec<Block> = (0..200).filter_map(|i| blocks.take((i * 7 % 5) as u8)).collect();
        held.retain(|block| !(block.offset() / 4096).is_multiple_of(3));
        let used: u64 = held.iter().map(|block| block.size() as u64).sum();
        let mut resumed = Blocks::resume(base, 8 << 20, held.clone()).unwrap();
        assert_eq!(resumed.used_bytes(), used);
        while let Some(block) = resumed.take(0) {
            for other in &held {
                assert!(
                    block.offset() + 4096 <= other.offset()
                        || other.offset() + other.size() as u64 <= block.offset()
                );
            }
            held.push(block);
        }
        assert_eq!(resumed.used_bytes(), 8 << 20, "all of it can be had");
        assert!(Blocks::resume(base, 8 << 20, vec![held[0], held[0]]).is_none(), "twice the same");
        assert!(Blocks::resume(base + (8 << 20), 8 << 20, held).is_none(), "elsewhere");
    }

    #[test]
    fn what_was_freed_last_is_taken_first() {
        let mut blocks = Blocks::new(0, 8 << 20);
        let (a, b) = (blocks.take(1).unwrap(), blocks.take(1).unwrap());
        blocks.give(b);
        blocks.give(a);
        assert_eq!(blocks.take(1), Some(a));
        assert_eq!(blocks.take(1), Some(b));
    }
}
