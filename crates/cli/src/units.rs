//! Numbers with units, as a configuration writes them.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Visitor};

/// Bytes per second, from text in bits per second: "500 Mbit/s", "1.5 Gbit/s" (SI: 1 kbit is 1000 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

impl Rate {
    pub fn parse(text: &str) -> Option<Rate> {
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let factor: u64 = match text[end..].trim() {
            "bit/s" => 1,
            "kbit/s" => 1_000,
            "Mbit/s" => 1_000_000,
            "Gbit/s" => 1_000_000_000,
            "Tbit/s" => 1_000_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = text[..end].split_once('.').unwrap_or((&text[..end], ""));
        if whole.is_empty() || fraction.len() > 9 {
            return None;
        }
        let mut bits = whole.parse::<u64>().ok()?.checked_mul(factor)?;
        let mut place = factor;
        for digit in fraction.bytes() {
            place /= 10;
            bits = bits.checked_add(u64::from(digit.checked_sub(b'0').filter(|&d| d < 10)?) * place)?;
        }
        (bits >= 8).then_some(Rate(bits / 8))
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Rate, D::Error> {
        struct RateVisitor;
        impl Visitor<'_> for RateVisitor {
            type Value = Rate;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a rate such as \"500 Mbit/s\" or \"1.5 Gbit/s\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Rate, E> {
                Rate::parse(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(RateVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read() {
        for (text, bytes) in [
            ("8 bit/s", 1),
            ("500 Mbit/s", 62_500_000),
            ("1.5 Gbit/s", 187_500_000),
            ("0.001Gbit/s", 125_000),
            (" 10kbit/s ", 1250),
        ] {
            assert_eq!(Rate::parse(text), Some(Rate(bytes)), "{text}");
        }
        for text in [
            "",
            "1",
            "Mbit/s",
            "1 MB/s",
            "-1 bit/s",
            "1.2.3 bit/s",
            "7 bit/s",
            ".5 Gbit/s",
            "99999999999 Gbit/s",
        ] {
            assert_eq!(Rate::parse(text), None, "{text}");
        }
    }
}
