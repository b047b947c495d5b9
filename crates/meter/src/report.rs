//! Sums of usage, and the bill.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::store::{Amount, Attained, Entry, Promise};

/// What rows are summed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grouping {
    pub tenant: bool,
    pub nsm: bool,
    pub guest: bool,
    pub period: Option<Period>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    Minute,
    Hour,
    /// Of UTC.
    Day,
}

impl Period {
    fn begin(self, minute: u64) -> u64 {
        match self {
            Period::Minute => minute,
            Period::Hour => minute - minute % 60,
            Period::Day => minute - minute % (24 * 60),
        }
    }
}

impl Grouping {
    /// From a list such as `tenant,nsm,day`; at most one period. Errors: a sentence.
    pub fn parse(text: &str) -> Result<Grouping, String> {
        let mut grouping = Grouping::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let period = match word {
                "tenant" => {
                    grouping.tenant = true;
                    continue;
                }
                "nsm" => {
                    grouping.nsm = true;
                    continue;
                }
                "guest" => {
                    grouping.guest = true;
                    continue;
                }
                "minute" => Period::Minute,
                "hour" => Period::Hour,
                "day" => Period::Day,
                _ => {
                    return Err(format!(
                        "usage cannot be summed by '{word}': there are tenant, nsm, guest, minute, hour and day"
                    ));
                }
            };
            if grouping.period.replace(period).is_some() {
                return Err("usage is summed by one of minute, hour and day".into());
            }
        }
        Ok(grouping)
    }
}

/// What an NSM costs, in the catalogue's currency.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Price {
    /// For each hour of a guest's life.
    pub per_hour: f64,
    /// For each 10^9 bytes, both directions together.
    pub per_gb: f64,
}

/// One line of a report. What was not asked to be told apart is missing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// Begin of the period, in seconds since 1970 (UTC).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begin: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nsm: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// Payload bytes that programs received and sent.
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub operations: u64,
    /// Connections that were accepted or made.
    pub connections: u64,
    /// How long guests lived, all together.
    pub guest_seconds: f64,
    /// Processor time of the engine that was spent on guests.
    #[serde(default)]
    pub cpu_seconds: f64,
    /// TCP connections of which the stack knows what follows; without any, the four below are missing: not known, which is not 0.
    #[serde(default)]
    pub tcp_connections: u64,
    /// Segments that were sent, and those of them that were sent again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segments: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retransmitted: Option<u64>,
    /// Mean of the smoothed round trip times of connections, at their ends and once a second while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// How many that is the mean of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_samples: Option<u64>,
    /// Seconds in which a guarantee was to be kept, and those of them in which it was met. A guarantee is a tenant's: rows by guest
    /// have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sla_seconds: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sla_met_seconds: Option<u64>,
    /// By the catalogue's prices; missing when an NSM in it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

