//! Which stacks a configuration makes an engine offer, and whether this host has them.

use std::collections::HashMap;

use anyhow::{Result, anyhow, bail};
use netkernel_abi::Limits;
use netkernel_control::NsmInfo;
use netkernel_engine::{Engine, EngineConfig, NsmConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{Config, HugePages};

/// The engine's configuration.
pub fn of(config: &Config) -> Result<EngineConfig> {
    let mut engine = EngineConfig { process_binary: std::env::current_exe().ok(), ..EngineConfig::default() };
    let section = &config.engine;
    if let Some(n) = &section.switch_threads {
        engine.switch_threads = *n.get_ref();
    }
    engine.placement = section.placement.unwrap_or_default();
    if let Some(n) = &section.spin_us {
        engine.spin_us = u64::from(*n.get_ref());
    }
    if let Some(n) = &section.max_guests {
        engine.max_guests = *n.get_ref();
    }
    if let Some(n) = &section.region_bytes {
        engine.limits = Limits { region_bytes: n.get_ref().0, ..engine.limits };
    }
    engine.huge_pages = match section.huge_pages.unwrap_or_default() {
        // A mapping takes no reservation, so a host without pages would show only at the first touch.
        HugePages::Auto if free_huge_page_bytes() < engine.limits.region_bytes => {
            netkernel_shm::HugePages::Off
        }
        HugePages::Auto => netkernel_shm::HugePages::Auto,
        HugePages::On => netkernel_shm::HugePages::On,
        HugePages::Off => netkernel_shm::HugePages::Off,
    };
    if !config.nsms.is_empty() {
        engine.nsms = config
            .nsms
            .iter()
            .map(|nsm| {
                let allow = nsm.memory_users()?;
                Ok(NsmConfig {
                    name: nsm.name.get_ref().clone(),
                    stack: nsm.stack.as_ref().map_or_else(|| "kernel".into(), |s| s.get_ref().clone()),
                    form: nsm.form.unwrap_or_default(),
                    congestion_control: nsm.congestion_control.as_ref().map(|s| s.get_ref().clone()),
                    netns: nsm.netns.as_ref().map(|s| s.get_ref().clone()),
                    congestion_policy: nsm.congestion_policy.unwrap_or_default(),
                    attach: nsm.attach.unwrap_or_default(),
                    pacing: nsm.pacing.map(|rate| rate.0),
                    mark: nsm.mark,
                    // The file was checked.
                    smoltcp: crate::smoltcp::config(nsm).ok().flatten(),
                    capacity: nsm.capacity(),
                    memory: nsm.memory.unwrap_or_default(),
                    memory_tenants: HashMap::new(),
                    memory_allow: (!allow.everybody).then_some(allow.list),
                    pair: nsm.pair.unwrap_or(true),
                    single_copy: nsm.single_copy.as_ref().is_some_and(|on| *on.get_ref()),
                })
            })
            .collect::<Result<_>>()?;
    }
    for nsm in &mut engine.nsms {
        nsm.memory_tenants = config.memory_tenants();
    }
    engine.tenants = config.tenants()?;
    engine.strict_tenants = config.engine.strict_tenants;
    Ok(engine)
}

fn free_huge_page_bytes() -> u64 {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .map_or(0, |pages| pages << 21)
}

/// What an engine of this configuration offers on this host.
pub fn offered(config: EngineConfig) -> Result<Vec<NsmInfo>> {
    let engine = Engine::start(config).map_err(|e| anyhow!("{e}"))?;
    let offered = engine.stacks().iter().filter_map(convert).collect();
    engine.shutdown();
    Ok(offered)
}

/// Fails when a configured stack cannot be had.
pub fn check(offered: &[NsmInfo]) -> Result<()> {
    match offered.iter().find(|nsm| !nsm.available) {
        Some(nsm) => bail!(
            "stack '{}' cannot be used on this host: {}",
            nsm.name,
            nsm.reason.as_deref().unwrap_or("its kind of stack is missing")
        ),
        None => Ok(()),
    }
}

/// The same fields under the same names, by way of JSON.
pub fn convert<T: Serialize, U: DeserializeOwned>(value: &T) -> Option<U> {
    serde_json::to_value(value).and_then(serde_json::from_value).ok()
}

/// Congestion controls of the host's kernel.
pub struct CongestionControls {
    pub available: Vec<String>,
    /// What processes without CAP_NET_ADMIN may choose.
    pub allowed: Vec<String>,
    pub default: String,
}

impl CongestionControls {
    pub fn of_host() -> CongestionControls {
        let words = |name: &str| -> Vec<String> {
            std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"))
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect()
        };
        CongestionControls {
            available: words("tcp_available_congestion_control"),
            allowed: words("tcp_allowed_congestion_control"),
            default: words("tcp_congestion_control").concat(),
        }
    }
}
