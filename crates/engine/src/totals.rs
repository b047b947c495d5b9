//! Sums by tenant and NSM that only grow, also when guests end, and how long the stages of the engine take.

use std::collections::BTreeMap;
use std::sync::Mutex;

use netkernel_service::{Histogram, Stages};
use serde::{Deserialize, Serialize};

use crate::engine::{Engine, lock};
use crate::status::{GuestStatus, Status};
use crate::usage::Usage;

/// What guests that are over left, and what was told last.
#[derive(Default)]
pub(crate) struct Finished(Mutex<Sums>);

#[derive(Default)]
struct Sums {
    /// By tenant and NSM.
    usage: BTreeMap<(String, String), Usage>,
    /// By NSM.
    stages: BTreeMap<String, Stages>,
    told: BTreeMap<(String, String), Usage>,
}

impl Finished {
    pub fn guest_over(&self, tenant: String, nsm: String, usage: &Usage) {
        lock(&self.0).usage.entry((tenant, nsm)).or_default().add(usage);
    }

    pub fn stages_of(&self, nsm: &str, stages: &Stages) {
        let mut sums = lock(&self.0);
        match sums.stages.get_mut(nsm) {
            Some(sum) => sum.add(stages),
            None => _ = sums.stages.insert(nsm.into(), stages.clone()),
        }
    }
}

/// All that guests of one tenant did and have on one NSM.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Total {
    pub tenant: String,
    pub nsm: String,
    pub guests: usize,
    pub processes: usize,
    pub sockets: usize,
    pub region_bytes: u64,
    pub ring_bytes: u64,
    /// Since the engine began; never less than was told before.
    pub usage: Usage,
}

impl Total {
    /// What another one did and has too.
    pub fn add(&mut self, other: &Total) {
        self.guests += other.guests;
        self.processes += other.processes;
        self.sockets += other.sockets;
        self.region_bytes += other.region_bytes;
        self.ring_bytes += other.ring_bytes;
        self.usage.add(&other.usage);
    }
}

/// Samples of one stage. Nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes {
    pub sum_ns: u64,
    /// Where a bucket ends, and how many are in it.
    pub buckets: Vec<(u64, u64)>,
}

/// How long the stages take, of an element in about 64.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagesStatus {
    /// From a guest's push until the engine takes the element.
    pub queue: StageTimes,
    /// In the engine, without the stack.
    pub service: StageTimes,
    /// One call of the stack.
    pub stack: StageTimes,
}

impl StageTimes {
    fn of(histogram: &Histogram) -> StageTimes {
        StageTimes { sum_ns: histogram.sum_ns(), buckets: histogram.buckets().collect() }
    }

    pub fn histogram(&self) -> Histogram {
        Histogram::of(self.buckets.iter().copied(), self.sum_ns)
    }
}

impl StagesStatus {
    pub fn of(stages: &Stages) -> StagesStatus {
        StagesStatus {
            queue: StageTimes::of(&stages.queue),
            service: StageTimes::of(&stages.service),
            stack: StageTimes::of(&stages.stack),
        }
    }

    pub fn stages(&self) -> Stages {
        Stages {
            queue: self.queue.histogram(),
            service: self.service.histogram(),
            stack: self.stack.histogram(),
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == StagesStatus::default()
    }
}

impl Engine {
    /// The status, and sums that fit it.
    pub fn overview(&self) -> (Status, Vec<Total>) {
        let finished = self.finished();
        for _ in 0..8 {
            let over = self.guests_over();
            let status = self.status();
            let totals = totals(&status.guests, finished);
            // One that ended meanwhile may be counted twice or not at all.
            if self.guests_over() == over {
                return (status, totals);
            }
        }
        let status = self.status();
        let totals = totals(&status.guests, finished);
        (status, totals)
    }
}

fn totals(guests: &[GuestStatus], finished: &Finished) -> Vec<Total> {
    let mut sums = lock(&finished.0);
    let mut all: BTreeMap<(String, String), Total> = BTreeMap::new();
    for (key, usage) in &sums.usage {
        all.entry(key.clone()).or_default().usage = *usage;
    }
    for guest in guests {
        let total = all.entry((guest.tenant.clone(), guest.stack.clone())).or_default();
        total.guests += 1;
        total.processes += guest.processes;
        total.sockets += guest.sockets;
        total.region_bytes += guest.region_bytes;
        total.ring_bytes += guest.ring_bytes;
        total.usage.add(&Usage { lived_ms: 0, ..guest.usage });
        for (nsm, usage) in &guest.elsewhere {
            all.entry((guest.tenant.clone(), nsm.clone())).or_default().usage.add(usage);
        }
    }
    let all: Vec<Total> =
        all.into_iter().map(|((tenant, nsm), total)| Total { tenant, nsm, ..total }).collect();
    all.into_iter()
        .map(|mut total| {
            let told = sums.told.entry((total.tenant.clone(), total.nsm.clone())).or_default();
            told.raise(&total.usage);
            total.usage = *told;
            total
        })
        .collect()
}

/// Takes the guests' samples out of their statuses and sums them by NSM.
pub(crate) fn stages(guests: &mut [GuestStatus], finished: &Finished) -> BTreeMap<String, StagesStatus> {
    let mut sums = lock(&finished.0).stages.clone();
    for guest in guests {
        let stages = std::mem::take(&mut guest.stages);
        if !stages.is_empty() {
            sums.entry(guest.stack.clone()).or_default().add(&stages.stages());
        }
    }
    sums.iter().map(|(nsm, stages)| (nsm.clone(), StagesStatus::of(stages))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_only_grow_when_guests_end() {
        let finished = Finished::default();
        let guest = |bytes_in| GuestStatus {
            tenant: "blue".into(),
            stack: "bbr".into(),
            usage: Usage { bytes_in, ..Usage::default() },
            sockets: 2,
            ..GuestStatus::default()
        };
        let before = totals(&[guest(10), guest(5)], &finished);
        assert_eq!((before.len(), before[0].usage.bytes_in, before[0].sockets), (1, 15, 4));
        // Looked at between the end of the guest and its being told.
        assert_eq!(totals(&[guest(5)], &finished)[0].usage.bytes_in, 15);
        finished.guest_over("blue".into(), "bbr".into(), &Usage { bytes_in: 12, ..Usage::default() });
        let after = totals(&[guest(5)], &finished);
        assert_eq!((after[0].usage.bytes_in, after[0].guests), (17, 1));
    }
}
