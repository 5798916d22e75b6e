//! Reading one value without guessing: 1.5 is not a whole number, `true` is not 1, and a number is not a name.
//! Environment variables and flags arrive as text, so numbers are read from text too.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, Error, Visitor};

struct Whole<T>(PhantomData<T>);

impl<T: TryFrom<u64>> Visitor<'_> for Whole<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number of at least 0")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        match u64::try_from(value) {
            Ok(value) => self.visit_u64(value),
            Err(_) => Err(E::custom(format!("must be a whole number of at least 0, not {value}"))),
        }
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
        T::try_from(value).map_err(|_| E::custom(format!("{value} is too large")))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        match text.trim().parse::<u64>() {
            Ok(value) => self.visit_u64(value),
            Err(_) => Err(E::custom(format!("must be a whole number of at least 0, not {text:?}"))),
        }
    }
}

struct Text;

impl Visitor<'_> for Text {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text in quotes")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }
}

fn read_whole<'de, D: Deserializer<'de>, T: TryFrom<u64>>(from: D) -> Result<T, D::Error> {
    from.deserialize_any(Whole(PhantomData))
}

fn read_text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    from.deserialize_any(Text)
}

/// A whole number.
pub(crate) mod whole {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<u64>>(from: D) -> Result<T, D::Error> {
        read_whole(from)
    }
}

/// A whole number that may be left out.
pub(crate) mod whole_option {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<u64>>(
        from: D,
    ) -> Result<Option<T>, D::Error> {
        read_whole(from).map(Some)
    }
}

/// Text that may be left out, but not empty.
pub(crate) mod text_option {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: From<String>>(
        from: D,
    ) -> Result<Option<T>, D::Error> {
        let text = read_text(from)?;
        if text.is_empty() {
            return Err(D::Error::custom("must not be empty; leave the key out instead"));
        }
        Ok(Some(T::from(text)))
    }
}

/// Text, but not empty.
pub(crate) mod text {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
        let text = read_text(from)?;
        match text.is_empty() {
            true => Err(D::Error::custom("must not be empty")),
            false => Ok(text),
        }
    }
}

/// A whole number of either sign that may be left out.
pub(crate) mod integer_option {
    use super::*;

    struct Integer;

    impl Visitor<'_> for Integer {
        type Value = i32;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number")
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<i32, E> {
            i32::try_from(value).map_err(|_| E::custom(format!("{value} is too far from 0")))
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<i32, E> {
            i32::try_from(value).map_err(|_| E::custom(format!("{value} is too large")))
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<i32, E> {
            text.trim().parse().map_err(|_| E::custom(format!("must be a whole number, not {text:?}")))
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i32>, D::Error> {
        from.deserialize_any(Integer).map(Some)
    }
}

/// A list of texts; from a variable or flag, separated by commas.
pub(crate) mod text_list {
    use serde::de::SeqAccess;

    use super::*;

    struct List;

    impl<'de> Visitor<'de> for List {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of texts")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<String>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = items.next_element::<Item>()? {
                list.push(item.0);
            }
            Ok(list)
        }
    }

    struct Item(String);

    impl<'de> serde::Deserialize<'de> for Item {
        fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            read_text(from).map(Item)
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
        from.deserialize_any(List)
    }
}

/// A list of whole numbers; from a variable or flag, separated by commas.
pub(crate) mod whole_list {
    use serde::de::SeqAccess;

    use super::*;

    struct List<T>(PhantomData<T>);

    impl<'de, T: TryFrom<u64>> Visitor<'de> for List<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of whole numbers")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            items.map(|item| Whole(PhantomData).visit_str(item)).collect()
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = items.next_element::<Item<T>>()? {
                list.push(item.0);
            }
            Ok(list)
        }
    }

    struct Item<T>(T);

    impl<'de, T: TryFrom<u64>> serde::Deserialize<'de> for Item<T> {
        fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            read_whole(from).map(Item)
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<u64>>(
        from: D,
    ) -> Result<Vec<T>, D::Error> {
        from.deserialize_any(List(PhantomData))
    }
}

/// Anything written as text: a dtype, an address.
pub(crate) mod parsed {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::Serializer;

