//! Layers as they should be, and as they should not.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use tar::EntryType::{Char, Directory, Fifo, GNUSparse, Link, Regular, Symlink, XGlobalHeader, XHeader};

use super::*;

fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    header
}

/// Builds a tar; paths are written raw so that hostile ones get in.
fn layer(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, kind, content) in entries {
        let link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        let mut header = header(*kind, if link { 0 } else { content.len() as u64 });
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if link {
            header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
        }
        if *kind == tar::EntryType::Directory {
            header.set_mode(0o755);
        }
        header.set_cksum();
        builder.append(&header, if link { &b""[..] } else { content.as_bytes() }).unwrap();
    }
    builder.into_inner().unwrap()
}

fn run(entries: &[(&str, tar::EntryType, &str)]) -> (tempfile::TempDir, Result<Unpacked, String>) {
    let dir = tempfile::tempdir().unwrap();
    let result = unpack(&layer(entries)[..], dir.path());
    (dir, result)
}

#[test]
fn files_links_and_whiteouts() {
    let (dir, result) = run(&[
        ("a", Directory, ""),
        ("a/file", Regular, "hello"),
        ("a/hard", Link, "a/file"),
        ("a/soft", Symlink, "file"),
        ("gone/.wh.old", Regular, ""),
        ("opaque/.wh..wh..opq", Regular, ""),
    ]);
    assert_eq!(result.unwrap().size, 5);
    let root = dir.path();
    assert_eq!(fs::read_to_string(root.join("a/soft")).unwrap(), "hello");
    assert_eq!(fs::metadata(root.join("a/file")).unwrap().nlink(), 2);
    assert_eq!(fs::symlink_metadata(root.join("gone/old")).unwrap().rdev(), 0);
    let mut value = [0u8; 4];
    let n = rustix::fs::getxattr(root.join("opaque"), "trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..n], b"y");
}

#[test]
fn later_entries_replace_earlier_ones_without_following_them() {
    let victim = tempfile::NamedTempFile::new().unwrap();
    let (dir, result) =
        run(&[("x", Symlink, victim.path().to_str().unwrap()), ("x", Regular, "mine"), ("x", Directory, "")]);
    result.unwrap();
    assert!(dir.path().join("x").is_dir());
    assert_eq!(fs::read(victim.path()).unwrap(), b"");
}

#[test]
fn compressed_layers_have_the_digest_of_the_tar() {
    let tar = layer(&[("f", Regular, "x")]);
    let plain = Digest::of(&tar);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    for bytes in [gzip.finish().unwrap(), zstd::encode_all(&tar[..], 1).unwrap(), tar.clone()] {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(unpack(&bytes[..], dir.path()).unwrap().diff_id, plain);
    }
}

/// One entry, its header changed after the fact.
fn entry(kind: tar::EntryType, name: &str, content: &[u8], change: impl FnOnce(&mut tar::Header)) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(content.len() as u64);
    change(&mut header);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut content = vec![];
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (1..).map(|digits| rest + digits).find(|n| n.to_string().len() + rest == *n).unwrap();
        content.extend_from_slice(format!("{length} {key}=").as_bytes());
        content.extend_from_slice(value);
        content.push(b'\n');
    }
    entry(XHeader, "pax", &content, |_| ())
}

fn raw(entries: &[Vec<u8>]) -> (tempfile::TempDir, Result<Unpacked, String>) {
    let dir = tempfile::tempdir().unwrap();
    let result = unpack(&[entries.concat(), vec![0; 1024]].concat()[..], dir.path());
    (dir, result)
}

