//! Prefills a prompt in chunks, densely and with CompactAttention, and says what was read and what came out.
//!
//! `compactattn-candle MODEL.gguf [PROMPT.txt]`

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use candle_core::DType;
use compactattn::settings::{DenseRules, Selector, Settings};
use compactattn_candle::attention::{Attention, Compact, Own};
use compactattn_candle::generate;
use compactattn_candle::model::Model;

const CHUNK: usize = 512;
const NEW_TOKENS: usize = 12;

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let path = args.next().context("usage: compactattn-candle MODEL.gguf [PROMPT.txt]")?;
    let text = match args.next() {
        Some(path) => std::fs::read_to_string(path)?,
        None => long_prompt(),
    };
    let model = Model::load(&path)?;
    let encoded = model.tokenizer.encode(text, false).map_err(|error| anyhow!(error))?;
    let prompt = encoded.get_ids();
    println!("{} prompt tokens in chunks of {CHUNK}", prompt.len());

    run("candle's own", &model, prompt, &mut Own::new(&model.config, DType::F32))?;
    // The preset is made for longer prompts than this one.
    let preset = Settings::of(Selector::SampledExact);
    let dense = DenseRules { below_kv_len: 512, ..preset.dense };
    let settings = Settings { block_size: 64, dense, ..preset };
    let mut compact = Compact::new(&model.config, settings, CHUNK, prompt.len() + NEW_TOKENS)?;
    run("compactattn", &model, prompt, &mut compact)?;
    let stats = (0..model.config.num_layers)
        .map(|layer| compact.stats(layer))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let (selected, candidates): (u64, u64) =
        (stats.iter().map(|s| s.counts.selected).sum(), stats.iter().map(|s| s.counts.candidates).sum());
    println!("compactattn read {selected} of {candidates} past blocks");
    Ok(())
}

fn run(name: &str, model: &Model, prompt: &[u32], attention: &mut dyn Attention) -> Result<()> {
    let start = Instant::now();
    let tokens = generate(model, prompt, CHUNK, NEW_TOKENS, attention)?;
    let text = model.tokenizer.decode(&tokens, false).map_err(|error| anyhow!(error))?;
    println!("{name}: {:.1} s, {text:?}", start.elapsed().as_secs_f64());
    Ok(())
}

/// About 2,000 tokens with one fact to find again.
fn long_prompt() -> String {
    let filler = "The river runs past the old mill, and in the evening the swallows come back to the barn. ";
    let fact = "The secret word of the miller is pomegranate. ";
    format!(
        "{}{fact}{}Question: what is the secret word of the miller? Answer: the secret word is",
        filler.repeat(40),
        filler.repeat(50)
    )
}
