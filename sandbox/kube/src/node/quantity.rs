//! Amounts of resources and sizes, as manifests have them and as they are computed with. Called by
//! everything in `node` that reads them. What text is one, `objects::quantity` says.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer};
use thiserror::Error;

use crate::objects::quantity;

/// An amount, in thousandths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Quantity(i128);

/// Text that is no amount.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is no quantity; write a number such as 500m, 1.5 or 128Mi")]
pub(super) struct NoQuantity(String);

/// More than this is no machine's, and could not be computed with.
const LARGEST: i128 = 1 << 80;

impl Quantity {
    /// An amount of whole ones.
    pub(super) fn whole(number: i64) -> Self {
        Self(i128::from(number) * 1000)
    }

    /// In thousandths.
    pub(super) fn milli(self) -> i64 {
        self.0.try_into().unwrap_or(i64::MAX)
    }

    /// In whole ones, rounded up.
    pub(super) fn value(self) -> i64 {
        (self.0 + 999)
            .div_euclid(1000)
            .try_into()
            .unwrap_or(i64::MAX)
    }

    /// How often `divisor` is in it, rounded up.
    pub(super) fn divided(self, divisor: Self) -> i64 {
        let by = divisor.0.max(1);
        (self.0 + by - 1)
            .div_euclid(by)
            .try_into()
            .unwrap_or(i64::MAX)
    }

    /// Whether it is nothing.
    pub(super) fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl std::ops::Add for Quantity {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl std::iter::Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| sum + one)
    }
}

impl FromStr for Quantity {
    type Err = NoQuantity;

    fn from_str(text: &str) -> Result<Self, NoQuantity> {
        let amount = quantity::Quantity::parse(text).ok_or_else(|| NoQuantity(text.into()))?;
        Ok(Self(amount.thousandths().clamp(-LARGEST, LARGEST)))
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Quantity;
            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("a quantity")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
                number.to_string().parse().map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Quantity, E> {
                number.to_string().parse().map_err(E::custom)
            }
            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Quantity, E> {
                number.to_string().parse().map_err(E::custom)
            }
        }
        from.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_reads_them() {
        let milli = |text: &str| text.parse::<Quantity>().map(Quantity::milli);
        assert_eq!(milli("500m"), Ok(500));
        assert_eq!(milli("1.5"), Ok(1500));
        assert_eq!(milli(".5"), Ok(500));
        assert_eq!(milli("2"), Ok(2000));
        assert_eq!(milli("1e3"), Ok(1_000_000));
        assert_eq!(milli("0.1m"), Ok(1));
        assert_eq!(milli("-1"), Ok(-1000));
        let value = |text: &str| text.parse::<Quantity>().map(Quantity::value);
        assert_eq!(value("128Mi"), Ok(128 << 20));
        assert_eq!(value("1.5Gi"), Ok(3 << 29));
        assert_eq!(value("1k"), Ok(1000));
        assert_eq!(value("100m"), Ok(1));
        for wrong in ["", "m", "1mi", "1 Gi", "1e99", "--1", "1.2.3"] {
            assert_eq!(wrong.parse::<Quantity>(), Err(NoQuantity(wrong.into())));
        }
        // What nobody has can still be added up.
        let most: Quantity = "99999999999Ei".parse().unwrap();
        assert_eq!((most + most).value(), i64::MAX);
    }

    #[test]
    fn division_is_rounded_up() {
        let of = |text: &str| text.parse::<Quantity>().unwrap();
        assert_eq!(of("1500m").divided(Quantity::whole(1)), 2);
        assert_eq!(of("250m").divided(of("1m")), 250);
        assert_eq!(of("100Mi").divided(of("1Mi")), 100);
    }
}
