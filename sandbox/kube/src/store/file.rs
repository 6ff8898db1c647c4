//! The store's file: one table of objects by kind, namespace and name, and the last version.

use std::path::{Path, PathBuf};

use redb::{Database, ReadableTable as _, TableDefinition};
use serde_json::Value;

use super::{Key, Kind, StoreError};

/// `PLURAL/NAMESPACE/NAME`, and the object as JSON.
const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const VERSION: &str = "version";

/// What was in a file.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) objects: Vec<(Kind, Value)>,
    pub(super) version: u64,
}

/// An open file. It is locked: a second process cannot open it.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    /// None after an error, until it is opened again: a database that could not write once, such as
    /// to a full disk, never does again.
    database: Option<Database>,
}

fn disk(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Disk(Box::new(error.into()))
}

impl File {
    /// Opens it; what is in it, and the last version.
    pub(super) fn open(path: &Path) -> Result<(Self, Kept), StoreError> {
        let database = Database::create(path).map_err(disk)?;
        let transaction = database.begin_write().map_err(disk)?;
        let mut kept = Vec::new();
        let version;
        {
            let objects = transaction.open_table(OBJECTS).map_err(disk)?;
            for entry in objects.iter().map_err(disk)? {
                let (key, object) = entry.map_err(disk)?;
                let garbled = |what: &str| StoreError::Garbled {
                    what: format!("'{}', {what}", key.value()),
                };
                let plural = key.value().split('/').next().unwrap_or_default();
                let kind = Kind::of_plural(plural).ok_or_else(|| garbled("of no known kind"))?;
                let object = serde_json::from_slice(object.value());
                kept.push((kind, object.map_err(|_| garbled("which is not JSON"))?));
            }
            let numbers = transaction.open_table(NUMBERS).map_err(disk)?;
            let found = numbers.get(VERSION).map_err(disk)?;
            version = found.map_or(1, |found| found.value());
        }
        // The tables are there from now on.
        transaction.commit().map_err(disk)?;
        Ok((
            Self {
                path: path.to_owned(),
                database: Some(database),
            },
            Kept {
                objects: kept,
                version,
            },
        ))
    }

    /// Keeps an object, given as text, or forgets it, and the version; both or none. After an error
    /// it is one of the two, too, and the next write is asked of the file anew.
    pub(super) fn write(
        &mut self,
        kind: Kind,
        (namespace, name): &Key,
        object: Option<&str>,
        version: u64,
    ) -> Result<(), StoreError> {
        let key = format!("{}/{namespace}/{name}", kind.plural());
        let database = match self.database.take() {
            Some(database) => database,
            None => Database::open(&self.path).map_err(disk)?,
        };
        Self::try_write(&database, &key, object, version)?;
        self.database = Some(database);
        Ok(())
    }

    fn try_write(
        database: &Database,
        key: &str,
        object: Option<&str>,
        version: u64,
    ) -> Result<(), StoreError> {
        let transaction = database.begin_write().map_err(disk)?;
        {
            let mut objects = transaction.open_table(OBJECTS).map_err(disk)?;
            match object {
                Some(text) => {
                    objects.insert(key, text.as_bytes()).map_err(disk)?;
                }
                None => {
                    objects.remove(key).map_err(disk)?;
                }
            }
            let mut numbers = transaction.open_table(NUMBERS).map_err(disk)?;
            numbers.insert(VERSION, version).map_err(disk)?;
        }
        transaction.commit().map_err(disk)
    }
}
