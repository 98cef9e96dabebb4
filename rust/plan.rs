//! plan: what one step's work looks like, from shapes alone, and how much memory the largest step can need.

use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::mask;
use crate::settings::{DenseRules, Selector, Settings};
use crate::types::{Geometry, Shape};

/// The largest step a plan must serve; an engine knows these at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests in a step.
    pub max_num_reqs: usize,
    /// Query tokens in a step, over all requests.
    pub max_total_q: usize,
    /// KV tokens of one request.
    pub max_kv_len: usize,
}

impl Limits {
    /// Refuses a batch that is larger than what was planned for.
    ///
    /// # Errors
    /// [`Status::Value`] naming the limit.
    pub fn admit(&self, batch: &Batch) -> Result<()> {
        let longest = (0..batch.num_reqs()).filter(|&r| batch.q_len(r) > 0).map(|r| batch.kv_len(r)).max();
        for (name, limit, got) in [
            ("num_reqs", self.max_num_reqs, batch.num_reqs()),
            ("total_q", self.max_total_q, batch.total_q()),
            ("seq_lens", self.max_kv_len, longest.unwrap_or(0)),
        ] {
            if got > limit {
                return Err(Error::new(
                    Status::Value,
                    name,
                    format!("at most {limit}, the plan's limit"),
                    got,
                ));
            }
        }
        Ok(())
    }
}

/// Consecutive query tokens of one request that share lists (or, for select, rows of scores).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The request.
    pub req: usize,
    /// First token, counted from the chunk's first.
    pub first: usize,
    /// Tokens.
    pub len: usize,
    /// First token within the packed `q`.
    pub q_start: usize,
    /// KV tokens that the span's last token sees; its lists end there.
    pub kv_end: usize,
    /// KV tokens before the chunk.
    pub past: usize,
    /// Attends to everything, whatever the scores.
    pub dense: bool,
}

impl Span {
    /// KV tokens that the span's token `i` sees.
    #[must_use]
    pub fn visible(&self, i: usize) -> usize {
        (self.kv_end + i + 1).saturating_sub(self.len)
    }
}

/// How one layer's stages cut a batch. Buffers between stages are laid out by it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// Heads, page size, dtype.
    pub shape: Shape,
    /// Pages, blocks, boxes.
    pub geometry: Geometry,
    /// The layer's settings.
    pub settings: Settings,
    /// The largest step.
    pub limits: Limits,
}

impl Layout {
    /// Checks that shape and settings fit together.
    ///
    /// # Errors
    /// Those of [`Shape::check`] and [`Settings::check`]; [`Status::Value`] for a limit of 0;
    /// [`Status::Overflow`] for limits whose buffers leave 63 bits.
    pub fn new(shape: Shape, settings: Settings, limits: Limits) -> Result<Self> {
        shape.check()?;
        settings.check()?;
        for (name, x) in [
            ("max_num_reqs", limits.max_num_reqs),
            ("max_total_q", limits.max_total_q),
            ("max_kv_len", limits.max_kv_len),
        ] {
            if x == 0 || i32::try_from(x).is_err() {
                return Err(Error::new(Status::Value, name, "1..2^31", x));
            }
        }
        let geometry = Geometry { page_size: shape.page_size, block_size: settings.block_size };
        let layout = Self { shape, geometry, settings, limits };
        layout.score_len()?;
        Ok(layout)
    }

    /// Refuses a batch beyond the limits, or with a pool whose boxes a table entry cannot number.
    ///
    /// # Errors
    /// Those of [`Limits::admit`]; [`Status::Overflow`] naming `num_pages`.
    pub fn admit(&self, batch: &Batch) -> Result<()> {
        self.limits.admit(batch)?;
        let (pages, per_page) = (batch.k().num_pages, self.geometry.boxes_per_page());
        let most = (1 << 31) / per_page;
        if pages > most {
            let wanted = format!("at most {most} ({per_page} boxes a page, numbered by int32)");
            return Err(Error::new(Status::Overflow, "num_pages", wanted, pages));
        }
        Ok(())
    }

