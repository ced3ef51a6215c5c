//! The engine against its promises: order, compares, restarts, crashes, foreign files.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::Arc,
};

use proptest::prelude::*;

use super::*;
use crate::{
    Durability, Expect,
    testing::{Log, all, behaves_like_a_map, delete, put},
};

#[test]
fn compares_guard_every_write() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let first = store.submit(put("a", "1", Expect::Absent)).wait().unwrap();
    let again = store.submit(put("a", "2", Expect::Absent)).wait();
    assert!(matches!(again, Err(Error::Conflict { expected: 0, found, .. }) if found == first));
    let second = store.submit(put("a", "2", Expect::Revision(first))).wait().unwrap();
    assert!(second > first);
    assert!(store.submit(delete("a", Expect::Revision(first))).wait().is_err());
    assert_eq!(all(&store)[0].value, "2");
    store.submit(delete("a", Expect::Revision(second))).wait().unwrap();
    assert_eq!(all(&store), vec![]);
}

#[test]
fn a_batch_is_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let mut batch = put("a", "1", Expect::Absent);
    batch.ops.extend(put("b", "1", Expect::Revision(7)).ops);
    assert!(matches!(store.submit(batch).wait(), Err(Error::Conflict { index: 1, .. })));
    assert_eq!(all(&store), vec![]);
}

#[test]
fn sinks_see_commits_in_order_before_the_acknowledgement() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.submit(put("old", "1", Expect::Any)).wait().unwrap();
    let log = Arc::new(Log::default());
    let range = store.range("", Some(log.clone())).unwrap();
    assert_eq!(range.count(), 1);
    let pending: Vec<_> = (0..100).map(|i| store.submit(put(&format!("k{i}"), "v", Expect::Absent))).collect();
    for (i, p) in pending.into_iter().enumerate() {
        let revision = p.wait().unwrap();
        assert_eq!(log.0.lock()[i], (revision, format!("k{i}")));
    }
}

#[test]
fn a_clean_restart_keeps_everything_and_the_revision() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.submit(put("a", "1", Expect::Any)).wait().unwrap();
    let last = store.submit(put("b", "2", Expect::Any)).wait().unwrap();
    let before = all(&store);
    store.close();
    assert!(matches!(store.submit(put("c", "3", Expect::Any)).wait(), Err(Error::Closed)));
    let store = Embedded::open(dir.path()).unwrap();
    assert_eq!(store.revision(), last);
    assert_eq!(store.range("", None).unwrap().complete, last);
    assert_eq!(all(&store), before);
    assert_eq!(store.submit(put("c", "3", Expect::Any)).wait().unwrap(), last + 1);
}

#[test]
fn one_process_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let _store = Embedded::open(dir.path()).unwrap();
    let error = Embedded::open(dir.path()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
}

#[test]
fn foreign_and_damaged_files_are_refused() {
    let text =
        |dir: &Path| std::fs::write(dir.join(FILE_NAME), "this is not a database, it is a letter".repeat(50)).unwrap();
    let other = |dir: &Path| {
        let db = rusqlite::Connection::open(dir.join(FILE_NAME)).unwrap();
        db.execute_batch("CREATE TABLE t (a)").unwrap();
    };
    let cut = |dir: &Path| {
        let store = Embedded::open(dir).unwrap();
        for i in 0..200 {
            store.submit(put(&format!("k{i}"), &"v".repeat(500), Expect::Any)).wait().unwrap();
        }
        store.close();
        let file = std::fs::OpenOptions::new().write(true).open(dir.join(FILE_NAME)).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    };
    type Damage<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Damage<'_>); 3] = [("text", &text), ("other database", &other), ("cut", &cut)];
    for (name, make) in cases {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let error = Embedded::open(dir.path()).map(drop).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{name}: {error}");
    }
}

#[test]
fn deleted_space_is_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let value = "v".repeat(2000);
    let round = || {
        for i in 0..300 {
            store.submit(put(&format!("k{i}"), &value, Expect::Any));
        }
        let pending: Vec<_> = (0..300).map(|i| store.submit(delete(&format!("k{i}"), Expect::Any))).collect();
        pending.into_iter().for_each(|p| assert!(p.wait().is_ok()));
    };
    round();
    let once = store.size();
    (0..15).for_each(|_| round());
    assert!(store.size() < once * 8 + (8 << 20), "{} bytes after one round, {} after sixteen", once, store.size());
}

/// The child of the crash test: writes as fast as it can and prints every acknowledged key.
#[test]
#[ignore = "runs only as the child of the crash test"]
fn crash_child() {
    let Ok(dir) = std::env::var("STORE_CRASH_DIR") else { return };
    let store = Embedded::open(Path::new(&dir)).unwrap();
    for round in 0.. {
        let pending: Vec<_> = (0..32)
            .map(|i| {
                let key = format!("r{round}-{i}");
                let mut batch = put(&key, &"v".repeat(900), Expect::Absent);
                if i % 4 == 0 {
                    batch.durability = Durability::Relaxed;
                }
                (key, store.submit(batch))
            })
            .collect();
        for (key, p) in pending {
            println!("ACK {key} {}", p.wait().unwrap());
        }
    }
}

#[test]
fn kill_9_loses_no_acknowledged_write() {
    for acks in [1, 57, 2_000] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "embedded::tests::crash_child", "--ignored", "--nocapture"])
            .env("STORE_CRASH_DIR", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut acknowledged = BTreeMap::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let note = |line: String, acknowledged: &mut BTreeMap<String, u64>| {
            let mut words = line.split_whitespace().skip_while(|w| *w != "ACK").skip(1);
            if let (Some(key), Some(Ok(revision))) = (words.next(), words.next().map(str::parse)) {
                acknowledged.insert(key.to_owned(), revision);
            }
        };
        while acknowledged.len() < acks {
            note(lines.next().unwrap().unwrap(), &mut acknowledged);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok).filter(|l| l.split(' ').count() >= 3) {
            note(line, &mut acknowledged);
        }
        // The last line may have been cut in the middle of its number.
        let last = acknowledged.values().copied().max().unwrap();
        let store = Embedded::open(dir.path()).unwrap();
        let found: BTreeMap<_, _> = all(&store).into_iter().map(|e| (String::from(e.key), e.modified)).collect();
        for key in acknowledged.keys() {
            assert!(found.contains_key(key), "{key} was acknowledged and is gone");
        }
        assert!(store.revision() >= last);
        let next = store.submit(put("next", "", Expect::Absent)).wait().unwrap();
        assert!(found.values().all(|r| *r < next));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn the_model(steps in proptest::collection::vec((0u8..6, 0u8..4, any::<bool>()), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let open = || Box::new(Embedded::open(dir.path()).unwrap()) as Box<dyn Engine>;
        behaves_like_a_map(&open, "", steps)?;
    }
}
