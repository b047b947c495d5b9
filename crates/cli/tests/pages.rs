//! What every command has: JSON, a man page, completions; and progress only for people.

mod common;

use std::collections::HashMap;
use std::process::{Command, Stdio};

use common::screen::Screen;
use common::{Place, finish, until, wait};

/// Commands that print no facts, or these in another form, and why.
const WITHOUT_JSON: [(&str, &str); 4] = [
    ("run", "becomes the program"),
    ("pcap", "writes pcapng"),
    ("completions", "prints a script"),
    ("man", "prints troff"),
];

/// The commands, as words.
fn commands() -> Vec<(String, Vec<String>, clap::Command)> {
    let all = netkernel_cli::commands().into_iter();
    all.map(|(words, command)| (words.join(" "), words, command)).collect()
}

#[test]
fn every_command_that_tells_facts_prints_json() {
    let place = Place::new("all-json");
    let config =
        place.file("nk.toml", "[[nsm]]\nname = \"kernel\"\n[[nsm]]\nname = \"own\"\nform = \"process\"\n[[tenant]]\nname = \"one\"\nusers = [\"root\"]\n");
    let config = config.to_str().unwrap();
    let usage = format!("[engine]\nusage = \"{}\"\n", place.dir.join("usage.db").display());
    std::fs::write(config, usage + &std::fs::read_to_string(config).unwrap()).unwrap();
    let engine = place.up(&["--config", config]);
    let mut cat = place.netkernel(&["run", "--", "cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    until("the guest is there", || place.run(&["ps"]).out.contains("cat"));

    // What a command needs besides --json, and a key of its answer.
    let needs: HashMap<&str, (&[&str], &str)> = HashMap::from([
        ("up", (&["--check"][..], "ok")),
        ("stacks", (&[][..], "stacks")),
        ("ps", (&[], "engines")),
        ("sockets", (&[], "sockets")),
        ("ss", (&["-a"], "sockets")),
        ("top", (&["-d", "0.1"], "guests")),
        ("explain", (&[], "guests")),
        ("catalog", (&[], "catalog")),
        ("tenants", (&[], "tenants")),
        ("tenant set", (&["one", "--weight", "3"], "tenant")),
        ("reload", (&[], "reloaded")),
        ("guest move", (&["1", "kernel"], "")),
        ("nsm restart", (&["own"], "")),
        ("nsm swap", (&["own"], "")),
        ("usage", (&[], "")),
        ("stop", (&["--guest", "1"], "ended")),
        ("doctor", (&[], "host")),
        ("bench", (&["--list"], "benchmarks")),
        ("bench micro", (&["--quick", "--rounds", "1", "--pool", "8"], "rows")),
    ]);
    let mut seen = 0;
    for (name, words, command) in commands() {
        let option = command.get_arguments().find(|option| option.get_long() == Some("json"));
        if command.is_subcommand_required_set() {
            // It only leads to its own.
            continue;
        }
        if let Some((_, why)) = WITHOUT_JSON.iter().find(|(without, _)| *without == name) {
            assert!(option.is_none() && !why.is_empty(), "{name} has --json: take it from the list");
            continue;
        }
        assert!(option.is_some(), "netkernel {name} has no --json");
        let (args, key) = match needs.get(name.as_str()) {
            Some(known) => *known,
            // Comparisons take their time. What has no list prints by the same code as `bench micro`.
            None if name.starts_with("bench ") => {
                if !command.get_arguments().any(|option| option.get_long() == Some("list")) {
                    continue;
                }
                (&["--list"][..], "benchmarks")
            }
            None => (&[][..], ""),
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let done = place.run(&[&words[..], args, &["--json"]].concat());
        let answer: serde_json::Value =
            serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("netkernel {name}: {e}: {done:?}"));
        assert!(key.is_empty() || !answer[key].is_null(), "netkernel {name}: no {key}");
        match name.as_str() {
            "tenant set" => assert_eq!(answer["tenant"]["weight"], 3),
            "usage" => assert!(answer.is_array()),
            // It says what is missing here with its exit code, too.
            "doctor" => {}
            _ => assert_eq!(done.code, Some(0), "netkernel {name}: {done:?}"),
        }
        seen += 1;
    }
    assert!(seen >= 18, "{seen}");
    drop(cat.stdin.take());
    wait(&mut cat, "cat");
    let stopped = place.run(&["stop", "--json"]).json();
    assert_eq!(stopped["ended"], "engine");
    engine.wait();
}

#[test]
fn every_command_has_a_man_page() {
    let place = Place::new("man");
    let dir = place.dir.join("man1");
    place.run(&["man", "--dir", dir.to_str().unwrap()]).succeeds();
    let mut files = std::fs::read_dir(&dir).unwrap().count();
    for (name, words, command) in commands() {
        let title = std::iter::once("netkernel").chain(words.iter().map(String::as_str)).collect::<Vec<_>>();
        let page = std::fs::read_to_string(dir.join(format!("{}.1", title.join("-")))).unwrap();
        assert!(page.contains(&format!(".TH {} 1", title.join("-"))), "{page}");
        assert!(page.contains(".SH SYNOPSIS") && page.contains(".SH DESCRIPTION"), "{name}: {page}");
        for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
            if let Some(long) = option.get_long() {
                let long = format!("\\-\\-{}", long.replace('-', "\\-"));
                assert!(page.contains(&long), "{name}: no {long} in {page}");
            }
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let printed = place.run(&[&["man"], &words[..]].concat());
        assert_eq!(printed.succeeds().out, page, "{name}");
        assert!(
            !page.contains("private-engine") && !page.contains("nsm-process"),
            "{name} shows what is hidden"
        );
        files -= 1;
    }
    assert_eq!(files, 0, "a page for each command and no more");
    place.run(&["man", "nothing"]).fails(125, &["no command 'nothing'"]);
}

/// What bash offers for the last of these words.
fn offered(place: &Place, script: &str, words: &[&str]) -> Vec<String> {
    let mut bash = Command::new("bash");
    // The function that the script registers, called as readline does.
    let ask = r#"source "$0"; f=$(complete -p netkernel); f=${f#*-F }; f=${f%% *}
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        "$f" netkernel "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; printf '%s\n' "${COMPREPLY[@]}""#;
    bash.args(["--norc", "-c", ask]).arg(place.file("completions.bash", script)).args(words);
    bash.stdin(Stdio::null());
    let done = finish(bash);
    done.succeeds().out.lines().map(str::to_owned).collect()
}

#[test]
fn shells_complete_every_command_and_nothing_hidden() {
    let place = Place::new("completions");
    let script = |shell: &str| place.run(&["completions", shell]).succeeds().out.clone();
    let scripts: Vec<(&str, String)> = ["bash", "zsh", "fish"].map(|shell| (shell, script(shell))).into();
    for (shell, script) in &scripts {
        for (_, words, _) in commands() {
            let last = words.last().map_or("netkernel", String::as_str);
            assert!(script.contains(last), "{shell}: no {last}");
        }
        let mut words = script.split(|c: char| !c.is_alphanumeric() && c != '-');
        let hidden = ["private-engine", "nsm-process", "heir", "idle-server", "isolation-load"];
        assert_eq!(words.find(|word| hidden.contains(word)), None, "{shell}");
    }
    let bash = &scripts[0].1;
    for (name, words, command) in commands() {
        let line: Vec<&str> = std::iter::once("netkernel").chain(words.iter().map(String::as_str)).collect();
        let options = offered(&place, bash, &[&line[..], &["--"]].concat());
        for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
            let Some(long) = option.get_long() else { continue };
            assert!(options.contains(&format!("--{long}")), "{name}: no --{long} among {options:?}");
        }
    }
    assert_eq!(offered(&place, bash, &["netkernel", "ex"]), ["explain"]);
    assert_eq!(offered(&place, bash, &["netkernel", "run", "--attach", "di"]), ["direct"]);
}

#[test]
fn progress_is_for_people_at_terminals() {
    let place = Place::new("progress");
    let micro = ["bench", "micro", "--quick", "--rounds", "1", "--pool", "8", "--json"];
    let piped = place.run(&micro);
    piped.json();
    // Only words of what could not be measured here.
    let drawn = |text: &str| text.contains(['\u{1b}', '\r']) || text.contains("doorbells");
    assert!(!drawn(&piped.err), "nothing in pipes: {}", piped.err);

    let at_terminal = |args: &[&str]| {
        let mut screen = Screen::of(place.netkernel(args), Some(Stdio::null()));
        assert_eq!(wait(screen.child(), "bench micro").code(), Some(0), "{}", screen.text());
        screen
    };
    let screen = at_terminal(&micro);
    screen.shows("doorbells");
    // Taken away at the end.
    screen.shows("\u{1b}[2K");
    let quiet = at_terminal(&[&micro[..], &["--quiet"]].concat());
    // What it wrote was read when what is written now is.
    quiet.write("end\n");
    quiet.shows("end");
    assert!(!drawn(&quiet.text().replace("\r\n", "\n")), "{}", quiet.text());
}
