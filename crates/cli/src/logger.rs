//! The log of engines, on standard error: a line of text or a JSON object for each record. `--log-level` and `--log-format`
//! of `netkernel up`, or `$NETKERNEL_LOG` and `$NETKERNEL_LOG_FORMAT`, which private engines and processes of NSMs read. Where
//! standard error is systemd's journal, each line begins with its priority (sd-daemon(3)), which the journal takes off.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::str::FromStr;
use std::sync::OnceLock;

use jiff::Timestamp;
use log::kv::{self, Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde_json::{Map, json};

use crate::args::{LogArgs, LogFormat};
use crate::show::printable;
use crate::sys;

const LEVELS: &str = "NETKERNEL_LOG";
const FORMAT: &str = "NETKERNEL_LOG_FORMAT";

/// What is logged: a level, and others for some targets (crates or their modules), such as `info,netkernel_agent=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Levels {
    /// As it was written.
    text: String,
    all: LevelFilter,
    /// The longest target first.
    targets: Vec<(String, LevelFilter)>,
}

impl Levels {
    fn of(&self, target: &str) -> LevelFilter {
        let is_in = |module: &str| {
            target.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        self.targets.iter().find(|(module, _)| is_in(module)).map_or(self.all, |(_, level)| *level)
    }

    fn most(&self) -> LevelFilter {
        self.targets.iter().map(|(_, level)| *level).fold(self.all, std::cmp::max)
    }
}

impl From<LevelFilter> for Levels {
    fn from(level: LevelFilter) -> Levels {
        Levels { text: level.to_string().to_lowercase(), all: level, targets: Vec::new() }
    }
}

impl FromStr for Levels {
    type Err = String;

    fn from_str(text: &str) -> Result<Levels, String> {
        let level = |word: &str| {
            let unknown = "is no level; use off, error, warn, info, debug or trace";
            word.trim().parse::<LevelFilter>().map_err(|_| format!("'{word}' {unknown}"))
        };
        let mut levels = Levels { text: text.to_owned(), ..LevelFilter::Info.into() };
        for part in text.split(',') {
            match part.split_once('=') {
                None => levels.all = level(part)?,
                Some((target, word)) => levels.targets.push((target.trim().to_owned(), level(word)?)),
            }
        }
        levels.targets.sort_by_key(|(target, _)| std::cmp::Reverse(target.len()));
        Ok(levels)
    }
}

struct Logger {
    levels: Levels,
    format: LogFormat,
    /// What each line begins with.
    priority: fn(Level) -> &'static str,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.levels.of(metadata.target())
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = match self.format {
                LogFormat::Text => text(record),
                LogFormat::Json => json(record, Timestamp::now()),
            };
            say(&format!("{}{line}", (self.priority)(record.level())));
        }
    }

    fn flush(&self) {}
}

/// In one write, so that lines of several threads do not mix. Nobody may read it.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Why the command ends, on standard error.
pub fn fatal(error: &anyhow::Error) {
    if is_json() {
        log::error!("{error:#}");
    } else {
        say(&format!("{}netkernel: {error:#}\n", priorities()(Level::Error)));
    }
}

/// What lines on standard error begin with.
fn priorities() -> fn(Level) -> &'static str {
    if is_journal() { journal_priority } else { |_| "" }
}

/// Whether standard error is the stream to systemd's journal that the environment names (systemd.exec(5)), and nothing else by now.
fn is_journal() -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let here = std::io::stderr().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    here.is_ok_and(|here| named == format!("{}:{}", here.dev(), here.ino()))
}

/// Those of syslog(3).
fn journal_priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

fn name(level: Level) -> String {
    level.as_str().to_lowercase()
}

fn text(record: &Record<'_>) -> String {
    // Names come from guests: none may look like a line of its own.
    format!("netkernel: {}: {}\n", name(record.level()), printable(&record.args().to_string()))
}

fn json(record: &Record<'_>, now: Timestamp) -> String {
    let mut object = json!({
        "time": format!("{now:.6}"),
        "level": name(record.level()),
        "target": record.target(),
        "pid": std::process::id(),
        "message": record.args().to_string(),
    });
    let mut fields = Fields(Map::new());
    // It never fails.
    let _ = record.key_values().visit(&mut fields);
    if !fields.0.is_empty() {
        object["fields"] = fields.0.into();
    }
    format!("{object}\n")
}

