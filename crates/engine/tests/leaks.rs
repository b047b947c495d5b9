//! What is left when guests are over: nothing. One test in a process of its own, because it counts descriptors.

mod common;

use std::io::Read;
use std::net::{TcpListener, TcpStream};

use common::{Guest, WATCHDOG, open_descriptors, until};
use netkernel_engine::{Engine, EngineConfig};

fn timed(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    stream
}

#[test]
fn the_end_of_a_guest_leaves_nothing() {
    leaves_nothing(common::config());
    // With most placeholders at the keeper.
    leaves_nothing(EngineConfig { placeholders_in_main_table: Some(4), ..common::config() });
}

fn leaves_nothing(config: EngineConfig) {
    let engine = Engine::start(config).unwrap();
    let mut before = 0;
    for round in 0..3 {
        let guest = Guest::new(&engine, "kernel");
        let (listener, address) = guest.listen("127.0.0.1:0", 64);
        let streams: Vec<_> = (0..30).map(|_| timed(TcpStream::connect(address).unwrap())).collect();
        let accepted: Vec<_> = (0..10).map(|_| guest.accept(listener.id)).collect();
        // Taken from the ring by a process that dies before it sends ACCEPTED.
        let lost = guest.take_accepted(listener.id);
        assert_ne!(lost.0, 0);
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected: Vec<_> = (0..10).map(|_| guest.connect(other.local_addr().unwrap())).collect();
        assert_eq!(engine.status().guests.len(), 1);
        assert!(engine.sockets(guest.id).len() > 20);
        drop((listener, accepted, connected));
        drop(guest);
        assert!(engine.wait_idle_timeout(WATCHDOG), "round {round}: {:?}", engine.status().guests);
        for mut stream in streams {
            let mut byte = [0];
            assert!(matches!(stream.read(&mut byte), Ok(0) | Err(_)), "round {round}");
        }
        drop(other);
        if round == 0 {
            // What the engine keeps for good (the stack of the module, the keeper) exists from now on.
            before = open_descriptors();
        }
    }
    until("descriptors are back", || open_descriptors() <= before);
    assert_eq!(engine.guest_count(), 0);
}