    /// Tokens per select span: what the selector's paper scores together, at most the list's span; 0 = the chunk.
    ///
    /// An external mask has one row per block of queries, as block-sparse masks do.
    #[must_use]
    pub fn select_span(&self) -> usize {
        let by_block = match self.settings.selector {
            Selector::FlashPrefill | Selector::AttnGate | Selector::XAttention => true,
            Selector::External => self.settings.block_size > 1,
            _ => false,
        };
        match (by_block, self.settings.scope.query_span) {
            (false, span) => span,
            (true, 0) => self.settings.block_size,
            (true, span) => span.min(self.settings.block_size),
        }
    }

    /// Query heads per list.
    #[must_use]
    pub fn heads_per_list(&self) -> usize {
        match self.settings.scope.heads_per_list {
            0 => self.shape.group_size(),
            n => n.min(self.shape.group_size()),
        }
    }

    /// Lists per KV head; the last covers what is left of the group.
    #[must_use]
    pub fn lists_per_kv_head(&self) -> usize {
        self.shape.group_size().div_ceil(self.heads_per_list())
    }

    /// Lists per list span, over all KV heads.
    #[must_use]
    pub fn lists_per_span(&self) -> usize {
        self.lists_per_kv_head() * self.shape.num_kv_heads
    }

    /// KV head and query heads (absolute) that list `list` of a span serves.
    #[must_use]
    pub fn list_heads(&self, list: usize) -> (usize, std::ops::Range<usize>) {
        let group = self.shape.group_size();
        let (kv_head, part) = (list / self.lists_per_kv_head(), list % self.lists_per_kv_head());
        let first = part * self.heads_per_list();
        let end = (first + self.heads_per_list()).min(group);
        (kv_head, kv_head * group + first..kv_head * group + end)
    }

    /// Most select spans a step can have.
    #[must_use]
    pub fn max_select_spans(&self) -> usize {
        self.most_planned().1
    }

    /// Most list rows (span, list) a step can have.
    #[must_use]
    pub fn max_list_rows(&self) -> usize {
        self.most_planned().0 * self.lists_per_span()
    }

    /// Most list spans and most select spans of a step with so many requests and query tokens.
    #[must_use]
    pub fn most_spans(&self, num_reqs: usize, total_q: usize) -> (usize, usize) {
        // Each that has queries has one span, and another for each further `span` of them.
        let reqs = num_reqs.min(total_q);
        let most = |span: usize| (total_q - reqs).checked_div(span).unwrap_or(0) + reqs;
        (most(self.settings.scope.query_span), most(self.select_span()))
    }

    fn most_planned(&self) -> (usize, usize) {
        self.most_spans(self.limits.max_num_reqs, self.limits.max_total_q)
    }

    /// Blocks of the longest request: the stride of a row of scores.
    #[must_use]
    pub fn max_blocks(&self) -> usize {
        self.geometry.blocks(self.limits.max_kv_len)
    }

    /// Words of a row of bits.
    #[must_use]
    pub fn mask_words(&self) -> usize {
        mask::words(self.max_blocks())
    }

    /// Entries of a row of the table.
    #[must_use]
    pub fn max_boxes(&self) -> usize {
        self.limits.max_kv_len.div_ceil(self.geometry.box_tokens())
    }

    /// Scores of the largest step: `[select spans, num_q_heads, max_blocks]`.
    ///
    /// # Errors
    /// [`Status::Overflow`].
    pub fn score_len(&self) -> Result<usize> {
        let rows = self.max_select_spans().checked_mul(self.shape.num_q_heads);
        rows.and_then(|rows| rows.checked_mul(self.max_blocks()))
            .filter(|&n| n < usize::MAX / 64)
            .ok_or_else(|| Error::new(Status::Overflow, "limits", "score buffers within 63 bits", "more"))
    }

