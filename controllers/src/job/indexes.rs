//! Sets of completion indexes, written as upstream does: `0-3,5`.

use std::collections::BTreeSet;

/// Reads `0-3,5`; indexes at or above `limit` are ignored.
pub(crate) fn parse(text: &str, limit: i32) -> BTreeSet<i32> {
    let mut all = BTreeSet::new();
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(from), Ok(to)) = (from.trim().parse::<i32>(), to.trim().parse::<i32>()) {
            all.extend((from..=to).take_while(|i| *i < limit));
        }
    }
    all
}

/// Writes `0-3,5`.
pub(crate) fn render(all: &BTreeSet<i32>) -> String {
    let mut runs: Vec<(i32, i32)> = Vec::new();
    for index in all {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *index => *last = *index,
            _ => runs.push((*index, *index)),
        }
    }
    let write = |(from, to): &(i32, i32)| match to - from {
        0 => from.to_string(),
        1 => format!("{from},{to}"),
        _ => format!("{from}-{to}"),
    };
    runs.iter().map(write).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, want) in
            [("", ""), ("0", "0"), ("0,1", "0,1"), ("0-3,5", "0-3,5"), ("5,0-2,1", "0-2,5"), ("0-99", "0-9")]
        {
            assert_eq!(render(&parse(text, 10)), want, "{text}");
        }
    }
}
