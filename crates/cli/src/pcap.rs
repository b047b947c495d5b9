//! `netkernel pcap`: what a tenant sends and receives, as pcapng.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, bail};
use netkernel_control::NewCapture;

use crate::args::PcapArgs;
use crate::{locate, show, sys};

pub fn pcap(args: &PcapArgs) -> Result<()> {
    let standard = args.write.as_os_str() == "-";
    if standard && io::stdout().is_terminal() {
        bail!(
            "pcapng is nothing for a terminal: name a file with -w, or pipe it: `netkernel pcap NAME | tcpdump -r -`"
        );
    }
    let capture = match args.target.parse::<u32>() {
        Ok(guest) => NewCapture { guest: Some(guest), ..NewCapture::default() },
        Err(_) => NewCapture { tenant: Some(args.target.clone()), ..NewCapture::default() },
    };
    let signals = sys::termination_signals().context("cannot take signals")?;
    let mut client = locate::require(args.socket.as_deref())?;
    let (pipe, info) = client.capture(NewCapture { snap_bytes: args.snaplen, ..capture })?;
    if let Some(unseen) = &info.unseen {
        // Data goes to standard output: this is for people.
        eprintln!("netkernel: {}", show::printable(unseen));
    }
    let mut pipe = File::from(pipe);
    let mut out: Box<dyn Write> = if standard {
        Box::new(io::stdout().lock())
    } else {
        let named = || args.write.display().to_string();
        Box::new(File::create(&args.write).with_context(named)?)
    };
    let mut bytes = vec![0; 256 << 10];
    let mut pending = Vec::new();
    loop {
        sys::wait_readable(&[pipe.as_fd(), signals.as_fd()]).context("cannot wait")?;
        // After a signal, what is there already.
        if sys::is_readable(signals.as_fd()) && !sys::is_readable(pipe.as_fd()) {
            return Ok(());
        }
        let n = pipe.read(&mut bytes)?;
        if n == 0 {
            // The engine ended.
            return Ok(());
        }
        pending.extend_from_slice(&bytes[..n]);
        let whole = whole_blocks(&pending);
        out.write_all(&pending[..whole])?;
        out.flush()?;
        pending.drain(..whole);
    }
}

/// How many bytes the blocks take that are complete: a file never ends in the middle of one.
fn whole_blocks(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(length) = bytes.get(at + 4..at + 8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes)
    {
        let end = at + length as usize;
        if end > bytes.len() || length < 12 {
            break;
        }
        at = end;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_are_written() {
        let block = |length: u32| {
            let mut block = vec![7; length as usize];
            block[4..8].copy_from_slice(&length.to_le_bytes());
            block
        };
        let two = [block(12), block(32)].concat();
        for end in 0..12 {
            assert_eq!(whole_blocks(&two[..end]), 0);
        }
        assert_eq!((whole_blocks(&two[..43]), whole_blocks(&two)), (12, 44));
        assert_eq!(whole_blocks(&[0; 40]), 0, "no length");
    }
}
