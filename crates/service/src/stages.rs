//! How long the stages of the engine take: samples, in histograms that cost a few hundred bytes.

/// One bucket for each eighth of a doubling would be exact to 9 %; a half is to 40 %, and small.
const HALVES: usize = 2 * BITS;
const BITS: usize = 36;

/// Counts of times in nanoseconds. Bucket 2n holds 2^n to 1.5 * 2^n, bucket 2n + 1 the rest up to 2^(n+1); the last one
/// (about a minute) everything above it too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u32; HALVES],
    sum_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: [0; HALVES], sum_ns: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, ns: u64) {
        let ns = ns.max(1);
        let bit = ns.ilog2() as usize;
        let half = if bit == 0 { 0 } else { (ns >> (bit - 1)) as usize & 1 };
        let bucket = (2 * bit + half).min(HALVES - 1);
        self.buckets[bucket] = self.buckets[bucket].saturating_add(1);
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }

    pub fn add(&mut self, other: &Histogram) {
        for (own, other) in self.buckets.iter_mut().zip(&other.buckets) {
            *own = own.saturating_add(*other);
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|&n| u64::from(n)).sum()
    }

    /// Of all times that were recorded.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// The buckets that hold something: where each ends (nanoseconds), and how many there are.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = |bucket: usize| {
            let (bit, half) = (bucket / 2, bucket as u64 % 2);
            let begin = 1u64 << bit;
            begin + (half + 1) * (begin / 2).max(1)
        };
        let held = self.buckets.iter().enumerate().filter(|(_, n)| **n > 0);
        held.map(move |(bucket, &n)| (end(bucket), u64::from(n)))
    }

    /// The inverse of [`Histogram::buckets`]; what is no end of a bucket is left out.
    pub fn of(buckets: impl IntoIterator<Item = (u64, u64)>, sum_ns: u64) -> Histogram {
        let mut histogram = Histogram { sum_ns, ..Histogram::default() };
        for (end, n) in buckets {
            let mut one = Histogram::default();
            one.record(end.saturating_sub(1));
            for (own, other) in histogram.buckets.iter_mut().zip(&one.buckets) {
                *own = own.saturating_add(other.saturating_mul(u32::try_from(n).unwrap_or(u32::MAX)));
            }
        }
        histogram
    }

    /// What was recorded since `before`, an earlier value of the same histogram.
    pub fn since(&self, before: &Histogram) -> Histogram {
        let mut new = self.clone();
        for (own, before) in new.buckets.iter_mut().zip(&before.buckets) {
            *own = own.saturating_sub(*before);
        }
        new.sum_ns = new.sum_ns.saturating_sub(before.sum_ns);
        new
    }

    /// The end of the bucket that holds this part (0 to 1) of all times. `None`: nothing was recorded.
    pub fn quantile(&self, part: f64) -> Option<u64> {
        let wanted = (self.count() as f64 * part).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (end, n) in self.buckets() {
            seen += n;
            if seen >= wanted {
                return Some(end);
            }
        }
        None
    }
}

/// The stages of an element's way through the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// From the guest's push until ServiceLib takes it, as the guest says; up to 67 ms.
    pub queue: Histogram,
    /// In ServiceLib, without the stack.
    pub service: Histogram,
    /// One call of the stack.
    pub stack: Histogram,
}

impl Stages {
    pub fn add(&mut self, other: &Stages) {
        self.queue.add(&other.queue);
        self.service.add(&other.service);
        self.stack.add(&other.stack);
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.service.is_empty() && self.stack.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_in_the_bucket_whose_end_is_above_them() {
        for ns in (1..2000).chain([1 << 20, (1 << 20) + 1, 3 << 19, u64::from(u32::MAX)]) {
            let mut one = Histogram::default();
            one.record(ns);
            let (end, n) = one.buckets().next().unwrap();
            assert_eq!(n, 1);
            assert!(end > ns && end <= (ns * 3 / 2).max(ns + 1), "{ns} stands below {end}");
            assert_eq!(Histogram::of(one.buckets(), one.sum_ns()), one);
        }
        let mut long = Histogram::default();
        long.record(u64::MAX);
        assert_eq!(long.count(), 1);
    }

    #[test]
    fn quantiles_and_differences() {
        let mut all = Histogram::default();
        assert_eq!(all.quantile(0.5), None);
        for ns in [100, 100, 100, 5000] {
            all.record(ns);
        }
        let before = all.clone();
        assert_eq!((all.quantile(0.5), all.quantile(1.0)), (Some(128), Some(6144)));
        all.record(70);
        let new = all.since(&before);
        assert_eq!((new.count(), new.sum_ns(), new.quantile(0.99)), (1, 70, Some(96)));
    }
}
