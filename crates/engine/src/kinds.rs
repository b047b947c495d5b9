use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use netkernel_agent::Sockets;
use netkernel_service::{Stack, namespace_path};
use netkernel_stack_shm::{Allowed, Hub, Network, Settings, ShmStack};

use crate::NsmConfig;

type Make = dyn Fn(&NsmConfig) -> Result<Box<dyn Stack>, String> + Send + Sync;
type Check = dyn Fn(&NsmConfig) -> Result<(), String> + Send + Sync;

type Direct = dyn Fn(&NsmConfig) -> Result<Box<dyn Sockets>, String> + Send + Sync;

struct Kind {
    check: Box<Check>,
    make: Box<Make>,
    direct: Option<Box<Direct>>,
    /// Which NSMs of the kind may have more instances than one for each switch thread.
    many: fn(&NsmConfig) -> bool,
    lasts: bool,
}

/// How a stack of each kind is checked and made: the place where concrete stacks are registered. The error texts are one
/// sentence that says what to do.
#[derive(Clone)]
pub struct StackKinds {
    kinds: BTreeMap<String, Arc<Kind>>,
    /// What joins guests in memory.
    hub: Option<Arc<Hub>>,
}

impl StackKinds {
    /// No kinds at all.
    pub fn none() -> StackKinds {
        StackKinds { kinds: BTreeMap::new(), hub: None }
    }

    /// Adds a kind. `check` is called from control threads when a guest asks for such an NSM; `make` once per switch
    /// thread and NSM, on that thread, when its first guest comes.
    pub fn register(
        &mut self,
        kind: &str,
        check: impl Fn(&NsmConfig) -> Result<(), String> + Send + Sync + 'static,
        make: impl Fn(&NsmConfig) -> Result<Box<dyn Stack>, String> + Send + Sync + 'static,
    ) {
        let kind_of = Kind {
            check: Box::new(check),
            make: Box::new(make),
            direct: None,
            many: |_| false,
            lasts: false,
        };
        self.kinds.insert(kind.into(), Arc::new(kind_of));
    }

    /// The sockets of this kind, registered before, are the kernel's and can be given to programs (direct attachment).
    /// `direct` is called for each guest that has an agent, on the agent's thread.
    pub fn register_direct(
        &mut self,
        kind: &str,
        direct: impl Fn(&NsmConfig) -> Result<Box<dyn Sockets>, String> + Send + Sync + 'static,
    ) {
        if let Some(kind) = self.kinds.get_mut(kind).and_then(Arc::get_mut) {
            kind.direct = Some(Box::new(direct));
        }
    }

    /// Of this kind, registered before, there may be any number of instances for the NSMs that `many` says yes to: each
    /// guest's relay has its own then. The others' relays borrow the switch thread's.
    pub fn register_many(&mut self, kind: &str, many: fn(&NsmConfig) -> bool) {
        if let Some(kind) = self.kinds.get_mut(kind).and_then(Arc::get_mut) {
            kind.many = many;
        }
    }

    /// Sockets of this kind, registered before, go on when the engine's program is exchanged.
    pub fn register_lasting(&mut self, kind: &str) {
        if let Some(kind) = self.kinds.get_mut(kind).and_then(Arc::get_mut) {
            kind.lasts = true;
        }
    }

    pub(crate) fn lasts(&self, nsm: &NsmConfig) -> bool {
        self.kind(nsm).is_ok_and(|kind| kind.lasts)
    }

    pub(crate) fn hub(&self) -> Option<&Hub> {
        self.hub.as_deref()
    }

    pub(crate) fn has_many(&self, nsm: &NsmConfig) -> bool {
        self.kind(nsm).is_ok_and(|kind| (kind.many)(nsm))
    }

    /// Whether this kind has sockets to give away.
    pub(crate) fn has_direct(&self, nsm: &NsmConfig) -> bool {
        self.kind(nsm).is_ok_and(|kind| kind.direct.is_some())
    }