struct Fields(Map<String, serde_json::Value>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let value = if let Some(number) = value.to_u64() {
            number.into()
        } else if let Some(number) = value.to_i64() {
            number.into()
        } else if let Some(number) = value.to_f64() {
            number.into()
        } else if let Some(truth) = value.to_bool() {
            truth.into()
        } else {
            value.to_string().into()
        };
        self.0.insert(key.as_str().to_owned(), value);
        Ok(())
    }
}

/// The log of an engine with options. To be called before there are threads: processes that the engine starts inherit the
/// choice by the environment.
pub fn start(args: &LogArgs) {
    let levels = args.log_level.clone().unwrap_or_else(|| LevelFilter::Info.into());
    let format = match args.log_format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    sys::set_environment(LEVELS, &levels.text);
    sys::set_environment(FORMAT, format);
    install(levels, args.log_format);
}

/// The log of a process that has no options for it.
pub fn start_inherited(level: LevelFilter) {
    let of = |name| std::env::var(name).ok();
    let levels = of(LEVELS).and_then(|text| text.parse().ok()).unwrap_or_else(|| level.into());
    let json = of(FORMAT).is_some_and(|text| text.eq_ignore_ascii_case("json"));
    install(levels, if json { LogFormat::Json } else { LogFormat::Text });
}

fn install(levels: Levels, format: LogFormat) {
    let most = levels.most();
    let priority = priorities();
    if log::set_logger(LOGGER.get_or_init(|| Logger { levels, format, priority })).is_ok() {
        log::set_max_level(most);
        if format == LogFormat::Json || !priority(Level::Error).is_empty() {
            std::panic::set_hook(Box::new(|panic| {
                let thread = std::thread::current();
                log::error!(thread = thread.name().unwrap_or("-"); "{panic}");
            }));
        }
    }
}

/// All that is said on standard error is to be JSON.
pub fn is_json() -> bool {
    LOGGER.get().is_some_and(|logger| logger.format == LogFormat::Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_for_all_or_for_targets() {
        let levels: Levels = "warn,netkernel_engine=debug,netkernel_engine::heir=off".parse().unwrap();
        let of = |target| levels.of(target);
        assert_eq!(of("netkernel_agent::agent"), LevelFilter::Warn);
        assert_eq!(of("netkernel_engine"), LevelFilter::Debug);
        assert_eq!(of("netkernel_engine::worker"), LevelFilter::Debug);
        assert_eq!(of("netkernel_engine::heir"), LevelFilter::Off);
        assert_eq!(of("netkernel_engineering"), LevelFilter::Warn);
        assert_eq!(levels.most(), LevelFilter::Debug);
        assert_eq!("INFO".parse::<Levels>().unwrap().of("x"), LevelFilter::Info);
        for bad in ["", "loud", "info,", "x=loud", "info,x"] {
            assert!(bad.parse::<Levels>().unwrap_err().contains("is no level"), "{bad}");
        }
    }

    #[test]
    fn a_record_is_one_object_whatever_is_in_it() {
        let fields: [(&str, Value<'_>); 4] = [
            ("guest", 7u32.into()),
            ("name", "a\n\"b".into()),
            ("left", (-3i32).into()),
            ("on", true.into()),
        ];
        let record = |args: std::fmt::Arguments<'_>, fields: &[(&str, Value<'_>)]| {
            let record = Record::builder()
                .level(Level::Warn)
                .target("netkernel_engine::worker")
                .args(args)
                .key_values(&fields)
                .build();
            (json(&record, Timestamp::from_second(1).unwrap()), text(&record))
        };
        let (line, text) = record(format_args!("guest \"{}\"\nis over", "\u{1b}x"), &fields);
        assert_eq!(line.matches('\n').count(), 1);
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["time"], "1970-01-01T00:00:01.000000Z");
        assert_eq!(
            (&object["level"], &object["target"]),
            (&"warn".into(), &"netkernel_engine::worker".into())
        );
        assert_eq!(object["message"], "guest \"\u{1b}x\"\nis over");
        assert_eq!(object["fields"], json!({ "guest": 7, "name": "a\n\"b", "left": -3, "on": true }));
        assert_eq!(text, "netkernel: warn: guest \"?x\"?is over\n");
        let (line, _) = record(format_args!("x"), &[]);
        assert!(!line.contains("fields"), "{line}");
    }
}
