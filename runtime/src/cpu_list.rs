//! Lists of processors and memory nodes as the kernel writes them: `0-2,8`.

use crate::error::{Error, Result};

/// Highest number accepted.
const MAX: usize = 8191;

/// Parses a list.
///
/// # Errors
/// When it is none.
pub fn parse(list: &str) -> Result<Vec<usize>> {
    let bad = || Error::invalid(format!("malformed list of processors or memory nodes {list:?}"));
    let mut out = vec![];
    for range in list.trim().split(',') {
        let (first, last) = range.trim().split_once('-').unwrap_or((range.trim(), range.trim()));
        let number = |text: &str| text.parse::<usize>().ok().filter(|n| *n <= MAX).ok_or_else(bad);
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(bad());
        }
        out.extend(first..=last);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_numbers() {
        assert_eq!(parse("0-2,8").unwrap(), [0, 1, 2, 8]);
        assert_eq!(parse(" 5 ").unwrap(), [5]);
        for bad in ["", "1-", "2-1", "x", "1,,2", "99999", "-1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
