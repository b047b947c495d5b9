//! Counters of the engine for Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use netkernel_engine::{Attained, OTHERS, StageTimes, Status, Total};
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Registry, Unit};

/// Tenants, and stacks, with lines of their own, unless the configuration says something else.
pub const LABELS: usize = 100;
/// The label of all that have none.
const REST: &str = "other";

/// The state of an engine in the text format of OpenMetrics.
///
/// Labels name tenants and stacks, as the configuration does: at most `labels` of each, the first ones, and the rest is
/// summed under `other`. Guests come and go, name themselves, and have no labels.
pub fn render(
    status: &Status,
    totals: &[Total],
    attained: &[Attained],
    tenants: &[String],
    labels: usize,
) -> String {
    let mut registry = Registry::with_prefix("netkernel");
    let engine = Engine {
        status: status.clone(),
        totals: totals.to_vec(),
        attained: attained.to_vec(),
        // Who belongs to no tenant is no other one.
        tenants: tenants.iter().take(labels).cloned().chain([OTHERS.to_owned()]).collect(),
        nsms: status.stacks.iter().take(labels).map(|nsm| nsm.name.clone()).collect(),
    };
    registry.register_collector(Box::new(engine));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode_registry(&mut text, &registry);
    text.push_str("# EOF\n");
    text
}

#[derive(Debug)]
struct Engine {
    status: Status,
    totals: Vec<Total>,
    attained: Vec<Attained>,
    /// With labels of their own.
    tenants: BTreeSet<String>,
    nsms: BTreeSet<String>,
}

impl Engine {
    fn label<'a>(own: &'a BTreeSet<String>, name: &str) -> &'a str {
        own.get(name).map_or(REST, String::as_str)
    }

    /// Sums by the labels of tenant and stack. Every stack has a line.
    fn sums(&self) -> BTreeMap<(&str, &str), Total> {
        let mut sums: BTreeMap<(&str, &str), Total> = BTreeMap::new();
        for nsm in &self.status.stacks {
            sums.insert((OTHERS, Self::label(&self.nsms, &nsm.name)), Total::default());
        }
        for total in &self.totals {
            let key = (Self::label(&self.tenants, &total.tenant), Self::label(&self.nsms, &total.nsm));
            sums.entry(key).or_default().add(total);
        }
        sums
    }
}

/// Upper bounds of the stages' buckets: 256 ns to 67 ms, each four times the one before.
const BOUNDS: [u32; 10] = [8, 10, 12, 14, 16, 18, 20, 22, 24, 26];

/// One histogram that is ready.
#[derive(Debug)]
struct Times<'a>(&'a StageTimes);

