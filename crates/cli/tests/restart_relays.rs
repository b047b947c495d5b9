//! Relayed sockets, when the engine's program is exchanged under them.

mod common;

use common::Place;
use common::streams::{Guest, RIGHT, STREAMS, guests, restarts};
use common::until;

/// Descriptors of a process.
fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn relayed_sockets_go_on_through_ten_restarts_and_each_byte_is_metered_once() {
    let place = Place::new("restart-relay");
    let database = place.dir.join("usage.db");
    let config = place.file("nk.toml", &format!("[engine]\nusage = {database:?}\nswitch_threads = 2\n"));
    let engine = place.up(&["--config", config.to_str().unwrap()]);
    let arguments = ["--attach", "relay", "--name", "ten"];
    Guest::start(&place, &arguments, "print('up', flush=True)").line();
    until("it is over", || guests(&place) == 0);
    let before = descriptors(engine.pid());
    let mut two: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &arguments, STREAMS)).collect();
    two.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
    for _ in 0..10 {
        let told = place.run(&["restart", "--json"]).json();
        assert_eq!((&told["guests"], &told["lost"]), (&2.into(), &serde_json::json!([])), "{told}");
    }
    let mut payload = 0;
    for guest in &mut two {
        guest.tell();
        let said = guest.line();
        let bytes = said.strip_prefix(RIGHT).unwrap_or_else(|| panic!("{said}"));
        payload += bytes.parse::<u64>().unwrap() + 5 + 4 + 4 + 5 + 1 + 3;
    }
    two.into_iter().for_each(Guest::ends);
    until("they are over", || guests(&place) == 0);
    let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
    let row = &usage.as_array().or_else(|| usage["rows"].as_array()).unwrap()[0];
    assert_eq!((&row["bytes_in"], &row["bytes_out"]), (&payload.into(), &payload.into()), "{usage}");
    assert_eq!(restarts(&place), 10);
    until("nothing is left open", || descriptors(engine.pid()) <= before);
    engine.end();
}
