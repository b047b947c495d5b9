//! The device that smoltcp sees. One frame at a time is given to it, so that the stack can look at each first.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6Message, Icmpv6Packet,
    IpAddress, IpProtocol, Ipv6Packet,
};

/// Frames to the stack itself that wait; more are lost, as on a wire.
const LOOP_FRAMES: usize = 512;

pub struct Device {
    tap: Option<File>,
    own: EthernetAddress,
    addresses: Vec<IpAddress>,
    /// Bytes of the largest frame.
    frame: usize,
    /// Frames that the stack sent to itself.
    looped: VecDeque<Vec<u8>>,
    /// The frame that smoltcp gets next.
    current: Option<Vec<u8>>,
    buffer: Vec<u8>,
}

/// A frame, and whether it came over the wire.
pub struct Frame {
    pub bytes: Vec<u8>,
    pub wire: bool,
}

const ETHERNET_HEADER: usize = 14;

impl Device {
    pub fn new(tap: Option<File>, own: EthernetAddress, addresses: Vec<IpAddress>, mtu: usize) -> Device {
        let frame = mtu + ETHERNET_HEADER;
        // One byte more shows what is too long.
        let buffer = vec![0; frame + 1];
        Device { tap, own, addresses, frame, looped: VecDeque::new(), current: None, buffer }
    }

    pub fn tap(&self) -> Option<&File> {
        self.tap.as_ref()
    }

    /// Frames wait that no descriptor tells of.
    pub fn has_looped(&self) -> bool {
        !self.looped.is_empty()
    }

    /// The next frame that came in.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if let Some(bytes) = self.looped.pop_front() {
            return Some(Frame { bytes, wire: false });
        }
        loop {
            let n = self.tap.as_ref()?.read(&mut self.buffer).ok()?;
            if (ETHERNET_HEADER..=self.frame).contains(&n) {
                return Some(Frame { bytes: self.buffer[..n].to_vec(), wire: true });
            }
            if n == 0 {
                return None;
            }
        }
    }

    /// What smoltcp receives next.
    pub fn give(&mut self, frame: Vec<u8>) {
        self.current = Some(frame);
    }

    fn send(&mut self, frame: Vec<u8>) {
        if self.is_for_us(&frame) {
            if self.looped.len() < LOOP_FRAMES {
                self.looped.push_back(frame);
            }
        } else if let Some(tap) = &mut self.tap {
            // A device that is full or down loses frames, as a wire does.
            let _ = tap.write(&frame);
        }
    }

    /// The stack is its own neighbour: it asks itself for its hardware address, and answers.
    fn is_for_us(&self, frame: &[u8]) -> bool {
        let Ok(frame) = EthernetFrame::new_checked(frame) else { return false };
        if frame.dst_addr() == self.own {
            return true;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => ArpPacket::new_checked(frame.payload()).is_ok_and(|arp| {
                let target: Option<[u8; 4]> = arp.target_protocol_addr().try_into().ok();
                arp.operation() == ArpOperation::Request
                    && target.is_some_and(|target| self.addresses.contains(&IpAddress::Ipv4(target.into())))
            }),
            // A neighbour solicitation goes to a group, which others may be in too.
            EthernetProtocol::Ipv6 => Ipv6Packet::new_checked(frame.payload()).is_ok_and(|packet| {
                packet.next_header() == IpProtocol::Icmpv6
                    && Icmpv6Packet::new_checked(packet.payload()).is_ok_and(|message| {
                        message.msg_type() == Icmpv6Message::NeighborSolicit
                            && self.addresses.contains(&IpAddress::Ipv6(message.target_addr()))
                    })
            }),
            _ => false,
        }
    }
}

impl phy::Device for Device {
    type RxToken<'a> = RxToken;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken, TxToken<'_>)> {
        let frame = self.current.take()?;
        Some((RxToken(frame), TxToken(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        // The stack's own frames wait until they are read: none is lost by sending more.
        (self.looped.len() < LOOP_FRAMES / 2).then_some(TxToken(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.frame;
        capabilities
    }
}

pub struct RxToken(Vec<u8>);

impl phy::RxToken for RxToken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct TxToken<'a>(&'a mut Device);

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(frame);
        result
    }
}
