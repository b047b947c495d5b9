use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use netkernel_abi::Limits;
use netkernel_shm::HugePages;

use crate::{Capacity, Form, StackKinds, TenantConfig};

/// A network stack module: a stack and how it is set up.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NsmConfig {
    /// What guests ask for.
    pub name: String,
    /// Kind of stack, see [`StackKinds`]: `kernel`, `shm` (in front of the kernel), `smoltcp`.
    pub stack: String,
    /// Where its code runs.
    pub form: Form,
    /// Congestion control of every TCP socket; `None`: the namespace's default.
    pub congestion_control: Option<String>,
    /// Network namespace: a name in `/run/netns`, or a path. `None`: the engine's own.
    pub netns: Option<String>,
    /// What becomes of a program's own choice of a congestion control.
    pub congestion_policy: netkernel_agent::Policy,
    /// How programs are attached unless `run` says otherwise.
    pub attach: Attach,
    /// Most bytes per second that each TCP socket sends. `None`: no limit.
    pub pacing: Option<u64>,
    /// SO_MARK of each socket.
    pub mark: Option<u32>,
    /// Set-up of a `smoltcp` stack; its namespace is `netns`.
    pub smoltcp: Option<netkernel_stack_smoltcp::SmoltcpConfig>,
    /// Connections between its guests and others that have this are joined in memory. Kind `shm` always has it.
    pub memory: bool,
    /// Users whose guests may connect in memory to guests of other users that have this stack. `None`: everybody.
    pub memory_allow: Option<Vec<u32>>,
    /// Tenants, by name, whose guests let guests of others connect to them in memory: their names, or `*` for everybody.
    #[serde(default)]
    pub memory_tenants: HashMap<String, Vec<String>>,
    /// Those of them between guests of one tenant stand in memory that both map, without the engine.
    pub pair: bool,
    /// Guests of one tenant trust each other as processes of one user do: a large write in such memory takes one copy.
    pub single_copy: bool,
    /// What it can carry.
    pub capacity: Capacity,
}

/// How a program's sockets are attached to their stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    /// Queued for what can be preloaded to, with the agent behind it; for the rest direct, or relay if the stack is not the
    /// kernel's.
    #[default]
    Auto,
    Queued,
    Direct,
    Relay,
}

impl NsmConfig {
    /// Whether a stack made from the one can go on with sockets of the other.
    pub fn is_same_kind(&self, other: &NsmConfig) -> bool {
        // With memory, `kernel` is what `shm` is.
        let kind = |nsm: &NsmConfig| match nsm.stack.as_str() {
            "shm" => ("kernel".to_owned(), true),
            stack => (stack.to_owned(), nsm.memory),
        };
        kind(self) == kind(other)
    }

    /// The host's kernel as it is.
    pub fn kernel(name: &str, congestion_control: Option<&str>) -> NsmConfig {
        NsmConfig {
            name: name.into(),
            stack: "kernel".into(),
            form: Form::Engine,
            congestion_control: congestion_control.map(str::to_owned),
            netns: None,
            congestion_policy: netkernel_agent::Policy::default(),
            attach: Attach::default(),
            pacing: None,
            mark: None,
            smoltcp: None,
            memory: false,
            memory_allow: Some(Vec::new()),
            memory_tenants: HashMap::new(),
            pair: true,
            single_copy: false,
            capacity: Capacity::default(),
        }
    }
}

/// What of an NSM in a process can be changed while it serves. `None`: as it is.
#[derive(Clone, Debug, Default)]
pub struct NsmChange {
    /// The program that its process is started with.
    pub binary: Option<PathBuf>,
    pub congestion_control: Option<String>,
    pub congestion_policy: Option<netkernel_agent::Policy>,
    /// Bytes per second of each TCP socket; 0: no limit any more.
    pub pacing: Option<u64>,
    /// 0: none any more.
    pub mark: Option<u32>,
}

impl NsmChange {
    pub(crate) fn apply(&self, nsm: &NsmConfig) -> NsmConfig {
        NsmConfig {
            congestion_control: self.congestion_control.clone().or_else(|| nsm.congestion_control.clone()),
            congestion_policy: self.congestion_policy.unwrap_or(nsm.congestion_policy),
            pacing: self.pacing.or(nsm.pacing).filter(|&rate| rate > 0),
            mark: self.mark.or(nsm.mark).filter(|&mark| mark > 0),
            ..nsm.clone()
        }
    }
}