#[test]
fn nothing_leaves_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "as it was").unwrap();
    let (out, file) = (outside.path().to_str().unwrap(), victim.to_str().unwrap());
    let up = "../../../../../../../../..";
    let (climb, climb_file) = (format!("{up}{out}"), format!("{up}{file}"));
    let cases: &[&[(&str, tar::EntryType, &str)]] = &[
        &[("l", Symlink, out), ("l/victim", Regular, "x")],
        &[("l", Symlink, &climb), ("l/victim", Regular, "x")],
        &[("l", Symlink, &climb_file), ("l", Regular, "x")],
        &[("l", Symlink, out), ("l/victim", Symlink, "x")],
        &[("l", Symlink, out), ("l/victim", Fifo, "")],
        &[("l", Symlink, out), ("l/victim/", Directory, "")],
        &[("l", Symlink, out), ("l/.wh.victim", Regular, "")],
        &[("l", Symlink, out), ("l/.wh..wh..opq", Regular, "")],
        &[("l", Symlink, file), ("h", Link, "l"), ("h", Regular, "x")],
        &[("l", Symlink, "/proc/self/root"), ("l/tmp/x", Regular, "x")],
        &[("l", Symlink, "/proc/self/fd"), ("l/3", Regular, "x")],
        &[("a", Symlink, "b"), ("b", Symlink, &climb), ("a/victim", Regular, "x")],
        &[("d/", Directory, ""), ("d", Symlink, out), ("d/victim", Regular, "x")],
        &[("d/f", Regular, ""), ("d", Symlink, out), ("d/victim", Regular, "x")],
    ];
    for case in cases {
        // Whether it is refused or lands inside, the victim and its directory are as they were.
        let (dir, result) = run(case);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was", "{case:?}: {result:?}");
        assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1, "{case:?}");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "{case:?}");
        let opaque = rustix::fs::getxattr(outside.path(), "trusted.overlay.opaque", &mut [0u8; 4]);
        assert_eq!(opaque, Err(Errno::NODATA), "{case:?}");
        drop(dir);
    }
}

#[test]
fn names_that_climb_are_refused_and_absolute_ones_land_inside() {
    for (name, kind, link) in [
        ("../escape", Regular, ""),
        ("a/../../escape", Regular, ""),
        ("a/..", Directory, ""),
        ("l", Link, "../../etc/passwd"),
        ("l", Link, "a/../../etc/passwd"),
        ("..", Symlink, "x"),
        ("a/../.wh.x", Regular, ""),
    ] {
        let (_dir, result) = run(&[(name, kind, link)]);
        assert_eq!(result.unwrap_err(), format!("entry \"{name}\": \"..\" in a path"));
    }
    for whiteout in [".wh.", ".wh..", ".wh..."] {
        let (_dir, result) = run(&[(whiteout, Regular, "")]);
        assert_eq!(result.unwrap_err(), format!("entry \"{whiteout}\": bad whiteout name"));
    }
    let (dir, result) = run(&[("/etc/x", Regular, "in"), ("//y", Regular, "in"), ("h", Link, "/etc/x")]);
    result.unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("h")).unwrap(), "in");
    assert!(dir.path().join("y").exists());
}

#[test]
fn hard_links_name_what_is_in_the_layer_and_follow_no_last_link() {
    for (target, why) in [
        ("missing", "No such file"),
        ("/proc/self/exe", "No such file"),
        ("/etc/passwd", "No such file"),
        ("d", "not permitted"),
        ("", "link without a target"),
        ("/", "hard link to the root directory"),
    ] {
        let (_dir, result) = run(&[("d/f", Regular, ""), ("h", Link, target)]);
        let text = result.unwrap_err();
        assert!(text.starts_with("entry \"h\"") && text.contains(why), "{target}: {text}");
    }
    let (dir, result) =
        run(&[("s", Symlink, "/etc/passwd"), ("h", Link, "s"), ("d", Symlink, "/etc"), ("x", Link, "s")]);
    result.unwrap();
    assert_eq!(fs::read_link(dir.path().join("h")).unwrap(), Path::new("/etc/passwd"));
    let (_dir, result) = run(&[("d", Symlink, "/etc"), ("h", Link, "d/passwd")]);
    assert!(result.unwrap_err().starts_with("entry \"h\": hard link to \"d/passwd\""));
}

