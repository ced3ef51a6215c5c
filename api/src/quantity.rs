//! [`Quantity`]: `500m`, `1Gi`, `1e3`. Fixed point at nano scale, as precise as upstream keeps it; parsing, canonical
//! text, comparison and arithmetic.

use std::{cmp::Ordering, fmt, str::FromStr};

const NANO: i128 = 1_000_000_000;
const MAX: i128 = i64::MAX as i128 * NANO;

/// Why a quantity could not be parsed; Display is upstream's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not of the form number and suffix.
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    /// An unknown suffix.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// How a quantity is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `1k`, `5m`.
    #[default]
    DecimalSi,
    /// `1Ki`.
    BinarySi,
    /// `1e3`.
    DecimalExponent,
}

/// A resource amount. Equality and order are numeric.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

/// Splits off the longest prefix of ASCII digits.
fn digits(s: &str) -> (&str, &str) {
    s.split_at(s.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(s.len()))
}

fn suffix(s: &str) -> Result<(Format, bool, i32), Error> {
    let decimal = |e| Ok((Format::DecimalSi, false, e));
    let binary = |e| Ok((Format::BinarySi, true, e));
    match s {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent = s.strip_prefix(['e', 'E']).ok_or(Error::Suffix)?;
            let exponent: i64 = exponent.parse().map_err(|_| Error::Suffix)?;
            Ok((Format::DecimalExponent, false, exponent.clamp(-1000, 1000) as i32))
        }
    }
}

/// `whole.fraction * 10^exponent` in nanos, rounded away from zero, saturating at [`MAX`].
fn scale_decimal(whole: &str, fraction: &str, exponent: i32) -> i128 {
    // The point sits after `whole`; moving it by exponent + 9 gives nanos.
    let all: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
    let point = whole.len() as i64 + i64::from(exponent) + 9;
    let mut out: i128 = 0;
    let mut lost = false;
    for (i, digit) in all.iter().enumerate() {
        if (i as i64) < point {
            out = (out * 10 + i128::from(digit - b'0')).min(MAX);
        } else if *digit != b'0' {
            lost = true;
        }
    }
    let mut i = all.len() as i64;
    while i < point && out != 0 && out < MAX {
        out = (out * 10).min(MAX);
        i += 1;
    }
    (out + i128::from(lost)).min(MAX)
}

impl FromStr for Quantity {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        if s.is_empty() {
            return Err(Error::Format);
        }
        let (negative, rest) = match s.as_bytes()[0] {
            b'-' => (true, &s[1..]),
            b'+' => (false, &s[1..]),
            _ => (false, s),
        };
        let (whole, rest) = digits(rest);
        let (fraction, rest) = match rest.strip_prefix('.') {
            Some(rest) => digits(rest),
            None => ("", rest),
        };
        let letters = rest.bytes().position(|b| !b"eEinumkKMGTP".contains(&b)).unwrap_or(rest.len());
        let tail = rest[letters..].strip_prefix(['-', '+']).unwrap_or(&rest[letters..]);
        if !digits(tail).1.is_empty() {
            return Err(Error::Format);
        }
        let (format, is_binary, exponent) = suffix(rest)?;
        let mut nanos = if is_binary {
            // The fraction of a binary quantity: 2^60 * 10^-18 and finer is below one nano.
            let unit = 1_i128 << exponent;
            let whole = scale_decimal(whole, "", -9).saturating_mul(unit).min(MAX / NANO).saturating_mul(NANO);
            let fraction = &fraction[..fraction.len().min(18)];
            let scaled: i128 = fraction.parse().unwrap_or(0);
            let divisor = 10_i128.pow(fraction.len() as u32);
            let part = mul_div_up(scaled, unit, divisor);
            whole.saturating_add(part).min(MAX)
        } else {
            scale_decimal(whole, fraction, exponent)
        };
        if negative {
            nanos = -nanos;
        }
        Ok(Self { nanos, format })
    }
}

/// `ceil(a / divisor * unit)` in nanos without overflow: a < divisor <= 10^18, unit <= 2^60.
fn mul_div_up(a: i128, unit: i128, divisor: i128) -> i128 {
    let product = a * unit;
    let (whole, rest) = (product / divisor, product % divisor);
    whole * NANO + (rest * NANO + divisor - 1) / divisor
}

impl Quantity {
    /// Zero.
    pub const ZERO: Self = Self { nanos: 0, format: Format::DecimalSi };

    /// A whole number.
    pub fn from_value(value: i64) -> Self {
        Self { nanos: i128::from(value) * NANO, format: Format::DecimalSi }
    }

    /// A number of bytes, written with binary suffixes.
    pub fn from_bytes(value: i64) -> Self {
        Self { nanos: i128::from(value) * NANO, format: Format::BinarySi }
    }

    /// A number of thousandths.
    pub fn from_milli(value: i64) -> Self {
        Self { nanos: i128::from(value) * (NANO / 1000), format: Format::DecimalSi }
    }

    /// Reads a JSON string or number; `null` is zero.
    pub fn from_json(v: &serde_json::Value) -> Result<Self, Error> {
        match v {
            serde_json::Value::Null => Ok(Self::ZERO),
            serde_json::Value::String(s) => s.trim().parse(),
            serde_json::Value::Number(n) => n.to_string().parse(),
            _ => Err(Error::Format),
        }
    }

