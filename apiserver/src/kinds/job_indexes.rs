//! Lists of indexes of Indexed Jobs: `0,2-5,7`.

/// How many indexes a list names; each must be below `completions`, and they must increase.
pub(super) fn count(text: &str, completions: i64) -> Result<i64, String> {
    let mut total = 0;
    let mut last = None;
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (first, end) = interval(part, completions)?;
        if let Some(previous) = last.filter(|previous| *previous >= first) {
            return Err(format!("non-increasing order, previous: {previous}, current: {first}"));
        }
        total += end - first + 1;
        last = Some(end);
    }
    Ok(total)
}

fn interval(text: &str, completions: i64) -> Result<(i64, i64), String> {
    let limits: Vec<&str> = text.split('-').collect();
    if limits.len() > 2 {
        return Err(format!(
            "the fragment {text:?} violates the requirement that an index interval can have at most two parts separated by '-'"
        ));
    }
    let number = |text: &str| -> Result<i64, String> {
        let number = text.parse().map_err(|_| format!("cannot convert string to integer for index: {text:?}"))?;
        if number >= completions { Err(format!("too large index: {text:?}")) } else { Ok(number) }
    };
    let first = number(limits[0])?;
    let Some(end) = limits.get(1) else { return Ok((first, first)) };
    let end = number(end)?;
    if first >= end {
        return Err(format!("non-increasing order, previous: {first}, current: {end}"));
    }
    Ok((first, end))
}

/// The first index that two lists both name, as far as they can be read.
pub(super) fn overlap(one: &str, other: &str, completions: i64) -> Option<i64> {
    let parse = |text: &str| -> Vec<(i64, i64)> {
        text.split(',').filter_map(|part| interval(part, completions).ok()).collect()
    };
    let other = parse(other);
    parse(one).iter().flat_map(|a| other.iter().map(move |b| (a, b))).find_map(|(a, b)| {
        let first = a.0.max(b.0);
        (first <= a.1.min(b.1)).then_some(first)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        for (text, want) in [
            ("", Ok(0)),
            ("0,2-4", Ok(4)),
            ("5", Err("too large index: \"5\"")),
            ("x", Err("cannot convert string to integer for index: \"x\"")),
            ("2,1", Err("non-increasing order, previous: 2, current: 1")),
            ("3-1", Err("non-increasing order, previous: 3, current: 1")),
            (
                "1-2-3",
                Err(
                    "the fragment \"1-2-3\" violates the requirement that an index interval can have at most two parts separated by '-'",
                ),
            ),
        ] {
            assert_eq!(count(text, 5), want.map_err(str::to_owned), "{text}");
        }
    }
}
