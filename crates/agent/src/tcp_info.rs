//! What TCP_INFO says of a connection (kernel: struct tcp_info in include/uapi/linux/tcp.h).

/// The part of struct tcp_info that people look at. Times in microseconds, rates in bytes per second.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TcpInfo {
    /// As ss(8) writes it: `ESTAB`, `LISTEN`, ...
    pub state: String,
    pub rto_us: u32,
    pub rtt_us: u32,
    pub rtt_variance_us: u32,
    pub least_rtt_us: u32,
    /// Segments.
    pub congestion_window: u32,
    /// Segments; `None`: not reached yet.
    pub slow_start_threshold: Option<u32>,
    pub segment_bytes: u32,
    /// Segments that are not acknowledged. Of a listener: connections that wait to be accepted.
    pub unacknowledged: u32,
    /// Segments acknowledged out of order. Of a listener: its backlog.
    pub selectively_acknowledged: u32,
    pub lost: u32,
    /// Segments that are being retransmitted, and that were ever.
    pub retransmitting: u32,
    pub retransmitted: u32,
    pub reordering: u32,
    /// Shifts of the window: of what is sent, and of what is received.
    pub window_scale: (u8, u8),
    /// `None`: there is no limit.
    pub pacing_rate: Option<u64>,
    pub most_pacing_rate: Option<u64>,
    pub delivery_rate: u64,
    pub bytes_acknowledged: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub bytes_retransmitted: u64,
    pub segments_in: u32,
    pub segments_out: u32,
    /// Milliseconds since something was sent, and received.
    pub last_sent_ms: u32,
    pub last_received_ms: u32,
}

/// Bytes to ask the kernel for.
pub const TCP_INFO_BYTES: usize = 256;
/// TCP_INFINITE_SSTHRESH.
const NO_THRESHOLD: u32 = 0x7fff_ffff;

impl TcpInfo {
    /// Reads what the kernel wrote; older kernels write less, which reads as 0. `None`: these are not the bytes of one.
    pub fn parse(bytes: &[u8]) -> Option<TcpInfo> {
        if bytes.len() < 104 {
            return None;
        }
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let u32_at =
            |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        let u64_at =
            |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
        let rate = |at: usize| Some(u64_at(at)).filter(|&rate| rate != u64::MAX && rate != 0);
        Some(TcpInfo {
            state: tcp_state(byte(0)).into(),
            window_scale: (byte(6) & 15, byte(6) >> 4),
            rto_us: u32_at(8),
            segment_bytes: u32_at(16),
            unacknowledged: u32_at(24),
            selectively_acknowledged: u32_at(28),
            lost: u32_at(32),
            retransmitting: u32_at(36),
            last_sent_ms: u32_at(44),
            last_received_ms: u32_at(52),
            rtt_us: u32_at(68),
            rtt_variance_us: u32_at(72),
            slow_start_threshold: Some(u32_at(76)).filter(|&segments| segments < NO_THRESHOLD),
            congestion_window: u32_at(80),
            reordering: u32_at(88),
            retransmitted: u32_at(100),
            pacing_rate: rate(104),
            most_pacing_rate: rate(112),
            bytes_acknowledged: u64_at(120),
            bytes_received: u64_at(128),
            segments_out: u32_at(136),
            segments_in: u32_at(140),
            least_rtt_us: Some(u32_at(148)).filter(|&us| us != u32::MAX).unwrap_or(0),
            delivery_rate: u64_at(160),
            bytes_sent: u64_at(200),
            bytes_retransmitted: u64_at(208),
        })
    }
}

/// The states of TCP (kernel: include/net/tcp_states.h) as ss(8) writes them.
pub fn tcp_state(state: u8) -> &'static str {
    match state {
        1 => "ESTAB",
        2 => "SYN-SENT",
        3 | 12 => "SYN-RECV",
        4 => "FIN-WAIT-1",
        5 => "FIN-WAIT-2",
        6 => "TIME-WAIT",
        8 => "CLOSE-WAIT",
        9 => "LAST-ACK",
        10 => "LISTEN",
        11 => "CLOSING",
        _ => "UNCONN",
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn info(fd: i32) -> TcpInfo {
        let mut bytes = [0u8; TCP_INFO_BYTES];
        let mut len = bytes.len() as libc::socklen_t;
        // SAFETY: bytes and len are valid for writes.
        let r = unsafe {
            libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, bytes.as_mut_ptr().cast(), &mut len)
        };
        assert_eq!(r, 0);
        TcpInfo::parse(&bytes[..len as usize]).unwrap()
    }

    #[test]
    fn the_kernels_own_is_understood() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let listening = info(listener.as_raw_fd());
        assert_eq!((listening.state.as_str(), listening.unacknowledged), ("LISTEN", 1));
        assert_eq!(listening.selectively_acknowledged, 128, "std's backlog");
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[7; 5000]).unwrap();
        server.read_exact(&mut [0; 5000]).unwrap();
        server.write_all(b"!").unwrap();
        client.read_exact(&mut [0]).unwrap();
        let info = info(client.as_raw_fd());
        assert_eq!((info.state.as_str(), info.bytes_sent, info.bytes_received), ("ESTAB", 5000, 1));
        assert_eq!(info.bytes_acknowledged, 5001, "with the SYN");
        assert!(info.rtt_us > 0 && info.congestion_window > 0 && info.segment_bytes > 500, "{info:?}");
        assert_eq!(info.slow_start_threshold, None);
        assert!(TcpInfo::parse(&[0; 50]).is_none());
    }
}
