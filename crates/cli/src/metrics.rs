//! Counters of the engine for Prometheus.

use std::collections::BTreeMap;

use netkernel_engine::Status;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// The state of an engine in the text format of OpenMetrics. Labels name stacks, which the configuration bounds; guests come
/// and go and have none.
pub fn render(status: &Status) -> String {
    let mut registry = Registry::with_prefix("netkernel");
    registry.register_collector(Box::new(Engine(status.clone())));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode_registry(&mut text, &registry);
    text.push_str("# EOF\n");
    text
}

#[derive(Debug)]
struct Engine(Status);

/// What is summed for each stack.
#[derive(Default)]
struct OfStack {
    guests: i64,
    processes: i64,
    sockets: i64,
    region_bytes: i64,
    ring_bytes: i64,
}

impl prometheus_client::collector::Collector for Engine {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let Engine(status) = self;
        let c = &status.counters;
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
        let uptime = ConstGauge::new(status.uptime_seconds as i64);
        let help = "Time since the engine began";
        uptime.encode(encoder.encode_descriptor(
            "uptime",
            help,
            Some(&Unit::Seconds),
            uptime.metric_type(),
        )?)?;

        let mut stacks: BTreeMap<&str, OfStack> =
            status.stacks.iter().map(|stack| (stack.name.as_str(), OfStack::default())).collect();
        for guest in &status.guests {
            let stack = stacks.entry(&guest.stack).or_default();
            stack.guests += 1;
            stack.processes += guest.processes as i64;
            stack.sockets += guest.sockets as i64;
            stack.region_bytes += guest.region_bytes as i64;
            stack.ring_bytes += guest.ring_bytes as i64;
        }
        type Get = fn(&OfStack) -> i64;
        let families: [(&str, &str, Option<Unit>, Get); 5] = [
            ("guests", "Guests now", None, |s| s.guests),
            ("processes", "Processes of guests now", None, |s| s.processes),
            ("sockets", "Sockets of guests now", None, |s| s.sockets),
            ("regions", "Shared memory regions of guests", Some(Unit::Bytes), |s| s.region_bytes),
            ("rings", "Payload memory in the rings of sockets", Some(Unit::Bytes), |s| s.ring_bytes),
        ];
        for (name, help, unit, get) in families {
            let kind = ConstGauge::new(0i64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for (stack, sums) in &stacks {
                ConstGauge::new(get(sums)).encode(family.encode_family(&[("stack", *stack)])?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use netkernel_engine::{GuestStatus, StackStatus};

    use super::*;

    #[test]
    fn stacks_are_the_only_labels_and_sums_are_right() {
        let guest =
            |stack: &str, sockets| GuestStatus { stack: stack.into(), sockets, ..GuestStatus::default() };
        let status = Status {
            stacks: ["bbr", "cubic"]
                .map(|name| StackStatus { name: name.into(), ..StackStatus::default() })
                .into(),
            guests: vec![guest("bbr", 2), guest("bbr", 3)],
            counters: netkernel_engine::Counters { violations: 7, ..Default::default() },
            ..Status::default()
        };
        let text = render(&status);
        for line in [
            "netkernel_violations_total 7",
            "# TYPE netkernel_uptime_seconds gauge",
            "netkernel_guests{stack=\"bbr\"} 2",
            "netkernel_sockets{stack=\"bbr\"} 5",
            "netkernel_sockets{stack=\"cubic\"} 0",
            "# UNIT netkernel_regions_bytes bytes",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line:?} in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    }
}
