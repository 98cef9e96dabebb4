//! seals: what tells a summary of these keys from one of other keys that lay in the same pages before.
//!
//! Engines free pages, use them again, roll sequences back, swap them out and in, and write KV in steps that this
//! library does not see. So a summary is sealed when it is written, with 64 bits of the very keys it was made from: 16
//! bytes of every 16th token's key, at least one token in every page of the block. [`crate::summaries::update`]
//! compares them with the keys that lie there now and makes anew what differs, so nobody has to be told of a write.
//!
//! A key follows from its token, its position and, after the first layer, all tokens before it; so the last probed key
//! of a page changes with anything before it. What goes unseen is other keys in an unannounced step that agree in all
//! probed bits: in the first layer, a sequence that differs from the old one at no 16th token of the block. Blocks that
//! an announced step completes are always made anew. Memory of zeros holds no seal; writing zeros breaks one.

use crate::batch::Batch;
use crate::plan::Layout;
use crate::summaries::BlockAt;

/// `u32` words of one seal buffer for a pool of `num_pages`: `[num_pages * summary_slots_per_page, num_kv_heads, 2]`,
/// low word first.
#[must_use]
pub fn len(layout: &Layout, num_pages: usize) -> usize {
    num_pages * layout.geometry.summary_slots_per_page() * layout.shape.num_kv_heads * WORDS
}

/// Seals to read and write, beside the summaries of the same blocks.
pub(crate) struct Seals<'a> {
    /// As [`len`] lays them out.
    pub(crate) words: &'a mut [u32],
    /// Whether mean values are sealed too: a seal of mean keys alone does not hold for them.
    pub(crate) values: bool,
}

impl Seals<'_> {
    /// Whether the block's summaries, of all KV heads, are of the keys that lie there; `slot` is where they are kept.
    pub(crate) fn hold(&self, layout: &Layout, batch: &Batch, at: BlockAt, slot: usize) -> bool {
        let kept = self.of(layout, slot);
        (0..layout.shape.num_kv_heads).all(|kv_head| {
            let now = seal(layout, batch, BlockAt { kv_head, ..at }, self.values);
            kept[kv_head * WORDS..][..WORDS] == words(now)
        })
    }

    /// Seals the block's summaries, just written.
    pub(crate) fn write(&mut self, layout: &Layout, batch: &Batch, at: BlockAt, slot: usize) {
        for kv_head in 0..layout.shape.num_kv_heads {
            let now = seal(layout, batch, BlockAt { kv_head, ..at }, self.values);
            let first = (slot * layout.shape.num_kv_heads + kv_head) * WORDS;
            self.words[first..first + WORDS].copy_from_slice(&words(now));
        }
    }

    fn of(&self, layout: &Layout, slot: usize) -> &[u32] {
        let width = layout.shape.num_kv_heads * WORDS;
        &self.words[slot * width..(slot + 1) * width]
    }
}

/// The seal of the block's keys as they lie; never 0.
fn seal(layout: &Layout, batch: &Batch, at: BlockAt, values: bool) -> u64 {
    let (page_size, block_size) = (layout.geometry.page_size, layout.geometry.block_size);
    let (start, step) = (at.block * block_size, PROBE_TOKENS.min(block_size));
    let probes = (start + step - 1..start + block_size).step_by(step);
    let sum = (1..).zip(probes).fold(0, |sum, (i, token)| {
        let page = batch.page(at.req, token / page_size);
        let [low, high] = batch.k().first_bits(page, token % page_size, at.kv_head);
        sum ^ mix(mix(low ^ PROBE_SALT.wrapping_mul(i)).wrapping_add(high))
    });
    sum ^ (u64::from(values) * VALUES_SALT) | 1
}

/// A bijection of 64 bits in which each one moves about half of all: odd products, folded.
fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 32).wrapping_mul(MIX);
    let x = (x ^ x >> 29).wrapping_mul(MIX);
    x ^ x >> 32
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is wanted")]
fn words(seal: u64) -> [u32; WORDS] {
    [seal as u32, (seal >> 32) as u32]
}

const WORDS: usize = 2;

/// Tokens from one probed key to the next: the smallest page, so that no page goes unprobed.
pub(crate) const PROBE_TOKENS: usize = 16;

// Odd numbers without structure, the same in cuda/summaries.
const MIX: u64 = 0xd6e8_feb8_6659_fd93;
const PROBE_SALT: u64 = 0x9e37_79b9_7f4a_7c15;
const VALUES_SALT: u64 = 0xc2b2_ae3d_27d4_eb4e;
