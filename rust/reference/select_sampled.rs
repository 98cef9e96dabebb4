//! Which tokens the selectors that sample score with, from the definition in rust/select/sample.rs.

use super::dot;
use super::select::At;

impl At<'_> {
    /// `sample_rows` tokens, ascending; and false where rounding may have taken another in place of the last of the unusual
    /// ones.
    pub(super) fn sampled(&self) -> (Vec<usize>, bool) {
        let (rows, len) = (self.layout.settings.sample_rows, self.chunk.tokens.len());
        if rows == 0 || rows >= len {
            return (self.all_rows(), true);
        }
        let (candidates, start) = (len.min(512), self.chunk.tokens.start);
        let unusual = (rows / 4).min(candidates);
        let last = rows / 8;
        let (even, before) = (rows - unusual - last, len - last);
        let mut tokens: Vec<usize> = if even == 1 {
            vec![start + before - 1]
        } else {
            (0..even).map(|i| start + i * (before - 1) / (even - 1)).collect()
        };
        let looked_at: Vec<usize> = (0..candidates).map(|i| start + i * len / candidates).collect();
        let mut ranked: Vec<(f64, usize)> =
            self.likeness(&looked_at).into_iter().zip(looked_at.iter().copied()).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        tokens.extend(start + before..start + len);
        tokens.extend(ranked[..unusual].iter().map(|(_, t)| t));
        tokens.sort_unstable();
        // In 32 bits a product of 256 elements goes through 1 + 8 + 5 roundings, of its terms' sizes at worst; a cosine has
        // three of them, and the sum over heads one more each.
        let slack = self.heads.len() as f64 * 64.0 * f64::from(f32::EPSILON / 2.0);
        let apart = unusual == candidates || ranked[unusual.max(1) - 1].0 + slack < ranked[unusual].0;
        (tokens, unusual == 0 || apart && looked_at.iter().all(|&t| self.fits_32_bits(t)))
    }

    /// Whether the squares of a token's queries are numbers in 32 bits as well.
    fn fits_32_bits(&self, token: usize) -> bool {
        self.heads.clone().all(|head| {
            let query = &self.request.q[head][token];
            let square = dot(query, query);
            square == 0.0 || (1e-30..1e30).contains(&square)
        })
    }

    /// Of each token: the sum over heads of its query's cosine with the sum of all their queries.
    fn likeness(&self, tokens: &[usize]) -> Vec<f64> {
        let mut likeness = vec![0.0; tokens.len()];
        for head in self.heads.clone() {
            let queries: Vec<&Vec<f64>> = tokens.iter().map(|&t| &self.request.q[head][t]).collect();
            let unit = unit_of(queries[0]);
            let whole = |q: &[f64], x: usize| match q[x] / unit {
                scaled if scaled.is_nan() => -LARGEST,
                scaled => scaled.clamp(-LARGEST, LARGEST).round_ties_even(),
            };
            let dim = self.layout.shape.head_dim;
            let mean: Vec<f64> = (0..dim).map(|x| queries.iter().map(|q| whole(q, x)).sum()).collect();
            for (sum, q) in likeness.iter_mut().zip(&queries) {
                let cosine = dot(q, &mean) / (dot(q, q) * dot(&mean, &mean)).sqrt();
                *sum += if cosine.is_finite() { cosine } else { 1.0 };
            }
        }
        likeness
    }
}

/// The power of two of which the vector's largest component is 1024 to 2048; no less than `2^-111`.
fn unit_of(vector: &[f64]) -> f64 {
    let top = vector.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
    let mut unit = 2.0_f64.powi(-111);
    while top / unit >= 2048.0 {
        unit *= 2.0;
    }
    unit
}

const LARGEST: f64 = 1_048_576.0;
