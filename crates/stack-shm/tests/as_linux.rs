//! Whatever is done with datagram sockets is seen as on the plain kernel: the same random calls, on a kernel stack and on one that
//! joins guests in memory, tell the same. `NETKERNEL_MAIL_SEED` and `NETKERNEL_MAIL_ROUNDS` choose other calls and more of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use netkernel_service::{
    Close, Datagram, Errno, GuestBytes, Handle, Segments, Shutdown, SocketAddress, Stack, key,
};
use netkernel_stack_kernel::{KernelConfig, KernelStack};
use netkernel_stack_shm::{Hub, Settings, ShmStack};

const SOCKETS: usize = 5;
const STEPS: usize = 80;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
}

/// Stacks by turns have the sockets; there is one native socket.
struct World {
    stacks: Vec<Box<dyn Stack>>,
    sockets: Vec<Option<(usize, Handle)>>,
    native: UdpSocket,
    ports: Vec<u16>,
    /// Numbers of ephemeral ports, in the order in which they were seen.
    seen: Vec<u16>,
    number: u32,
    log: String,
    in_memory: u64,
}

fn segments(bytes: &mut [u8]) -> Segments {
    // SAFETY: a stack uses the run during the call only, for which the caller's borrow lasts.
    let first = unsafe { GuestBytes::new(bytes.as_mut_ptr(), bytes.len()) };
    Segments { first, second: GuestBytes::EMPTY }
}

impl World {
    fn new(stacks: Vec<Box<dyn Stack>>, ports: &[u16]) -> World {
        let native = UdpSocket::bind("127.0.0.1:0").unwrap();
        native.set_nonblocking(true).unwrap();
        World {
            stacks,
            sockets: vec![None; SOCKETS],
            seen: vec![native.local_addr().unwrap().port()],
            native,
            ports: ports.to_vec(),
            number: 0,
            log: String::new(),
            in_memory: 0,
        }
    }

    /// Two runs have different ephemeral ports.
    fn place(&mut self, address: &SocketAddress) -> String {
        let Some(address) = address.to_std() else { return "-".into() };
        let port = address.port();
        if port == 0 || self.ports.contains(&port) {
            return format!("{}:{port}", address.ip());
        }
        let index = self.seen.iter().position(|&other| other == port).unwrap_or_else(|| {
            self.seen.push(port);
            self.seen.len() - 1
        });
        format!("{}:e{index}", address.ip())
    }

    fn address(&mut self, random: &mut Random) -> SocketAddress {
        let ip: IpAddr = random
            .of(&[
                "127.0.0.1",
                "127.0.0.1",
                "127.0.0.1",
                "127.0.0.2",
                "0.0.0.0",
                "127.255.255.255",
                "224.0.0.9",
                "::1",
                "::1",
                "::",
                "::ffff:127.0.0.1",
                "::ffff:0.0.0.0",
                "127.0.0.3",
                "ff02::1",
            ])
            .parse()
            .unwrap();
        let mut ports = self.ports.clone();
        ports.extend(self.seen.iter().take(1));
        SocketAddr::new(ip, random.of(&ports)).into()
    }

