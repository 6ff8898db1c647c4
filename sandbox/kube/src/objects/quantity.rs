//! Amounts as Kubernetes writes them: `100m`, `1.5`, `64Mi`, `1e3`.

use serde_json::Value;

/// An amount in thousandths of its unit, which is as fine as anything here is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(i128);

impl Quantity {
    /// Reads a string or a number.
    pub fn of(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Self::parse(text),
            Value::Number(number) => Self::parse(&number.to_string()),
            _ => None,
        }
    }

    /// Reads text. What is finer than a thousandth is rounded up, as Kubernetes does.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = |c: char| c.is_ascii_digit() || c == '.';
        let (negative, text) = match text.strip_prefix(['+', '-']) {
            Some(rest) => (text.starts_with('-'), rest),
            None => (false, text),
        };
        let end = text.find(|c| !digits(c)).unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.len() + fraction.len() == 0 || whole.len() + fraction.len() > 18 {
            return None;
        }
        let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
        let (factor, exponent) = scale(suffix)?;
        // Thousandths, then without the decimal places of the fraction.
        let exponent = exponent + 3 - i32::try_from(fraction.len()).ok()?;
        let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
        let product = mantissa.checked_mul(factor)?;
        let amount = match exponent {
            0.. => product.checked_mul(power)?,
            _ => product.div_euclid(power) + i128::from(product.rem_euclid(power) != 0),
        };
        Some(Self(if negative { -amount } else { amount }))
    }

    /// In whole units, rounded up.
    pub fn units(self) -> i128 {
        self.0.div_euclid(1000) + i128::from(self.0.rem_euclid(1000) != 0)
    }

    /// In thousandths.
    pub fn thousandths(self) -> i128 {
        self.0
    }
}

/// Factor and power of ten of a suffix.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            ((-18..=18).contains(&exponent)).then_some((1, exponent))?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read() {
        for (text, thousandths) in [
            ("1", 1000),
            ("100m", 100),
            ("1.5", 1500),
            (".5", 500),
            ("1Ki", 1_024_000),
            ("1.5Gi", 1_610_612_736_000),
            ("2k", 2_000_000),
            ("1e3", 1_000_000),
            ("1E2", 100_000),
            ("1u", 1),
            ("-1", -1000),
            ("0", 0),
        ] {
            assert_eq!(
                Quantity::parse(text).map(Quantity::thousandths),
                Some(thousandths),
                "{text}"
            );
        }
        for bad in ["", "m", "1 Gi", "1gi", "1.2.3", "abc", "1e99", "--1"] {
            assert_eq!(Quantity::parse(bad), None, "{bad}");
        }
        assert_eq!(Quantity::parse("100m").unwrap().units(), 1);
        assert_eq!(Quantity::parse("1Gi").unwrap().units(), 1 << 30);
    }
}
