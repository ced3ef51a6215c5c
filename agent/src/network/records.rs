//! What pods' networks exist, on disk: one small file per pod, replaced whole, written before anything is shown to the
//! pod. Reading them back after a crash gives every address that may be in use.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Bandwidth, HostPort};

const RANGES: &str = "ranges.json";

/// One pod's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) uid: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Host end of the pod's link.
    pub(crate) link: String,
    pub(crate) ips: Vec<IpAddr>,
    #[serde(default)]
    pub(crate) host_ports: Vec<HostPort>,
    #[serde(default)]
    pub(crate) bandwidth: Bandwidth,
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("network record {path}")]
pub(crate) struct Error {
    path: PathBuf,
    source: io::Error,
}

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    dir: PathBuf,
}

impl Records {
    pub(crate) fn open(dir: PathBuf) -> Result<Self, Error> {
        fs::create_dir_all(dir.join("pods")).map_err(|source| Error { path: dir.clone(), source })?;
        Ok(Self { dir })
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.dir.join("pods").join(format!("{uid}.json"))
    }

    fn write(&self, path: &Path, value: &impl Serialize) -> Result<(), Error> {
        let fail = |source| Error { path: path.into(), source };
        let bytes = serde_json::to_vec(value).map_err(|e| fail(e.into()))?;
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path)).map_err(fail)
    }

    pub(crate) fn save(&self, record: &Record) -> Result<(), Error> {
        self.write(&self.path(&record.uid), record)
    }

    pub(crate) fn remove(&self, uid: &str) -> Result<(), Error> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error { path, source }),
            _ => Ok(()),
        }
    }

    /// Every record; a file that is no record is told of and removed, its pod gets a new network.
    pub(crate) fn load(&self) -> Result<Vec<Record>, Error> {
        let dir = self.dir.join("pods");
        let fail = |source| Error { path: dir.clone(), source };
        let mut all = Vec::new();
        for entry in fs::read_dir(&dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let parsed = fs::read(&path).map_err(fail).map(|b| serde_json::from_slice::<Record>(&b));
            match parsed? {
                Ok(record) if path == self.path(&record.uid) => all.push(record),
                _ => {
                    tracing::warn!(path = %path.display(), "not a network record: removed");
                    fs::remove_file(&path).map_err(fail)?;
                }
            }
        }
        all.sort_by(|a, b| a.uid.cmp(&b.uid));
        Ok(all)
    }

    /// The node's ranges as last told: pods start without an API server.
    pub(crate) fn save_ranges(&self, ranges: &[IpNet]) -> Result<(), Error> {
        self.write(&self.dir.join(RANGES), &ranges)
    }

    pub(crate) fn ranges(&self) -> Vec<IpNet> {
        fs::read(self.dir.join(RANGES)).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_rubbish_goes() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().into()).unwrap();
        let record = Record {
            uid: "u1".into(),
            namespace: "ns".into(),
            name: "pod".into(),
            link: "isov1".into(),
            ips: vec!["10.0.0.2".parse().unwrap()],
            host_ports: Vec::new(),
            bandwidth: Bandwidth::default(),
        };
        records.save(&record).unwrap();
        fs::write(dir.path().join("pods/u2.json"), "{\"uid\":").unwrap();
        fs::write(dir.path().join("pods/u3.tmp"), "").unwrap();
        assert_eq!(records.load().unwrap(), [record]);
        assert_eq!(fs::read_dir(dir.path().join("pods")).unwrap().count(), 1);
        records.remove("u1").unwrap();
        records.remove("u1").unwrap();
        assert!(records.load().unwrap().is_empty());
        assert!(records.ranges().is_empty());
        records.save_ranges(&["10.1.0.0/24".parse().unwrap()]).unwrap();
        assert_eq!(records.ranges().len(), 1);
    }
}