    fn step(&mut self, random: &mut Random) {
        let at = random.below(SOCKETS);
        let what = random.below(60);
        let address = self.address(random);
        let (other, bytes) =
            (random.below(SOCKETS), random.of(&[0usize, 1, 64, 1400, 9000, 65507, 65508, 65527, 65528]));
        let option = random.of(&[
            (libc::SOL_SOCKET, libc::SO_REUSEADDR),
            (libc::SOL_SOCKET, libc::SO_REUSEADDR),
            (libc::IPPROTO_IP, libc::IP_RECVTTL),
            (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
            (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
            (libc::SOL_SOCKET, libc::SO_BROADCAST),
            (libc::IPPROTO_IP, libc::IP_TTL),
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
            (libc::IPPROTO_UDP, 103),
        ]);
        let domain = random.of(&[libc::AF_INET, libc::AF_INET6]);
        let Some((stack, handle)) = self.sockets[at] else {
            let guest = at % self.stacks.len();
            let opened =
                self.stacks[guest].open(key(guest as u32, 100 + at as u32), domain, libc::SOCK_DGRAM, 0);
            // A host may have no IPv6.
            self.sockets[at] = opened.ok().map(|handle| (guest, handle));
            writeln!(self.log, "{at} opened {domain}").unwrap();
            return;
        };
        let to_socket =
            self.sockets[other].and_then(|(stack, handle)| self.stacks[stack].local_name(handle).ok());
        let result = match what {
            0 => {
                self.count(at);
                self.stacks[stack].close(handle, Close::Graceful);
                self.sockets[at] = None;
                Ok(())
            }
            1..=8 => self.stacks[stack].bind(handle, &address),
            9 => self.stacks[stack].connect(handle, &address).map(|_| ()),
            10..=12 => match to_socket {
                Some(name) if name.port() != 0 => self.stacks[stack].connect(handle, &name).map(|_| ()),
                _ => Ok(()),
            },
            13 => self.stacks[stack].disconnect(handle),
            14 if random.below(3) == 0 => {
                let value = random.of(&[0i32, 1, 1000]).to_ne_bytes();
                self.stacks[stack].set_option(handle, option.0, option.1, &value)
            }
            15 if random.below(4) == 0 => {
                self.stacks[stack].shutdown(handle, random.of(&[Shutdown::Read, Shutdown::Write]))
            }
            16..=21 => self.send(at, address, bytes, false),
            22..=45 => match to_socket.and_then(|name| name.to_std()) {
                Some(name) if name.port() != 0 => {
                    // Bound to no address, it is reached by any.
                    let any = name.ip().to_canonical().is_unspecified();
                    let ip = address.to_std().filter(|_| any).map_or(name.ip(), |address| address.ip());
                    self.send(at, SocketAddr::new(ip, name.port()).into(), bytes, what == 45)
                }
                _ => Ok(()),
            },
            46..=48 => self.send(at, SocketAddress::default(), bytes, false),
            49..=52 => {
                if let Some(port) = to_socket.map(|name| name.port()).filter(|&port| port != 0) {
                    self.number += 1;
                    let _ = self.native.send_to(&self.number.to_ne_bytes(), ("127.0.0.1", port));
                }
                Ok(())
            }
            _ => {
                self.receive(at);
                Ok(())
            }
        };
        writeln!(
            self.log,
            "{at} does {what} ({:?}, {other}, {bytes} bytes, {option:?}): {result:?}",
            address.to_std().map(|a| a.ip())
        )
        .unwrap();
        if bytes > 2000 {
            // How many large ones fit is counted otherwise.
            (0..SOCKETS).for_each(|at| self.receive(at));
        }
        for at in 0..SOCKETS {
            let Some((stack, handle)) = self.sockets[at] else { continue };
            let local = self.stacks[stack].local_name(handle).map(|name| self.place(&name));
            let peer = self.stacks[stack].peer_name(handle).map(|name| self.place(&name));
            let error = self.stacks[stack].take_error(handle);
            writeln!(self.log, "  {at}: {local:?} {peer:?} {error:?}").unwrap();
        }
    }

    fn send(&mut self, at: usize, to: SocketAddress, bytes: usize, control: bool) -> Result<(), Errno> {
        let Some((stack, handle)) = self.sockets[at] else { return Ok(()) };
        self.number += 1;
        // What leaves the host fills the socket's buffer for as long as the device likes.
        let is_group = to.to_std().is_some_and(|to| to.ip().is_multicast());
        let mut data = vec![at as u8; if is_group { bytes.min(64) } else { bytes }];
        for (to, from) in data.iter_mut().zip(self.number.to_ne_bytes()) {
            *to = from;
        }
        // One with a control message of its own: a time to live.
        let mut message = [0; 24];
        for (at, word) in [(0, 20), (8, libc::IPPROTO_IP), (12, libc::IP_TTL), (16, 7)] {
            message[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        let control = if control && to.family() == libc::AF_INET as u16 { &message[..] } else { &[] };
        let datagram = Datagram { data: segments(&mut data), to, control };
        self.stacks[stack].send_datagrams(handle, &[datagram]).map(|sent| assert_eq!(sent, 1))
    }

    /// All that waits, by who sent it: of one sender the order counts.
    fn receive(&mut self, at: usize) {
        let Some((stack, handle)) = self.sockets[at] else { return };
        self.turn();
        let mut got: BTreeMap<String, Vec<(usize, u32)>> = BTreeMap::new();
        let (mut into, mut errors) = (vec![0; 65536], Vec::new());
        for _ in 0..1000 {
            let received = self.stacks[stack].recv_datagram(handle, &segments(&mut into), &mut [0; 512]);
            let received = match received {
                Ok(received) => received,
                Err(errno) if errno.would_block() => break,
                Err(errno) => {
                    // Before or after what waits: that is not promised.
                    errors.push(errno);
                    continue;
                }
            };
            if received.from.is_empty() {
                writeln!(self.log, "  {at} is at its end").unwrap();
                break;
            }
            let mut number = [0; 4];
            let n = received.bytes.min(4);
            number[..n].copy_from_slice(&into[..n]);
            let from = self.place(&received.from);
            got.entry(from).or_default().push((received.bytes, u32::from_ne_bytes(number)));
        }
        writeln!(self.log, "  {at} got {got:?} {errors:?}").unwrap();
    }

    fn turn(&mut self) {
        for stack in &mut self.stacks {
            // With reports of the hub there, the fallback's come some turns later.
            (0..16).for_each(|_| stack.poll(&mut Vec::new(), 1024));
        }
    }

    fn count(&mut self, at: usize) {
        let Some((stack, handle)) = self.sockets[at] else { return };
        let way = self.stacks[stack].way(handle).unwrap_or_default();
        let received = way.split(" received").next().and_then(|before| before.rsplit(' ').next());
        self.in_memory += received.and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
    }
}

fn run(stacks: Vec<Box<dyn Stack>>, ports: &[u16], seed: u64) -> (String, u64) {
    let (mut world, mut random) = (World::new(stacks, ports), Random(seed));
    (0..STEPS).for_each(|_| world.step(&mut random));
    (0..SOCKETS).for_each(|at| world.receive(at));
    (0..SOCKETS).for_each(|at| world.count(at));
    // Ports in use by somebody else would be told of as well.
    (world.log, world.in_memory)
}

fn kernel() -> Box<dyn Stack> {
    Box::new(KernelStack::new(KernelConfig::default()).unwrap())
}

fn joined() -> Vec<Box<dyn Stack>> {
    let hub = Arc::new(Hub::default());
    let make = |guest| {
        let mut stack = ShmStack::new(kernel(), Arc::clone(&hub), Settings::default()).unwrap();
        stack.guest(guest, 7);
        Box::new(stack) as Box<dyn Stack>
    };
    vec![make(0), make(1)]
}

#[test]
fn random_calls_tell_the_same_as_on_the_kernel() {
    let env = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = env("NETKERNEL_MAIL_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20);
    let rounds = env("NETKERNEL_MAIL_ROUNDS").unwrap_or(300);
    println!("NETKERNEL_MAIL_SEED={first}");
    let mut in_memory = 0;
    for seed in (first..first + rounds).map(|seed| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1) {
        // Below the ephemeral ones, so that nobody is given them.
        let base = 20_000 + (seed % 5_000) as u16;
        let ports = [base, base + 1, base + 2];
        let compare = || {
            let native = run(vec![kernel(), kernel()], &ports, seed);
            let served = run(joined(), &ports, seed);
            (native.0, served.0, served.1)
        };
        let (mut native, mut served, mut by_memory) = compare();
        for _ in 0..2 {
            if native != served {
                // Somebody else on this machine may have used a port, or kept the kernel from delivering at once.
                (native, served, by_memory) = compare();
            }
        }
        in_memory += by_memory;
        if native != served {
            let same = native.lines().zip(served.lines()).take_while(|(a, b)| a == b).count();
            let part = |text: &str, from: usize, lines: usize| -> String {
                text.lines().skip(from).take(lines).collect::<Vec<_>>().join("\n")
            };
            let before = part(&native, 0, same);
            let (native, served) = (part(&native, same, 3), part(&served, same, 3));
            panic!("seed {seed}\n{before}\n--- kernel\n{native}\n--- joined\n{served}");
        }
    }
    println!("{in_memory} datagrams by memory");
    assert!(in_memory > rounds, "{in_memory} datagrams went by memory in {rounds} rounds");
}
