//! The configuration file. `docs/netkernel.example.toml` documents each key; a test parses it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use netkernel_control::TlsListener;
use netkernel_engine::{Capacity, NsmConfig, Rates, Recognise, TenantConfig};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor};
use toml::Spanned;

use crate::sys;
use crate::units::Rate;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where it was read.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    #[serde(default)]
    pub engine: EngineSection,
    /// Empty: the built-in catalogue.
    #[serde(default, rename = "nsm")]
    pub nsms: Vec<NsmSection>,
    #[serde(default, rename = "tenant")]
    pub tenants: Vec<TenantSection>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSection {
    pub socket: Option<PathBuf>,
    pub switch_threads: Option<Spanned<usize>>,
    pub placement: Option<netkernel_engine::Placement>,
    pub spin_us: Option<Spanned<u32>>,
    pub huge_pages: Option<HugePages>,
    pub region_bytes: Option<Spanned<Bytes>>,
    pub max_guests: Option<Spanned<usize>>,
    /// Where usage is kept; without it, it is not.
    pub usage: Option<PathBuf>,
    /// Tenants, and stacks, that /metrics tells apart.
    pub metrics_labels: Option<usize>,
    /// Address and port that the control API listens at, with TLS.
    pub listen: Option<Spanned<std::net::SocketAddr>>,
    /// PEM.
    pub tls_certificate: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// A file with the provider's token.
    pub provider_token_file: Option<PathBuf>,
    /// Who belongs to no [[tenant]] gets no guest.
    #[serde(default)]
    pub strict_tenants: bool,
    /// Names or numbers of users; "*" is everybody.
    #[serde(default)]
    pub allow_users: Vec<Spanned<User>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NsmSection {
    pub name: Spanned<String>,
    pub stack: Option<Spanned<String>>,
    pub form: Option<netkernel_engine::Form>,
    pub congestion_control: Option<Spanned<String>>,
    pub netns: Option<Spanned<String>>,
    pub congestion_policy: Option<netkernel_engine::Policy>,
    pub attach: Option<netkernel_engine::Attach>,
    pub pacing: Option<Rate>,
    pub mark: Option<u32>,
    pub tap: Option<Spanned<String>>,
    pub addresses: Option<Spanned<Vec<String>>>,
    pub gateways: Option<Spanned<Vec<String>>>,
    pub mtu: Option<Spanned<u16>>,
    pub memory: Option<bool>,
    #[serde(default)]
    pub memory_allow: Vec<Spanned<User>>,
    /// Guests of one tenant map the memory that their connections stand in.
    pub pair: Option<bool>,
    /// These guests trust each other: a large write takes one copy.
    pub single_copy: Option<Spanned<bool>>,
    /// What it can carry in each direction.
    pub capacity: Option<Spanned<Rate>>,
    pub capacity_operations: Option<Spanned<u64>>,
    pub capacity_connections: Option<Spanned<u64>>,
    /// Cores that the provider reckons with.
    pub cores: Option<Spanned<f64>>,
    pub price_per_hour: Option<Spanned<f64>>,
    pub price_per_gb: Option<Spanned<f64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantSection {
    pub name: Spanned<String>,
    #[serde(default)]
    pub users: Vec<Spanned<User>>,
    #[serde(default)]
    pub cgroups: Vec<String>,
    #[serde(default)]
    pub netns: Vec<String>,
    /// A file with the token.
    pub token_file: Option<Spanned<PathBuf>>,
    #[serde(default)]
    pub nsms: Vec<Spanned<String>>,
    pub guaranteed_send: Option<Spanned<Rate>>,
    pub max_send: Option<Rate>,
    pub guaranteed_receive: Option<Spanned<Rate>>,
    pub max_receive: Option<Rate>,
    pub guaranteed_operations: Option<Spanned<u64>>,
    pub max_operations: Option<Spanned<u64>>,
    pub guaranteed_connections: Option<Spanned<u64>>,
    pub max_connections: Option<u64>,
    pub max_guests: Option<u64>,
    pub region_bytes: Option<Spanned<Bytes>>,
    pub weight: Option<Spanned<u32>>,
    /// Tenants whose guests may be joined in memory with this one's listeners and datagram sockets; `*` is everybody.
    #[serde(default)]
    pub memory_allow: Vec<Spanned<String>>,
}

impl NsmSection {
    pub fn capacity(&self) -> Capacity {
        Capacity {
            rate: self.capacity.as_ref().map(|rate| rate.get_ref().0),
            operations: self.capacity_operations.as_ref().map(|n| *n.get_ref()),
            connections: self.capacity_connections.as_ref().map(|n| *n.get_ref()),
        }
    }

    fn start_of(&self, key: &str) -> Option<usize> {
        match key {
            "capacity" => self.capacity.as_ref().map(|value| value.span().start),
            "capacity_operations" => self.capacity_operations.as_ref().map(|value| value.span().start),
            "capacity_connections" => self.capacity_connections.as_ref().map(|value| value.span().start),
            "name" => Some(self.name.span().start),
            _ => None,
        }
    }
}

impl TenantSection {
    /// What it may do, without how it is recognised.
    fn rights(&self) -> TenantConfig {
        let rates = |guaranteed: &Option<Spanned<Rate>>, most: Option<Rate>| Rates {
            guaranteed: guaranteed.as_ref().map_or(0, |rate| rate.get_ref().0),
            most: most.map(|rate| rate.0),
        };
        let number = |value: &Option<Spanned<u64>>| value.as_ref().map(|n| *n.get_ref());
        TenantConfig {
            nsms: self.nsms.iter().map(|nsm| nsm.get_ref().clone()).collect(),
            send: rates(&self.guaranteed_send, self.max_send),
            receive: rates(&self.guaranteed_receive, self.max_receive),
            guaranteed_operations: number(&self.guaranteed_operations).unwrap_or(0),
            operations: number(&self.max_operations),
            guaranteed_connections: number(&self.guaranteed_connections).unwrap_or(0),
            connections: self.max_connections,
            guests: self.max_guests,
            region_bytes: self.region_bytes.as_ref().map(|n| n.get_ref().0),
            weight: self.weight.as_ref().map_or(1, |n| *n.get_ref()),
            ..TenantConfig::new(self.name.get_ref())
        }
    }

    fn start_of(&self, key: &str) -> Option<usize> {
        match key {
            "nsms" => self.nsms.first().map(|value| value.span().start),
            "guaranteed_send" => self.guaranteed_send.as_ref().map(|value| value.span().start),
            "guaranteed_receive" => self.guaranteed_receive.as_ref().map(|value| value.span().start),
            "guaranteed_operations" => self.guaranteed_operations.as_ref().map(|value| value.span().start),
            "guaranteed_connections" => self.guaranteed_connections.as_ref().map(|value| value.span().start),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    #[default]
    Auto,
    On,
    Off,
}

/// A number of bytes: an integer, or text such as "1GiB".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// A user's name or number.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum User {
    Number(u32),
    Name(String),
}

/// Who may create guests besides the engine's user and root.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Users {
    pub list: Vec<u32>,
    pub everybody: bool,
}

const REGION_BYTES: std::ops::RangeInclusive<u64> = (64 << 20)..=(64 << 30);

impl Config {
    pub fn read(path: &Path) -> Result<Config> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            anyhow!(
                "cannot read the configuration {}: {e}; give the right path with --config",
                path.display()
            )
        })?;
        let config = Config::parse(path, &text)?;
        // `reload` reads it again, wherever the process is then.
        Ok(Config { file: std::path::absolute(path).ok(), ..config })
    }

    pub fn parse(path: &Path, text: &str) -> Result<Config> {
        let config: Config = toml::from_str(text).map_err(|e| {
            let at = Place::of(path, text, e.span().map(|s| s.start));
            anyhow!("{at}: {}", explain(e.message()))
        })?;
        config.check(path, text)?;
        Ok(config)
    }

    /// What types cannot say.
    fn check(&self, path: &Path, text: &str) -> Result<()> {
        let at = |start: usize| Place::of(path, text, Some(start));
        let engine = &self.engine;
        if let Some(n) = &engine.switch_threads
            && !(1..=64).contains(n.get_ref())
        {
            bail!("{}: {} is out of range; use 1 to 64", at(n.span().start), n.get_ref());
        }
        if let Some(n) = &engine.spin_us
            && *n.get_ref() > 1_000_000
        {
            bail!("{}: {} is more than a second; use 0 to 1000000", at(n.span().start), n.get_ref());
        }
        if let Some(n) = &engine.max_guests
            && !(1..=65536).contains(n.get_ref())
        {
            bail!("{}: {} is out of range; use 1 to 65536", at(n.span().start), n.get_ref());
        }
        if let Some(n) = &engine.region_bytes
            && !REGION_BYTES.contains(&n.get_ref().0)
        {
            bail!("{}: a region is 64MiB to 64GiB large", at(n.span().start));
        }
        if let Some(listen) = &engine.listen {
            let at = at(listen.span().start);
            if engine.tls_certificate.is_none() || engine.tls_key.is_none() {
                bail!(
                    "{at}: the control API is served over TCP with TLS only: set `tls_certificate` and `tls_key`"
                );
            }
            if engine.provider_token_file.is_none() && self.tenants.iter().all(|t| t.token_file.is_none()) {
                bail!(
                    "{at}: over TCP who asks is told by tokens only, and there is none: set `provider_token_file`, or `token_file` of a [[tenant]]"
                );
            }
        }
        self.users_at(path, text)?;
        for nsm in &self.nsms {
            resolve(&nsm.memory_allow, path, text)?;
        }
        self.check_tenants(path, text)?;
        self.check_promises(path, text)?;
        for (i, nsm) in self.nsms.iter().enumerate() {
            let name = nsm.name.get_ref();
            if !is_name(name) {
                bail!(
                    "{}: '{name}' is no name for a stack; use 1 to 32 letters, digits, '-', '_' and '.'",
                    at(nsm.name.span().start)
                );
            }
            if self.nsms[..i].iter().any(|other| other.name.get_ref() == name) {
                bail!("{}: there are two stacks named '{name}'; rename one", at(nsm.name.span().start));
            }
            if let Some(stack) = &nsm.stack
                && !["kernel", "shm", "smoltcp"].contains(&stack.get_ref().as_str())
            {
                bail!(
                    "{}: there is no stack '{}'; use \"kernel\", \"shm\" or \"smoltcp\"",
                    at(stack.span().start),
                    stack.get_ref()
                );
            }
            if let Err((start, error)) = crate::smoltcp::config(nsm) {
                bail!("{}: {error}", at(start));
            }
            let joins = nsm.memory == Some(true) || nsm.stack.as_ref().is_some_and(|s| s.get_ref() == "shm");
            if let Some(single_copy) = &nsm.single_copy
                && *single_copy.get_ref()
                && (!joins || nsm.pair == Some(false))
            {
                bail!(
                    "{}: there is no memory that guests share: set `memory = true`, and not `pair = false`",
                    at(single_copy.span().start)
                );
            }
            if let Some(cc) = &nsm.congestion_control
                && (cc.get_ref().is_empty() || cc.get_ref().len() > 15)
            {
                bail!("{}: a congestion control's name has 1 to 15 letters", at(cc.span().start));
            }
            for price in [&nsm.price_per_hour, &nsm.price_per_gb].into_iter().flatten() {
                if !(0.0..1e9).contains(price.get_ref()) {
                    bail!(
                        "{}: a price is a number from 0 on, in the currency of your choice",
                        at(price.span().start)
                    );
                }
            }
        }
        Ok(())
    }

    fn check_tenants(&self, path: &Path, text: &str) -> Result<()> {
        let at = |start: usize| Place::of(path, text, Some(start));
        for (i, tenant) in self.tenants.iter().enumerate() {
            let name = tenant.name.get_ref();
            let start = tenant.name.span().start;
            if !is_name(name) || name == netkernel_engine::OTHERS {
                bail!(
                    "{}: '{name}' is no name for a tenant; use 1 to 32 letters, digits, '-', '_' and '.', and not '{}', which is everybody else",
                    at(start),
                    netkernel_engine::OTHERS
                );
            }
            if self.tenants[..i].iter().any(|other| other.name.get_ref() == name) {
                bail!("{}: there are two tenants named '{name}'; rename one", at(start));
            }
            if tenant.users.is_empty()
                && tenant.cgroups.is_empty()
                && tenant.netns.is_empty()
                && tenant.token_file.is_none()
            {
                bail!(
                    "{}: tenant '{name}' cannot be recognised; give it users, cgroups, netns or token_file",
                    at(start)
                );
            }
            resolve(&tenant.users, path, text)?;
            for nsm in &tenant.nsms {
                if !self.nsms.iter().any(|other| other.name.get_ref() == nsm.get_ref()) {
                    bail!(
                        "{}: tenant '{name}' may use '{}', but there is no such [[nsm]]",
                        at(nsm.span().start),
                        nsm.get_ref()
                    );
                }
            }
            for other in tenant.memory_allow.iter().filter(|other| *other.get_ref() != "*") {
                if !self.tenants.iter().any(|tenant| tenant.name.get_ref() == other.get_ref()) {
                    bail!(
                        "{}: there is no [[tenant]] '{}'; use \"*\" for everybody",
                        at(other.span().start),
                        other.get_ref()
                    );
                }
            }
            if let Some(weight) = &tenant.weight
                && !(1..=10_000).contains(weight.get_ref())
            {
                bail!("{}: a weight is 1 to 10000", at(weight.span().start));
            }
            if let Some(n) = &tenant.max_operations
                && *n.get_ref() == 0
            {
                bail!("{}: 0 operations are none; leave the key out for no limit", at(n.span().start));
            }
            if let Some(n) = &tenant.region_bytes
                && !REGION_BYTES.contains(&n.get_ref().0)
            {
                bail!("{}: a region is 64MiB to 64GiB large", at(n.span().start));
            }
        }
        Ok(())
    }

    /// Promises that cannot be kept, where they stand.
    fn check_promises(&self, path: &Path, text: &str) -> Result<()> {
        let tenants: Vec<TenantConfig> = self.tenants.iter().map(TenantSection::rights).collect();
        let nsms: Vec<NsmConfig> = self
            .nsms
            .iter()
            .map(|nsm| NsmConfig {
                capacity: nsm.capacity(),
                form: nsm.form.unwrap_or_default(),
                ..NsmConfig::kernel(nsm.name.get_ref(), None)
            })
            .collect();
        if nsms.is_empty() {
            return Ok(());
        }
        let Err(unkept) = netkernel_engine::admit(tenants.iter(), &nsms) else { return Ok(()) };
        let tenant = self.tenants.iter().find(|tenant| Some(tenant.name.get_ref()) == unkept.tenant.as_ref());
        let nsm = self.nsms.iter().find(|nsm| Some(nsm.name.get_ref()) == unkept.nsm.as_ref());
        let start = tenant.and_then(|t| t.start_of(unkept.key)).or(nsm.and_then(|n| n.start_of(unkept.key)));
        bail!("{}: {}", Place::of(path, text, start), unkept.why)
    }

    /// Which tenants let others in, in memory.
    pub fn memory_tenants(&self) -> HashMap<String, Vec<String>> {
        let names = |list: &[Spanned<String>]| list.iter().map(|name| name.get_ref().clone()).collect();
        let some = self.tenants.iter().filter(|tenant| !tenant.memory_allow.is_empty());
        some.map(|tenant| (tenant.name.get_ref().clone(), names(&tenant.memory_allow))).collect()
    }

    /// Tenants as the engine knows them. Reads their tokens.
    pub fn tenants(&self) -> Result<Vec<TenantConfig>> {
        let one = |section: &TenantSection| -> Result<TenantConfig> {
            let token = match &section.token_file {
                Some(file) => Some(read_token(file.get_ref())?),
                None => None,
            };
            let users = resolve(&section.users, Path::new("configuration"), "")?;
            let recognise = Recognise {
                users: users.list,
                cgroups: section.cgroups.clone(),
                netns: section.netns.clone(),
                token,
            };
            Ok(TenantConfig { recognise, ..section.rights() })
        };
        let tenants: Vec<TenantConfig> = self.tenants.iter().map(one).collect::<Result<_>>()?;
        let mut known: HashMap<&str, &str> = HashMap::new();
        for tenant in &tenants {
            let Some(token) = &tenant.recognise.token else { continue };
            if let Some(other) = known.insert(token, &tenant.name) {
                bail!("tenants '{other}' and '{}' have the same token: give each its own", tenant.name);
            }
        }
        Ok(tenants)
    }

    /// Whoever shows it is the provider. No tenant may have the same.
    pub fn provider_token(&self) -> Result<Option<String>> {
        let Some(file) = &self.engine.provider_token_file else { return Ok(None) };
        let token = read_token(file)?;
        if let Some(tenant) = self.tenants()?.iter().find(|t| t.recognise.token.as_ref() == Some(&token)) {
            bail!("the provider and tenant '{}' have the same token: give each its own", tenant.name);
        }
        Ok(Some(token))
    }

    /// Listens where the configuration says.
    pub fn listen(&self) -> Result<Option<TlsListener>> {
        let EngineSection {
            listen: Some(at), tls_certificate: Some(certificate), tls_key: Some(key), ..
        } = &self.engine
        else {
            return Ok(None);
        };
        Ok(Some(TlsListener::bind(*at.get_ref(), certificate, key)?))
    }

    /// Resolves `allow_users`.
    pub fn users(&self) -> Result<Users> {
        self.users_at(Path::new("configuration"), "")
    }

    /// Tenants' users are allowed too.
    fn users_at(&self, path: &Path, text: &str) -> Result<Users> {
        let mut users = resolve(&self.engine.allow_users, path, text)?;
        for tenant in &self.tenants {
            users.list.extend(resolve(&tenant.users, path, text)?.list);
            // These are not known by their user: the engine asks for the rest.
            users.everybody |=
                tenant.token_file.is_some() || !tenant.cgroups.is_empty() || !tenant.netns.is_empty();
        }
        Ok(users)
    }
}

