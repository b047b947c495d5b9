use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableHandle as _};

/// Minute since 1970, tenant, NSM, guest.
type Key = (u64, &'static str, &'static str, &'static str);
/// The fields of [`Amount`], in order.
const USAGE: TableDefinition<Key, [u64; FIELDS]> = TableDefinition::new("usage-2");
/// As it was before: the first five fields.
const USAGE_1: TableDefinition<Key, (u64, u64, u64, u64, u64)> = TableDefinition::new("usage-1");
/// Minute since 1970, tenant, NSM: the fields of [`Attained`].
const ATTAINED: TableDefinition<(u64, &'static str, &'static str), (u64, u64)> =
    TableDefinition::new("attained-1");

const FIELDS: usize = 11;

/// What was used. Sums wrap at 2^64 only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Payload bytes that programs received and sent.
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub operations: u64,
    /// Connections that were accepted or made.
    pub connections: u64,
    /// How long guests lived, in milliseconds, all together.
    pub guest_ms: u64,
    /// Processor time of the engine, in nanoseconds.
    pub cpu_ns: u64,
    /// TCP connections of which the stack knew what follows.
    pub tcp_connections: u64,
    /// Segments sent, and those of them that were sent again.
    pub segments: u64,
    pub retransmitted: u64,
    /// Sum of the smoothed round trip times that were seen, in microseconds, and how many.
    pub rtt_us: u64,
    pub rtt_samples: u64,
}

impl Amount {
    pub fn is_zero(&self) -> bool {
        *self == Amount::default()
    }

    pub fn plus(&self, other: &Amount) -> Amount {
        let (mut sum, other) = (self.to_value(), other.to_value());
        sum.iter_mut().zip(other).for_each(|(sum, more)| *sum = sum.wrapping_add(more));
        Amount::from_value(sum)
    }

    fn to_value(self) -> [u64; FIELDS] {
        let Amount { bytes_in, bytes_out, operations, connections, guest_ms, cpu_ns, .. } = self;
        let Amount { tcp_connections, segments, retransmitted, rtt_us, rtt_samples, .. } = self;
        [
            bytes_in,
            bytes_out,
            operations,
            connections,
            guest_ms,
            cpu_ns,
            tcp_connections,
            segments,
            retransmitted,
            rtt_us,
            rtt_samples,
        ]
    }

    fn from_value(value: [u64; FIELDS]) -> Amount {
        let [bytes_in, bytes_out, operations, connections, guest_ms, cpu_ns, tcp @ ..] = value;
        let [tcp_connections, segments, retransmitted, rtt_us, rtt_samples] = tcp;
        Amount {
            bytes_in,
            bytes_out,
            operations,
            connections,
            guest_ms,
            cpu_ns,
            tcp_connections,
            segments,
            retransmitted,
            rtt_us,
            rtt_samples,
        }
    }
}

/// For how many seconds a tenant's guarantee on an NSM was watched, and in how many of them it was met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attained {
    pub seconds: u64,
    pub met: u64,
}

impl Attained {
    pub fn plus(&self, other: &Attained) -> Attained {
        Attained { seconds: self.seconds.wrapping_add(other.seconds), met: self.met.wrapping_add(other.met) }
    }
}

/// One tenant's on one NSM in one minute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promise {
    /// Minutes since 1970 (UTC).
    pub minute: u64,
    pub tenant: String,
    pub nsm: String,
    pub attained: Attained,
}

/// What one guest's name used in one minute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Minutes since 1970 (UTC).
    pub minute: u64,
    pub tenant: String,
    pub nsm: String,
    pub guest: String,
    pub amount: Amount,
}

#[derive(Debug)]
pub struct StoreError {
    path: PathBuf,
    error: Fault,
}

#[derive(Debug)]
enum Fault {
    Database(redb::Error),
    /// A table that this version does not know.
    Newer(String),
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Fault {
        Fault::Database(error.into())
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the usage database {}: ", self.path.display())?;
        let error = match &self.error {
            Fault::Newer(table) => {
                return write!(
                    f,
                    "it was written by a newer netkernel (it has a table {table}): use that one, or move the file away"
                );
            }
            Fault::Database(error) => error,
        };
        write!(f, "{error}")?;
        match error {
            redb::Error::DatabaseAlreadyOpen => f.write_str(" (another engine has it: give each its own)"),
            redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => {
                f.write_str(" (move the file away; a new one is made)")
            }
            _ => Ok(()),
        }
    }
}

impl std::error::Error for StoreError {}

/// The database. One process has it at a time.
#[derive(Debug)]
pub struct Store {
    database: Database,
    path: PathBuf,
}

