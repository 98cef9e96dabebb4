//! The selectors that read mean keys in place of past keys.

use super::select::{At, Scored};
use super::softmax;
use crate::settings::Keep;

impl At<'_> {
    /// Block masses of attention in which each key of a block that the row sees whole is the block's mean.
    pub(super) fn pooled_mass(&self, head: usize, tokens: &[usize]) -> Vec<f64> {
        self.mixed_mass(head, tokens, &|_, sees_whole| sees_whole)
    }

    /// Masses of the group's candidate blocks with exact keys there; other blocks pooled in the total and scored 0.
    pub(super) fn two_level(&self, slack: f64) -> Scored {
        let (tokens, sampled) = self.sampled();
        let mut pooled = vec![0.0; self.past_blocks()];
        for mass in self.heads.clone().map(|head| self.pooled_mass(head, &tokens)) {
            let said = mass.iter().map(|&share| if share.is_nan() { 0.0 } else { share });
            pooled.iter_mut().zip(said).for_each(|(sum, share)| *sum += share);
        }
        let chosen = self.candidates(&pooled, slack);
        let certain = sampled && chosen.is_some();
        let candidates = chosen.unwrap_or_default();
        let score = |head: usize| {
            let past = self.past_blocks();
            let mass =
                self.mixed_mass(head, &tokens, &|block, _| block < past && !candidates.contains(&block));
            mass.iter()
                .enumerate()
                .map(|(j, &m)| if candidates.contains(&j) || m.is_nan() { m } else { 0.0 })
                .collect()
        };
        Scored { rows: self.heads.clone().map(score).collect(), certain }
    }

    /// Share of attention of each past block where the keys of `pooled(block, whether the row sees it whole)` blocks
    /// are their mean.
    fn mixed_mass(&self, head: usize, rows: &[usize], pooled: &dyn Fn(usize, bool) -> bool) -> Vec<f64> {
        let block = self.layout.settings.block_size;
        let means = self.mean_keys();
        let mut mass = vec![0.0; self.past_blocks()];
        for &t in rows {
            let sees_whole = |j: usize| (j + 1) * block <= self.request.visible(t);
            let stand_in = |key: usize| match key / block {
                j if pooled(j, sees_whole(j)) => &means[j],
                _ => &self.request.k[self.kv_head][key],
            };
            let keys = 0..self.request.visible(t);
            let weights = softmax(&keys.map(|key| self.logit(head, t, stand_in(key))).collect::<Vec<_>>());
            for (j, share) in mass.iter_mut().enumerate() {
                *share += weights[j * block..(j + 1) * block].iter().sum::<f64>() / rows.len() as f64;
            }
        }
        mass
    }

    /// A group's candidates by the sums of its heads' scores, the forced blocks among them; `None` where the last place is a tie within `slack`.
    fn candidates(&self, scores: &[f64], slack: f64) -> Option<Vec<usize>> {
        let (settings, n) = (&self.layout.settings, scores.len());
        let budget = match settings.keep {
            Keep::Density(share) => share,
            Keep::Threshold(_) | Keep::Mass(_) => settings.max_density,
        };
        let forced: Vec<usize> = (0..n).filter(|&j| super::keep::forced(settings, j, n)).collect();
        let wanted = super::keep::ceil_share((budget * settings.two_level_factor).min(1.0), n);
        let mut free: Vec<usize> = (0..n).filter(|j| !forced.contains(j)).collect();
        free.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let places = wanted.saturating_sub(forced.len());
        let tied = |&a: &usize, &b: &usize| (scores[a] - scores[b]).abs() <= slack * scores[a];
        if places > 0 && places < free.len() && tied(&free[places - 1], &free[places]) {
            return None;
        }
        free.truncate(places);
        Some([forced, free].concat())
    }
}
