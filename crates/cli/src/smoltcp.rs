//! The keys of `[[nsm]]` that only the stack `smoltcp` has.

use std::net::IpAddr;

use netkernel_engine::{Cidr, SmoltcpConfig};

use crate::config::NsmSection;

/// The set-up of a smoltcp stack, `None` for another one. An error: the place in the file, and one sentence.
pub fn config(nsm: &NsmSection) -> Result<Option<SmoltcpConfig>, (usize, String)> {
    let stack = nsm.stack.as_ref().filter(|stack| stack.get_ref() == "smoltcp");
    let own = [
        nsm.tap.as_ref().map(|key| key.span().start),
        nsm.addresses.as_ref().map(|key| key.span().start),
        nsm.gateways.as_ref().map(|key| key.span().start),
        nsm.mtu.as_ref().map(|key| key.span().start),
    ];
    let Some(stack) = stack else {
        return match own.into_iter().flatten().min() {
            Some(at) => Err((
                at,
                "only a stack \"smoltcp\" has this key; remove it, or set stack = \"smoltcp\"".into(),
            )),
            None => Ok(None),
        };
    };
    if let Some(key) = &nsm.congestion_control {
        let text = "the stack \"smoltcp\" has a congestion control of its own (cubic); remove the key".into();
        return Err((key.span().start, text));
    }
    let at = stack.span().start;
    if nsm.pacing.is_some() || nsm.mark.is_some() {
        return Err((
            at,
            "`pacing` and `mark` are for the kernel's sockets; remove them for \"smoltcp\"".into(),
        ));
    }
    if nsm.form == Some(netkernel_engine::Form::Process) {
        let text = "a stack \"smoltcp\" runs in the engine's own process only so far; remove `form`".into();
        return Err((at, text));
    }
    let mut config = SmoltcpConfig {
        netns: nsm.netns.as_ref().map(|key| key.get_ref().clone()),
        ..SmoltcpConfig::default()
    };
    let Some(tap) = &nsm.tap else {
        return Err((at, "the stack \"smoltcp\" needs a TAP device: tap = \"nk0\"".into()));
    };
    config.tap = Some(tap.get_ref().clone());
    for text in nsm.addresses.iter().flat_map(|list| list.get_ref()) {
        let place = nsm.addresses.as_ref().map_or(at, |list| list.span().start);
        config.addresses.push(text.parse::<Cidr>().map_err(|error| (place, error))?);
    }
    for text in nsm.gateways.iter().flat_map(|list| list.get_ref()) {
        let place = nsm.gateways.as_ref().map_or(at, |list| list.span().start);
        let gateway = text.parse::<IpAddr>();
        config.gateways.push(gateway.map_err(|_| (place, format!("'{text}' is no address of a gateway")))?);
    }
    if let Some(mtu) = &nsm.mtu {
        config.mtu = *mtu.get_ref();
    }
    match config.validate() {
        Ok(()) => Ok(Some(config)),
        Err(error) => Err((own.into_iter().flatten().min().unwrap_or(at), error)),
    }
}
