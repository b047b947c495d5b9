//! Which socket options a guest may set and read. What is not here does not exist (ENOPROTOOPT).
//!
//! No option that carries a pointer, that reaches beyond the socket, or that needs a privilege is passed: the engine's
//! privileges are not the guest's.

use libc::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Flat value, both ways.
    Pass,
    /// May only be read.
    Read,
    /// GuestLib's own business; the kernel's socket is not asked. Setting succeeds.
    Local,
    /// TCP_CONGESTION: the module's, nothing else.
    Congestion,
    /// SO_LINGER: kept by the stack.
    Linger,
    /// SO_PRIORITY: what needs no privilege.
    Priority,
    /// May be read; setting is refused with EPERM.
    Guarded,
    /// Refused with this errno, both ways.
    Deny(i32),
}

use Rule::*;

const SO_RESERVE_MEM: i32 = 73;
const SO_TXREHASH: i32 = 74;
const TCP_SAVE_SYN_: i32 = 27;
const TCP_SAVED_SYN_: i32 = 28;
const TCP_FASTOPEN_KEY_: i32 = 33;
const TCP_ZEROCOPY_RECEIVE_: i32 = 35;
const TCP_TX_DELAY: i32 = 37;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const UDP_SEGMENT_: i32 = 103;
const UDP_GRO_: i32 = 104;
const SO_TIMESTAMP_NEW: i32 = 63;
const SO_TIMESTAMPNS_NEW: i32 = 64;
const IP_RECVFRAGSIZE: i32 = 25;
const IP_CHECKSUM: i32 = 23;
const IPV6_2292PKTINFO: i32 = 2;
const IPV6_2292HOPLIMIT: i32 = 8;
const IPV6_RECVFRAGSIZE: i32 = 77;

/// The rule for an option.
pub fn rule(level: i32, name: i32) -> Rule {
    match level {
        SOL_SOCKET => match name {
            SO_REUSEADDR | SO_REUSEPORT | SO_KEEPALIVE | SO_BROADCAST | SO_OOBINLINE | SO_SNDBUF
            | SO_RCVBUF | SO_TIMESTAMP | SO_TIMESTAMPNS | SO_TIMESTAMP_NEW | SO_TIMESTAMPNS_NEW
            | SO_RXQ_OVFL | SO_DONTROUTE | SO_NO_CHECK | SO_MAX_PACING_RATE | SO_INCOMING_CPU
            | SO_TXREHASH => Pass,
            SO_LINGER => Linger,
            SO_PRIORITY => Priority,
            SO_TYPE | SO_PROTOCOL | SO_DOMAIN | SO_ACCEPTCONN | SO_ERROR | SO_COOKIE
            | SO_INCOMING_NAPI_ID | SO_MEMINFO => Read,
            SO_RCVLOWAT | SO_RCVTIMEO | SO_SNDTIMEO => Local,
            SO_DEBUG => Deny(EACCES),
            SO_MARK | SO_BINDTODEVICE | SO_BINDTOIFINDEX | SO_BUSY_POLL => Guarded,
            SO_SNDBUFFORCE
            | SO_RCVBUFFORCE
            | SO_ATTACH_FILTER
            | SO_ATTACH_BPF
            | SO_ATTACH_REUSEPORT_CBPF
            | SO_ATTACH_REUSEPORT_EBPF
            | SO_DETACH_FILTER
            | SO_LOCK_FILTER
            | SO_RESERVE_MEM => Deny(EPERM),
            _ => Deny(ENOPROTOOPT),
        },
        IPPROTO_TCP => match name {
            TCP_NODELAY
            | TCP_MAXSEG
            | TCP_CORK
            | TCP_KEEPIDLE
            | TCP_KEEPINTVL
            | TCP_KEEPCNT
            | TCP_SYNCNT
            | TCP_LINGER2
            | TCP_DEFER_ACCEPT
            | TCP_WINDOW_CLAMP
            | TCP_QUICKACK
            | TCP_THIN_LINEAR_TIMEOUTS
            | TCP_THIN_DUPACK
            | TCP_USER_TIMEOUT
            | TCP_FASTOPEN
            | TCP_NOTSENT_LOWAT
            | TCP_SAVE_SYN_
            | TCP_TIMESTAMP
            | TCP_TX_DELAY => Pass,
            TCP_INFO | TCP_CC_INFO | TCP_SAVED_SYN_ => Read,
            TCP_CONGESTION => Congestion,
            TCP_REPAIR
            | TCP_REPAIR_QUEUE
            | TCP_QUEUE_SEQ
            | TCP_REPAIR_OPTIONS
            | TCP_REPAIR_WINDOW
            | TCP_MD5SIG
            | TCP_ULP
            | TCP_FASTOPEN_KEY_
            | TCP_ZEROCOPY_RECEIVE_ => Deny(EPERM),
            _ => Deny(ENOPROTOOPT),
        },
        IPPROTO_IP => match name {
            IP_TOS
            | IP_TTL
            | IP_MTU_DISCOVER
            | IP_RECVERR
            | IP_PKTINFO
            | IP_RECVTTL
            | IP_RECVTOS
            | IP_RECVORIGDSTADDR
            | IP_RECVFRAGSIZE
            | IP_CHECKSUM
            | IP_FREEBIND
            | IP_MINTTL
            | IP_BIND_ADDRESS_NO_PORT
            | IP_MULTICAST_IF
            | IP_MULTICAST_TTL
            | IP_MULTICAST_LOOP
            | IP_ADD_MEMBERSHIP
            | IP_DROP_MEMBERSHIP
            | IP_ADD_SOURCE_MEMBERSHIP
            | IP_DROP_SOURCE_MEMBERSHIP
            | IP_BLOCK_SOURCE
            | IP_UNBLOCK_SOURCE
            | IP_MULTICAST_ALL
            | IP_UNICAST_IF
            | IP_LOCAL_PORT_RANGE
            | MCAST_JOIN_GROUP
            | MCAST_LEAVE_GROUP => Pass,
            IP_MTU => Read,
            IP_TRANSPARENT | IP_OPTIONS | IP_IPSEC_POLICY | IP_XFRM_POLICY => Deny(EPERM),
            _ => Deny(ENOPROTOOPT),
        },
        IPPROTO_IPV6 => match name {
            IPV6_V6ONLY
            | IPV6_UNICAST_HOPS
            | IPV6_MULTICAST_IF
            | IPV6_MULTICAST_HOPS
            | IPV6_MULTICAST_LOOP
            | IPV6_ADD_MEMBERSHIP
            | IPV6_DROP_MEMBERSHIP
            | IPV6_MTU_DISCOVER
            | IPV6_RECVERR
            | IPV6_TCLASS
            | IPV6_RECVTCLASS
            | IPV6_RECVPKTINFO
            | IPV6_2292PKTINFO
            | IPV6_2292HOPLIMIT
            | IPV6_FLOWINFO
            | IPV6_RECVORIGDSTADDR
            | IPV6_RECVFRAGSIZE
            | IPV6_RECVHOPLIMIT
            | IPV6_DONTFRAG
            | IPV6_AUTOFLOWLABEL
            | IPV6_ADDR_PREFERENCES
            | IPV6_MINHOPCOUNT
            | IPV6_FREEBIND
            | IPV6_UNICAST_IF
            | IPV6_MULTICAST_ALL
            | MCAST_JOIN_GROUP
            | MCAST_LEAVE_GROUP => Pass,
            IPV6_MTU => Read,
            IPV6_TRANSPARENT => Deny(EPERM),
            _ => Deny(ENOPROTOOPT),
        },
        IPPROTO_UDP => match name {
            UDP_CORK | UDP_SEGMENT_ | UDP_GRO_ => Pass,
            _ => Deny(ENOPROTOOPT),
        },
        _ => Deny(ENOPROTOOPT),
    }
}

