use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::tap;

/// An address with the length of its network's prefix: `10.9.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cidr {
    pub address: IpAddr,
    pub prefix: u8,
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Cidr, String> {
        let wrong = || format!("`{text}` is no address with a prefix such as 10.9.0.2/24 or fd00::2/64");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let (address, prefix): (IpAddr, u8) =
            (address.parse().map_err(|_| wrong())?, prefix.parse().map_err(|_| wrong())?);
        let most = if address.is_ipv4() { 32 } else { 128 };
        if prefix > most || address.is_unspecified() || address.is_multicast() || address.is_loopback() {
            return Err(wrong());
        }
        Ok(Cidr { address, prefix })
    }
}

/// How the module is set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmoltcpConfig {
    /// TAP device, made unless it exists. `None`: no wire, the stack talks to itself only.
    pub tap: Option<String>,
    /// Network namespace of the device: a name in `/run/netns`, or a path. `None`: the engine's own.
    pub netns: Option<String>,
    /// The stack's own addresses, at most [`MOST_ADDRESSES`](SmoltcpConfig::MOST_ADDRESSES).
    pub addresses: Vec<Cidr>,
    /// Where packets to other networks go, at most one for each family.
    pub gateways: Vec<IpAddr>,
    /// Bytes of the largest IP packet.
    pub mtu: u16,
}

impl Default for SmoltcpConfig {
    fn default() -> SmoltcpConfig {
        SmoltcpConfig { tap: None, netns: None, addresses: Vec::new(), gateways: Vec::new(), mtu: 1500 }
    }
}

impl SmoltcpConfig {
    pub const MOST_ADDRESSES: usize = 6;

    /// What is wrong by itself, in one sentence.
    pub fn validate(&self) -> Result<(), String> {
        if self.addresses.is_empty() {
            return Err("a smoltcp stack needs an address of its own: addresses = [\"10.9.0.2/24\"]".into());
        }
        if self.addresses.len() > Self::MOST_ADDRESSES {
            return Err(format!("a smoltcp stack has at most {} addresses", Self::MOST_ADDRESSES));
        }
        if !(1280..=9000).contains(&self.mtu) {
            return Err(format!("an MTU of {} is out of range; use 1280 to 9000", self.mtu));
        }
        if let Some(tap) = &self.tap
            && (tap.is_empty() || tap.len() > 15 || tap.bytes().any(|b| b == b'/' || b.is_ascii_whitespace()))
        {
            return Err(format!("`{tap}` is no name for a TAP device; use 1 to 15 letters"));
        }
        for (n, gateway) in self.gateways.iter().enumerate() {
            if self.gateways[..n].iter().any(|other| other.is_ipv4() == gateway.is_ipv4()) {
                return Err("there is one gateway for each of IPv4 and IPv6 at most".into());
            }
            let inside = |cidr: &Cidr| crate::stack::cidr(cidr).contains_addr(&(*gateway).into());
            if !self.addresses.iter().any(inside) {
                return Err(format!("the gateway {gateway} is in none of the networks of `addresses`"));
            }
        }
        Ok(())
    }
}

/// Says in one sentence why a module with this configuration cannot work here. That the device is free is found out only
/// when the stack is made: a module that runs has it already.
pub fn check(config: &SmoltcpConfig) -> Result<(), String> {
    config.validate()?;
    if config.tap.is_some() { tap::possible(config.netns.as_deref()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(addresses: &[&str], gateways: &[&str]) -> SmoltcpConfig {
        SmoltcpConfig {
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            gateways: gateways.iter().map(|text| text.parse().unwrap()).collect(),
            ..SmoltcpConfig::default()
        }
    }

    #[test]
    fn what_cannot_work_is_told() {
        assert_eq!(config(&["10.9.0.2/24", "fd00::2/64"], &["10.9.0.1", "fd00::1"]).validate(), Ok(()));
        for (addresses, gateways, word) in [
            (&[][..], &[][..], "needs an address"),
            (&["10.9.0.2/24"], &["10.8.0.1"], "in none of the networks"),
            (&["10.9.0.2/24"], &["10.9.0.1", "10.9.0.3"], "one gateway"),
        ] {
            let error = config(addresses, gateways).validate().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let tap = SmoltcpConfig { tap: Some("a/b".into()), ..config(&["10.9.0.2/24"], &[]) };
        assert!(tap.validate().unwrap_err().contains("TAP"));
        let mtu = SmoltcpConfig { mtu: 100, ..config(&["10.9.0.2/24"], &[]) };
        assert!(mtu.validate().unwrap_err().contains("MTU"));
    }

    #[test]
    fn addresses_are_read() {
        for text in
            ["10.9.0.2", "10.9.0.2/33", "0.0.0.0/0", "127.0.0.1/8", "224.0.0.1/4", "x/24", "fd00::1/129"]
        {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
