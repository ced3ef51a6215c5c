//! Pages of the program's own file that are mapped into this process.

use std::{fs, io};

use rustix::mm::{Advice, madvise};

/// Takes the pages of code and constants out of this process's memory. They stay in the page cache, and what is used again is
/// mapped again, sixteen pages at a fault. Mappings that can be written, or in which a page of our own lies, stay as they are.
///
/// # Errors
/// Those of procfs and madvise(2).
pub fn forget_code() -> io::Result<()> {
    let table = fs::read_to_string("/proc/self/smaps")?;
    let own = fs::read_link("/proc/self/exe")?;
    let own = own.to_string_lossy();
    for (start, length) in mappings(&table, own.trim_end_matches(" (deleted)")) {
        // SAFETY: the range is one whole mapping of a file, private, never writable and without a page of its own, so what a
        // later access reads is what was there: the file's. Nothing unmaps the program's file while it runs.
        unsafe { madvise(start as *mut _, length, Advice::LinuxDontNeed)? };
    }
    Ok(())
}

/// Start and length of each mapping of `file` that cannot be written and holds no anonymous page.
fn mappings(smaps: &str, file: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut last = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let unwritten = words.next().is_some_and(|flags| flags.starts_with("r-") && flags.ends_with('p'));
            let range = usize::from_str_radix(start, 16).ok().zip(usize::from_str_radix(end, 16).ok());
            last = range.filter(|_| unwritten && line.contains(file)).map(|(start, end)| (start, end - start));
        } else if first == "Anonymous:" && words.next() == Some("0") {
            found.extend(last.take());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r--p 00000000 fe:00 1 /usr/bin/isopod
Rss:                 100 kB
Anonymous:             0 kB
00500000-02000000 r-xp 00100000 fe:00 1 /usr/bin/isopod
Anonymous:             0 kB
02000000-02100000 r--p 01c00000 fe:00 1 /usr/bin/isopod
Anonymous:            64 kB
02100000-02200000 rw-p 01d00000 fe:00 1 /usr/bin/isopod
Anonymous:             0 kB
7f0000000000-7f0000001000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
";

    #[test]
    fn only_what_the_file_still_holds_is_forgotten() {
        assert_eq!(mappings(SMAPS, "/usr/bin/isopod"), [(0x40_0000, 0x10_0000), (0x50_0000, 0x1b0_0000)]);
        assert_eq!(mappings(SMAPS, "/usr/bin/other"), []);
    }

    #[test]
    fn a_process_goes_on_without_its_pages() {
        forget_code().unwrap();
        assert_eq!("still here".to_uppercase(), "STILL HERE");
    }
}