impl NsmSection {
    /// Resolves `memory_allow`.
    pub fn memory_users(&self) -> Result<Users> {
        resolve(&self.memory_allow, Path::new("configuration"), "")
    }
}

fn resolve(users: &[Spanned<User>], path: &Path, text: &str) -> Result<Users> {
    let mut found = Users::default();
    for user in users {
        match user.get_ref() {
            User::Number(uid) => found.list.push(*uid),
            User::Name(name) if name == "*" => found.everybody = true,
            User::Name(name) => {
                let uid = name.parse().ok().or_else(|| sys::uid_of(name)).ok_or_else(|| {
                    let at = Place::of(path, text, Some(user.span().start));
                    anyhow!("{at}: there is no user '{name}' on this host; use a name, a number, or \"*\" for everybody")
                })?;
                found.list.push(uid);
            }
        }
    }
    Ok(found)
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 32
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// The first line of a file that nobody else can read.
pub fn read_token(path: &Path) -> Result<String> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| anyhow!("cannot read the token in {shown}: {e}"))?;
    let token = text.lines().next().unwrap_or_default().trim();
    if token.len() < 16 {
        bail!(
            "the token in {shown} is too short to be secret: use 16 characters or more, such as those of `openssl rand -hex 16`"
        );
    }
    Ok(token.to_owned())
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        struct BytesVisitor;
        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes such as 268435456, \"256MiB\" or \"1GiB\"")
            }

            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Bytes, E> {
                u64::try_from(n)
                    .map(Bytes)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(n), &self))
            }

            fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Bytes, E> {
                Ok(Bytes(n))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Bytes, E> {
                parse_bytes(text)
                    .map(Bytes)
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(BytesVisitor).map_err(D::Error::custom)
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(unit)
}

/// Where in a file, for messages: the line and the key that it sets.
struct Place {
    file: String,
    line: Option<usize>,
    key: Option<String>,
}

impl Place {
    fn of(path: &Path, text: &str, offset: Option<usize>) -> Place {
        let file = path.display().to_string();
        let Some(offset) = offset.filter(|&o| o <= text.len() && !text.is_empty()) else {
            return Place { file, line: None, key: None };
        };
        let before = &text.as_bytes()[..offset];
        let line = before.iter().filter(|&&b| b == b'\n').count();
        let text = text.lines().nth(line).unwrap_or("");
        let key = text.split_once('=').map(|(key, _)| key.trim().to_owned()).filter(|k| !k.is_empty());
        Place { file, line: Some(line + 1), key }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ", key '{key}'")?;
        }
        Ok(())
    }
}

