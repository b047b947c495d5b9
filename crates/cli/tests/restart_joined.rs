//! Connections in memory, when the engine's program is exchanged under them.

mod common;

use common::streams::{Guest, RIGHT, STREAMS, guests, restarts};
use common::{Place, until};

/// Both ends in one guest, on one thread: pairs of queues, or links that the engine copies; and of relays.
#[test]
fn connections_within_a_guest_go_on_through_ten_restarts_and_each_byte_is_metered_once() {
    for (name, pair, attach, both) in
        [("pairs", true, "auto", true), ("links", false, "auto", false), ("relays", true, "relay", false)]
    {
        let place = Place::new(&format!("restart-joined-{name}"));
        let database = place.dir.join("usage.db");
        let text = format!(
            "[engine]\nusage = {database:?}\nswitch_threads = 2\n[[nsm]]\nname = \"joined\"\nstack = \"shm\"\npair = {pair}\n"
        );
        let config = place.file("nk.toml", &text);
        let engine = place.up(&["--config", config.to_str().unwrap()]);
        let arguments = ["--attach", attach, "--name", "ten"];
        let mut two: Vec<Guest> = (0..2).map(|_| Guest::start(&place, &arguments, STREAMS)).collect();
        two.iter().for_each(|guest| assert_eq!(guest.line(), "up"));
        let explained = place.run(&["explain"]).out;
        assert_eq!(explained.contains("in memory that both map"), both, "{explained}");
        for _ in 0..10 {
            let told = place.run(&["restart", "--json"]).json();
            assert_eq!((&told["guests"], &told["lost"]), (&2.into(), &serde_json::json!([])), "{told}");
        }
        let mut payload = 0;
        for guest in &mut two {
            guest.tell();
            let said = guest.line();
            let bytes = said.strip_prefix(RIGHT).unwrap_or_else(|| panic!("{name}: {said}"));
            payload += bytes.parse::<u64>().unwrap() + 5 + 4 + 4 + 5 + 1 + 3;
        }
        two.into_iter().for_each(Guest::ends);
        until("they are over", || guests(&place) == 0);
        let usage = place.run(&["usage", "--by", "guest", "--format", "json"]).json();
        let row = &usage.as_array().or_else(|| usage["rows"].as_array()).unwrap()[0];
        assert_eq!(
            (&row["bytes_in"], &row["bytes_out"]),
            (&payload.into(), &payload.into()),
            "{name} {usage}"
        );
        assert_eq!(restarts(&place), 10);
        engine.end();
    }
}
