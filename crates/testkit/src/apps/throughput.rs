//! iperf3 in all its ways.

use anyhow::{Context as _, Result, ensure};
use netkernel_testkit::process::Signal;
use netkernel_testkit::{Ctx, Scenario};
use serde_json::Value;

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("iperf3/tcp", &["iperf3"], |ctx| iperf3(ctx, "", &["sum_sent", "sum_received"])),
    Scenario::new("iperf3/parallel", &["iperf3"], |ctx| iperf3(ctx, "-P 4", &["sum_sent", "sum_received"])),
    Scenario::new("iperf3/reverse", &["iperf3"], |ctx| iperf3(ctx, "-R", &["sum_sent", "sum_received"])),
    Scenario::new("iperf3/bidir", &["iperf3"], |ctx| {
        iperf3(ctx, "--bidir", &["sum_received", "sum_received_bidir_reverse"])
    }),
    Scenario::new("iperf3/udp", &["iperf3"], |ctx| iperf3(ctx, "-u -b 100M", &["sum"])),
    Scenario::new("iperf3/udp-reverse", &["iperf3"], |ctx| iperf3(ctx, "-u -b 100M -R", &["sum"])),
    Scenario::new("iperf3/ipv6", &["iperf3"], |ctx| iperf3(ctx, "-6", &["sum_sent", "sum_received"])),
    Scenario::new("iperf3/zerocopy", &["iperf3"], |ctx| {
        iperf3(ctx, "-Z -n 64M", &["sum_sent", "sum_received"])
    }),
];

fn iperf3(ctx: &mut Ctx, how: &str, sums: &[&str]) -> Result<()> {
    let port = ctx.port()?;
    let mut server = ctx.server("iperf3")?.line(&format!("-s -p {port}")).spawn()?;
    ctx.listening(&mut server, port)?;
    let host = if how.contains("-6") { "::1" } else { "127.0.0.1" };
    let length = if how.contains("-n") { "" } else { "-t 1" };
    let client = ctx.client("iperf3")?.line(&format!("-c {host} -p {port} -J {length} {how}")).output()?;
    let text = client.text();
    let report: Value = serde_json::from_str(&text).with_context(|| format!("iperf3 said:\n{text}"))?;
    if let Some(error) = report.get("error") {
        anyhow::bail!("iperf3: {error}");
    }
    ensure!(client.code == 0, "iperf3 ended with {}", client.code);
    for sum in sums {
        let bytes = report.pointer(&format!("/end/{sum}/bytes")).and_then(Value::as_u64);
        ensure!(bytes.is_some_and(|b| b > 1_000_000), "{sum}: {bytes:?} bytes");
    }
    let streams = report.pointer("/end/streams").and_then(Value::as_array).context("no streams")?;
    if how.contains("-P 4") {
        ensure!(streams.len() == 4, "{} streams", streams.len());
        for stream in streams {
            let bytes = stream.pointer("/receiver/bytes").and_then(Value::as_u64);
            ensure!(bytes.is_some_and(|b| b > 0), "a stream starved");
        }
    }
    if how.contains("-u") {
        let lost = report.pointer("/end/sum/lost_percent").and_then(Value::as_f64);
        ensure!(lost.is_some_and(|l| l < 50.0), "lost {lost:?} %");
    }
    // It says goodbye and ends with 0 or 1, as its version likes.
    server.stop(Signal::TERM, &[0, 1, 143])
}