/// The parser's words with what to do.
fn explain(message: &str) -> String {
    let message = message.trim().replace('\n', "; ");
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let (key, expected) = rest.split_once(", expected ").unwrap_or((rest, ""));
        let known = expected.trim_start_matches("one of ").replace('`', "");
        return format!("unknown key {}; remove it, or use one of: {known}", key.replace('`', "'"));
    }
    if let Some(key) = message.strip_prefix("missing field ") {
        return format!("the key {} is missing; add it", key.replace('`', "'"));
    }
    format!("{}; docs/netkernel.example.toml shows each key", message.replace('`', "'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(Path::new("nk.toml"), text).unwrap_err())
    }

    #[test]
    fn promises_that_cannot_be_kept_point_at_their_key() {
        let nsm = "[[nsm]]\nname = \"a\"\ncapacity = \"1 Gbit/s\"\ncapacity_operations = 1000\ncapacity_connections = 10\n";
        let tenant =
            |name: &str, rights: &str| format!("[[tenant]]\nname = \"{name}\"\nusers = [1]\n{rights}\n");
        let error = |rights: [&str; 2]| {
            let text = format!("{nsm}{}{}", tenant("x", rights[0]), tenant("y", rights[1]));
            Config::parse(Path::new("f.toml"), &text).unwrap_err().to_string()
        };
        for (key, line, kept, arithmetic) in [
            ("capacity", 3, "guaranteed_send = \"600 Mbit/s\"", "x 600 Mbit/s + y 600 Mbit/s = 1.2 Gbit/s"),
            ("capacity_operations", 4, "guaranteed_operations = 501", "= 1002 operations/s"),
            (
                "capacity_connections",
                5,
                "guaranteed_connections = 6",
                "x 6 connections + y 6 connections = 12",
            ),
        ] {
            let error = error([kept, kept]);
            let place = format!("f.toml, line {line}, key '{key}'");
            assert!(error.starts_with(&place) && error.contains(arithmetic), "{error}");
        }
        let error = error(["", "guaranteed_operations = 6\nmax_operations = 5"]);
        assert!(error.starts_with("f.toml, line 13, key 'guaranteed_operations'"), "{error}");
        let fits =
            format!("{nsm}{}", tenant("x", "guaranteed_operations = 1000\nguaranteed_connections = 10"));
        assert!(Config::parse(Path::new("f.toml"), &fits).is_ok());
    }

    #[test]
    fn there_are_places_for_so_many_processes() {
        let one = |i: usize| format!("[[nsm]]\nname = \"p{i}\"\nform = \"process\"\n");
        let most: String = (0..63).map(one).collect();
        assert!(Config::parse(Path::new("f.toml"), &format!("{most}[[nsm]]\nname = \"e\"\n")).is_ok());
        let error = Config::parse(Path::new("f.toml"), &(most + &one(63))).unwrap_err().to_string();
        assert!(error.starts_with("f.toml, line 191") && error.contains("at most 63 stacks"), "{error}");
    }

    #[test]
    fn a_thousand_tenants_in_one_file() {
        let mut text = "[[nsm]]\nname = \"a\"\ncapacity = \"10 Gbit/s\"\n".to_owned();
        for i in 0..1000 {
            text += &format!("[[tenant]]\nname = \"t{i}\"\nusers = [{i}]\nguaranteed_send = \"10 Mbit/s\"\n");
        }
        let config = Config::parse(Path::new("f.toml"), &text).unwrap();
        assert_eq!(config.tenants().unwrap().len(), 1000);
        text += "[[tenant]]\nname = \"more\"\nusers = [5]\nguaranteed_send = \"1 Mbit/s\"\n";
        let error = Config::parse(Path::new("f.toml"), &text).unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains(" + 991 more ") && error.len() < 1000, "{error}");
    }

    #[test]
    fn the_example_parses_and_names_every_key() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/netkernel.example.toml");
        let text = std::fs::read_to_string(path).unwrap();
        let config = Config::parse(Path::new(path), &text).unwrap();
        assert!(!config.nsms.is_empty());
        // Every key stands in the file, live or as a comment that parses once the mark is taken away.
        let live: String = text
            .lines()
            .map(|line| match line.strip_prefix("# ").or_else(|| line.strip_prefix('#')) {
                Some(rest) if rest.contains(" = ") && rest.starts_with(|c: char| c.is_ascii_lowercase()) => {
                    rest
                }
                _ => line,
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let config = Config::parse(Path::new(path), &live).unwrap();
        let engine = config.engine;
        assert!(engine.socket.is_some() && engine.switch_threads.is_some() && engine.spin_us.is_some());
        assert!(engine.huge_pages.is_some() && engine.region_bytes.is_some() && engine.max_guests.is_some());
        assert!(!engine.allow_users.is_empty() && engine.usage.is_some());
        let [a, ..] = &config.tenants[..] else { panic!("a tenant") };
        assert!(!a.users.is_empty() && !a.cgroups.is_empty() && !a.netns.is_empty() && !a.nsms.is_empty());
        assert!(a.token_file.is_some() && a.weight.is_some() && a.region_bytes.is_some());
        assert!(a.guaranteed_send.is_some() && a.max_send.is_some());
        assert!(a.guaranteed_receive.is_some() && a.max_receive.is_some());
        assert!(a.max_operations.is_some() && a.max_connections.is_some() && a.max_guests.is_some());
        for has in [
            |n: &NsmSection| n.netns.is_some(),
            |n: &NsmSection| n.congestion_policy.is_some(),
            |n: &NsmSection| n.attach.is_some(),
            |n: &NsmSection| n.pacing.is_some(),
            |n: &NsmSection| n.mark.is_some(),
            |n: &NsmSection| n.tap.is_some() && n.addresses.is_some(),
            |n: &NsmSection| n.gateways.is_some() && n.mtu.is_some(),
            |n: &NsmSection| n.price_per_hour.is_some() && n.price_per_gb.is_some(),
            |n: &NsmSection| n.capacity.is_some() && n.cores.is_some(),
            |n: &NsmSection| n.capacity_operations.is_some() && n.capacity_connections.is_some(),
        ] {
            assert!(config.nsms.iter().any(has));
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let text = "[engine]\nspin_us = 5\nswitch_thread = 2\n";
        let error = error(text);
        assert!(
            error.starts_with("nk.toml, line 3, key 'switch_thread': unknown key 'switch_thread'; "),
            "{error}"
        );
        assert!(error.contains("switch_threads"), "{error}");
    }

    #[test]
    fn wrong_values_are_named_with_their_line() {
        for (text, expected) in [
            ("[engine]\nspin_us = \"x\"\n", "nk.toml, line 2, key 'spin_us': invalid type"),
            (
                "[engine]\nhuge_pages = \"maybe\"\n",
                "nk.toml, line 2, key 'huge_pages': unknown variant 'maybe'",
            ),
            ("[engine]\nregion_bytes = \"1GB\"\n", "nk.toml, line 2, key 'region_bytes': invalid value"),
            ("[engine]\nregion_bytes = 5\n", "nk.toml, line 2, key 'region_bytes': a region is 64MiB to"),
            ("[engine]\nswitch_threads = 0\n", "nk.toml, line 2, key 'switch_threads': 0 is out of range"),
            (
                "[[nsm]]\nname = \"a\"\n[[nsm]]\nname = \"a\"\n",
                "nk.toml, line 4, key 'name': there are two stacks",
            ),
            (
                "[[nsm]]\nname = \"a\"\nstack = \"tpc\"\n",
                "nk.toml, line 3, key 'stack': there is no stack 'tpc'",
            ),
            (
                "[[nsm]]\nname = \"a\"\ntap = \"nk0\"\n",
                "nk.toml, line 3, key 'tap': only a stack \"smoltcp\"",
            ),
            (
                "[[nsm]]\nname = \"a\"\nstack = \"smoltcp\"\n",
                "nk.toml, line 3, key 'stack': the stack \"smoltcp\" needs a TAP",
            ),
            (
                "[[nsm]]\nname = \"a\"\nstack = \"smoltcp\"\ntap = \"nk0\"\naddresses = [\"10.9.0.2\"]\n",
                "nk.toml, line 5, key 'addresses': `10.9.0.2` is no address with a prefix",
            ),
            ("[[nsm]]\nname = \"a\"\npacing = \"5 MB/s\"\n", "nk.toml, line 3, key 'pacing': invalid value"),
            (
                "[[nsm]]\nname = \"a\"\nprice_per_gb = -0.5\n",
                "nk.toml, line 3, key 'price_per_gb': a price is",
            ),
            (
                "[[nsm]]\nname = \"a\"\nsingle_copy = true\n",
                "nk.toml, line 3, key 'single_copy': there is no memory",
            ),
            (
                "[[tenant]]\nname = \"a\"\nusers = [1]\nmemory_allow = [\"b\"]\n",
                "nk.toml, line 4, key 'memory_allow': there is no [[tenant]] 'b'",
            ),
            ("[[tenant]]\nname = \"a\"\n", "nk.toml, line 2, key 'name': tenant 'a' cannot be recognised"),
            (
                "[[tenant]]\nname = \"others\"\nusers = [1]\n",
                "nk.toml, line 2, key 'name': 'others' is no name for a tenant",
            ),
            (
                "[[tenant]]\nname = \"a\"\nusers = [1]\nmax_send = \"5\"\n",
                "nk.toml, line 4, key 'max_send': invalid value",
            ),
            (
                "[[tenant]]\nname = \"a\"\nusers = [1]\nnsms = [\"b\"]\n",
                "nk.toml, line 4, key 'nsms': tenant 'a' may use 'b', but there is no such [[nsm]]",
            ),
            (
                "[[nsm]]\nname = \"a\"\nattach = \"fast\"\n",
                "nk.toml, line 3, key 'attach': unknown variant 'fast'",
            ),
            ("[[nsm]]\nstack = \"kernel\"\n", "nk.toml, line 1: the key 'name' is missing"),
            (
                "[engine]\nallow_users = [\"no-such-user\"]\n",
                "nk.toml, line 2, key 'allow_users': there is no user",
            ),
            ("[engine\n", "nk.toml, line 1"),
        ] {
            let error = error(text);
            assert!(error.starts_with(expected), "{text:?} gave: {error}");
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [("1GiB", 1 << 30), ("256 MiB", 256 << 20), ("64M", 64 << 20), ("123", 123)] {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for text in ["", "GiB", "1GB", "-1", "1.5GiB", "99999999999GiB"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn users_are_resolved() {
        let config =
            Config::parse(Path::new("x"), "[engine]\nallow_users = [\"root\", 7, \"*\", \"8\"]").unwrap();
        assert_eq!(config.users().unwrap(), Users { list: vec![0, 7, 8], everybody: true });
    }
}