    /// Spans of `tokens` query tokens (0 = whole chunks), request by request.
    #[must_use]
    pub fn spans(&self, batch: &Batch, tokens: usize) -> Vec<Span> {
        let mut spans = Vec::new();
        for req in 0..batch.num_reqs() {
            let q_len = batch.q_len(req);
            let step = if tokens == 0 { q_len.max(1) } else { tokens };
            let dense = self.is_dense(batch, req);
            for first in (0..q_len).step_by(step) {
                let len = step.min(q_len - first);
                spans.push(Span {
                    req,
                    first,
                    len,
                    q_start: batch.q_start(req) + first,
                    kv_end: batch.visible(req, first + len - 1),
                    past: batch.past_len(req),
                    dense,
                });
            }
        }
        spans
    }

    /// Spans that share rows of scores.
    #[must_use]
    pub fn select_spans(&self, batch: &Batch) -> Vec<Span> {
        self.spans(batch, self.select_span())
    }

    /// Spans that share lists. Each is a whole number of select spans (the last of a chunk may be shorter).
    #[must_use]
    pub fn list_spans(&self, batch: &Batch) -> Vec<Span> {
        self.spans(batch, self.settings.scope.query_span)
    }

    /// Whether the policy leaves every request dense in each step of at most `total_q` query tokens and `kv_len` KV
    /// tokens a request. Nothing else is asked, so a captured step may rely on it at every replay.
    #[must_use]
    pub fn only_dense(&self, total_q: usize, kv_len: usize) -> bool {
        let DenseRules { below_kv_len, max_q_len, prefix_tokens } = self.settings.dense;
        let kv_len = kv_len.min(self.limits.max_kv_len);
        // The shortest chunk that may be sparse leaves the longest past.
        let past = kv_len.saturating_sub(max_q_len + 1);
        self.settings.selector == Selector::Dense
            || total_q <= max_q_len
            || kv_len < below_kv_len
            || kv_len <= prefix_tokens
            || self.geometry.past_blocks(past) == 0
    }

    /// Whether the policy leaves this request dense in this step.
    fn is_dense(&self, batch: &Batch, req: usize) -> bool {
        let DenseRules { below_kv_len, max_q_len, prefix_tokens } = self.settings.dense;
        self.settings.selector == Selector::Dense
            || batch.q_len(req) <= max_q_len
            || batch.kv_len(req) < below_kv_len
            || batch.kv_len(req) <= prefix_tokens
            || self.geometry.past_blocks(batch.past_len(req)) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, shape};
    use crate::settings::Scope;
    use crate::types::Dtype;

    fn paged() -> Paged {
        Paged::random(1, shape(2, 7, 64, 16, Dtype::F32), &[(300, 900), (0, 5), (1, 40), (129, 129), (9, 4)])
    }

    fn settings(query_span: usize, heads_per_list: usize) -> Settings {
        Settings { scope: Scope { query_span, heads_per_list }, ..Settings::of(Selector::SampledExact) }
    }

    #[test]
    fn spans_cover_every_query_once_and_fit_the_planned_number() {
        let paged = paged();
        let batch = paged.batch();
        for tokens in [0, 128, 256, 512, 1024, 2048] {
            let layout = paged.layout(settings(tokens, 1));
            let spans = layout.list_spans(&batch);
            let covered: Vec<_> = spans.iter().flat_map(|s| s.q_start..s.q_start + s.len).collect();
            assert_eq!(covered, (0..batch.total_q()).collect::<Vec<_>>());
            assert!(spans.len() * layout.lists_per_span() <= layout.max_list_rows());
        }
    }

    /// Spans of the step of so many requests and tokens that has the most.
    fn worst(num_reqs: usize, total_q: usize, span: usize) -> usize {
        if num_reqs == 1 {
            return total_q.div_ceil(span);
        }
        let with_first = |q: usize| q.div_ceil(span) + worst(num_reqs - 1, total_q - q, span);
        (0..=total_q).map(with_first).max().unwrap()
    }