#[derive(Clone)]
pub struct EngineConfig {
    pub nsms: Vec<NsmConfig>,
    pub switch_threads: usize,
    /// Which of them a new guest comes to.
    pub placement: crate::Placement,
    /// How long a switch thread polls, at most, before it sleeps; also advised to guests. Microseconds.
    pub spin_us: u64,
    /// Sizes of a guest's region unless its [`GuestSpec`] says otherwise.
    pub limits: Limits,
    pub huge_pages: HugePages,
    pub max_guests: usize,
    pub tenants: Vec<TenantConfig>,
    /// Who belongs to no tenant gets no guest.
    pub strict_tenants: bool,
    /// Placeholder ends that a switch thread holds in the process's descriptor table before it hands them to a thread
    /// with a table of its own. `None`: a quarter of the limit for all threads together, at most 4096.
    pub placeholders_in_main_table: Option<usize>,
    /// The `netkernel` program, which NSMs with `form = "process"` are started with. `None`: there can be none.
    pub process_binary: Option<PathBuf>,
    /// How stacks are made.
    pub kinds: StackKinds,
}

impl EngineConfig {
    /// NSM `kernel` (the host's default congestion control), one for each congestion control that the host offers, and `shm`.
    pub fn default_catalog() -> Vec<NsmConfig> {
        let mut nsms = vec![NsmConfig::kernel("kernel", None)];
        for cc in netkernel_stack_kernel::available_congestion_controls() {
            nsms.push(NsmConfig::kernel(&cc, Some(&cc)));
        }
        nsms.push(NsmConfig { stack: "shm".into(), ..NsmConfig::kernel("shm", None) });
        nsms
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            nsms: EngineConfig::default_catalog(),
            switch_threads: 1,
            placement: crate::Placement::default(),
            spin_us: 50,
            limits: Limits::default(),
            huge_pages: HugePages::Off,
            max_guests: 1024,
            tenants: Vec::new(),
            strict_tenants: false,
            placeholders_in_main_table: None,
            process_binary: None,
            kinds: StackKinds::default(),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct GuestSpec {
    /// For people; need not be unique.
    pub name: String,
    /// Name of an NSM; empty: the tenant's first one.
    pub stack: String,
    /// What the caller shows to be known as a tenant's.
    pub tenant_token: Option<String>,
    /// Who asked.
    pub pid: i32,
    pub uid: u32,
    /// `None`: the engine's.
    pub limits: Option<Limits>,
    pub huge_pages: Option<HugePages>,
}

/// What a guest's first process needs. All descriptors are close-on-exec.
#[derive(Debug)]
pub struct GuestFds {
    pub id: u32,
    /// The right to attach to this guest ([`crate::Engine::attach`]).
    pub token: [u8; 16],
    /// How its module wants programs to be attached.
    pub attach: Attach,
    pub region: OwnedFd,
    pub channel: OwnedFd,
    pub doorbell: OwnedFd,
    /// The stack's sockets are the kernel's and can be given to programs (direct attachment); else they are relayed.
    pub direct: bool,
}

/// Why the engine could not do it. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineError {
    /// The configuration cannot work.
    Config(String),
    UnknownStack {
        name: String,
        known: Vec<String>,
    },
    /// The stack is configured but cannot be used on this host.
    StackUnavailable {
        name: String,
        reason: String,
    },
    UnknownGuest(u32),
    /// Who asks may not have it.
    Refused(String),
    /// No guest has this token.
    BadToken,
    TooManyGuests(usize),
    /// The host lacks something.
    Resource(String),
    /// The engine is being ended.
    Stopped,
}

impl std::fmt::Display for EngineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            EngineError::Config(text) | EngineError::Resource(text) | EngineError::Refused(text) => {
                f.write_str(text)
            }
            EngineError::UnknownStack { name, known } => {
                write!(f, "there is no stack `{name}`; this engine offers: {}", known.join(", "))
            }
            EngineError::StackUnavailable { name, reason } => {
                write!(f, "stack `{name}` cannot be used here: {reason}")
            }
            EngineError::UnknownGuest(id) => write!(f, "there is no guest {id}"),
            EngineError::BadToken => {
                write!(f, "no guest has this token: it is over, or belongs to another engine")
            }
            EngineError::TooManyGuests(max) => {
                write!(f, "the engine serves {max} guests already: end one, or raise max_guests")
            }
            EngineError::Stopped => write!(f, "the engine is being ended"),
        }
    }
}

impl std::error::Error for EngineError {}
