//! The SQLite file: its layout, how it is opened and checked, and the statements run on it.
//!
//! `kv` has no index on the key: every key is in memory with its row number. `state` has one row: the last revision, and
//! the revision up to which numbers may already have been given out (see [`super::writer`]).

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, ffi, params};

use crate::{Durability, Error, Revision};

/// "isop": marks the file as ours in SQLite's header.
const APPLICATION_ID: i64 = 0x6973_6f70;
/// Layout of the tables.
const LAYOUT: i64 = 1;
/// Older versions have a known way to corrupt a database in WAL mode.
const OLDEST_SQLITE: (i32, &str) = (3_051_003, "3.51.3");

/// The open file.
pub(super) struct File {
    db: Connection,
    path: PathBuf,
    durability: Option<Durability>,
}

/// The one row of `state`.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    /// Last committed revision.
    pub(super) revision: Revision,
    /// No revision above this has been given out.
    pub(super) reserved: Revision,
}

impl File {
    /// Opens or creates the file.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        if rusqlite::version_number() < OLDEST_SQLITE.0 {
            return Err(Error::Version { found: rusqlite::version().into(), needed: OLDEST_SQLITE.1 });
        }
        let fresh = std::fs::metadata(path).map_or(true, |m| m.len() == 0);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(path, flags).map_err(|e| classify(path, "open", e))?;
        let file = Self { db, path: path.to_owned(), durability: None };
        if fresh {
            file.create()?;
        } else {
            file.check()?;
        }
        file.pragmas()?;
        Ok(file)
    }

    fn create(&self) -> Result<(), Error> {
        // One transaction: a crash leaves either no layout (length 0 or an empty database) or all of it.
        let sql = format!(
            "PRAGMA auto_vacuum = INCREMENTAL;
             PRAGMA journal_mode = WAL;
             BEGIN;
             PRAGMA application_id = {APPLICATION_ID};
             PRAGMA user_version = {LAYOUT};
             CREATE TABLE kv (id INTEGER PRIMARY KEY, key TEXT NOT NULL, created INTEGER NOT NULL,
                              modified INTEGER NOT NULL, value BLOB NOT NULL);
             CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL, reserved INTEGER NOT NULL);
             INSERT INTO state VALUES (1, 1, 1);
             COMMIT;"
        );
        self.db.execute_batch(&sql).map_err(|e| classify(&self.path, "create", e))?;
        let dir = self.path.parent().unwrap_or(Path::new("."));
        std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|source| Error::File {
            operation: "sync directory",
            path: dir.to_owned(),
            source,
        })
    }

    fn check(&self) -> Result<(), Error> {
        let pragma = |name: &str| -> Result<i64, Error> {
            self.db.pragma_query_value(None, name, |r| r.get(0)).map_err(|e| classify(&self.path, "read", e))
        };
        let (application, layout) = (pragma("application_id")?, pragma("user_version")?);
        if application == 0 && layout == 0 && pragma("schema_version")? == 0 {
            return self.create();
        }
        let reason = if application != APPLICATION_ID {
            "it is a SQLite database of another program".to_owned()
        } else if layout != LAYOUT {
            format!("its layout is version {layout}, this program knows {LAYOUT}")
        } else {
            return Ok(());
        };
        Err(Error::Foreign { path: self.path.clone(), reason })
    }

    fn pragmas(&self) -> Result<(), Error> {
        self.db
            .execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE;
                 PRAGMA journal_mode = WAL;
                 PRAGMA cache_size = -1024;
                 PRAGMA temp_store = MEMORY;
                 PRAGMA wal_autocheckpoint = 4000;
                 PRAGMA journal_size_limit = 16777216;",
            )
            .map_err(|e| classify(&self.path, "configure", e))
    }

    /// Reads the state row.
    pub(super) fn state(&self) -> Result<State, Error> {
        self.db
            .query_row("SELECT revision, reserved FROM state", [], |r| {
                Ok(State { revision: r.get::<_, i64>(0)? as u64, reserved: r.get::<_, i64>(1)? as u64 })
            })
            .map_err(|e| classify(&self.path, "read", e))
    }

    /// Visits every row without its value: id, key, created, modified.
    pub(super) fn keys(&self, mut visit: impl FnMut(i64, Box<str>, Revision, Revision)) -> Result<(), Error> {
        let fail = |e| classify(&self.path, "read", e);
        let mut statement = self.db.prepare("SELECT id, key, created, modified FROM kv").map_err(fail)?;
        let mut rows = statement.query([]).map_err(fail)?;
        while let Some(row) = rows.next().map_err(fail)? {
            let key: String = row.get(1).map_err(fail)?;
            let created: i64 = row.get(2).map_err(fail)?;
            let modified: i64 = row.get(3).map_err(fail)?;
            visit(row.get(0).map_err(fail)?, key.into(), created as u64, modified as u64);
        }
        Ok(())
    }

    /// One value.
    pub(super) fn value(&self, id: i64) -> Result<Vec<u8>, Error> {
        self.db
            .prepare_cached("SELECT value FROM kv WHERE id = ?1")
            .and_then(|mut s| s.query_row([id], |r| r.get(0)))
            .map_err(|e| classify(&self.path, "read", e))
    }

    /// Starts a transaction of a durability class.
    pub(super) fn begin(&mut self, durability: Durability) -> Result<(), Error> {
        if self.durability != Some(durability) {
            // In WAL mode NORMAL leaves the log to the kernel at commit; FULL waits for the disk.
            let level = match durability {
                Durability::Synced => "PRAGMA synchronous = FULL",
                Durability::Relaxed => "PRAGMA synchronous = NORMAL",
            };
            self.execute(level)?;
            self.durability = Some(durability);
        }
        self.execute("BEGIN IMMEDIATE")
    }

    /// Inserts a row.
    pub(super) fn insert(&self, id: i64, key: &str, revision: Revision, value: &[u8]) -> Result<(), Error> {
        self.db
            .prepare_cached("INSERT INTO kv (id, key, created, modified, value) VALUES (?1, ?2, ?3, ?3, ?4)")
            .and_then(|mut s| s.execute(params![id, key, revision as i64, value]))
            .map(drop)
            .map_err(|e| classify(&self.path, "write", e))
    }

    /// Changes a row.
    pub(super) fn update(&self, id: i64, revision: Revision, value: &[u8]) -> Result<(), Error> {
        self.db
            .prepare_cached("UPDATE kv SET modified = ?2, value = ?3 WHERE id = ?1")
            .and_then(|mut s| s.execute(params![id, revision as i64, value]))
            .map(drop)
            .map_err(|e| classify(&self.path, "write", e))
    }

    /// Removes a row.
    pub(super) fn delete(&self, id: i64) -> Result<(), Error> {
        self.db
            .prepare_cached("DELETE FROM kv WHERE id = ?1")
            .and_then(|mut s| s.execute([id]))
            .map(drop)
            .map_err(|e| classify(&self.path, "write", e))
    }

    /// Writes the state row.
    pub(super) fn set_state(&self, state: State) -> Result<(), Error> {
        self.db
            .prepare_cached("UPDATE state SET revision = ?1, reserved = ?2")
            .and_then(|mut s| s.execute(params![state.revision as i64, state.reserved as i64]))
            .map(drop)
            .map_err(|e| classify(&self.path, "write", e))
    }

    /// Commits the transaction.
    pub(super) fn commit(&self) -> Result<(), Error> {
        self.execute("COMMIT")
    }

    /// Abandons the transaction.
    pub(super) fn rollback(&self) {
        if !self.db.is_autocommit()
            && let Err(error) = self.execute("ROLLBACK")
        {
            tracing::error!(%error, "cannot roll back");
        }
    }

    /// Gives unused pages back to the file system when they are most of the file.
    pub(super) fn shrink(&self) -> Result<(), Error> {
        let pragma = |name: &str| -> i64 { self.db.pragma_query_value(None, name, |r| r.get(0)).unwrap_or(0) };
        let (free, all) = (pragma("freelist_count"), pragma("page_count"));
        if free > 1024 && free * 2 > all {
            self.execute("PRAGMA incremental_vacuum(4096)")?;
        }
        Ok(())
    }

    /// Moves the log into the file.
    pub(super) fn checkpoint(&self) -> Result<(), Error> {
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    }

    fn execute(&self, sql: &str) -> Result<(), Error> {
        self.db
            .prepare_cached(sql)
            .and_then(|mut s| {
                let mut rows = s.query([])?;
                while rows.next()?.is_some() {}
                Ok(())
            })
            .map_err(|e| classify(&self.path, "write", e))
    }
}

/// Tells a damaged or foreign file and a held lock from other errors.
fn classify(path: &Path, operation: &'static str, source: rusqlite::Error) -> Error {
    let code = match &source {
        rusqlite::Error::SqliteFailure(e, _) => e.extended_code & 0xff,
        _ => 0,
    };
    match code {
        ffi::SQLITE_NOTADB => Error::Foreign { path: path.to_owned(), reason: "it is not a SQLite database".into() },
        ffi::SQLITE_CORRUPT => Error::Foreign { path: path.to_owned(), reason: "it is damaged or half-written".into() },
        ffi::SQLITE_BUSY => Error::Locked { path: path.to_owned(), holder: String::new() },
        // A table or column that is not there: a database with our mark but not our content.
        ffi::SQLITE_ERROR if operation == "read" => {
            Error::Foreign { path: path.to_owned(), reason: format!("it has unexpected content ({source})") }
        }
        _ => Error::Sqlite { operation, source },
    }
}