    #[test]
    fn no_step_has_more_spans_than_planned_and_one_has_as_many() {
        let layout = paged().layout(settings(128, 1));
        for (num_reqs, total_q) in [(1, 0), (1, 1), (1, 128), (1, 129), (2, 1), (2, 128), (2, 130), (3, 300)]
        {
            let (spans, _) = layout.most_spans(num_reqs, total_q);
            assert_eq!(spans, worst(num_reqs, total_q, 128), "{num_reqs} {total_q}");
        }
    }

    #[test]
    fn a_span_sees_what_bottom_right_causality_says() {
        let paged = paged();
        let batch = paged.batch();
        for span in paged.layout(settings(128, 1)).list_spans(&batch) {
            for i in 0..span.len {
                let position =
                    (batch.kv_len(span.req) + span.first + i + 1).saturating_sub(batch.q_len(span.req));
                assert_eq!(span.visible(i), position);
            }
        }
    }

    #[test]
    fn lists_of_a_span_serve_every_query_head_once() {
        for heads_per_list in [0, 1, 2, 4, 7, 9] {
            let layout = paged().layout(settings(0, heads_per_list));
            let served: Vec<_> =
                (0..layout.lists_per_span()).flat_map(|list| layout.list_heads(list).1).collect();
            assert_eq!(served, (0..14).collect::<Vec<_>>());
        }
    }

    #[test]
    fn policy_leaves_decode_short_and_first_chunks_dense() {
        let paged = paged();
        let batch = paged.batch();
        let mut sparse = settings(0, 1);
        sparse.dense.below_kv_len = 200;
        let dense = |settings| -> Vec<_> {
            paged.layout(settings).list_spans(&batch).iter().map(|s| s.dense).collect()
        };
        assert_eq!(dense(sparse), [false, true, true, true]);
        sparse.dense.prefix_tokens = 900;
        assert_eq!(dense(sparse), [true; 4]);
    }

    #[test]
    fn one_more_token_of_a_bound_is_what_a_sparse_request_needs() {
        let rules = |below_kv_len, max_q_len, prefix_tokens| {
            let dense = DenseRules { below_kv_len, max_q_len, prefix_tokens };
            paged().layout(Settings { dense, block_size: 128, ..settings(0, 1) })
        };
        for (layout, total_q, kv_len) in [
            (rules(300, 0, 0), 439, 299),
            (rules(0, 0, 300), 439, 300),
            (rules(0, 16, 0), 16, 900),
            // A past of 128 tokens, the block, behind a chunk of 17.
            (rules(0, 16, 0), 439, 144),
        ] {
            let more = if total_q == 439 { (439, kv_len + 1) } else { (total_q + 1, kv_len) };
            assert!(layout.only_dense(total_q, kv_len), "{total_q} {kv_len}");
            assert!(!layout.only_dense(more.0, more.1), "{total_q} {kv_len}");
        }
        // The plan's limit of 900 holds, whatever a table has room for.
        let mut layout = rules(901, 0, 0);
        layout.limits.max_kv_len = 900;
        assert!(layout.only_dense(439, 1 << 20));
    }

    #[test]
    fn a_batch_beyond_a_limit_is_refused_by_name() {
        let paged = paged();
        let limits = Limits { max_num_reqs: 5, max_total_q: 439, max_kv_len: 900 };
        assert_eq!(limits.admit(&paged.batch()), Ok(()));
        for (limits, name) in [
            (Limits { max_num_reqs: 4, ..limits }, "num_reqs"),
            (Limits { max_total_q: 438, ..limits }, "total_q"),
            (Limits { max_kv_len: 899, ..limits }, "seq_lens"),
        ] {
            assert!(limits.admit(&paged.batch()).unwrap_err().to_string().contains(name));
        }
    }
}
