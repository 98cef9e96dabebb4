//! Settings written as `COMPACTATTN_CONFIG` reads them: the inverse of [`crate::config`]'s file.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::settings::{Keep, KeepAt, Settings};

/// A file whose layers have `layers`' settings and all others `settings`; the dense rules stay those of the mode.
///
/// Each layer is complete in itself, selector and all, so that nothing of it depends on the fields above it.
#[must_use]
pub fn of(settings: &Settings, layers: &BTreeMap<usize, Settings>) -> Value {
    let mut file = fields(settings);
    let layers = layers.iter().map(|(layer, own)| (layer.to_string(), Value::Object(fields(own))));
    file.insert("layers".into(), Value::Object(layers.collect()));
    Value::Object(file)
}

/// The selector, how blocks are kept, and whatever differs from what the selector is published with.
fn fields(settings: &Settings) -> Map<String, Value> {
    let published = Settings::of(settings.selector);
    let mut fields = Map::new();
    fields.insert("selector".into(), json!(settings.selector.name()));
    let (name, value) = match settings.keep {
        Keep::Threshold(x) => ("keep_threshold", x),
        Keep::Mass(x) => ("keep_mass", x),
        Keep::Density(x) => ("keep_density", x),
    };
    fields.insert(name.into(), shortest(value));
    for ((name, value), (_, usual)) in others(settings).into_iter().zip(others(&published)) {
        if value != usual {
            fields.insert(name.into(), value);
        }
    }
    fields
}

/// Every field but selector, keep rule and dense rules.
fn others(settings: &Settings) -> [(&'static str, Value); 17] {
    let at = if settings.keep_at == KeepAt::Row { "row" } else { "list" };
    [
        ("block_size", json!(settings.block_size)),
        ("query_span", json!(settings.scope.query_span)),
        ("heads_per_list", json!(settings.scope.heads_per_list)),
        ("keep_at", json!(at)),
        ("min_density", shortest(settings.min_density)),
        ("max_density", shortest(settings.max_density)),
        ("sink_blocks", json!(settings.sink_blocks)),
        ("local_blocks", json!(settings.local_blocks)),
        ("density_guard", shortest(settings.density_guard)),
        ("mean_correction", json!(settings.mean_correction)),
        ("sample_rows", json!(settings.sample_rows)),
        ("flashprefill_non_voting_spans", json!(settings.flashprefill.non_voting_spans)),
        ("flashprefill_min_budget", json!(settings.flashprefill.min_budget)),
        ("flashprefill_relative_to_past", json!(settings.flashprefill.relative_to_past)),
        ("quoka_query_ratio", shortest(settings.quoka_query_ratio)),
        ("xattention_stride", json!(settings.xattention_stride)),
        ("two_level_factor", shortest(settings.two_level_factor)),
    ]
}

/// The fewest digits that name this f32: `0.97`, not the f64 next to it.
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::settings::{FlashPrefill, Scope, Selector};

    /// Every field another than the published one.
    fn changed(selector: Selector) -> Settings {
        let usual = Settings::of(selector);
        Settings {
            block_size: 32,
            scope: Scope { query_span: 256, heads_per_list: 3 },
            keep: Keep::Threshold(0.012_345_68),
            keep_at: if usual.keep_at == KeepAt::Row { KeepAt::List } else { KeepAt::Row },
            min_density: 0.1,
            max_density: 0.7,
            sink_blocks: 5,
            local_blocks: 7,
            density_guard: 0.8,
            mean_correction: true,
            sample_rows: 9,
            flashprefill: FlashPrefill { non_voting_spans: 1, min_budget: 2, relative_to_past: true },
            quoka_query_ratio: 0.3,
            xattention_stride: 8,
            two_level_factor: 3.5,
            ..usual
        }
    }

    fn read(file: &Value) -> config::Config {
        let vars = [("COMPACTATTN_MODE", "compactattn"), ("COMPACTATTN_CONFIG", "c.json")];
        let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        config::resolve(vars.into_iter(), |_| Ok(file.to_string())).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_field_by_field() {
        for (selector, name) in Selector::ALL {
            let other = if selector == Selector::Oracle { Selector::Quoka } else { Selector::Oracle };
            for (all, one) in [(other, selector), (selector, other)] {
                for settings in [Settings::of(one), changed(one)] {
                    let file = of(&changed(all), &BTreeMap::from([(3, settings)]));
                    let config = read(&file);
                    assert_eq!(*config.layer(3), settings, "{name}: {file}");
                    assert_eq!(*config.layer(0), changed(all), "{name}: {file}");
                }
            }
        }
    }

    #[test]
    fn every_rule_is_named() {
        for keep in [Keep::Threshold(1e-5), Keep::Mass(0.97), Keep::Density(0.3)] {
            let settings = Settings { keep, ..Settings::of(Selector::SampledExact) };
            assert_eq!(read(&of(&settings, &BTreeMap::new())).settings, settings);
        }
    }
}
