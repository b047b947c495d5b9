use std::sync::Arc;

use netkernel_shm::Journal;

use crate::journal::{Fixed, Plain};

const CHUNK: usize = 256;

/// A sparse table indexed by socket id: chunks appear when an id in them is first used. No hashing, no moving.
#[derive(Debug)]
pub struct Table<T> {
    chunks: Vec<Option<Fixed<T>>>,
    kept: Option<Kept<T>>,
}

/// As [`Fixed::kept`].
type Make<T> = fn(&Arc<Journal>, usize, usize, bool) -> Option<Fixed<T>>;

/// Where chunks are made when they stand in a journal.
struct Kept<T> {
    journal: Arc<Journal>,
    offset: usize,
    /// Of each chunk: 1 when it was made.
    made: Fixed<u8>,
    make: Make<T>,
}

impl<T> std::fmt::Debug for Kept<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("kept")
    }
}

impl<T: Plain> Table<T> {
    /// Bytes that a table for ids below `ids` takes in a journal.
    pub fn kept_bytes(ids: u32) -> usize {
        let chunks = (ids as usize).div_ceil(CHUNK);
        chunks.next_multiple_of(64) + chunks * CHUNK * size_of::<T>()
    }

    /// One that stands at `offset`, a multiple of 64, with what was left there.
    pub fn kept(ids: u32, journal: &Arc<Journal>, offset: usize) -> Option<Table<T>> {
        let count = (ids as usize).div_ceil(CHUNK);
        let made = Fixed::<u8>::kept(journal, offset, count, false)?;
        let offset = offset + count.next_multiple_of(64);
        let mut chunks = Vec::new();
        for (i, made) in made.iter().enumerate() {
            let at = offset + i * CHUNK * size_of::<T>();
            chunks.push(if *made == 1 { Some(Fixed::kept(journal, at, CHUNK, false)?) } else { None });
        }
        let journal = Arc::clone(journal);
        Some(Table { chunks, kept: Some(Kept { journal, offset, made, make: Fixed::kept }) })
    }
}

impl<T: Plain> Table<T> {
    /// Where the values stand in a journal whose chunks were made.
    pub fn places(
        ids: u32,
        journal: &Arc<Journal>,
        offset: usize,
    ) -> Option<impl Iterator<Item = usize> + use<T>> {
        let count = (ids as usize).div_ceil(CHUNK);
        let made = Fixed::<u8>::kept(journal, offset, count, false)?;
        let offset = offset + count.next_multiple_of(64);
        let chunks: Vec<usize> = (0..count).filter(|i| made[*i] == 1).collect();
        let of = move |i: usize| (0..CHUNK).map(move |j| offset + (i * CHUNK + j) * size_of::<T>());
        Some(chunks.into_iter().flat_map(of))
    }

    /// Writes all values out, for [`Table::kept`]. `None`: the journal ends before.
    pub fn write_out(&self, ids: u32, journal: &Arc<Journal>, offset: usize) -> Option<()> {
        let mut copy = Table::kept(ids, journal, offset)?;
        for (id, value) in self.iter() {
            *copy.make(id)? = *value;
        }
        Some(())
    }
}

impl<T: Default> Table<T> {
    /// For ids below `ids`.
    pub fn new(ids: u32) -> Table<T> {
        let mut chunks = Vec::new();
        chunks.resize_with((ids as usize).div_ceil(CHUNK), || None);
        Table { chunks, kept: None }
    }

    /// The value of `id`, if its chunk exists.
    #[inline]
    pub fn get(&self, id: u32) -> Option<&T> {
        self.chunks.get(id as usize / CHUNK)?.as_ref().map(|chunk| &chunk[id as usize % CHUNK])
    }

    #[inline]
    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.chunks.get_mut(id as usize / CHUNK)?.as_mut().map(|chunk| &mut chunk[id as usize % CHUNK])
    }

    /// The value of `id`, made when there is none yet. `None`: out of the table.
    pub fn make(&mut self, id: u32) -> Option<&mut T> {
        let index = id as usize / CHUNK;
        let chunk = self.chunks.get_mut(index)?;
        if chunk.is_none() {
            *chunk = Some(match &mut self.kept {
                None => Fixed::new(CHUNK),
                Some(kept) => {
                    let at = kept.offset + index * CHUNK * size_of::<T>();
                    let new = (kept.make)(&kept.journal, at, CHUNK, true)?;
                    kept.made[index] = 1;
                    new
                }
            });
        }
        chunk.as_mut().map(|chunk| &mut chunk[id as usize % CHUNK])
    }

    /// All values whose chunks exist, with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.chunks.iter().enumerate().filter_map(|(i, chunk)| Some((i, chunk.as_ref()?))).flat_map(
            |(i, chunk)| chunk.iter().enumerate().map(move |(j, value)| ((i * CHUNK + j) as u32, value)),
        )
    }

    /// The ids whose chunks exist, for loops that change the table meanwhile: next such id after `id`.
    pub fn next_id(&self, id: u32) -> Option<u32> {
        let mut id = id as usize + 1;
        while id / CHUNK < self.chunks.len() {
            if self.chunks[id / CHUNK].is_some() {
                return Some(id as u32);
            }
            id = (id / CHUNK + 1) * CHUNK;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_appear_on_use_and_are_walked_in_order() {
        let mut table = Table::<u8>::new(1000);
        assert!(table.get(3).is_none() && table.make(1024).is_none());
        *table.make(3).unwrap() = 1;
        *table.make(700).unwrap() = 2;
        let used: Vec<_> = table.iter().filter(|(_, v)| **v != 0).map(|(id, _)| id).collect();
        assert_eq!(used, [3, 700]);
        assert_eq!(table.next_id(255), Some(512));
        assert_eq!(table.next_id(1023), None);
    }
}
