//! Quantities against arbitrary precision.

use isopod_api::quantity::{Format, Quantity};
use num_bigint::{BigInt, Sign};
use proptest::prelude::*;

/// Suffix, its base and exponent, and the format it stands for.
const SUFFIXES: [(&str, u32, i32, Format); 21] = [
    ("n", 10, -9, Format::DecimalSi),
    ("u", 10, -6, Format::DecimalSi),
    ("m", 10, -3, Format::DecimalSi),
    ("", 10, 0, Format::DecimalSi),
    ("k", 10, 3, Format::DecimalSi),
    ("M", 10, 6, Format::DecimalSi),
    ("G", 10, 9, Format::DecimalSi),
    ("T", 10, 12, Format::DecimalSi),
    ("P", 10, 15, Format::DecimalSi),
    ("E", 10, 18, Format::DecimalSi),
    ("Ki", 2, 10, Format::BinarySi),
    ("Mi", 2, 20, Format::BinarySi),
    ("Gi", 2, 30, Format::BinarySi),
    ("Ti", 2, 40, Format::BinarySi),
    ("Pi", 2, 50, Format::BinarySi),
    ("Ei", 2, 60, Format::BinarySi),
    ("e0", 10, 0, Format::DecimalExponent),
    ("E3", 10, 3, Format::DecimalExponent),
    ("e-3", 10, -3, Format::DecimalExponent),
    ("e+6", 10, 6, Format::DecimalExponent),
    ("e-12", 10, -12, Format::DecimalExponent),
];

fn power(base: u32, exponent: u32) -> BigInt {
    BigInt::from(base).pow(exponent)
}

/// The largest amount there is, in nanos.
fn limit() -> BigInt {
    BigInt::from(i64::MAX) * power(10, 9)
}

fn clamped(nanos: BigInt) -> BigInt {
    nanos.min(limit()).max(-limit())
}

/// Quotient, away from zero.
fn away(value: &BigInt, by: &BigInt) -> BigInt {
    let part = (value.magnitude() + by.magnitude() - 1_u32) / by.magnitude();
    BigInt::from_biguint(value.sign(), part)
}

/// A text and what it is worth in nanos.
#[derive(Debug, Clone)]
struct Amount {
    text: String,
    nanos: BigInt,
    format: Format,
}

fn amount() -> impl Strategy<Value = Amount> {
    let number = ("[+-]?", "[0-9]{1,22}|0|1|1024|1536|1000000", "(\\.[0-9]{0,12})?");
    (number, prop::sample::select(SUFFIXES.to_vec())).prop_map(
        |((sign, whole, fraction), (suffix, base, exp, format))| {
            let digits = format!("{whole}{}", fraction.trim_start_matches('.'));
            let mut scaled: BigInt = digits.parse().unwrap();
            let mut divisor = power(10, fraction.len().saturating_sub(1) as u32);
            scaled *= power(10, 9);
            match exp {
                0.. => scaled *= power(base, exp as u32),
                _ => divisor *= power(base, exp.unsigned_abs()),
            }
            if sign == "-" {
                scaled = -scaled;
            }
            Amount { text: format!("{sign}{whole}{fraction}{suffix}"), nanos: clamped(away(&scaled, &divisor)), format }
        },
    )
}

/// The canonical text of an amount: the largest suffix that leaves a whole number.
fn canonical(nanos: &BigInt, format: Format) -> String {
    if nanos.sign() == Sign::NoSign {
        return "0".to_owned();
    }
    let divisible = |unit: &BigInt| (nanos % unit).sign() == Sign::NoSign;
    let whole = power(10, 9);
    let binary =
        format == Format::BinarySi && divisible(&whole) && nanos.magnitude() >= (&whole * 1024_u32).magnitude();
    let steps: Vec<(BigInt, String)> = match (binary, format) {
        (true, _) => {
            let names = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
            (0..).zip(names).map(|(n, name)| (&whole * power(1024, n), name.to_owned())).collect()
        }
        (_, Format::DecimalExponent) => (0..10)
            .map(|n| (power(1000, n), if n == 3 { String::new() } else { format!("e{}", n as i32 * 3 - 9) }))
            .collect(),
        _ => {
            let names = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
            (0..).zip(names).map(|(n, name)| (power(1000, n), name.to_owned())).collect()
        }
    };
    let (unit, name) = steps.into_iter().rev().find(|(unit, _)| divisible(unit)).unwrap();
    format!("{}{name}", nanos / unit)
}

fn parsed(amount: &Amount) -> Quantity {
    amount.text.parse().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn texts_are_worth_what_they_say(a in amount()) {
        let q = parsed(&a);
        prop_assert_eq!(q.to_string(), canonical(&a.nanos, a.format), "{}", a.text);
        let up = |unit: u32| {
            let out = away(&a.nanos, &power(10, unit)).max(i64::MIN.into()).min(i64::MAX.into());
            i64::try_from(out).unwrap()
        };
        prop_assert_eq!((q.value(), q.milli_value()), (up(9), up(6)));
        prop_assert_eq!((q.is_zero(), q.sign()), (a.nanos.sign() == Sign::NoSign, match a.nanos.sign() {
            Sign::Minus => -1, Sign::NoSign => 0, Sign::Plus => 1,
        }));
    }

    #[test]
    fn arithmetic_is_exact(a in amount(), b in amount(), factor in any::<i32>()) {
        let (x, y) = (parsed(&a), parsed(&b));
        let format = if a.nanos.sign() == Sign::NoSign { b.format } else { a.format };
        prop_assert_eq!(x.add(&y).to_string(), canonical(&clamped(&a.nanos + &b.nanos), format));
        prop_assert_eq!(x.sub(&y).to_string(), canonical(&clamped(&a.nanos - &b.nanos), format));
        prop_assert_eq!(x.mul(factor.into()).to_string(), canonical(&clamped(&a.nanos * factor), a.format));
        prop_assert_eq!(x.cmp(&y), a.nanos.cmp(&b.nanos));
    }
}
