//! What tenants used, kept in an embedded database, and what it costs.
//!
//! Usage is kept by the minute. Each [`Store::add`] is one transaction: after a crash it is there wholly or not at all, so that
//! nothing is counted twice, and at most what was not added yet is lost.
#![forbid(unsafe_code)]

mod report;
mod store;

pub use report::{Grouping, Period, Price, Row, report};
pub use store::{Amount, Attained, Entry, Promise, Store, StoreError};
