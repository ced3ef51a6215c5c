//! How much disk a tree uses.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long an answer is good for a summary; a walk of a large tree is dear.
const FRESH: Duration = Duration::from_secs(15);

/// Space and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl std::ops::AddAssign for Used {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

/// Walks a tree without leaving its file system; a file with several names counts once, what is not there not at all.
pub(crate) fn used(root: &Path) -> Used {
    let mut sum = Used::default();
    let Ok(first) = fs::symlink_metadata(root) else { return sum };
    let (device, mut seen) = (first.dev(), HashSet::new());
    let mut stack = vec![root.to_path_buf()];
    while let Some(path) = stack.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.dev() != device || (meta.nlink() > 1 && !meta.is_dir() && !seen.insert(meta.ino())) {
            continue;
        }
        sum += Used { bytes: meta.blocks() * 512, inodes: 1 };
        if meta.is_dir() {
            stack.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
        }
    }
    sum
}

/// Answers remembered for a while.
#[derive(Debug, Default)]
pub(super) struct Memory {
    known: std::collections::HashMap<PathBuf, (Instant, Used)>,
}

impl Memory {
    /// The tree's use, walked again when the last answer is old.
    pub(super) fn used(&mut self, root: PathBuf) -> Used {
        let now = Instant::now();
        if let Some((at, used)) = self.known.get(&root).filter(|(at, _)| now - *at < FRESH) {
            let _ = at;
            return *used;
        }
        let fresh = used(&root);
        self.known.retain(|_, (at, _)| now - *at < FRESH);
        self.known.insert(root, (now, fresh));
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_counts_each_file_once() {
        let dir = tempfile::tempdir().unwrap();
        let empty = used(dir.path());
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/a"), vec![1u8; 100_000]).unwrap();
        fs::hard_link(dir.path().join("d/a"), dir.path().join("b")).unwrap();
        let all = used(dir.path());
        assert_eq!(all.inodes, empty.inodes + 2);
        let grown = all.bytes - empty.bytes;
        assert!((100_000..300_000).contains(&grown), "{grown}");
        assert_eq!(used(Path::new("/no/such/tree")), Used::default());
    }
}