    /// The value rounded up to a whole number.
    pub fn value(&self) -> i64 {
        div_up(self.nanos, NANO)
    }

    /// The value in thousandths, rounded up.
    pub fn milli_value(&self) -> i64 {
        div_up(self.nanos, NANO / 1000)
    }

    /// As a float, for ratios and messages.
    pub fn as_f64(&self) -> f64 {
        self.nanos as f64 / NANO as f64
    }

    /// How it is written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether it is zero.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// -1, 0 or 1.
    pub fn sign(&self) -> i32 {
        self.nanos.signum() as i32
    }

    /// Rounded up to a multiple of a thousandth.
    pub fn round_up_milli(&self) -> Self {
        let unit = NANO / 1000;
        let nanos =
            if self.nanos >= 0 { (self.nanos + unit - 1) / unit } else { (self.nanos - unit + 1) / unit } * unit;
        Self { nanos, ..*self }
    }

    fn with(&self, other: &Self, nanos: i128) -> Self {
        let format = if self.nanos == 0 { other.format } else { self.format };
        Self { nanos: nanos.clamp(-MAX, MAX), format }
    }

    /// Sum; keeps this one's format unless it is zero.
    #[must_use]
    pub fn add(&self, other: &Self) -> Self {
        self.with(other, self.nanos + other.nanos)
    }

    /// Difference; keeps this one's format unless it is zero.
    #[must_use]
    pub fn sub(&self, other: &Self) -> Self {
        self.with(other, self.nanos - other.nanos)
    }

    /// Product with a whole number.
    #[must_use]
    pub fn mul(&self, factor: i64) -> Self {
        Self { nanos: self.nanos.saturating_mul(i128::from(factor)).clamp(-MAX, MAX), format: self.format }
    }
}

fn div_up(nanos: i128, unit: i128) -> i64 {
    let out = if nanos >= 0 { (nanos + unit - 1) / unit } else { -((-nanos + unit - 1) / unit) };
    out.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        let whole = self.nanos / NANO;
        if self.format == Format::BinarySi && self.nanos % NANO == 0 && whole.abs() >= 1024 {
            let mut mantissa = whole;
            let mut power = 0;
            while mantissa % 1024 == 0 && power < 6 {
                mantissa /= 1024;
                power += 1;
            }
            return write!(f, "{mantissa}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][power]);
        }
        let mut mantissa = self.nanos;
        let mut power = 0;
        while mantissa % 1000 == 0 && power < 9 {
            mantissa /= 1000;
            power += 1;
        }
        if self.format == Format::DecimalExponent {
            let exponent = power as i32 * 3 - 9;
            return if exponent == 0 { write!(f, "{mantissa}") } else { write!(f, "{mantissa}e{exponent}") };
        }
        write!(f, "{mantissa}{}", ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][power])
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}
impl Eq for Quantity {}
impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn canonical_text() {
        for (given, want) in [
            ("0", "0"),
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.1Gi", "107374182400m"),
            ("1Ki", "1Ki"),
            ("512", "512"),
            ("1000", "1k"),
            ("1e3", "1e3"),
            ("1E6", "1e6"),
            ("100e-1", "10"),
            ("-1500m", "-1500m"),
            ("1n", "1n"),
            ("0.1n", "1n"),
            ("1.", "1"),
            (".5", "500m"),
            ("99999999999999999999E", "9223372036854775807"),
            ("8Ei", "9223372036854775807"),
            ("7Ei", "7Ei"),
            ("0.5Ki", "512"),
            ("12345678", "12345678"),
            ("+1M", "1M"),
        ] {
            assert_eq!(given.parse::<Quantity>().unwrap().to_string(), want, "{given}");
        }
    }

    #[test]
    fn refuses() {
        for (given, want) in [("", Error::Format), ("abc", Error::Format), ("1K", Error::Suffix), ("1 ", Error::Format)]
        {
            assert_eq!(given.parse::<Quantity>().unwrap_err(), want, "{given}");
        }
    }

    #[test]
    fn rounds_up() {
        let q: Quantity = "1500m".parse().unwrap();
        assert_eq!((q.value(), q.milli_value()), (2, 1500));
        assert_eq!("1u".parse::<Quantity>().unwrap().round_up_milli().to_string(), "1m");
    }

    proptest! {
        #[test]
        fn canonical_text_is_stable(n in -1_000_000_000_000_i64..1_000_000_000_000, s in prop::sample::select(
            vec!["n", "u", "m", "", "k", "M", "Ki", "Mi", "e3", "e-3"])) {
            let q: Quantity = format!("{n}{s}").parse().unwrap();
            let again: Quantity = q.to_string().parse().unwrap();
            prop_assert_eq!(q, again);
            prop_assert_eq!(q.to_string(), again.to_string());
        }

        #[test]
        fn add_then_sub(a in -1_000_000_000_i64..1_000_000_000, b in -1_000_000_000_i64..1_000_000_000) {
            let (a, b) = (Quantity::from_milli(a), Quantity::from_value(b));
            prop_assert_eq!(a.add(&b).sub(&b), a);
        }

        #[test]
        fn never_panics(s in "\\PC*") {
            let _ = s.parse::<Quantity>();
        }
    }
}