#[test]
fn device_nodes_are_left_out_and_modes_kept() {
    let device = |name: &str, major, minor| {
        entry(Char, name, b"", |h| {
            h.set_device_major(major).unwrap();
            h.set_device_minor(minor).unwrap();
        })
    };
    let (dir, result) = raw(&[
        device("null", 1, 3),
        device("hidden", 0, 0),
        entry(tar::EntryType::Block, "disk", b"", |h| h.set_device_major(8).unwrap()),
        entry(Fifo, "pipe", b"", |h| h.set_mode(0o640)),
        entry(Regular, "su", b"x", |h| {
            h.set_mode(0o6755);
            h.set_uid(65534);
            h.set_gid(7);
        }),
    ]);
    result.unwrap();
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["pipe", "su"]);
    assert!(fs::metadata(dir.path().join("pipe")).unwrap().file_type().is_fifo());
    let su = fs::metadata(dir.path().join("su")).unwrap();
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid()), (0o6755, 65534, 7));
}

#[test]
fn only_attributes_that_stay_in_the_container_are_set() {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let (dir, result) = raw(&[
        pax(&[
            ("SCHILY.xattr.user.note", b"kept"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.trusted.overlay.metacopy", b""),
            ("SCHILY.xattr.security.selinux", b"x"),
            ("SCHILY.xattr.security.capability", &capability),
        ]),
        entry(Regular, "f", b"", |_| ()),
    ]);
    result.unwrap();
    let mut list = vec![0u8; 4096];
    let n = rustix::fs::listxattr(dir.path().join("f"), &mut list[..]).unwrap();
    let mut names: Vec<_> = list[..n].split(|b| *b == 0).map(String::from_utf8_lossy).collect();
    names.sort();
    assert_eq!(names, ["", "security.capability", "user.note"]);
    let (_dir, result) = raw(&[pax(&[("SCHILY.xattr.user.big", &[0; 70_000])]), entry(Regular, "f", b"", |_| ())]);
    let text = result.unwrap_err();
    assert!(text.starts_with("entry \"f\": attribute \"user.big\" of 70000 bytes"), "{text}");
}

#[test]
fn a_whiteout_hides_lower_layers_and_nothing_of_its_own() {
    let (dir, result) = run(&[
        ("file", Regular, "mine"),
        (".wh.file", Regular, ""),
        ("dir/f", Regular, ""),
        (".wh.dir", Regular, ""),
        (".wh.later", Regular, ""),
        ("later/", Directory, ""),
        (".wh.below", Regular, ""),
        ("below/a/b", Regular, ""),
        (".wh..wh.plnk", Regular, ""),
        (".wh.gone", Link, ".wh..wh.aufs"),
    ]);
    result.unwrap();
    let root = dir.path();
    assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "mine");
    for opaque in ["dir", "later", "below"] {
        let mut value = [0u8; 4];
        assert_eq!(rustix::fs::getxattr(root.join(opaque), "trusted.overlay.opaque", &mut value), Ok(1), "{opaque}");
    }
    assert!(root.join("dir/f").exists() && root.join("below/a/b").exists());
    assert!(fs::metadata(root.join("gone")).unwrap().file_type().is_char_device());
    assert_eq!(fs::read_dir(root).unwrap().count(), 5);
    let name = |bytes: &[u8]| root.join(OsStr::from_bytes(bytes));
    assert!(!name(b".wh.plnk").exists());
    let (dir, result) = raw(&[entry(Regular, "", b"", |h| h.as_old_mut().name[..5].copy_from_slice(b".wh.\xff"))]);
    result.unwrap();
    assert!(fs::metadata(dir.path().join(OsStr::from_bytes(b"\xff"))).unwrap().file_type().is_char_device());
}

