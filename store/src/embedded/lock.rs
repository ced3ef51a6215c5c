//! One process per file: an advisory lock on `store.db.lock`, which also names the holder.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, Write},
    path::Path,
};

use crate::Error;

/// The held lock; released when dropped.
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock for a store file or says who has it.
    pub(super) fn take(store: &Path) -> Result<Self, Error> {
        let path = store.with_extension("db.lock");
        let fail = |operation| {
            let path = path.clone();
            move |source| Error::File { operation, path, source }
        };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(fail("open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                let pid = pid.trim();
                let holder = if pid.is_empty() { String::new() } else { format!(" (pid {pid})") };
                return Err(Error::Locked { path: store.to_owned(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(fail("lock")(source)),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(fail("write"))?;
        write!(file, "{}", std::process::id()).map_err(fail("write"))?;
        Ok(Self { _file: file })
    }
}
