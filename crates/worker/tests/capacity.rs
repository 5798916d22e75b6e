//! What a group needs, for the published models; and the table of `docs/memory.md`, which is what the code computes.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

use std::fmt::Write;

use model::Preset;
use types::{BlockSize, Bytes, DType, Dispatch, ExpertSharding, KvGroup, TpSize};
use worker::{Capacity, GroupShape, Limits, Memory};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/memory.md");
const GIB: f64 = (1_u64 << 30) as f64;

fn shape(ranks: u32, memory: Memory, context: Option<u32>) -> GroupShape {
    let limits = Limits {
        block_size: BlockSize::new(16).unwrap(),
        kv_tokens: 1 << 19,
        step_tokens_max: 512,
        running_max: 64,
        waiting_requests_max: 256,
        waiting_tokens_max: 1 << 18,
    };
    GroupShape {
        tensor: TpSize::new(ranks).unwrap(),
        data: 1,
        placement: None,
        experts: ExpertSharding::Tensor,
        dispatch: Dispatch::Replicated,
        dtype: DType::BF16,
        limits,
        memory,
        context_tokens: context,
    }
}

fn capacity(preset: Preset, shape: &GroupShape) -> Capacity {
    Capacity::new(&preset.config().unwrap(), shape).unwrap()
}

#[test]
fn a_sequence_takes_what_the_published_models_take_when_sliding_layers_forget() {
    let published = [
        (Preset::NorthMiniCode, 4, "0.38"),
        (Preset::NorthMiniCode, 8, "0.48"),
        (Preset::NorthMiniCode, 32, "1.09"),
        (Preset::NorthMiniCode, 256, "6.78"),
        (Preset::CommandAPlus, 4, "0.50"),
        (Preset::CommandAPlus, 8, "0.63"),
        (Preset::CommandAPlus, 32, "1.38"),
        (Preset::CommandAPlus, 128, "4.38"),
    ];
    for (preset, thousands, expected) in published {
        let of_context = shape(1, Memory::Unknown, Some(thousands << 10));
        let bytes = capacity(preset, &of_context).kv_sequence.0 as f64;
        let off = (bytes / GIB - expected.parse::<f64>().unwrap()).abs();
        assert!(off < 0.006, "{preset} at {thousands}K: {} GiB, expected {expected}", bytes / GIB);
    }
}

#[test]
fn what_is_filled_fits_and_one_block_more_would_not() {
    let config = Preset::NorthMiniCode.config().unwrap();
    for ranks in [1, 2, 4, 8] {
        let memory = Bytes(80 << 30);
        let filled = capacity(Preset::NorthMiniCode, &shape(ranks, Memory::Filled(memory), None));
        assert!(filled.fits, "{ranks} ranks");
        let with = |kv_tokens| {
            let mut given = shape(ranks, Memory::Holds(memory), Some(4096));
            given.limits.kv_tokens = kv_tokens;
            Capacity::new(&config, &given).unwrap()
        };
        assert!(with(filled.kv_tokens).fits, "{ranks} ranks");
        assert!(!with(filled.kv_tokens + 16).fits, "{ranks} ranks");
    }
}

#[test]
fn weights_that_do_not_fit_leave_no_cache() {
    let short = capacity(Preset::CommandAPlus, &shape(2, Memory::Filled(Bytes(139 << 30)), None));
    assert!(!short.fits);
    assert_eq!((short.kv_tokens, short.concurrency), (0, 0));
}

#[test]
fn whole_experts_or_parts_of_them_take_the_same_memory_and_traffic() {
    for preset in Preset::ALL {
        for ranks in [2, 4, 8] {
            let parts = shape(ranks, Memory::Unknown, None);
            let whole = GroupShape { experts: ExpertSharding::Expert, ..parts.clone() };
            assert_eq!(capacity(preset, &parts), capacity(preset, &whole), "{preset} on {ranks}");
        }
    }
}

#[test]
fn sending_rows_to_their_experts_adds_two_exchanges_a_sparse_layer() {
    let replicated = GroupShape { experts: ExpertSharding::Expert, ..shape(4, Memory::Unknown, None) };
    let sent = GroupShape { dispatch: Dispatch::AllToAll, ..replicated.clone() };
    let [replicated, sent] =
        [replicated, sent].map(|shape| capacity(Preset::NorthMiniCode, &shape).collectives);
    assert_eq!((replicated.all_to_alls, sent.all_to_alls), (0, 2 * 48));
    assert_eq!(replicated.all_reduces, sent.all_reduces);
    assert_eq!((sent.all_reduces_per_layer, sent.all_to_all_messages_per_layer), (1, 2 * 3));
    // One row: its rank sends it to three others, with eight choices; or another sends its result.
    let most = 48 * 3 * (2048 + 16) * 4;
    assert_eq!(sent.decode_token.0 - replicated.decode_token.0, most);
}

/// The table of `docs/memory.md`: a row for each model and number of ranks.
fn table() -> String {
    let mut table = String::from(
        "| model | ranks | weights GiB | KV KiB/token full + sliding | KV tokens | sequences of 32K | of 128K | all-reduces | sent KiB/token decode | prompt |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for preset in Preset::ALL {
        for ranks in [1, 2, 4, 8] {
            let memory = Memory::Filled(Bytes(139 << 30));
            let [short, long] =
                [32 << 10, 128 << 10].map(|context| capacity(preset, &shape(ranks, memory, Some(context))));
            let [full, sliding] =
                KvGroup::ALL.map(|group| short.kv[group.index()].per_token.0 as f64 / 1024.0);
            let costs = short.collectives;
            let weights = short.ranks[0].weights.total().0 as f64 / GIB;
            write!(table, "| {preset} | {ranks} | {weights:.1} | {full} + {sliding} | ").unwrap();
            match short.fits {
                true => write!(table, "{} | {} | {} ", short.kv_tokens, short.concurrency, long.concurrency),
                false => write!(table, "does not fit | – | – "),
            }
            .unwrap();
            let [decode, prompt] = [costs.decode_token, costs.prompt_token].map(|bytes| bytes.0 / 1024);
            writeln!(table, "| {} | {decode} | {prompt} |", costs.all_reduces).unwrap();
        }
    }
    table
}

/// The other table: what one long sequence keeps, and what it would keep if sliding layers forgot nothing.
fn sequences() -> String {
    let mut table = String::from(
        "| model | context | KV GiB of one sequence | if every layer kept every token |\n|---|---|---|---|\n",
    );
    let contexts = [(Preset::NorthMiniCode, [32, 128, 256]), (Preset::CommandAPlus, [32, 64, 128])];
    for (preset, thousands) in contexts.into_iter().flat_map(|(preset, all)| all.map(|one| (preset, one))) {
        let one = capacity(preset, &shape(1, Memory::Unknown, Some(thousands << 10)));
        let all: u64 = one.kv.iter().map(|group| group.per_token.0).sum();
        let [kept, all] =
            [one.kv_sequence.0, all * u64::from(thousands << 10)].map(|bytes| bytes as f64 / GIB);
        writeln!(table, "| {preset} | {thousands}K | {kept:.2} | {all:.2} |").unwrap();
    }
    table
}

#[test]
fn the_page_about_memory_shows_what_the_code_computes() {
    let page = std::fs::read_to_string(PAGE).unwrap();
    for table in [table(), sequences()] {
        assert!(page.contains(&table), "{PAGE} should contain:\n{table}");
    }
}
