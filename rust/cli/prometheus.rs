//! Counters of serving processes as Prometheus text.

use serde_json::{Map, Value};

/// Every metric once with its help and type, then its samples of all processes.
pub(crate) fn text(all: &[Map<String, Value>]) -> String {
    let mut text = String::new();
    for (name, key, help) in METRICS {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        text += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for counters in all {
            let pid = format!("pid=\"{}\"", counters.get("pid").unwrap_or(&Value::Null));
            for (labels, value) in samples(counters, key) {
                text += &format!("{name}{{{pid}{labels}}} {value}\n");
            }
        }
    }
    text
}

/// Labels (each with a comma before it) and value: of a number, of each reason, or (`plans.field`) of each plan.
fn samples(counters: &Map<String, Value>, key: &str) -> Vec<(String, Value)> {
    if let Some(field) = key.strip_prefix("plans.") {
        let plans = counters.get("plans").and_then(Value::as_array).into_iter().flatten().enumerate();
        // A plan that has selected nothing yet has no density.
        let known = plans.filter(|(_, plan)| plan[field].is_number());
        return known
            .map(|(i, plan)| {
                (format!(",plan=\"{i}\",page_size=\"{}\"", plan["page_size"]), plan[field].clone())
            })
            .collect();
    }
    match counters.get(key) {
        Some(Value::Object(reasons)) => reasons
            .iter()
            .map(|(reason, count)| (format!(",reason=\"{}\"", escaped(reason)), count.clone()))
            .collect(),
        Some(count) => vec![(String::new(), count.clone())],
        None => Vec::new(),
    }
}

/// As the text format wants label values.
fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Metric, its place in the file, help.
const METRICS: [(&str, &str, &str); 9] = [
    ("compactattn_steps_total", "steps", "Steps with a chunk that is long enough to be looked at."),
    ("compactattn_split_steps_total", "split_steps", "Steps of which some request was served here."),
    ("compactattn_requests_total", "our_requests", "Requests of steps that were served here."),
    ("compactattn_tokens_total", "our_tokens", "Query tokens that were served here."),
    ("compactattn_left_to_engine_total", "left_to_engine", "Requests that policy left to the engine."),
    ("compactattn_fallbacks_total", "fallbacks", "Steps and layers that fell back to dense attention."),
    ("compactattn_density", "plans.density", "Share of past blocks that sparse lists have read."),
    ("compactattn_dense_lists_total", "plans.dense", "Lists that were dense by policy."),
    (
        "compactattn_refused_total",
        "plans.refused",
        "Requests whose table or lengths were refused on the device.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::tests::FILE;

    #[test]
    fn each_counter_of_each_process_is_a_sample_under_one_heading() {
        let one: Map<String, Value> = serde_json::from_str(FILE).unwrap();
        let mut other = one.clone();
        other.insert("pid".to_owned(), Value::from(8));
        let text = super::text(&[one, other]);
        for line in [
            "# TYPE compactattn_split_steps_total counter",
            "compactattn_split_steps_total{pid=\"7\"} 12",
            "compactattn_split_steps_total{pid=\"8\"} 12",
            "compactattn_left_to_engine_total{pid=\"7\",reason=\"decode\"} 17",
            "compactattn_fallbacks_total{pid=\"7\",reason=\"layer: \\\"odd\\\"\"} 4",
            "compactattn_density{pid=\"7\",plan=\"0\",page_size=\"16\"} 0.25",
            "compactattn_refused_total{pid=\"8\",plan=\"1\",page_size=\"64\"} 0",
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line} in\n{text}");
        }
        assert!(!text.contains("null"), "{text}");
    }
}
