//! Blocks of pcapng files (draft-ietf-opsawg-pcapng).

/// LINKTYPE_RAW: packets begin with an IP header.
const RAW: u16 = 101;
const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;

fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let length = (12 + body.len()) as u32;
    let mut out = Vec::with_capacity(length as usize);
    out.extend(kind.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(body);
    out.extend(length.to_le_bytes());
    out
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(u16::MAX as usize)];
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The beginning of a file.
pub fn section(application: &str, comment: &str) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(0x1a2b_3c4d_u32.to_le_bytes());
    body.extend([1, 0, 0, 0]);
    body.extend(u64::MAX.to_le_bytes());
    option(&mut body, 1, comment.as_bytes());
    option(&mut body, 4, application.as_bytes());
    option(&mut body, 0, &[]);
    block(SECTION, &body)
}

/// An interface; its number is how many were before it. Times are in nanoseconds.
pub fn interface(name: &str, description: &str, snap: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(RAW.to_le_bytes());
    body.extend([0, 0]);
    body.extend(snap.to_le_bytes());
    option(&mut body, 2, name.as_bytes());
    option(&mut body, 3, description.as_bytes());
    option(&mut body, 9, &[9]);
    option(&mut body, 0, &[]);
    block(INTERFACE, &body)
}

/// A packet of `length` bytes, of which `data` was kept; `at_ns` since 1970.
pub fn packet(interface: u32, at_ns: u64, length: usize, data: &[u8], comment: &str) -> Vec<u8> {
    let mut body = Vec::with_capacity(data.len() + 24);
    body.extend(interface.to_le_bytes());
    body.extend(((at_ns >> 32) as u32).to_le_bytes());
    body.extend((at_ns as u32).to_le_bytes());
    body.extend((data.len() as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(data);
    body.resize(body.len().next_multiple_of(4), 0);
    option(&mut body, 1, comment.as_bytes());
    option(&mut body, 0, &[]);
    block(PACKET, &body)
}

/// A packet that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Since 1970.
    pub at_ns: u64,
    /// What it was long.
    pub length: usize,
    pub data: &'a [u8],
}

/// Reads what [`packet`] wrote, in pieces of any size.
#[derive(Default)]
pub struct Reader {
    pending: Vec<u8>,
}

/// It is not what was to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garbled;

impl Reader {
    /// Takes bytes, and tells of the packets that are whole then. No block may be longer than `most`.
    pub fn take(
        &mut self,
        bytes: &[u8],
        most: usize,
        mut tell: impl FnMut(Packet<'_>),
    ) -> Result<(), Garbled> {
        self.pending.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(length) = word(&self.pending, at + 4) {
            if length < 12 || length % 4 != 0 || length > most {
                return Err(Garbled);
            }
            let Some(block) = self.pending.get(at..at + length) else { break };
            if word(block, 0) == Some(PACKET as usize) {
                tell(read_packet(&block[8..length - 4]).ok_or(Garbled)?);
            }
            at += length;
        }
        self.pending.drain(..at);
        Ok(())
    }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

fn read_packet(body: &[u8]) -> Option<Packet<'_>> {
    let at_ns = (word(body, 4)? as u64) << 32 | word(body, 8)? as u64;
    let data = body.get(20..)?.get(..word(body, 12)?)?;
    Some(Packet { at_ns, length: word(body, 16)?, data })
}

/// How many packets of an interface were seen, and lost on the way to the file.
pub fn statistics(interface: u32, at_ns: u64, seen: u64, lost: u64) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(interface.to_le_bytes());
    body.extend(((at_ns >> 32) as u32).to_le_bytes());
    body.extend((at_ns as u32).to_le_bytes());
    option(&mut body, 4, &seen.to_le_bytes());
    option(&mut body, 5, &lost.to_le_bytes());
    option(&mut body, 0, &[]);
    block(STATISTICS, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_in_pieces_of_any_size() {
        let long = vec![7; 1001];
        let file = [
            section("a", "b"),
            interface("c", "d", 100),
            packet(0, 5 << 32 | 6, 70_000, &long, "stack x"),
            packet(0, 7, 0, &[], ""),
            statistics(0, 9, 1, 2),
        ]
        .concat();
        for size in [1, 3, 100, file.len()] {
            let (mut reader, mut seen) = (Reader::default(), Vec::new());
            for piece in file.chunks(size) {
                reader.take(piece, 2000, |p| seen.push((p.at_ns, p.length, p.data.to_vec()))).unwrap();
            }
            assert_eq!(seen, [(5 << 32 | 6, 70_000, long.clone()), (7, 0, vec![])]);
        }
        assert_eq!(Reader::default().take(&file, 1000, |_| ()), Err(Garbled), "longer than what may be");
    }

    #[test]
    fn nonsense_is_not_believed() {
        let garbled = |bytes: &[u8]| Reader::default().take(bytes, 4096, |_| ()) == Err(Garbled);
        let whole = packet(0, 1, 8, &[1; 8], "");
        let with = |at: usize, value: u32| {
            let mut bytes = whole.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            bytes
        };
        assert!(!garbled(&whole));
        // How long the block is, and its data.
        for (at, value) in [(4, 0), (4, 8), (4, 13), (4, u32::MAX), (20, 9000), (20, u32::MAX)] {
            assert!(garbled(&with(at, value)), "{value} at {at}");
        }
        let mut short = 6u32.to_le_bytes().to_vec();
        short.extend([12u32.to_le_bytes(), 12u32.to_le_bytes()].concat());
        assert!(garbled(&short), "no packet in it");
    }
}
