use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

/// Minute since 1970, tenant, NSM, guest.
type Key = (u64, &'static str, &'static str, &'static str);
/// The fields of [`Amount`], in order.
type Value = (u64, u64, u64, u64, u64);
const USAGE: TableDefinition<Key, Value> = TableDefinition::new("usage-1");

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
}

impl Amount {
    pub fn is_zero(&self) -> bool {
        *self == Amount::default()
    }

    pub fn plus(&self, other: &Amount) -> Amount {
        Amount {
            bytes_in: self.bytes_in.wrapping_add(other.bytes_in),
            bytes_out: self.bytes_out.wrapping_add(other.bytes_out),
            operations: self.operations.wrapping_add(other.operations),
            connections: self.connections.wrapping_add(other.connections),
            guest_ms: self.guest_ms.wrapping_add(other.guest_ms),
        }
    }

    fn to_value(self) -> Value {
        (self.bytes_in, self.bytes_out, self.operations, self.connections, self.guest_ms)
    }

    fn from_value((bytes_in, bytes_out, operations, connections, guest_ms): Value) -> Amount {
        Amount { bytes_in, bytes_out, operations, connections, guest_ms }
    }
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
    error: redb::Error,
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the usage database {}: {}", self.path.display(), self.error)?;
        match self.error {
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
    /// Opens the file or makes it.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let named = |error: redb::Error| StoreError { path: path.into(), error };
        let database = Database::create(path).map_err(|e| named(e.into()))?;
        let store = Store { database, path: path.into() };
        // So that there is a table to read.
        store.add(&[])?;
        Ok(store)
    }

    /// Adds to what stands there, all or nothing; durable when it returns.
    pub fn add(&self, entries: &[Entry]) -> Result<(), StoreError> {
        self.try_add(entries).map_err(|error| StoreError { path: self.path.clone(), error })
    }

    fn try_add(&self, entries: &[Entry]) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(USAGE)?;
            for entry in entries {
                let key = (entry.minute, entry.tenant.as_str(), entry.nsm.as_str(), entry.guest.as_str());
                let before = table.get(key)?.map(|value| Amount::from_value(value.value()));
                table.insert(key, before.unwrap_or_default().plus(&entry.amount).to_value())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Gives every entry of the minutes `from..to` to `take`, in order of time.
    pub fn read(&self, from: u64, to: u64, mut take: impl FnMut(Entry)) -> Result<(), StoreError> {
        self.try_read(from, to, &mut take).map_err(|error| StoreError { path: self.path.clone(), error })
    }

    fn try_read(&self, from: u64, to: u64, take: &mut dyn FnMut(Entry)) -> Result<(), redb::Error> {
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
}
