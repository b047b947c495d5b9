//! NSMs in processes of their own (`form = "process"`); docs/adr/0005 has the reasons.
//!
//! Three parties:
//! - the engine's side ([`remote`]): to the rest of the engine one more switch thread, which takes the same commands;
//! - the *holder* ([`holder`]): a child process of the engine that does nothing but own the NSM's descriptor table, and start
//!   the worker again when it dies;
//! - [`succession`]: how one holder takes over from another (`nsm swap`);
//! - [`transit`]: how one guest comes into a worker, or leaves it (`guest move`);
//! - the *worker* ([`worker`]): a process that the holder clones with CLONE_FILES, so that both have one descriptor table. It
//!   is an engine with one switch thread and one module, and guests talk to it over their regions directly.
//!
//! What the worker opens is in the holder's table from the moment on when the kernel made it, and what it closes is gone for
//! both: nothing is registered, duplicated or counted, and a worker that is killed leaves every descriptor open.

mod capture;
mod confine;
pub(crate) mod holder;
pub(crate) mod journal;
pub(crate) mod remote;
mod succession;
pub(crate) mod transit;
pub(crate) mod wire;
pub(crate) mod worker;

pub use holder::main;

/// Where the code of an NSM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// In the engine's switch threads.
    #[default]
    Engine,
    /// In a process of its own.
    Process,
}
