//! What tenants do in the isolation benchmarks, and the peers that they do it with. Natively and as guests they are the same
//! program: a hidden part of this one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::report::quantile;

/// Between two looks at a counter.
pub const SAMPLE: Duration = Duration::from_millis(100);
const CHUNK: usize = 64 << 10;
/// A paced request, and its answer.
const REQUEST: usize = 64;
const PACE: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Kind {
    /// Sends as fast as it can.
    Send,
    /// Receives as fast as it can.
    Receive,
    /// 64 bytes there and back, once in a millisecond.
    Paced,
    /// Options of sockets, set again and again.
    Operations,
    /// Connections that are opened and closed again.
    Churn,
}

#[derive(clap::Args, Debug)]
pub struct LoadArgs {
    pub kind: Kind,
    pub port: u16,
    pub tenant: u8,
    pub connections: usize,
    pub seconds: f64,
}

/// Runs for its time and tells on stdout what it did.
pub fn run(args: &LoadArgs) -> Result<()> {
    let seconds = Duration::from_secs_f64(args.seconds);
    if args.kind == Kind::Paced {
        let mut stream = connect(args.port, b'e', args.tenant)?;
        return paced(&mut stream, seconds);
    }
    let counter = Arc::new(AtomicU64::new(0));
    let (kind, port, tenant) = (args.kind, args.port, args.tenant);
    for _ in 0..args.connections {
        let counter = Arc::clone(&counter);
        thread::spawn(move || {
            if let Err(error) = one(kind, port, tenant, &counter) {
                eprintln!("{error:#}");
                exit(1);
            }
        });
    }
    let begin = Instant::now();
    while begin.elapsed() < seconds {
        println!("{} {}", begin.elapsed().as_micros(), counter.load(Relaxed));
        thread::sleep(SAMPLE);
    }
    println!("{} {}", begin.elapsed().as_micros(), counter.load(Relaxed));
    exit(0)
}

fn connect(port: u16, what: u8, tenant: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).context("connect")?;
    stream.set_nodelay(true)?;
    stream.write_all(&[what, tenant]).context("greeting")?;
    Ok(stream)
}

fn one(kind: Kind, port: u16, tenant: u8, counter: &AtomicU64) -> Result<()> {
    let mut bytes = vec![7; CHUNK];
    match kind {
        Kind::Send => {
            let mut stream = connect(port, b's', tenant)?;
            loop {
                let n = stream.write(&bytes).context("send")?;
                counter.fetch_add(n as u64, Relaxed);
            }
        }
        Kind::Receive => {
            let mut stream = connect(port, b'r', tenant)?;
            loop {
                let n = stream.read(&mut bytes).context("receive")?;
                counter.fetch_add(n as u64, Relaxed);
            }
        }
        Kind::Operations => {
            let stream = connect(port, b'e', tenant)?;
            loop {
                stream.set_nodelay(true)?;
                counter.fetch_add(1, Relaxed);
            }
        }
        Kind::Churn | Kind::Paced => loop {
            let mut stream = connect(port, b'c', tenant)?;
            // The peer closes first, so that no port of this side has to wait.
            let _ = stream.read(&mut bytes);
            counter.fetch_add(1, Relaxed);
        },
    }
}

/// Prints median, 99th percentile and worst in microseconds, and how many there were.
fn paced(stream: &mut TcpStream, duration: Duration) -> Result<()> {
    let mut times = Vec::new();
    let mut bytes = [1; REQUEST];
    let begin = Instant::now();
    let warm = duration / 10;
    let mut next = begin;
    while begin.elapsed() < duration + warm {
        next = (next + PACE).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        stream.write_all(&bytes).context("request")?;
        stream.read_exact(&mut bytes).context("answer")?;
        if begin.elapsed() > warm {
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{} {} {} {}",
        quantile(&times, 0.5),
        quantile(&times, 0.99),
        quantile(&times, 1.0),
        times.len()
    );
    Ok(())
}

/// What all loads talk to, on the plain kernel, in this process.
pub struct Peers {
    pub port: u16,
    received: Arc<[AtomicU64; 8]>,
}

impl Peers {
    pub fn start() -> Result<Peers> {
        let listener = TcpListener::bind("127.0.0.1:0").context("no port for the peers")?;
        let port = listener.local_addr()?.port();
        let received: Arc<[AtomicU64; 8]> = Arc::default();
        let counters = Arc::clone(&received);
        thread::spawn(move || {
            // Ends with the process: there is one for each benchmark.
            for stream in listener.incoming().flatten() {
                let counters = Arc::clone(&counters);
                let _ = thread::Builder::new().stack_size(256 << 10).spawn(move || serve(stream, &counters));
            }
        });
        Ok(Peers { port, received })
    }

    /// Bytes that came from a tenant so far.
    pub fn received(&self, tenant: u8) -> u64 {
        self.received[usize::from(tenant) % 8].load(Relaxed)
    }
}

/// Errors end the connection: the load on the other side is over.
fn serve(mut stream: TcpStream, counters: &[AtomicU64; 8]) {
    let mut greeting = [0; 2];
    if stream.set_nodelay(true).is_err() || stream.read_exact(&mut greeting).is_err() {
        return;
    }
    let mut bytes = vec![9; CHUNK];
    match greeting[0] {
        b's' => {
            let counter = &counters[usize::from(greeting[1]) % 8];
            while let Ok(n @ 1..) = stream.read(&mut bytes) {
                counter.fetch_add(n as u64, Relaxed);
            }
        }
        b'r' => while stream.write_all(&bytes).is_ok() {},
        b'e' => {
            while let Ok(n @ 1..) = stream.read(&mut bytes) {
                if stream.write_all(&bytes[..n]).is_err() {
                    return;
                }
            }
        }
        _ => {}
    }
}
