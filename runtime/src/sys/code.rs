//! The pages of this executable.

use std::{io, slice};

use super::check;

/// Takes the pages of code and constants out of this process's memory. They stay in the page cache, and what is used again is
/// mapped again, sixteen pages at a fault: what only a start needed is no longer counted as this process's own.
///
/// # Errors
/// Those of madvise(2); `Unsupported` where the kernel does not tell of the program's headers.
pub fn forget_code() -> io::Result<()> {
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
    fn a_process_goes_on_without_its_pages() {
        static CONSTANTS: [u64; 4096] = [7; 4096];
        super::forget_code().unwrap();
        assert_eq!(std::hint::black_box(&CONSTANTS).iter().sum::<u64>(), 7 * 4096);
    }
}