impl TypedMetric for Times<'_> {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Times<'_> {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        let (mut buckets, mut below, mut count) = (Vec::new(), 0, 0);
        for bound in BOUNDS {
            let bound = 1u64 << bound;
            let up_to: u64 = self.0.buckets.iter().filter(|(end, _)| *end <= bound).map(|(_, n)| n).sum();
            buckets.push((bound as f64 / 1e9, up_to - below));
            below = up_to;
        }
        count += self.0.buckets.iter().map(|(_, n)| n).sum::<u64>();
        buckets.push((f64::INFINITY, count - below));
        encoder.encode_histogram::<NoLabelSet>(self.0.sum_ns as f64 / 1e9, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl prometheus_client::collector::Collector for Engine {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let c = &self.status.counters;
        for (name, help, value) in [
            ("guests_created", "Guests made since the engine began", c.guests_created),
            ("guests_over", "Guests that ended", c.guests_over),
            ("violations", "Guests that were ended because they broke the protocol", c.violations),
            ("switch_turns", "Turns of the switch threads", c.turns),
            ("switch_sleeps", "How often a switch thread slept", c.sleeps),
            ("doorbells", "Doorbells rung for guests' epoll instances", c.doorbells),
            ("wakes", "Wake-ups of guests' sleeping threads", c.wakes),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let help = "Processor time of the switch threads, whatever they did";
        let cpu = ConstCounter::new(c.switch_cpu_ns as f64 / 1e9);
        cpu.encode(encoder.encode_descriptor(
            "switch_cpu",
            help,
            Some(&Unit::Seconds),
            cpu.metric_type(),
        )?)?;
        let uptime = ConstGauge::new(self.status.uptime_seconds as i64);
        let help = "Time since the engine began";
        uptime.encode(encoder.encode_descriptor(
            "uptime",
            help,
            Some(&Unit::Seconds),
            uptime.metric_type(),
        )?)?;

        let sums = self.sums();
        type Get = fn(&Total) -> u64;
        let gauges: [(&str, &str, Option<Unit>, Get); 5] = [
            ("guests", "Guests now", None, |s| s.guests as u64),
            ("processes", "Processes of guests now", None, |s| s.processes as u64),
            ("sockets", "Sockets of guests now", None, |s| s.sockets as u64),
            ("regions", "Shared memory regions of guests", Some(Unit::Bytes), |s| s.region_bytes),
            ("rings", "Payload memory in the rings of sockets", Some(Unit::Bytes), |s| s.ring_bytes),
        ];
        for (name, help, unit, get) in gauges {
            let kind = ConstGauge::new(0i64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for ((tenant, nsm), sum) in &sums {
                let labels = [("tenant", *tenant), ("nsm", *nsm)];
                ConstGauge::new(get(sum) as i64).encode(family.encode_family(&labels)?)?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "cpu",
            "Processor time of the engine that was spent on guests, estimated from one piece of work in 64",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        for ((tenant, nsm), sum) in &sums {
            let labels = [("tenant", *tenant), ("nsm", *nsm)];
            ConstCounter::new(sum.usage.cpu_ns as f64 / 1e9).encode(family.encode_family(&labels)?)?;
        }
        let help = "Sum of the smoothed round trip times of TCP connections that were seen, at their ends and while open";
        let mut family = encoder.encode_descriptor("rtt", help, Some(&Unit::Seconds), MetricType::Counter)?;
        for ((tenant, nsm), sum) in sums.iter().filter(|(_, sum)| sum.usage.tcp_connections > 0) {
            let labels = [("tenant", *tenant), ("nsm", *nsm)];
            ConstCounter::new(sum.usage.rtt_us as f64 / 1e6).encode(family.encode_family(&labels)?)?;
        }
        // What no stack told of is not known, which is no line.
        let known: [(&str, &str, Get); 4] = [
            ("rtt_samples", "Round trip times in the sum", |s| s.usage.rtt_samples),
            ("tcp_connections", "TCP connections whose segments are counted", |s| s.usage.tcp_connections),
            ("segments", "TCP segments sent", |s| s.usage.segments),
            ("retransmitted_segments", "TCP segments that were sent again", |s| s.usage.retransmitted),
        ];
        for (name, help, get) in known {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for ((tenant, nsm), sum) in sums.iter().filter(|(_, sum)| sum.usage.tcp_connections > 0) {
                let labels = [("tenant", *tenant), ("nsm", *nsm)];
                ConstCounter::new(get(sum)).encode(family.encode_family(&labels)?)?;
            }
        }
        let mut attained: BTreeMap<(&str, &str), (u64, u64)> = BTreeMap::new();
        for one in &self.attained {
            let key = (Self::label(&self.tenants, &one.tenant), Self::label(&self.nsms, &one.nsm));
            let sum = attained.entry(key).or_default();
            *sum = (sum.0 + one.seconds, sum.1 + one.met);
        }
        type Part = fn(&(u64, u64)) -> u64;
        let kept: [(&str, &str, Part); 2] = [
            ("sla", "Time in which guarantees of rates were watched", |sum| sum.0),
            ("sla_met", "Of that, time in which they were met", |sum| sum.1),
        ];
        for (name, help, part) in kept {
            let mut family =
                encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Counter)?;
            for ((tenant, nsm), sum) in &attained {
                let labels = [("tenant", *tenant), ("nsm", *nsm)];
                ConstCounter::new(part(sum)).encode(family.encode_family(&labels)?)?;
            }
        }
        let counters: [(&str, &str, Option<Unit>, Get); 4] = [
            ("received", "Payload that queued sockets received", Some(Unit::Bytes), |s| s.usage.bytes_in),
            ("sent", "Payload that queued sockets sent", Some(Unit::Bytes), |s| s.usage.bytes_out),
            ("operations", "Queue elements taken from guests", None, |s| s.usage.operations),
            ("connections", "Connections that were accepted or made", None, |s| s.usage.connections),
        ];
        for (name, help, unit, get) in counters {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for ((tenant, nsm), sum) in &sums {
                let labels = [("tenant", *tenant), ("nsm", *nsm)];
                ConstCounter::new(get(sum)).encode(family.encode_family(&labels)?)?;
            }
        }

        let help = "Samples of how long the stages of the engine take: queue (from a guest's push until it is taken), \
                    service (in the engine, without the stack), stack (one call)";
        let mut family =
            encoder.encode_descriptor("stage", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (nsm, stages) in self.status.stages.iter().filter(|(nsm, _)| self.nsms.contains(*nsm)) {
            for (stage, times) in
                [("queue", &stages.queue), ("service", &stages.service), ("stack", &stages.stack)]
            {
                Times(times).encode(family.encode_family(&[("nsm", nsm.as_str()), ("stage", stage)])?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use netkernel_engine::{StackStatus, StagesStatus, Usage};

    use super::*;

    fn total(tenant: &str, nsm: &str, sockets: usize, bytes_in: u64) -> Total {
        let usage = Usage { bytes_in, ..Usage::default() };
        Total { tenant: tenant.into(), nsm: nsm.into(), sockets, usage, ..Total::default() }
    }

    fn status(nsms: &[&str]) -> Status {
        let stack = |name: &&str| StackStatus { name: (*name).into(), ..StackStatus::default() };
        Status {
            stacks: nsms.iter().map(stack).collect(),
            counters: netkernel_engine::Counters { violations: 7, ..Default::default() },
            ..Status::default()
        }
    }

    #[track_caller]
    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|l| l == line), "no line {line:?} in:\n{text}");
    }

    #[test]
    fn sums_are_told_by_tenant_and_stack() {
        let totals =
            [total("blue", "bbr", 2, 10), total("blue", "bbr", 3, 5), total("others", "cubic", 1, 0)];
        let mut status = status(&["bbr", "cubic", "reno"]);
        let times = StageTimes { sum_ns: 3_000, buckets: vec![(1024, 2), (1536, 1), (1 << 40, 4)] };
        status.stages.insert("bbr".into(), StagesStatus { stack: times, ..StagesStatus::default() });
        let attained = |nsm: &str, met| Attained { tenant: "blue".into(), nsm: nsm.into(), seconds: 60, met };
        let text =
            render(&status, &totals, &[attained("bbr", 59), attained("cubic", 60)], &["blue".into()], 10);
        for line in [
            "netkernel_violations_total 7",
            "# TYPE netkernel_uptime_seconds gauge",
            "netkernel_sockets{tenant=\"blue\",nsm=\"bbr\"} 5",
            "netkernel_received_bytes_total{tenant=\"blue\",nsm=\"bbr\"} 15",
            "netkernel_sla_seconds_total{tenant=\"blue\",nsm=\"bbr\"} 60",
            "netkernel_sla_met_seconds_total{tenant=\"blue\",nsm=\"bbr\"} 59",
            "netkernel_sla_met_seconds_total{tenant=\"blue\",nsm=\"cubic\"} 60",
            "netkernel_sockets{tenant=\"others\",nsm=\"cubic\"} 1",
            "netkernel_sockets{tenant=\"others\",nsm=\"reno\"} 0",
            "# UNIT netkernel_regions_bytes bytes",
            "# TYPE netkernel_stage_seconds histogram",
            "netkernel_stage_seconds_sum{nsm=\"bbr\",stage=\"stack\"} 0.000003",
            "netkernel_stage_seconds_count{nsm=\"bbr\",stage=\"stack\"} 7",
            "netkernel_stage_seconds_bucket{le=\"0.000001024\",nsm=\"bbr\",stage=\"stack\"} 2",
            "netkernel_stage_seconds_bucket{le=\"0.000004096\",nsm=\"bbr\",stage=\"stack\"} 3",
            "netkernel_stage_seconds_bucket{le=\"+Inf\",nsm=\"bbr\",stage=\"stack\"} 7",
        ] {
            has(&text, line);
        }
        assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    }

    #[test]
    fn labels_are_bounded_and_what_has_none_is_summed() {
        let names: Vec<String> = (0..1000).map(|i| format!("tenant-{i}")).collect();
        let nsms: Vec<String> = (0..50).map(|i| format!("nsm-{i}")).collect();
        let totals: Vec<Total> = names.iter().flat_map(|t| nsms.iter().map(|n| total(t, n, 1, 1))).collect();
        let nsms: Vec<&str> = nsms.iter().map(String::as_str).collect();
        let text = render(&status(&nsms), &totals, &[], &names, 3);
        let lines = text.lines().filter(|l| l.starts_with("netkernel_sockets{")).count();
        // Three and the rest of each, and a line for each stack of those without a tenant.
        assert_eq!(lines, 4 * 4 + 4, "{text}");
        has(&text, "netkernel_sockets{tenant=\"other\",nsm=\"other\"} 46859");
        has(&text, "netkernel_received_bytes_total{tenant=\"tenant-0\",nsm=\"other\"} 47");
        has(&text, "netkernel_sockets{tenant=\"other\",nsm=\"nsm-2\"} 997");
    }

    #[test]
    fn names_cannot_make_lines() {
        let evil = "a\"} 1\nforged{x=\"\\";
        let text = render(&status(&[evil]), &[total(evil, evil, 1, 1)], &[], &[evil.into()], 3);
        assert!(!text.lines().any(|line| line.starts_with("forged")), "{text}");
        has(&text, r#"netkernel_sockets{tenant="a\"} 1\nforged{x=\"\\",nsm="a\"} 1\nforged{x=\"\\"} 1"#);
    }
}
