//! Resource quantities as plain numbers.
//!
//! The agent only ever needs a quantity's value; the canonical forms of the API live in `isopod-api`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A quantity in thousandths, rounded up; `None` when it is not one.
pub fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let end = text
        .char_indices()
        .position(|(i, c)| !(c.is_ascii_digit() || c == '.' || (i == 0 && (c == '-' || c == '+'))))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let negative = number.starts_with('-');
    let number = number.trim_start_matches(['-', '+']);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let (multiplier, divisor): (i128, i128) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        s => {
            let exponent: i32 = s.strip_prefix(['e', 'E'])?.parse().ok()?;
            if !(-9..=18).contains(&exponent) {
                return None;
            }
            let power = 10i128.pow(exponent.unsigned_abs());
            if exponent >= 0 { (power, 1) } else { (1, power) }
        }
    };
    let fraction = &fraction[..fraction.len().min(9)];
    let scale = 10i128.pow(fraction.len() as u32);
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let divisor = divisor * scale;
    let value = (digits.checked_mul(multiplier)?.checked_mul(1000)? + divisor - 1) / divisor;
    Some(if negative { -value } else { value })
}

/// Whole units of a quantity, rounded up.
pub fn value(q: &Quantity) -> i64 {
    let m = milli(&q.0).unwrap_or(0);
    i64::try_from((m + 999).div_euclid(1000)).unwrap_or(i64::MAX)
}

/// Thousandths of a quantity (millicores).
pub fn millis(q: &Quantity) -> i64 {
    i64::try_from(milli(&q.0).unwrap_or(0)).unwrap_or(i64::MAX)
}

/// Whole units of the resource `name` in a list, if it is there.
pub fn get(list: Option<&BTreeMap<String, Quantity>>, name: &str) -> Option<i64> {
    list?.get(name).map(value)
}

/// Thousandths of the resource `name` in a list, if it is there.
pub fn get_millis(list: Option<&BTreeMap<String, Quantity>>, name: &str) -> Option<i64> {
    list?.get(name).map(millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        for (text, want) in [
            ("1", 1000),
            ("100m", 100),
            ("0.5", 500),
            ("1Ki", 1_024_000),
            ("1.5Gi", 1_610_612_736_000),
            ("2e3", 2_000_000),
            ("1n", 1),
            ("-2", -2000),
        ] {
            assert_eq!(milli(text), Some(want), "{text}");
        }
        for bad in ["", "x", "1Q", "Ki", "1e99", "."] {
            assert_eq!(milli(bad), None, "{bad}");
        }
    }
}
