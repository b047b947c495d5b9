//! Ports: free ones, and whether somebody listens on them (without connecting, which servers would notice).

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};

/// Ports of one scenario. All lie below the range that the kernel gives to clients.
pub const PORTS_PER_RUN: u16 = 40;
const FIRST: u16 = 10_000;
const LAST: u16 = 32_000;

/// Where the ports of run `n` of this runner start; different runners start at different places.
pub fn first_port(runner: u32, n: usize) -> u16 {
    let slots = usize::from((LAST - FIRST) / PORTS_PER_RUN);
    let slot = (runner as usize * 31 + n) % slots;
    FIRST + PORTS_PER_RUN * slot as u16
}

/// Nobody has the port, TCP or UDP, IPv4 or IPv6.
pub fn is_free(port: u16) -> bool {
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        && TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).is_ok();
    tcp && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() && !in_use(port)
}

pub fn listens_tcp(port: u16) -> bool {
    entries(&["tcp", "tcp6"]).iter().any(|e| e.port == port && e.state == "0A")
}

pub fn bound_udp(port: u16) -> bool {
    entries(&["udp", "udp6"]).iter().any(|e| e.port == port)
}

/// Connections of old runs included (TIME_WAIT).
fn in_use(port: u16) -> bool {
    entries(&["tcp", "tcp6", "udp", "udp6"]).iter().any(|e| e.port == port)
}

struct Entry {
    port: u16,
    state: String,
}

fn entries(files: &[&str]) -> Vec<Entry> {
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(format!("/proc/net/{file}")) else { continue };
        for line in text.lines().skip(1) {
            let mut words = line.split_whitespace();
            let Some(local) = words.nth(1) else { continue };
            let Some(state) = words.nth(1) else { continue };
            let Some(port) = local.rsplit(':').next().and_then(|p| u16::from_str_radix(p, 16).ok()) else {
                continue;
            };
            found.push(Entry { port, state: state.to_owned() });
        }
    }
    found
}
