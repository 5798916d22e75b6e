//! Any bytes as `config.json` (and, behind a zero byte, `generation_config.json`): refused, or a configuration that
//! can be planned for one rank.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::{ModelConfig, ShardPlan, WeightBytes};
use types::{DType, TpRank};

fuzz_target!(|content: &[u8]| {
    let mut files = content.splitn(2, |byte| *byte == 0);
    let config = files.next().unwrap_or_default();
    if let Ok(config) = ModelConfig::from_json(config, "config.json", files.next()) {
        let plan = ShardPlan::new(&config, TpRank::SOLO).expect("one rank holds any model");
        assert!(WeightBytes::new(&config, &plan, DType::F32).total().0 > 0);
    }
});