    /// `None`: this kind has no sockets to give away.
    pub(crate) fn direct(&self, nsm: &NsmConfig) -> Option<Result<Box<dyn Sockets>, String>> {
        Some((self.kind(nsm).ok()?.direct.as_ref()?)(nsm))
    }

    pub(crate) fn check(&self, nsm: &NsmConfig) -> Result<(), String> {
        (self.kind(nsm)?.check)(nsm)
    }

    pub(crate) fn make(&self, nsm: &NsmConfig) -> Result<Box<dyn Stack>, String> {
        (self.kind(nsm)?.make)(nsm)
    }

    fn kind(&self, nsm: &NsmConfig) -> Result<&Kind, String> {
        self.kinds.get(&nsm.stack).map(|kind| &**kind).ok_or_else(|| {
            let known: Vec<_> = self.kinds.keys().cloned().collect();
            format!("there is no kind of stack `{}`; there is: {}", nsm.stack, known.join(", "))
        })
    }
}

impl Default for StackKinds {
    /// The kernel stack, by itself and behind the shared-memory stack, and smoltcp.
    fn default() -> Self {
        use netkernel_stack_kernel::{DirectSockets, KernelConfig, KernelStack, check};
        use netkernel_stack_smoltcp::{SmoltcpConfig, SmoltcpStack};
        fn kernel(nsm: &NsmConfig) -> KernelConfig {
            KernelConfig {
                congestion_control: nsm.congestion_control.clone(),
                netns: nsm.netns.clone(),
                congestion_policy: nsm.congestion_policy,
                pacing: nsm.pacing,
                mark: nsm.mark,
            }
        }
        let mut kinds = StackKinds::none();
        let hub = Arc::new(Hub::default());
        for kind in ["kernel", "shm"] {
            let hub = Arc::clone(&hub);
            let make = move |nsm: &NsmConfig| {
                let stack = Box::new(KernelStack::new(kernel(nsm))?) as Box<dyn Stack>;
                if kind == "kernel" && !nsm.memory {
                    return Ok(stack);
                }
                let settings = Settings {
                    network: network(nsm.netns.as_deref())?,
                    allowed: Arc::new(Allowed {
                        users: nsm.memory_allow.clone().unwrap_or_default(),
                        everybody: nsm.memory_allow.is_none(),
                        tenants: nsm.memory_tenants.clone(),
                    }),
                    pair: nsm.pair,
                };
                Ok(Box::new(ShmStack::new(stack, Arc::clone(&hub), settings)?) as Box<dyn Stack>)
            };
            kinds.register(kind, |nsm| check(&kernel(nsm)), make);
            kinds.register_direct(kind, |nsm| {
                Ok(Box::new(DirectSockets::new(kernel(nsm))?) as Box<dyn Sockets>)
            });
            kinds.register_lasting(kind);
        }
        kinds.hub = Some(hub);
        // Guests that are joined in memory are known by the switch thread's stack.
        kinds.register_many("kernel", |nsm| !nsm.memory);
        fn smoltcp(nsm: &NsmConfig) -> SmoltcpConfig {
            SmoltcpConfig { netns: nsm.netns.clone(), ..nsm.smoltcp.clone().unwrap_or_default() }
        }
        kinds.register(
            "smoltcp",
            |nsm| netkernel_stack_smoltcp::check(&smoltcp(nsm)),
            |nsm| Ok(Box::new(SmoltcpStack::new(&smoltcp(nsm))?) as Box<dyn Stack>),
        );
        kinds
    }
}

/// The network namespace of an NSM, by its identity.
fn network(netns: Option<&str>) -> Result<Network, String> {
    let path = match netns {
        None => "/proc/self/ns/net".into(),
        Some(name) => namespace_path(name),
    };
    let file = std::fs::metadata(&path).map_err(|e| format!("network namespace {path}: {e}"))?;
    Ok(Network(file.dev(), file.ino()))
}