#[test]
fn an_entry_may_change_its_type_and_come_twice() {
    let (dir, result) = run(&[
        ("x/deep/er", Regular, "1"),
        ("x", Regular, "2"),
        ("x", Symlink, "nowhere"),
        ("x", Fifo, ""),
        ("y", Regular, "kept"),
        ("x", Link, "y"),
        ("x", Link, "x"),
        ("y", Regular, "new"),
        ("z/", Directory, ""),
        ("z/", Directory, ""),
    ]);
    result.unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("x")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(dir.path().join("y")).unwrap(), "new");
}

#[test]
fn depth_is_bounded_also_through_links() {
    let deep = vec!["d"; 210].join("/");
    let long = |name: &str| entry(tar::EntryType::GNULongName, "long", format!("{name}\0").as_bytes(), |_| ());
    let (_dir, result) = raw(&[long(&deep), entry(Regular, "f", b"", |_| ())]);
    assert!(result.unwrap_err().ends_with("more than 200 directories deep"));
    let half = vec!["d"; 150].join("/");
    let (_dir, result) = raw(&[
        long(&format!("{half}/f")),
        entry(Regular, "f", b"", |_| ()),
        entry(tar::EntryType::GNULongLink, "long", half.as_bytes(), |_| ()),
        entry(Symlink, "l", b"", |_| ()),
        long(&format!("l/{half}/f")),
        entry(Regular, "f", b"", |_| ()),
    ]);
    assert!(result.unwrap_err().contains("File name too long"));
}

/// Small enough that a test reaches them.
const SMALL: Limits = Limits { bytes: 1 << 20, ratio: 10, headers: 8192, entries: 100 };

fn within(tar: &[u8]) -> (Result<Unpacked, String>, u64) {
    let dir = tempfile::tempdir().unwrap();
    let result = unpack_within(SMALL, tar, dir.path());
    let bytes = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    (result, bytes)
}