impl Store {
    /// Opens the file or makes it. What an older version wrote is carried over, all or nothing; what it did not know stays unknown.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let named = |error: Fault| StoreError { path: path.into(), error };
        let database = Database::create(path).map_err(|e| named(e.into()))?;
        let store = Store { database, path: path.into() };
        store.migrate().map_err(named)?;
        Ok(store)
    }

    /// Makes the tables that this version reads, out of those that there are.
    fn migrate(&self) -> Result<(), Fault> {
        let transaction = self.database.begin_write()?;
        let known = [USAGE.name(), USAGE_1.name(), ATTAINED.name()];
        let tables: Vec<String> = transaction.list_tables()?.map(|table| table.name().to_owned()).collect();
        if let Some(unknown) = tables.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(Fault::Newer(unknown.clone()));
        }
        let mut usage = transaction.open_table(USAGE)?;
        transaction.open_table(ATTAINED)?;
        if tables.iter().any(|name| name == USAGE_1.name()) {
            for item in transaction.open_table(USAGE_1)?.iter()? {
                let (key, value) = item?;
                let (bytes_in, bytes_out, operations, connections, guest_ms) = value.value();
                let amount =
                    Amount { bytes_in, bytes_out, operations, connections, guest_ms, ..Amount::default() };
                usage.insert(key.value(), amount.to_value())?;
            }
            transaction.delete_table(USAGE_1)?;
        }
        drop(usage);
        transaction.commit()?;
        Ok(())
    }

    /// Adds to what stands there, all or nothing; durable when it returns.
    pub fn add(&self, entries: &[Entry], promises: &[Promise]) -> Result<(), StoreError> {
        self.try_add(entries, promises).map_err(|error| StoreError { path: self.path.clone(), error })
    }

    fn try_add(&self, entries: &[Entry], promises: &[Promise]) -> Result<(), Fault> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(USAGE)?;
            for entry in entries {
                let key = (entry.minute, entry.tenant.as_str(), entry.nsm.as_str(), entry.guest.as_str());
                let before = table.get(key)?.map(|value| Amount::from_value(value.value()));
                table.insert(key, before.unwrap_or_default().plus(&entry.amount).to_value())?;
            }
            let mut table = transaction.open_table(ATTAINED)?;
            for promise in promises {
                let key = (promise.minute, promise.tenant.as_str(), promise.nsm.as_str());
                let before = table.get(key)?.map(|value| value.value()).unwrap_or_default();
                let sum = promise.attained.plus(&Attained { seconds: before.0, met: before.1 });
                table.insert(key, (sum.seconds, sum.met))?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Gives every entry of the minutes `from..to` to `take`, in order of time.
    pub fn read(&self, from: u64, to: u64, mut take: impl FnMut(Entry)) -> Result<(), StoreError> {
        self.try_read(from, to, &mut take).map_err(|error| StoreError { path: self.path.clone(), error })
    }

    fn try_read(&self, from: u64, to: u64, take: &mut dyn FnMut(Entry)) -> Result<(), Fault> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(USAGE)?;
        for item in table.range((from, "", "", "")..(to, "", "", ""))? {
            let (key, value) = item?;
            let (minute, tenant, nsm, guest) = key.value();
            take(Entry {
                minute,
                tenant: tenant.into(),
                nsm: nsm.into(),
                guest: guest.into(),
                amount: Amount::from_value(value.value()),
            });
        }
        Ok(())
    }

    /// As [`Store::read`], of guarantees.
    pub fn read_promises(&self, from: u64, to: u64, mut take: impl FnMut(Promise)) -> Result<(), StoreError> {
        self.try_read_promises(from, to, &mut take)
            .map_err(|error| StoreError { path: self.path.clone(), error })
    }

    fn try_read_promises(&self, from: u64, to: u64, take: &mut dyn FnMut(Promise)) -> Result<(), Fault> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(ATTAINED)?;
        for item in table.range((from, "", "")..(to, "", ""))? {
            let (key, value) = item?;
            let (minute, tenant, nsm) = key.value();
            let (seconds, met) = value.value();
            take(Promise {
                minute,
                tenant: tenant.into(),
                nsm: nsm.into(),
                attained: Attained { seconds, met },
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("netkernel-{name}-{}.redb", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn what_an_older_version_wrote_is_carried_over_once() {
        let path = place("migrate");
        let old = Database::create(&path).unwrap();
        let transaction = old.begin_write().unwrap();
        let mut table = transaction.open_table(USAGE_1).unwrap();
        table.insert((7, "t", "n", "g"), (1, 2, 3, 4, 5)).unwrap();
        drop(table);
        transaction.commit().unwrap();
        drop(old);
        let expected = Amount {
            bytes_in: 1,
            bytes_out: 2,
            operations: 3,
            connections: 4,
            guest_ms: 5,
            ..Amount::default()
        };
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            let mut found = Vec::new();
            store.read(0, u64::MAX, |entry| found.push(entry)).unwrap();
            assert_eq!((found.len(), found[0].minute, found[0].amount), (1, 7, expected));
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_a_newer_version_wrote_is_refused_and_left_alone() {
        let path = place("newer");
        let newer = Database::create(&path).unwrap();
        let transaction = newer.begin_write().unwrap();
        transaction.open_table(TableDefinition::<u64, u64>::new("usage-3")).unwrap();
        transaction.commit().unwrap();
        drop(newer);
        for _ in 0..2 {
            let error = Store::open(&path).unwrap_err().to_string();
            assert!(error.contains("newer netkernel (it has a table usage-3)"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn all_that_is_counted_is_kept_and_summed() {
        let path = place("all");
        let fields: [u64; FIELDS] = std::array::from_fn(|i| i as u64 + 1);
        let amount = Amount::from_value(fields);
        let entry = Entry { minute: 3, tenant: "t".into(), nsm: "n".into(), guest: "g".into(), amount };
        let promise = |met| Promise {
            minute: 3,
            tenant: "t".into(),
            nsm: "n".into(),
            attained: Attained { seconds: 1, met },
        };
        let store = Store::open(&path).unwrap();
        store.add(std::slice::from_ref(&entry), &[promise(1)]).unwrap();
        store.add(&[entry], &[promise(0), promise(1)]).unwrap();
        let (mut entries, mut promises) = (Vec::new(), Vec::new());
        store.read(0, 9, |entry| entries.push(entry.amount.to_value())).unwrap();
        store.read_promises(3, 4, |promise| promises.push(promise.attained)).unwrap();
        assert_eq!(entries, [fields.map(|field| 2 * field)]);
        assert_eq!(promises, [Attained { seconds: 3, met: 2 }]);
        store.read_promises(0, 3, |_| panic!("of another minute")).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