/// Sums up entries and promises. `price` tells an NSM's price. Costs are computed for each NSM before they are summed.
pub fn report(
    entries: impl IntoIterator<Item = Entry>,
    promises: impl IntoIterator<Item = Promise>,
    grouping: Grouping,
    price: impl Fn(&str) -> Option<Price>,
) -> Vec<Row> {
    type Key = (Option<u64>, Option<String>, Option<String>, Option<String>);
    let begin = |minute| grouping.period.map(|period| period.begin(minute) * 60);
    let mut sums: BTreeMap<Key, (BTreeMap<String, Amount>, Attained)> = BTreeMap::new();
    for entry in entries {
        let key = (
            begin(entry.minute),
            grouping.tenant.then_some(entry.tenant),
            grouping.nsm.then(|| entry.nsm.clone()),
            grouping.guest.then_some(entry.guest),
        );
        let sum = sums.entry(key).or_default().0.entry(entry.nsm).or_default();
        *sum = sum.plus(&entry.amount);
    }
    for promise in promises.into_iter().filter(|_| !grouping.guest) {
        let Promise { minute, tenant, nsm, attained } = promise;
        let key = (begin(minute), grouping.tenant.then_some(tenant), grouping.nsm.then_some(nsm), None);
        let sum = &mut sums.entry(key).or_default().1;
        *sum = sum.plus(&attained);
    }
    sums.into_iter()
        .map(|((begin, tenant, nsm, guest), (by_nsm, attained))| {
            let total = by_nsm.values().fold(Amount::default(), |sum, amount| sum.plus(amount));
            let cost = by_nsm
                .iter()
                .map(|(nsm, amount)| {
                    let price = price(nsm)?;
                    let hours = amount.guest_ms as f64 / 3_600_000.0;
                    let gigabytes = (amount.bytes_in as f64 + amount.bytes_out as f64) / 1e9;
                    Some(hours * price.per_hour + gigabytes * price.per_gb)
                })
                .sum();
            let known = |value: u64| (total.tcp_connections > 0).then_some(value);
            let promised = |value: u64| (attained.seconds > 0).then_some(value);
            Row {
                begin,
                tenant,
                nsm,
                guest,
                bytes_in: total.bytes_in,
                bytes_out: total.bytes_out,
                operations: total.operations,
                connections: total.connections,
                guest_seconds: total.guest_ms as f64 / 1000.0,
                cpu_seconds: total.cpu_ns as f64 / 1e9,
                tcp_connections: total.tcp_connections,
                segments: known(total.segments),
                retransmitted: known(total.retransmitted),
                rtt_ms: (total.rtt_samples > 0)
                    .then(|| total.rtt_us as f64 / total.rtt_samples as f64 / 1000.0),
                rtt_samples: known(total.rtt_samples),
                sla_seconds: promised(attained.seconds),
                sla_met_seconds: promised(attained.met),
                cost,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(minute: u64, tenant: &str, nsm: &str, bytes: u64) -> Entry {
        let amount = Amount { bytes_in: bytes, guest_ms: 1_800_000, ..Amount::default() };
        Entry { minute, tenant: tenant.into(), nsm: nsm.into(), guest: "g".into(), amount }
    }

    #[test]
    fn rows_are_summed_as_asked_and_priced_by_nsm() {
        let entries = || {
            [
                entry(0, "a", "bbr", 1_000_000_000),
                entry(59, "a", "cubic", 2_000_000_000),
                entry(60, "b", "bbr", 5),
            ]
        };
        let price = |nsm: &str| match nsm {
            "bbr" => Some(Price { per_hour: 2.0, per_gb: 0.5 }),
            "cubic" => Some(Price { per_hour: 0.0, per_gb: 0.25 }),
            _ => None,
        };
        let by_tenant = report(entries(), [], Grouping::parse("tenant").unwrap(), price);
        assert_eq!(by_tenant.len(), 2);
        assert_eq!(by_tenant[0].tenant.as_deref(), Some("a"));
        assert_eq!(by_tenant[0].bytes_in, 3_000_000_000);
        assert_eq!(by_tenant[0].guest_seconds, 3600.0);
        // Half an hour and a GB of bbr, and two GB of cubic.
        assert_eq!(by_tenant[0].cost, Some(1.0 + 0.5 + 0.5));
        let by_hour = report(entries(), [], Grouping::parse("hour").unwrap(), price);
        assert_eq!(by_hour.iter().map(|row| row.begin).collect::<Vec<_>>(), [Some(0), Some(3600)]);
        let all = report(entries(), [], Grouping::default(), |nsm| price(nsm).filter(|_| nsm != "cubic"));
        assert_eq!((all.len(), all[0].cost), (1, None), "a price is missing");
        assert!(report([], [], Grouping::default(), price).is_empty());
    }

    #[test]
    fn what_no_stack_knows_is_missing_and_not_0() {
        let mut known = entry(0, "a", "bbr", 1);
        known.amount = Amount {
            tcp_connections: 2,
            segments: 10,
            rtt_us: 3_000,
            rtt_samples: 2,
            cpu_ns: 1_500_000_000,
            ..known.amount
        };
        let rows = report([known, entry(0, "b", "shm", 1)], [], Grouping::parse("tenant").unwrap(), |_| None);
        assert_eq!((rows[0].segments, rows[0].retransmitted, rows[0].rtt_ms), (Some(10), Some(0), Some(1.5)));
        assert_eq!(rows[0].cpu_seconds, 1.5);
        assert_eq!((rows[1].segments, rows[1].retransmitted, rows[1].rtt_ms), (None, None, None));
        let json = serde_json::to_string(&rows[1]).unwrap();
        assert!(!json.contains("rtt") && !json.contains("sla"), "{json}");
    }

    #[test]
    fn promises_are_summed_as_usage_is_but_not_by_guest() {
        let promise = |minute, nsm: &str, met| Promise {
            minute,
            tenant: "a".into(),
            nsm: nsm.into(),
            attained: Attained { seconds: 60, met },
        };
        let promises = || [promise(0, "bbr", 60), promise(1, "bbr", 57), promise(0, "cubic", 60)];
        let rows =
            |by: &str| report([entry(0, "a", "bbr", 1)], promises(), Grouping::parse(by).unwrap(), |_| None);
        let told = |row: &Row| (row.sla_seconds, row.sla_met_seconds);
        assert_eq!(told(&rows("tenant")[0]), (Some(180), Some(177)));
        let by_nsm = rows("tenant,nsm");
        assert_eq!((told(&by_nsm[0]), told(&by_nsm[1])), ((Some(120), Some(117)), (Some(60), Some(60))));
        assert_eq!((rows("guest").len(), told(&rows("guest")[0])), (1, (None, None)));
    }

    #[test]
    fn a_grouping_is_read_or_refused() {
        let grouping = Grouping::parse("tenant, nsm,day").unwrap();
        assert!(grouping.tenant && grouping.nsm && !grouping.guest);
        assert_eq!(grouping.period, Some(Period::Day));
        assert!(Grouping::parse("week").unwrap_err().contains("'week'"));
        assert!(Grouping::parse("day,hour").is_err());
    }
}
