//! SmolLM2 on candle, prefilled in chunks: candle's own attention, or CompactAttention as a candle operation.

pub mod attention;
pub mod model;

use candle_core::{Result, Tensor};

use attention::Attention;
use model::{Model, argmax};

/// Runs the prompt in chunks of at most `chunk` tokens; logits after its last token.
pub fn prefill(model: &Model, prompt: &[u32], chunk: usize, attention: &mut dyn Attention) -> Result<Tensor> {
    let mut logits = None;
    for (i, tokens) in prompt.chunks(chunk).enumerate() {
        logits = Some(model.forward(tokens, i * chunk, attention)?);
    }
    logits.ok_or_else(|| candle_core::Error::Msg("an empty prompt".into()))
}

/// The `count` likeliest tokens after a prompt, one by one.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    chunk: usize,
    count: usize,
    attention: &mut dyn Attention,
) -> Result<Vec<u32>> {
    let mut next = argmax(&prefill(model, prompt, chunk, attention)?)?;
    let mut found = vec![next];
    while found.len() < count {
        next = argmax(&model.forward(&[next], prompt.len() + found.len() - 1, attention)?)?;
        found.push(next);
    }
    Ok(found)
}
