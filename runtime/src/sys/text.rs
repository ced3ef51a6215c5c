//! The pages of this executable.

use std::{io, slice};

use super::check;

/// Gives back every page of the executable's code and constants; those used again come back from the page cache.
///
/// A supervisor that waits needs few of what it started a container with, and where it is the only one of its file those
/// would be counted as its own.
pub(crate) fn release_text() -> io::Result<()> {
    // SAFETY: getauxval only reads what the kernel gave the process.
    let (at, count) = unsafe { (libc::getauxval(libc::AT_PHDR), libc::getauxval(libc::AT_PHNUM)) };
    if at == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: the kernel tells with these two where it mapped the program headers and how many there are; they are never
    // written to or unmapped.
    let headers = unsafe { slice::from_raw_parts(at as *const libc::Elf64_Phdr, count as usize) };
    let loaded = || headers.iter().filter(|h| h.p_type == libc::PT_LOAD);
    // The headers follow the file's own of 64 bytes, at the start of its first segment.
    let Some(first) = loaded().find(|h| h.p_offset == 0) else { return Err(io::ErrorKind::Unsupported.into()) };
    let base = at - 64 - first.p_vaddr;
    for segment in loaded().filter(|h| h.p_flags & libc::PF_W == 0) {
        let start = (base + segment.p_vaddr) & !4095;
        let end = (base + segment.p_vaddr + segment.p_filesz) & !4095;
        // SAFETY: the range is whole pages of a private mapping of a file that this process never writes to (segments that
        // it does write to, relocations among it, are left out), so what is read there again is what is there now. The last
        // page may be shared with the next segment and stays.
        let advised = unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        check(advised.into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_given_back_is_still_there() {
        static CONSTANTS: [u64; 4096] = [7; 4096];
        super::release_text().unwrap();
        assert_eq!(std::hint::black_box(&CONSTANTS).iter().sum::<u64>(), 7 * 4096);
    }
}