    use super::*;

    pub(crate) fn deserialize<'de, D, T>(from: D) -> Result<T, D::Error>
    where
        D: Deserializer<'de>,
        T: FromStr<Err: Display>,
    {
        let text = read_text(from)?;
        text.parse().map_err(|error| D::Error::custom(format!("{text:?}: {error}")))
    }

    pub(crate) fn serialize<S: Serializer, T: Display>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }
}

/// Anything written as text that may be left out.
pub(crate) mod parsed_option {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::Serializer;

    use super::*;

    pub(crate) fn deserialize<'de, D, T>(from: D) -> Result<Option<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: FromStr<Err: Display>,
    {
        parsed::deserialize(from).map(Some)
    }

    pub(crate) fn serialize<S: Serializer, T: Display>(value: &Option<T>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(value),
            None => to.serialize_none(),
        }
    }
}

/// Yes or no.
pub(crate) mod truth {
    use serde::Serializer;

    use super::*;

    struct Truth;

    impl Visitor<'_> for Truth {
        type Value = bool;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true or false")
        }

        fn visit_bool<E: Error>(self, value: bool) -> Result<bool, E> {
            Ok(value)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<bool, E> {
            text.trim().parse().map_err(|_| E::custom(format!("must be true or false, not {text:?}")))
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
        from.deserialize_any(Truth)
    }

    pub(crate) fn serialize<S: Serializer>(value: &bool, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bool(*value)
    }
}

/// A number, whole or not.
pub(crate) mod fraction {
    use serde::Serializer;

    use super::*;

    struct Fraction;

    impl Visitor<'_> for Fraction {
        type Value = f64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number")
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_f64<E: Error>(self, value: f64) -> Result<f64, E> {
            Ok(value)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<f64, E> {
            text.trim().parse().map_err(|_| E::custom(format!("must be a number, not {text:?}")))
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        from.deserialize_any(Fraction)
    }

    pub(crate) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(*value)
    }
}

/// A span in seconds, whole or not.
pub(crate) mod seconds {
    use std::time::Duration;

    use serde::Serializer;

    use super::*;

    struct Seconds;

    impl Visitor<'_> for Seconds {
        type Value = Duration;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of seconds")
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<Duration, E> {
            self.visit_f64(value as f64)
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<Duration, E> {
            self.visit_f64(value as f64)
        }

        fn visit_f64<E: Error>(self, value: f64) -> Result<Duration, E> {
            Duration::try_from_secs_f64(value)
                .map_err(|_| E::custom(format!("must be a number of seconds of at least 0, not {value}")))
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Duration, E> {
            match text.trim().parse::<f64>() {
                Ok(value) => self.visit_f64(value),
                Err(_) => Err(E::custom(format!("must be a number of seconds, not {text:?}"))),
            }
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        from.deserialize_any(Seconds)
    }

    pub(crate) fn serialize<S: Serializer>(span: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(span.as_secs_f64())
    }
}

/// The number of ranks of a group.
pub(crate) mod tp_size {
    use serde::Serializer;
    use types::TpSize;

    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TpSize, D::Error> {
        TpSize::new(read_whole(from)?).map_err(D::Error::custom)
    }

    pub(crate) fn serialize<S: Serializer>(size: &TpSize, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(size.get())
    }
}

/// Tokens per KV block.
pub(crate) mod block_size {
    use serde::Serializer;
    use types::BlockSize;

    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BlockSize, D::Error> {
        BlockSize::new(read_whole(from)?).map_err(D::Error::custom)
    }

    pub(crate) fn serialize<S: Serializer>(size: &BlockSize, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(size.tokens())
    }
}

/// Where the model runs.
pub(crate) mod device {
    use serde::Serializer;
    use worker::Device;

    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Device, D::Error> {
        match read_text(from)?.as_str() {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda),
            other => Err(D::Error::custom(format!("unknown device {other:?}; use auto, cpu or cuda"))),
        }
    }

    pub(crate) fn serialize<S: Serializer>(device: &Device, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(match device {
            Device::Auto => "auto",
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        })
    }
}
