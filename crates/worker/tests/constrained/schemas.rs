//! Schemas drawn from a seed: every keyword that an answer of bounded length can be asked to keep to.

use serde_json::{Map, Value, json};

/// A small generator (SplitMix64); its seed is printed by whoever makes one.
pub(crate) struct Random(u64);

impl Random {
    #[allow(clippy::print_stdout, reason = "a failing test must say what it drew from")]
    pub(crate) fn seeded(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ (x >> 31)) % bound
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

const NAMES: [&str; 8] = ["id", "name", "größe", "a b", "quote\"d", "items", "$ref", "ключ"];

/// A schema; at times with definitions that refer to each other.
pub(crate) fn schema(random: &mut Random) -> Value {
    if random.below(5) > 0 {
        return any(random, 3);
    }
    let node = json!({
        "type": "object",
        "properties": { "value": any(random, 1), "next": { "anyOf": [{ "$ref": "#/$defs/leaf" }, { "type": "null" }] } },
        "required": ["value", "next"],
        "additionalProperties": false,
    });
    json!({ "$ref": "#/$defs/node", "$defs": { "node": node, "leaf": any(random, 1) } })
}

fn any(random: &mut Random, depth: u32) -> Value {
    match random.below(if depth > 0 { 11 } else { 8 }) {
        0 => json!({ "type": random.pick(&["boolean", "null"]) }),
        1 => integer(random),
        2 => json!({ "type": "string", "minLength": random.below(3), "maxLength": 3 + random.below(12) }),
        3 => {
            json!({ "type": "string", "pattern": random.pick(&["^[a-z]{2,6}$", "^\\d{4}-\\d{2}$", "^(ja|nein)!?$", "^[A-Z][a-z]{1,5} [0-9]$"]) })
        }
        4 => json!({ "type": "string", "format": random.pick(&["date", "uuid", "ipv4"]) }),
        5 => json!({ "enum": [random.below(100), "x", null, true, random.pick(&NAMES)] }),
        6 => json!({ "const": random.pick(&[json!("a\nb"), json!(-7), json!({ "k": [1, {}] }), json!([])]) }),
        7 => json!({ "type": "number", "multipleOf": 0.5, "minimum": -4, "maximum": 8 }),
        8 => array(random, depth),
        9 => object(random, depth),
        _ => json!({ "anyOf": [any(random, depth - 1), any(random, depth - 1)] }),
    }
}

fn integer(random: &mut Random) -> Value {
    let low = random.below(2000) as i64 - 1000;
    let high = low + random.below(5000) as i64;
    match random.below(3) {
        0 => json!({ "type": "integer", "minimum": low, "maximum": high }),
        1 => json!({ "type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 3 }),
        _ => json!({ "type": "integer", "minimum": low, "maximum": high + 10, "multipleOf": 3 }),
    }
}

fn array(random: &mut Random, depth: u32) -> Value {
    let least = random.below(2);
    let most = least + 1 + random.below(2);
    let mut schema =
        json!({ "type": "array", "items": any(random, depth - 1), "minItems": least, "maxItems": most });
    if random.coin() {
        schema["prefixItems"] = json!([any(random, depth - 1)]);
    }
    schema
}

fn object(random: &mut Random, depth: u32) -> Value {
    let mut properties = Map::new();
    for _ in 0..=random.below(3) {
        properties.insert(random.pick(&NAMES).to_owned(), any(random, depth - 1));
    }
    let required: Vec<String> = properties.keys().filter(|_| random.coin()).cloned().collect();
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
}