#[test]
fn bombs_stop_at_the_declared_size() {
    let tar = layer(&[("zeros", Regular, &"\0".repeat(8 << 20))]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&tar).unwrap();
    let after_the_end = [layer(&[]), vec![0; 8 << 20]].concat();
    for blob in [
        gzip.finish().unwrap(),
        zstd::encode_all(&tar[..], 19).unwrap(),
        zstd::encode_all(&after_the_end[..], 19).unwrap(),
    ] {
        let (result, bytes) = within(&blob);
        let text = result.unwrap_err();
        assert!(text.contains(&format!("{} bytes unpack to more than 1048576", blob.len())), "{text}");
        assert!(bytes <= 1 << 20, "{bytes} bytes on disk");
    }
    // A window of 2 GiB would be that much memory.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(31).unwrap();
    encoder.write_all(&tar).unwrap();
    let (result, _) = within(&encoder.finish().unwrap());
    assert!(result.unwrap_err().contains("memory"), "a window of any size is accepted");
    // What compresses no better than the ratio may be as large as it likes.
    let noise: Vec<u8> = (0..3u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let (result, bytes) = within(&[entry(Regular, "noise", &noise, |_| ()), vec![0; 1024]].concat());
    assert_eq!((result.unwrap().size, bytes), (3 << 20, 3 << 20));
}

#[test]
fn sparse_files_count_as_large_as_they_are() {
    let sparse = |real: u64, offset: u64, name: &str| {
        entry(GNUSparse, name, &[], |h| {
            let gnu = h.as_gnu_mut().unwrap();
            gnu.set_real_size(real);
            gnu.sparse[0].set_offset(offset);
            gnu.sparse[0].set_length(0);
        })
    };
    let (result, bytes) = within(&[sparse(5000, 5000, "s"), vec![0; 1024]].concat());
    assert_eq!((result.unwrap().size, bytes), (5000, 5000));
    for huge in [2 << 20, 1 << 40, i64::MAX as u64, u64::MAX] {
        let (result, bytes) = within(&[sparse(huge, huge, "s"), vec![0; 1024]].concat());
        assert!(result.unwrap_err().contains("unpacks to more than 1048576 bytes"));
        assert!(bytes <= (1 << 20) + 1, "{bytes} bytes on disk");
        let (result, _) = within(&[sparse(huge, huge, ".wh.s"), vec![0; 1024]].concat());
        assert!(result.unwrap_err().contains("a whiteout with content"));
    }
    let (result, _) = within(&[sparse(5000, 4000, "s"), vec![0; 1024]].concat());
    assert!(result.unwrap_err().contains("mismatch"));
}

#[test]
fn headers_are_bounded() {
    let kinds = [XHeader, XGlobalHeader, tar::EntryType::GNULongName, tar::EntryType::GNULongLink];
    for kind in kinds {
        // Claimed but not there, there and too large, and larger than any file.
        for (size, content) in [(1 << 40, 0), (9000, 9000), (u64::MAX - 600, 0), (u64::MAX, 0)] {
            let header = entry(kind, "h", &vec![b'x'; content], |h| h.set_size(size));
            let (result, _) = within(&[header, entry(Regular, "f", b"", |_| ()), vec![0; 20_000]].concat());
            // What describes all that follows is passed over, not kept.
            assert!(kind == XGlobalHeader && size == 9000 || result.is_err(), "{kind:?} {size}");
        }
    }
    let (result, _) = within(&[entry(XHeader, "h", &[b'x'; 9000], |_| ()), entry(Regular, "f", b"", |_| ())].concat());
    assert_eq!(result.unwrap_err(), "tar: an entry has more than 8192 bytes of headers");
    let many: Vec<u8> = (0..101).flat_map(|n| entry(Regular, &format!("f{n}"), b"", |_| ())).collect();
    assert_eq!(within(&many).0.unwrap_err(), "tar: more than 100 entries");
}

#[test]
fn numbers_at_their_bounds() {
    for (time, kept) in [(0u64, 0), (1 << 33, 1 << 33), (u64::MAX, 0), (i64::MAX as u64, i64::MAX)] {
        let (dir, result) = raw(&[entry(Regular, "f", b"", |h| h.set_mtime(time))]);
        result.unwrap();
        let got = fs::metadata(dir.path().join("f")).unwrap().mtime();
        // File systems keep less than 64 bits.
        assert!(got == kept || kept == i64::MAX && got > 1 << 33, "{time} became {got}");
    }
    // Negative, as GNU tar writes it.
    let negative = |h: &mut tar::Header| h.as_old_mut().mtime = [0xff; 12];
    assert!(raw(&[entry(Regular, "f", b"", negative)]).1.is_ok());
    let large = raw(&[entry(Regular, "f", b"", |h| h.set_uid(1 << 40))]).1;
    assert_eq!(large.unwrap_err(), "entry \"f\": uid 1099511627776 is too large");
    for size in [1 << 40, i64::MAX as u64, u64::MAX - 511, u64::MAX] {
        let (_dir, result) = raw(&[entry(Regular, "f", b"0123456789", |h| h.set_size(size))]);
        assert!(result.is_err(), "{size} bytes of which there are 10");
        let (_dir, result) = raw(&[pax(&[("size", size.to_string().as_bytes())]), entry(Regular, "f", b"x", |_| ())]);
        assert!(result.is_err(), "{size} bytes by a pax header");
    }
}

#[test]
fn a_truncated_layer_is_an_error() {
    let tar = layer(&[("f", Regular, "0123456789"), ("g", Regular, "0123456789")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let (gzip, zstd) = (gzip.finish().unwrap(), zstd::encode_all(&tar[..], 1).unwrap());
    let dir = || tempfile::tempdir().unwrap();
    for end in [1, 100, 511, 513, 515, 1023, 1025, 1500, 1540] {
        assert!(unpack(&tar[..end], dir().path()).is_err(), "{end} bytes of tar");
    }
    for blob in [gzip, zstd] {
        for end in [5, blob.len() / 2, blob.len() - 9] {
            assert!(unpack(&blob[..end], dir().path()).is_err(), "{end} bytes of {}", blob.len());
        }
    }
}
