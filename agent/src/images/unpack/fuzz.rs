//! Made-up and mutated layers: whatever they say, nothing outside their directory changes, nothing in it is a device, and the
//! directory can be removed again.
//!
//! Run with every `cargo test`, for as many cases as proptest does; `PROPTEST_CASES=1000000 cargo test -p isopod-agent --release
//! unpack::fuzz` goes on for longer.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use proptest::{collection::vec, prelude::*};

use super::*;

/// What becomes the path of a directory outside, in names and in targets of links.
const OUTSIDE: &str = "OUT";

const NAMES: &[&str] = &[
    "a",
    "a/",
    "a/b",
    "a/b/c",
    "b",
    "l",
    "l/x",
    "l/l/x",
    "l/victim",
    "./a/./b",
    "/a",
    "//b",
    ".",
    "",
    "/",
    "..",
    "../x",
    "a/../../x",
    "OUT/victim",
    "..OUT/victim",
    ".wh.a",
    ".wh.l",
    "a/.wh.b",
    "l/.wh.victim",
    ".wh..wh..opq",
    "l/.wh..wh..opq",
    "a/b/.wh..wh..opq",
    ".wh.",
    ".wh..",
    ".wh...",
    ".wh..wh.plnk",
    "proc/self/fd/3",
    "dev/null",
];
const TARGETS: &[&str] = &[
    "a",
    "a/b",
    "b",
    "l",
    ".",
    "/",
    "..",
    "../..",
    "../../../../../../../../../../OUT",
    "OUT",
    "OUT/victim",
    "/proc/self/root",
    "/proc/self/fd",
    "/proc/self/exe",
    "",
    "l/../..",
    "x",
];
const KINDS: &[u8] = b"000000112222555534637SxgLKD\0";
const SIZES: &[u64] = &[0, 1, 511, 512, 513, 5000, 1 << 20, 1 << 40, i64::MAX as u64, u64::MAX - 511, u64::MAX];
const RECORDS: &[(&str, &str)] = &[
    ("path", "l/victim"),
    ("path", "../x"),
    ("linkpath", "OUT/victim"),
    ("linkpath", "../../../../../../../../OUT"),
    ("size", "18446744073709551615"),
    ("size", "3"),
    ("size", "-1"),
    ("uid", "4294967296"),
    ("mtime", "-1.5"),
    ("SCHILY.xattr.trusted.overlay.redirect", "/"),
    ("SCHILY.xattr.user.a", "b"),
    ("SCHILY.xattr.security.capability", "x"),
    ("GNU.sparse.realsize", "99999999999"),
    ("", ""),
];

/// A header of one entry: kind, name, target, size where it is not that of the content, content.
type Made = (usize, usize, usize, Option<usize>, usize);

fn entry(made: &Made, outside: &str, out: &mut Vec<u8>) {
    let (kind, name, target, size, content) = *made;
    let pick = |list: &[&str], n: usize| list[n % list.len()].replace(OUTSIDE, outside);
    let kind = KINDS[kind % KINDS.len()];
    let content = match kind {
        b'x' | b'g' => {
            let (key, value) = RECORDS[content % RECORDS.len()];
            let value = value.replace(OUTSIDE, outside);
            let rest = key.len() + value.len() + 5;
            format!("{rest:02} {key}={value}\n").into_bytes()
        }
        b'L' => pick(NAMES, content).into_bytes(),
        b'K' => pick(TARGETS, content).into_bytes(),
        b'0' | b'S' | b'7' | 0 => vec![b'x'; content % 2000],
        _ => vec![],
    };
    let mut header = tar::Header::new_gnu();
    let (name, target) = (pick(NAMES, name), pick(TARGETS, target));
    let put = |field: &mut [u8], text: &str| {
        let n = text.len().min(field.len());
        field[..n].copy_from_slice(&text.as_bytes()[..n]);
    };
    put(&mut header.as_old_mut().name, &name);
    put(&mut header.as_old_mut().linkname, &target);
    header.as_old_mut().linkflag = [kind];
    header.set_mode(0o7777);
    header.set_uid(1);
    header.set_gid(1);
    header.set_size(size.map_or(content.len() as u64, |n| SIZES[n % SIZES.len()]));
    if kind == b'S'
        && let Some(gnu) = header.as_gnu_mut()
    {
        gnu.set_real_size(SIZES[target.len() % SIZES.len()]);
        gnu.sparse[0].set_offset(SIZES[target.len() % SIZES.len()]);
    }
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// Files, their content and attributes, below a directory.
fn all(dir: &Path) -> Vec<(PathBuf, u32, u64, i64, Vec<u8>)> {
    let mut found = vec![];
    for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).chain([dir.to_owned()]) {
        let stat = fs::symlink_metadata(&path).unwrap();
        found.push((path.clone(), stat.mode(), stat.nlink(), stat.mtime_nsec(), fs::read(&path).unwrap_or_default()));
    }
    found.sort();
    found
}

/// No node of a layer is a device, but for whiteouts.
fn no_devices(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let stat = entry.path().symlink_metadata().unwrap();
        let kind = stat.file_type();
        assert!(!kind.is_block_device() && (!kind.is_char_device() || stat.rdev() == 0), "{:?}", entry.path());
        if kind.is_dir() {
            no_devices(&entry.path());
        }
    }
}

fn try_it(layer: impl FnOnce(&str) -> Vec<u8>) {
    let limits = Limits { bytes: 1 << 16, ratio: 2, headers: 4096, entries: 50 };
    let dir = tempfile::tempdir().unwrap();
    let (inside, outside) = (dir.path().join("layer"), dir.path().join("outside"));
    fs::create_dir(&inside).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "as it was").unwrap();
    let before = (all(&outside), fs::read_dir(dir.path()).unwrap().count());
    let _ = unpack_within(limits, &layer(outside.to_str().unwrap())[..], &inside);
    assert_eq!((all(&outside), fs::read_dir(dir.path()).unwrap().count()), before);
    no_devices(&inside);
    fs::remove_dir_all(&inside).unwrap();
}

fn tar_of(entries: &[Made], outside: &str) -> Vec<u8> {
    let mut bytes = vec![];
    entries.iter().for_each(|made| entry(made, outside, &mut bytes));
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

proptest! {
    #[test]
    fn made_up_layers(entries in vec(any::<Made>(), 0..14)) {
        try_it(|outside| tar_of(&entries, outside));
    }

    #[test]
    fn mutated_bytes(entries in vec(any::<Made>(), 1..6), changes in vec(any::<(usize, u8)>(), 1..8), cut: usize) {
        try_it(|outside| {
            let mut bytes = tar_of(&entries, outside);
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
                // Or its checksum would end every one of them.
                let start = at / 512 * 512;
                let mut header = tar::Header::from_byte_slice(&bytes[start..start + 512]).clone();
                header.set_cksum();
                bytes[start..start + 512].copy_from_slice(header.as_bytes());
            }
            let most = bytes.len();
            bytes.truncate(cut % (2 * most));
            bytes
        });
    }

    #[test]
    fn broken_compression(entries in vec(any::<Made>(), 1..6), changes in vec(any::<(usize, u8)>(), 0..4), gzip: bool) {
        try_it(|outside| {
            let tar = tar_of(&entries, outside);
            let mut bytes = if gzip {
                let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
                encoder.write_all(&tar).unwrap();
                encoder.finish().unwrap()
            } else {
                zstd::encode_all(&tar[..], 1).unwrap()
            };
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            bytes
        });
    }
}
