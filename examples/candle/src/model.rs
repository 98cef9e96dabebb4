//! A Llama-shaped model from a GGUF file, in f32: the attention is the caller's.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::{D, Device, Result, Tensor};
use candle_nn::rotary_emb::rope_i;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{PreTokenizerWrapper, Tokenizer};

use crate::attention::Attention;

/// The model's extents.
#[derive(Clone, Debug)]
pub struct Config {
    /// Transformer blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    norm_eps: f32,
}

/// Weights and tokenizer.
pub struct Model {
    /// The model's extents.
    pub config: Config,
    /// Of the model's vocabulary.
    pub tokenizer: Tokenizer,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    /// Of each position, `[context, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
}

struct Block {
    attn_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_out: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Model {
    /// Reads the whole file. Weights are widened to f32: products of quantised activations would turn the last bits in
    /// which two attentions differ into whole steps.
    pub fn load(path: &Path) -> Result<Self> {
        let mut file = std::fs::File::open(path)?;
        let mut content = Content::read(&mut file)?;
        let config = config(&content)?;
        let tokenizer = tokenizer(&mut content)?;
        let device = Device::Cpu;
        let mut weight =
            |name: &str| content.tensor(&mut file, &format!("{name}.weight"), &device)?.dequantize(&device);
        let blocks = (0..config.num_layers)
            .map(|layer| Block::load(&mut |name| weight(&format!("blk.{layer}.{name}"))));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let (embedding, norm) = (weight("token_embd")?, weight("output_norm")?);
        let (cos, sin) = rotations(&content, config.head_dim)?;
        Ok(Self { config, tokenizer, embedding, blocks, norm, cos, sin })
    }

    /// Logits `[vocabulary]` after the last of `tokens`, the first of which stands at `position`.
    pub fn forward(&self, tokens: &[u32], position: usize, attention: &mut dyn Attention) -> Result<Tensor> {
        let mut x = self.embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = (&x + self.attend(block, layer, &x, position, attention)?)?;
            x = (&x + self.feed_forward(block, &x)?)?;
        }
        let last = self.normed(&x.narrow(0, tokens.len() - 1, 1)?, &self.norm)?;
        // The output shares the embedding's weights.
        last.matmul(&self.embedding.t()?)?.squeeze(0)
    }

    fn attend(
        &self,
        block: &Block,
        layer: usize,
        x: &Tensor,
        position: usize,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let Config { num_q_heads, num_kv_heads, head_dim, .. } = self.config;
        let (tokens, x) = (x.dim(0)?, self.normed(x, &block.attn_norm)?);
        let q = self.rotated(&x.matmul(&block.q)?.reshape((tokens, num_q_heads, head_dim))?, position)?;
        let k = self.rotated(&x.matmul(&block.k)?.reshape((tokens, num_kv_heads, head_dim))?, position)?;
        let v = x.matmul(&block.v)?.reshape((tokens, num_kv_heads, head_dim))?;
        let out = attention.forward(layer, &q, &k, &v)?;
        out.reshape((tokens, num_q_heads * head_dim))?.matmul(&block.attn_out)
    }

    fn feed_forward(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let x = self.normed(x, &block.ffn_norm)?;
        (x.matmul(&block.gate)?.silu()? * x.matmul(&block.up)?)?.matmul(&block.down)
    }

    fn normed(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm(&x.contiguous()?, weight, self.config.norm_eps)
    }

    /// `x [tokens, heads, head_dim]`; pairs are neighbours, as GGUF orders the weights of this architecture.
    fn rotated(&self, x: &Tensor, position: usize) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let (cos, sin) = (self.cos.narrow(0, position, tokens)?, self.sin.narrow(0, position, tokens)?);
        rope_i(&x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?, &cos, &sin)?
            .squeeze(0)?
            .transpose(0, 1)?
            .contiguous()
    }
}

impl Block {
    fn load(weight: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<Self> {
        // Stored as [out, in]; contiguous for the products, once.
        let mut matrix = |name: &str| weight(name)?.t()?.contiguous();
        let (q, k, v, attn_out) =
            (matrix("attn_q")?, matrix("attn_k")?, matrix("attn_v")?, matrix("attn_output")?);
        let (gate, up, down) = (matrix("ffn_gate")?, matrix("ffn_up")?, matrix("ffn_down")?);
        Ok(Self {
            attn_norm: weight("attn_norm")?,
            q,
            k,
            v,
            attn_out,
            ffn_norm: weight("ffn_norm")?,
            gate,
            up,
            down,
        })
    }
}

/// Index of the largest.
pub fn argmax(logits: &Tensor) -> Result<u32> {
    logits.argmax(D::Minus1)?.to_scalar::<u32>()
}

fn config(content: &Content) -> Result<Config> {
    let number = |name: &str| Ok::<_, candle_core::Error>(metadata(content, name)?.to_u32()? as usize);
    let num_q_heads = number("attention.head_count")?;
    Ok(Config {
        num_layers: number("block_count")?,
        num_q_heads,
        num_kv_heads: number("attention.head_count_kv")?,
        head_dim: number("embedding_length")? / num_q_heads,
        norm_eps: metadata(content, "attention.layer_norm_rms_epsilon")?.to_f32()?,
    })
}

fn metadata<'a>(content: &'a Content, name: &str) -> Result<&'a Value> {
    let missing = || candle_core::Error::Msg(format!("the file says nothing of llama.{name}"));
    content.metadata.get(&format!("llama.{name}")).ok_or_else(missing)
}

fn rotations(content: &Content, head_dim: usize) -> Result<(Tensor, Tensor)> {
    let context = metadata(content, "context_length")?.to_u32()? as usize;
    let base = metadata(content, "rope.freq_base")?.to_f32()?;
    let angles: Vec<f32> = (0..context)
        .flat_map(|at| {
            (0..head_dim / 2).map(move |i| at as f32 / base.powf(2.0 * i as f32 / head_dim as f32))
        })
        .collect();
    let angles = Tensor::from_vec(angles, (context, head_dim / 2), &Device::Cpu)?;
    Ok((angles.cos()?, angles.sin()?))
}

/// candle does not know this model's way of splitting text: single digits, then as GPT-2.
fn tokenizer(content: &mut Content) -> Result<Tokenizer> {
    content.metadata.insert("tokenizer.ggml.pre".into(), Value::String("gpt2".into()));
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    let steps = [PreTokenizerWrapper::Digits(Digits::new(true)), ByteLevel::new(false, true, true).into()];
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(steps.into()))));
    Ok(tokenizer)
}
