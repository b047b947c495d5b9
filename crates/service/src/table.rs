const CHUNK: usize = 256;

/// A sparse table indexed by socket id: chunks appear when an id in them is first used. No hashing, no moving.
#[derive(Debug)]
pub struct Table<T> {
    chunks: Vec<Option<Box<[T]>>>,
}

impl<T: Default> Table<T> {
    /// For ids below `ids`.
    pub fn new(ids: u32) -> Table<T> {
        let mut chunks = Vec::new();
        chunks.resize_with((ids as usize).div_ceil(CHUNK), || None);
        Table { chunks }
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
        let chunk = self.chunks.get_mut(id as usize / CHUNK)?;
        let chunk = chunk.get_or_insert_with(|| (0..CHUNK).map(|_| T::default()).collect());
        Some(&mut chunk[id as usize % CHUNK])
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