const TCP_TIMESTAMP: i32 = 24;
const TCP_CC_INFO: i32 = 26;
const TCP_REPAIR_WINDOW: i32 = 29;
const IPV6_MULTICAST_ALL: i32 = 29;
const IPV6_UNICAST_IF: i32 = 76;
const IPV6_ADDR_PREFERENCES: i32 = 72;
const IPV6_AUTOFLOWLABEL: i32 = 70;
const IPV6_MINHOPCOUNT: i32 = 73;
const IPV6_TRANSPARENT: i32 = 75;
const IPV6_FREEBIND: i32 = 78;
const IP_UNICAST_IF: i32 = 50;
const IP_IPSEC_POLICY: i32 = 16;
const IP_XFRM_POLICY: i32 = 17;
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_LEAVE_GROUP: i32 = 45;
const UDP_CORK: i32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_with_a_pointer_or_a_privilege_passes() {
        for (level, name) in [
            (SOL_SOCKET, SO_ATTACH_FILTER),
            (SOL_SOCKET, SO_MARK),
            (SOL_SOCKET, SO_BINDTODEVICE),
            (IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE_),
            (IPPROTO_TCP, TCP_REPAIR),
            (IPPROTO_TCP, TCP_ULP),
            (IPPROTO_IP, IP_TRANSPARENT),
        ] {
            assert!(matches!(rule(level, name), Deny(EPERM) | Guarded), "{level} {name}");
        }
        // iptables and multicast filters take pointers; they are not in the table.
        assert_eq!(rule(IPPROTO_IP, 64), Deny(ENOPROTOOPT));
        assert_eq!(rule(77, 1), Deny(ENOPROTOOPT));
        assert_eq!(rule(IPPROTO_TCP, TCP_NODELAY), Pass);
    }
}
