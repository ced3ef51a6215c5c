//! The option words of a mount: flags of the mount, propagation, recursive attributes and data for the file system.

use std::collections::BTreeSet;

use crate::error::{Error, Result};

/// Parsed options.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// A bind mount.
    pub(crate) bind: bool,
    /// Of the whole tree below the source.
    pub(crate) recursive: bool,
    /// `MOUNT_ATTR_*` to set on the mount.
    pub(crate) set: u64,
    /// `MOUNT_ATTR_*` to clear on the mount.
    pub(crate) clear: u64,
    /// To set on the whole tree.
    pub(crate) set_recursive: u64,
    /// To clear on the whole tree.
    pub(crate) clear_recursive: u64,
    /// `MS_*` propagation changes, in order, with whether each is recursive.
    pub(crate) propagation: Vec<(u64, bool)>,
    /// Copy the contents of the directory below onto a tmpfs.
    pub(crate) copy_up: bool,
    /// `Some(recursive)`: map ids as the container's user namespace or the mount's mappings say.
    pub(crate) idmap: Option<bool>,
    /// Superblock flags and parameters for the file system.
    pub(crate) data: Vec<(String, Option<String>)>,
}

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
const NOSYMFOLLOW: u64 = libc::MOUNT_ATTR_NOSYMFOLLOW;

/// `(word, set, clear)`; a leading `r` makes each recursive.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", RDONLY, 0),
    ("rw", 0, RDONLY),
    ("nosuid", NOSUID, 0),
    ("suid", 0, NOSUID),
    ("nodev", NODEV, 0),
    ("dev", 0, NODEV),
    ("noexec", NOEXEC, 0),
    ("exec", 0, NOEXEC),
    ("noatime", NOATIME, ATIME),
    ("atime", 0, ATIME),
    ("relatime", 0, ATIME),
    ("norelatime", 0, ATIME),
    ("strictatime", STRICTATIME, ATIME),
    ("nostrictatime", 0, ATIME),
    ("nodiratime", NODIRATIME, 0),
    ("diratime", 0, NODIRATIME),
    ("nosymfollow", NOSYMFOLLOW, 0),
    ("symfollow", 0, NOSYMFOLLOW),
];

const PROPAGATION: &[(&str, u64, bool)] = &[
    ("private", libc::MS_PRIVATE, false),
    ("rprivate", libc::MS_PRIVATE, true),
    ("shared", libc::MS_SHARED, false),
    ("rshared", libc::MS_SHARED, true),
    ("slave", libc::MS_SLAVE, false),
    ("rslave", libc::MS_SLAVE, true),
    ("unbindable", libc::MS_UNBINDABLE, false),
    ("runbindable", libc::MS_UNBINDABLE, true),
];

/// Superblock flags that the kernel takes for every file system.
const SUPERBLOCK: &[&str] = &["dirsync", "lazytime", "mand", "nolazytime", "sync"];

/// Defaults, and words for mount(8) and fstab only: they mean nothing to a container.
const MEANINGLESS: &[&str] = &[
    "defaults",
    "async",
    "auto",
    "noauto",
    "user",
    "nouser",
    "_netdev",
    "nofail",
    "remount",
    "loud",
    "silent",
    "nomand",
    "noiversion",
    "copy",
    "nocopy",
];

/// Words that are no attribute and no propagation.
const OTHERS: &[&str] = &["bind", "rbind", "tmpcopyup", "idmap", "ridmap"];

/// All words known here.
pub(crate) fn words() -> BTreeSet<String> {
    let attributes = ATTRIBUTES.iter().flat_map(|(word, ..)| [(*word).to_owned(), format!("r{word}")]);
    let propagation = PROPAGATION.iter().map(|(word, ..)| (*word).to_owned());
    let others = [SUPERBLOCK, MEANINGLESS, OTHERS].concat().into_iter().map(str::to_owned);
    attributes.chain(propagation).chain(others).collect()
}

/// Parses the option words of one mount.
pub(crate) fn parse(options: &[String]) -> Result<MountOptions> {
    let mut out = MountOptions::default();
    for word in options {
        let word = word.as_str();
        if let Some(&(_, set, clear)) = ATTRIBUTES.iter().find(|a| a.0 == word) {
            out.set = out.set & !clear | set;
            out.clear = out.clear & !set | clear;
            continue;
        }
        if let Some(&(_, flag, recursive)) = PROPAGATION.iter().find(|p| p.0 == word) {
            out.propagation.push((flag, recursive));
            continue;
        }
        if let Some(&(_, set, clear)) = word.strip_prefix('r').and_then(|w| ATTRIBUTES.iter().find(|a| a.0 == w)) {
            out.set_recursive = out.set_recursive & !clear | set;
            out.clear_recursive = out.clear_recursive & !set | clear;
            continue;
        }
        match word {
            "bind" => out.bind = true,
            "rbind" => (out.bind, out.recursive) = (true, true),
            "tmpcopyup" => out.copy_up = true,
            "idmap" => out.idmap = Some(false),
            "ridmap" => out.idmap = Some(true),
            _ if word.is_empty() || MEANINGLESS.contains(&word) => {}
            _ if word.contains('\0') => return Err(Error::invalid("mount option with a NUL byte")),
            _ => match word.split_once('=') {
                Some((key, value)) => out.data.push((key.to_owned(), Some(value.to_owned()))),
                None => out.data.push((word.to_owned(), None)),
            },
        }
    }
    Ok(out)
}

/// The propagation flag of `linux.rootfsPropagation`.
pub(crate) fn rootfs_propagation(word: &str) -> Result<Option<u64>> {
    if word.is_empty() {
        return Ok(None);
    }
    PROPAGATION
        .iter()
        .find(|p| p.0 == word)
        .map(|p| Some(p.1))
        .ok_or_else(|| Error::invalid(format!("linux.rootfsPropagation: unknown value {word:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> MountOptions {
        parse(&list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn only_the_kernels_words_are_left_to_it() {
        for word in super::words() {
            assert_eq!(words(&[&word]).data.is_empty(), !SUPERBLOCK.contains(&word.as_str()), "{word}");
        }
        assert!(["rro", "rrelatime", "tmpcopyup", "sync"].iter().all(|word| super::words().contains(*word)));
    }

    #[test]
    fn later_words_win() {
        assert_eq!(words(&["ro", "rw"]).set, 0);
        assert_eq!(words(&["ro", "rw"]).clear, RDONLY);
        assert_eq!(words(&["rw", "ro", "nosuid"]).set, RDONLY | NOSUID);
    }

    #[test]
    fn recursive_words_are_their_own() {
        let options = words(&["rbind", "rro", "rprivate", "rnosuid", "size=5m", "mode=1777", "inode64"]);
        assert!(options.bind && options.recursive);
        assert_eq!(options.set, 0);
        assert_eq!(options.set_recursive, RDONLY | NOSUID);
        assert_eq!(options.propagation, [(libc::MS_PRIVATE, true)]);
        assert_eq!(options.data.len(), 3);
        assert_eq!(options.data[0], ("size".to_owned(), Some("5m".to_owned())));
        assert_eq!(options.data[2], ("inode64".to_owned(), None));
    }

    #[test]
    fn relatime_is_not_a_recursive_elatime() {
        assert_eq!(words(&["relatime"]).set_recursive, 0);
        assert_eq!(words(&["relatime"]).clear, ATIME);
    }
}
