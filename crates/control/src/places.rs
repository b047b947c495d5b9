//! How many connections each caller may have at a time: nobody can take the last places of others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// Limits of connections at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Of one caller.
    pub each: usize,
    /// From so many in all on, a caller with [`Limits::kept`] gets no more.
    pub all: usize,
    /// That each caller can have nevertheless.
    pub kept: usize,
    /// Never more than this.
    pub most: usize,
}

/// Connections by caller.
#[derive(Debug)]
pub(crate) struct Places<K: Hash + Eq + Clone> {
    limits: Limits,
    open: Mutex<(usize, HashMap<K, usize>)>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place<K: Hash + Eq + Clone> {
    places: Arc<Places<K>>,
    caller: K,
}

impl<K: Hash + Eq + Clone> Places<K> {
    pub fn new(limits: Limits) -> Arc<Places<K>> {
        Arc::new(Places { limits, open: Mutex::default() })
    }

    /// `None`: there are too many. With `always` only the caller's own count.
    pub fn take(self: &Arc<Self>, caller: K, always: bool) -> Option<Place<K>> {
        let Limits { each, all, kept, most } = self.limits;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let own = open.1.get(&caller).copied().unwrap_or(0);
        let free =
            if always { own < all } else { own < each && open.0 < most && (open.0 < all || own < kept) };
        if !free {
            return None;
        }
        open.0 += 1;
        *open.1.entry(caller.clone()).or_default() += 1;
        Some(Place { places: Arc::clone(self), caller })
    }
}

impl<K: Hash + Eq + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let mut open = self.places.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.0 -= 1;
        if let Some(count) = open.1.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                open.1.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_takes_no_place_of_others() {
        let places = Places::new(Limits { each: 4, all: 6, kept: 1, most: 8 });
        let take = |who, n: usize| (0..n).filter_map(|_| places.take(who, false)).collect::<Vec<_>>();
        let (a, b) = (take("a", 9), take("b", 9));
        assert_eq!((a.len(), b.len()), (4, 2), "one caller's limit, then that of all");
        let (c, d, e) = (take("c", 9), take("d", 9), take("e", 9));
        assert_eq!(
            (c.len(), d.len(), e.len()),
            (1, 1, 0),
            "everybody gets one, until there are far too many"
        );
        assert!(places.take("provider", true).is_some());
        drop((a, b, c, d));
        assert_eq!(take("e", 9).len(), 4);
        assert!(places.open.lock().unwrap().1.is_empty(), "nobody is remembered");
    }
}
