//! Which tokens the selectors that sample score with, from the definition in rust/select/sample.rs.

use super::select::At;

impl At<'_> {
    /// `sample_rows` tokens, ascending; and false where rounding may have taken another in place of the last of the unusual
    /// ones.
    pub(super) fn sampled(&self) -> (Vec<usize>, bool) {
        let (rows, len) = (self.layout.settings.sample_rows, self.chunk.tokens.len());
        if rows == 0 || rows >= len {
            return (self.all_rows(), true);
        }
        let (candidates, start) = (len.min(1024), self.chunk.tokens.start);
        let unusual = (rows / 4).min(candidates);
        let even = rows - unusual;
        let mut tokens: Vec<usize> = if even == 1 {
            vec![start + len - 1]
        } else {
            (0..even).map(|i| start + i * (len - 1) / (even - 1)).collect()
        };
        let looked_at: Vec<usize> = (0..candidates).map(|i| start + i * len / candidates).collect();
        let mut ranked: Vec<(f64, usize)> = self.likeness(&looked_at).into_iter().zip(looked_at).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        tokens.extend(ranked[..unusual].iter().map(|(_, t)| t));
        tokens.sort_unstable();
        // A head's cosine goes through eight roundings of half a unit of 2^-23, and the sum through one more.
        let slack = self.heads.len() as f64 * 1e-6;
        let certain =
            unusual == 0 || unusual == candidates || ranked[unusual].0 - ranked[unusual - 1].0 > slack;
        (tokens, certain)
    }

    /// Of each token: the sum over heads of its query's cosine with the sum of all their queries.
    fn likeness(&self, tokens: &[usize]) -> Vec<f64> {
        let mut likeness = vec![0.0; tokens.len()];
        for head in self.heads.clone() {
            let queries: Vec<Vec<i64>> =
                tokens.iter().map(|&t| whole_numbers(&self.request.q[head][t])).collect();
            let mut mean: Vec<i64> =
                (0..self.layout.shape.head_dim).map(|x| queries.iter().map(|q| q[x]).sum()).collect();
            let top = mean.iter().map(|x| x.abs()).max().unwrap_or(0);
            let halvings = (0..).find(|&n| top >> n < 2048).unwrap_or(0);
            mean.iter_mut().for_each(|x| *x = x.div_euclid(1 << halvings));
            let dot = |a: &[i64], b: &[i64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<i64>() as f64;
            for (sum, q) in likeness.iter_mut().zip(&queries) {
                let lengths = (dot(q, q) * dot(&mean, &mean)).sqrt();
                *sum += if lengths == 0.0 { 1.0 } else { dot(q, &mean) / lengths };
            }
        }
        likeness
    }
}

/// The vector as whole numbers of at most 2047, its largest one at least 1024 before it is rounded; of a vector below
/// `2^-101`, smaller ones.
fn whole_numbers(vector: &[f64]) -> Vec<i64> {
    let top = vector.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
    let mut scale = 2.0_f64.powi(111);
    while top * scale >= 2048.0 {
        scale /= 2.0;
    }
    let rounded = vector.iter().map(|x| (x * scale).round_ties_even().clamp(-2047.0, 2047.0));
    // What is no number is 0.
    rounded.map(|x| x as i64).collect()
}
