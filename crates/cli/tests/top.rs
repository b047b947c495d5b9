//! `netkernel top`, on a pseudo-terminal and for scripts.

mod common;

use std::process::Stdio;

use common::screen::Screen;
use common::{Engine, Place, until};

/// An engine with a guest that waits.
fn served(place: &Place) -> (Engine, Engine) {
    let socket = place.socket();
    let socket = socket.to_str().unwrap();
    let engine = place.up(&["--socket", socket]);
    let mut guest = place.netkernel(&["run", "--socket", socket, "--name", "waiting", "--", "python3", "-c"]);
    guest.arg(
        "import socket, sys\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nsys.stdin.read()",
    );
    let guest = Engine::of(guest.stdin(Stdio::piped()).spawn().unwrap());
    until("the guest is there", || place.run(&["ss", "--socket", socket, "-lH"]).out.contains("LISTEN"));
    (engine, guest)
}

#[test]
fn keys_change_what_is_seen_and_the_terminal_is_given_back() {
    let place = Place::new("top");
    let (engine, guest) = served(&place);
    let socket = place.socket();
    let args = ["top", "--socket", socket.to_str().unwrap(), "--interval", "0.1"];

    let mut screen = Screen::start(&place, &args, true);
    screen.shows("waiting");
    assert!(!screen.is_cooked());
    assert!(screen.text().contains("\u{1b}[?1049h"), "a screen of its own");
    assert!(screen.text().contains("\u{1b}[38;5;") || screen.text().contains("\u{1b}[3"), "colours");
    screen.press("4");
    screen.shows("LISTEN");
    screen.press("2");
    screen.shows("kernel,");
    screen.press("h");
    screen.shows("this help");
    screen.press("h\t");
    screen.shows("ATTACHMENT");
    screen.press("q");
    screen.ended();

    // Ctrl-C, which is a key here, and signals.
    let mut screen = Screen::start(&place, &args, false);
    screen.shows("waiting");
    assert!(!screen.text().contains("\u{1b}[38;"), "no colour was wanted: {:?}", screen.text());
    screen.press("\u{3}");
    screen.ended();
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
        let screen = Screen::start(&place, &args, true);
        screen.shows("waiting");
        // SAFETY: a child that was not waited for.
        unsafe { libc::kill(screen.pid(), signal) };
        screen.ended();
    }

    // It outlives the engine, and says so.
    let mut screen = Screen::start(&place, &args, true);
    screen.shows("waiting");
    engine.end();
    screen.shows("no engine answers at");
    screen.press("q");
    screen.ended();
    drop(guest);
}

#[test]
fn scripts_get_text_and_json() {
    let place = Place::new("top-once");
    let (engine, guest) = served(&place);
    let socket = place.socket();
    let top = |args: &[&str]| {
        place.run(&[&["top", "--socket", socket.to_str().unwrap(), "-d", "0.1"], args].concat())
    };
    let text = top(&["--once"]).succeeds().out.clone();
    assert!(text.lines().next().unwrap().contains("1 guests, 1 sockets; in 0 bit/s"), "{text}");
    assert!(text.contains("waiting") && text.contains("queued"), "{text}");
    let json = top(&["--json"]).json();
    assert_eq!(json["guests"][0]["name"], "waiting");
    assert_eq!(json["sockets"][0]["state"], "LISTEN");
    assert!(json["seconds"].as_f64().unwrap() >= 0.1, "{json}");
    assert!(json["nsms"].as_array().unwrap().iter().any(|nsm| nsm["guests"] == 1), "{json}");
    top(&[]).fails(125, &["this is no terminal", "--once"]);
    place.run(&["top", "--interval", "0"]).fails(125, &["--interval 0", "0.1 to 60"]);
    drop(guest);
    engine.end();
}
