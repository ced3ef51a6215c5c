//! Quantities as integers, for the hot paths that compare and add them: milli-units and whole units, rounded up as
//! upstream's `MilliValue` and `Value` do.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of a unit, rounded up; 0 for what cannot be read.
pub fn milli(quantity: &Quantity) -> i64 {
    scaled(&quantity.0, 1000)
}

/// Whole units, rounded up; 0 for what cannot be read.
pub fn value(quantity: &Quantity) -> i64 {
    scaled(&quantity.0, 1)
}

fn scaled(text: &str, scale: i128) -> i64 {
    exact(text, scale).and_then(|n| i64::try_from(n).ok()).unwrap_or(0)
}

fn exact(text: &str, scale: i128) -> Option<i128> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (number, negative) = match number.strip_prefix('-') {
        Some(rest) => (rest, true),
        None => (number.strip_prefix('+').unwrap_or(number), false),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let mut mantissa: i128 = 0;
    for byte in whole.bytes().chain(fraction.bytes()) {
        mantissa = mantissa.checked_mul(10)?.checked_add(i128::from(byte.checked_sub(b'0')?))?;
    }
    let mut below = 10i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let mut above = scale;
    match suffix {
        "" => {}
        "n" => below = below.checked_mul(1_000_000_000)?,
        "u" => below = below.checked_mul(1_000_000)?,
        "m" => below = below.checked_mul(1000)?,
        "k" => above = above.checked_mul(1000)?,
        "M" => above = above.checked_mul(1_000_000)?,
        "G" => above = above.checked_mul(1_000_000_000)?,
        "T" => above = above.checked_mul(1_000_000_000_000)?,
        "P" => above = above.checked_mul(1_000_000_000_000_000)?,
        "E" => above = above.checked_mul(1_000_000_000_000_000_000)?,
        "Ki" => above = above.checked_mul(1 << 10)?,
        "Mi" => above = above.checked_mul(1 << 20)?,
        "Gi" => above = above.checked_mul(1 << 30)?,
        "Ti" => above = above.checked_mul(1 << 40)?,
        "Pi" => above = above.checked_mul(1 << 50)?,
        "Ei" => above = above.checked_mul(1 << 60)?,
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let ten = 10i128.checked_pow(power.unsigned_abs())?;
            if power < 0 {
                below = below.checked_mul(ten)?;
            } else {
                above = above.checked_mul(ten)?;
            }
        }
    }
    let product = mantissa.checked_mul(above)?;
    let up = (product + below - 1) / below;
    Some(if negative { -(product / below) } else { up })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        for (text, thousandths, whole) in [
            ("100m", 100, 1),
            ("1", 1000, 1),
            ("1.5", 1500, 2),
            ("0.1", 100, 1),
            ("1Gi", (1 << 30) * 1000, 1 << 30),
            ("128974848", 128_974_848_000, 128_974_848),
            ("1e3", 1_000_000, 1000),
            ("100n", 1, 1),
            ("500M", 500_000_000_000, 500_000_000),
            ("junk", 0, 0),
        ] {
            let quantity = Quantity(text.to_owned());
            assert_eq!((milli(&quantity), value(&quantity)), (thousandths, whole), "{text}");
        }
    }
}
