//! The edge: environment and JSON file to explicit [`Settings`]. Nothing else reads the environment.
//!
//! | variable | meaning |
//! |---|---|
//! | `COMPACTATTN_MODE` | `dense` (default), `compactattn` or `block_sparse`: which preset to start from |
//! | `COMPACTATTN_CONFIG` | a JSON file whose fields replace the preset's, with `"layers": {"0": {..}}` per layer |
//! | `COMPACTATTN_CHECK` | `1`: plans look at every list once more before attend follows it (`rust/check.rs`) |
//! | `COMPACTATTN_LIBCUDA` | the driver's library; `libcuda.so.1`, wherever the loader finds it, by default |
//! | `COMPACTATTN_NVTX` | `1`: each stage is an NVTX range for the profiler of `NVTX_INJECTION64_PATH`; `0` (default) |
//!
//! `dense` means dense: the file is still checked, but none of it applies.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use serde_json::{Map, Value};

use crate::error::{Error, Result, Status};
use crate::settings::{Keep, KeepAt, Selector, Settings};

/// Which preset a process runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Mode {
    /// The engine's own attention, or dense lists through ours.
    #[default]
    Dense = 0,
    /// The product's default: `sampled_exact`, one list per query head and 1024 tokens.
    CompactAttn = 1,
    /// FlashPrefill masks per query head and 128 tokens, no union.
    BlockSparse = 2,
}

impl Mode {
    /// All modes with the names users type.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Dense, "dense"), (Self::CompactAttn, "compactattn"), (Self::BlockSparse, "block_sparse")];

    /// The name users type.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(mode, _)| *mode == self).map_or("", |(_, name)| name)
    }

    /// The mode of that name; case and surrounding space do not matter.
    ///
    /// # Errors
    /// [`Status::Config`] with the accepted names.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(_, known)| name.trim().eq_ignore_ascii_case(known));
        let wanted = "dense|compactattn|block_sparse";
        found
            .map(|(mode, _)| *mode)
            .ok_or_else(|| Error::new(Status::Config, MODE, wanted, format!("{name:?}")))
    }

    /// The preset.
    #[must_use]
    pub fn settings(self) -> Settings {
        match self {
            Self::Dense => Settings::of(Selector::Dense),
            Self::CompactAttn => Settings::of(Selector::SampledExact),
            Self::BlockSparse => Settings::block_sparse(),
        }
    }
}

/// What the environment asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The preset.
    pub mode: Mode,
    /// Settings of every layer not named in `layers`.
    pub settings: Settings,
    /// Settings of single layers.
    pub layers: BTreeMap<usize, Settings>,
    /// Where each value that is not the preset's came from, for `doctor`: (name, value, source).
    pub sources: Vec<(String, String, String)>,
    /// Variables with our prefix that mean nothing to us.
    pub unknown: Vec<String>,
}

/// Reads this process's environment, and the file it names, once.
///
/// # Errors
/// [`Status::Config`] for an unknown value, key or number; [`Status::Io`] for an unreadable file.
pub fn from_env() -> Result<Config> {
    let vars = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
    resolve(vars.map(|(name, value)| (name, text(value))), |path| std::fs::read_to_string(path))
}

/// The driver's library: `COMPACTATTN_LIBCUDA`, or the name that a driver's installation provides.
///
/// # Errors
/// [`Status::Config`] for a path with a NUL inside.
pub fn libcuda() -> Result<CString> {
    libcuda_of(std::env::var_os(LIBCUDA))
}

/// Whether plans of the C ABI work in checked mode: `COMPACTATTN_CHECK`.
///
/// # Errors
/// [`Status::Config`] for what is neither 0 nor 1.
pub fn check() -> Result<bool> {
    check_of(std::env::var_os(CHECK).map(|value| value.to_string_lossy().into_owned()).as_deref())
}

fn check_of(value: Option<&str>) -> Result<bool> {
    match value.map(str::trim) {
        None | Some("" | "0") => Ok(false),
        Some("1") => Ok(true),
        Some(other) => Err(Error::new(Status::Config, CHECK, "0 or 1", format!("{other:?}"))),
    }
}

fn libcuda_of(value: Option<OsString>) -> Result<CString> {
    let path = value.filter(|path| !path.is_empty());
    let path = path.as_deref().unwrap_or(OsStr::new("libcuda.so.1"));
    CString::new(path.as_bytes()).map_err(|_| Error::new(Status::Config, LIBCUDA, "a path", "a NUL inside"))
}

/// Whether stages are ranges in a profile, and whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nvtx {
    /// They are none.
    Off,
    /// They would be, but no profiler has named its library.
    NoProfiler,
    /// The library of the profiler that takes them.
    Profiler(CString),
}

/// `COMPACTATTN_NVTX`, and the library that profilers name in `NVTX_INJECTION64_PATH`.
///
/// # Errors
/// [`Status::Config`] for a wish other than 0 and 1.
pub fn nvtx() -> Result<Nvtx> {
    nvtx_of(std::env::var_os(NVTX), std::env::var_os("NVTX_INJECTION64_PATH"))
}

fn nvtx_of(wish: Option<OsString>, library: Option<OsString>) -> Result<Nvtx> {
    if !is_wished(wish.unwrap_or_default().to_string_lossy().trim())? {
        return Ok(Nvtx::Off);
    }
    let library = library.filter(|path| !path.is_empty()).and_then(|path| CString::new(path.as_bytes()).ok());
    Ok(library.map_or(Nvtx::NoProfiler, Nvtx::Profiler))
}

fn is_wished(nvtx: &str) -> Result<bool> {
    match nvtx {
        "" | "0" => Ok(false),
        "1" => Ok(true),
        other => Err(Error::new(Status::Config, NVTX, "0 or 1", format!("{other:?}"))),
    }
}

/// [`from_env`] over given variables and files.
///
/// # Errors
/// As [`from_env`].
pub fn resolve(
    vars: impl Iterator<Item = (String, String)>,
    read: impl Fn(&str) -> std::io::Result<String>,
) -> Result<Config> {
    let vars: BTreeMap<_, _> = vars.filter(|(name, _)| name.starts_with(PREFIX)).collect();
    let mode = vars.get(MODE).map_or(Ok(Mode::default()), |name| Mode::from_name(name))?;
    let settings = mode.settings();
    let mut config =
        Config { mode, settings, layers: BTreeMap::new(), sources: Vec::new(), unknown: Vec::new() };
    if let Some(value) = vars.get(MODE) {
        config.sources.push(("mode".into(), value.trim().into(), MODE.into()));
    }
    vars.get(NVTX).map_or(Ok(false), |wish| is_wished(wish.trim()))?;
    if let Some(path) = vars.get(FILE) {
        let text = read(path).map_err(|e| Error::new(Status::Io, FILE, "a readable JSON file", e.kind()))?;
        config.apply_file(&text, path)?;
    }
    if mode == Mode::Dense {
        (config.settings, config.layers) = (mode.settings(), BTreeMap::new());
        config.sources.retain(|(_, _, source)| source == MODE);
    }
    if check_of(vars.get(CHECK).map(String::as_str))? {
        config.sources.push(("check".into(), "1".into(), CHECK.into()));
    }
    config.unknown = vars
        .into_keys()
        .filter(|name| ![MODE, FILE, LIBCUDA, CHECK, NVTX].contains(&name.as_str()))
        .filter(|name| !ELSEWHERE.contains(&name.as_str()) && !of_kubernetes(name))
        .collect();
    Ok(config)
}

/// Kubernetes injects these for a Service that is called like us.
fn of_kubernetes(name: &str) -> bool {
    ["COMPACTATTN_PORT", "COMPACTATTN_SERVICE_"].iter().any(|prefix| name.starts_with(prefix))
}

impl Config {
    /// Settings of one layer.
    #[must_use]
    pub fn layer(&self, layer: usize) -> &Settings {
        self.layers.get(&layer).unwrap_or(&self.settings)
    }

    fn apply_file(&mut self, text: &str, path: &str) -> Result<()> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| Error::new(Status::Config, FILE, "JSON", e.to_string()))?;
        let mut fields = object("the file", value)?;
        let layers = fields.remove("layers").map_or(Ok(Map::new()), |value| object("layers", value))?;
        self.apply(None, &fields, path)?;
        for (key, value) in layers {
            let layer =
                key.parse().map_err(|_| Error::new(Status::Config, "layers", "layer numbers", &key))?;
            self.apply(Some(layer), &object(&key, value)?, path)?;
        }
        Ok(())
    }

    fn apply(&mut self, layer: Option<usize>, fields: &Map<String, Value>, path: &str) -> Result<()> {
        let mut settings = self.settings;
        // A selector brings its own published constants, which the other fields then change.
        if let Some(value) = fields.get("selector") {
            settings = Settings::of(Selector::from_name(&string("selector", value)?)?);
        }
        let rules: Vec<_> =
            fields.keys().filter(|name| KEEP_RULES.contains(&name.as_str())).cloned().collect();
        if rules.len() > 1 {
            return Err(Error::new(Status::Config, "keep", "one rule", rules.join(", ")));
        }
        for (name, value) in fields {
            set(&mut settings, name, value)?;
            let name = layer.map_or(name.clone(), |layer| format!("layers.{layer}.{name}"));
            self.sources.push((name, value.to_string(), path.to_owned()));
        }
        settings.check()?;
        match layer {
            None => self.settings = settings,
            Some(layer) => drop(self.layers.insert(layer, settings)),
        }
        Ok(())
    }
}

/// Sets one field by the name it has in [`Settings`].
fn set(settings: &mut Settings, name: &str, value: &Value) -> Result<()> {
    match name {
        "selector" => {}
        "block_size" => settings.block_size = count(name, value)?,
        "query_span" => settings.scope.query_span = count(name, value)?,
        "heads_per_list" => settings.scope.heads_per_list = count(name, value)?,
        "keep_threshold" => settings.keep = Keep::Threshold(number(name, value)?),
        "keep_mass" => settings.keep = Keep::Mass(number(name, value)?),
        "keep_density" => settings.keep = Keep::Density(number(name, value)?),
        "keep_at" => settings.keep_at = keep_at(&string(name, value)?)?,
        "min_density" => settings.min_density = number(name, value)?,
        "max_density" => settings.max_density = number(name, value)?,
        "sink_blocks" => settings.sink_blocks = count(name, value)?,
        "local_blocks" => settings.local_blocks = count(name, value)?,
        "density_guard" => settings.density_guard = number(name, value)?,
        "mean_correction" => settings.mean_correction = flag(name, value)?,
        "dense_below_kv_len" => settings.dense.below_kv_len = count(name, value)?,
        "dense_max_q_len" => settings.dense.max_q_len = count(name, value)?,
        "dense_prefix_tokens" => settings.dense.prefix_tokens = count(name, value)?,
        "sample_rows" => settings.sample_rows = count(name, value)?,
        "flashprefill_non_voting_spans" => settings.flashprefill.non_voting_spans = count(name, value)?,
        "flashprefill_min_budget" => settings.flashprefill.min_budget = count(name, value)?,
        "flashprefill_relative_to_past" => settings.flashprefill.relative_to_past = flag(name, value)?,
        "quoka_query_ratio" => settings.quoka_query_ratio = number(name, value)?,
        "xattention_stride" => settings.xattention_stride = count(name, value)?,
        "two_level_factor" => settings.two_level_factor = number(name, value)?,
        _ => {
            return Err(Error::new(Status::Config, name, "a setting (see SETTINGS.md)", "an unknown name"));
        }
    }
    Ok(())
}

fn keep_at(name: &str) -> Result<KeepAt> {
    match name {
        "row" => Ok(KeepAt::Row),
        "list" => Ok(KeepAt::List),
        _ => Err(Error::new(Status::Config, "keep_at", "row|list", format!("{name:?}"))),
    }
}

fn object(name: &str, value: Value) -> Result<Map<String, Value>> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(Error::new(Status::Config, name, "a JSON object", other)),
    }
}

fn string(name: &str, value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).ok_or_else(|| Error::new(Status::Config, name, "a string", value))
}

fn count(name: &str, value: &Value) -> Result<usize> {
    let number = value.as_u64().and_then(|x| usize::try_from(x).ok());
    number.ok_or_else(|| Error::new(Status::Config, name, "a whole number >= 0", value))
}

#[expect(clippy::cast_possible_truncation, reason = "settings are f32")]
fn number(name: &str, value: &Value) -> Result<f32> {
    value.as_f64().map(|x| x as f32).ok_or_else(|| Error::new(Status::Config, name, "a number", value))
}

fn flag(name: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| Error::new(Status::Config, name, "true or false", value))
}

/// Each replaces the others, so a file names one of them.
const KEEP_RULES: [&str; 3] = ["keep_threshold", "keep_mass", "keep_density"];
const PREFIX: &str = "COMPACTATTN_";
const MODE: &str = "COMPACTATTN_MODE";
const FILE: &str = "COMPACTATTN_CONFIG";
const LIBCUDA: &str = "COMPACTATTN_LIBCUDA";
const CHECK: &str = "COMPACTATTN_CHECK";
const NVTX: &str = "COMPACTATTN_NVTX";
/// Read by SGLang's adapter and by the build.
const ELSEWHERE: [&str; 4] =
    ["COMPACTATTN_SGLANG", "COMPACTATTN_CUDA", "COMPACTATTN_KERNEL_CACHE", "COMPACTATTN_PYTHON"];

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)], file: &str) -> Result<Config> {
        let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        resolve(vars, |_| Ok(file.to_owned()))
    }

    #[test]
    fn an_empty_environment_is_dense() {
        let config = of(&[], "").unwrap();
        assert_eq!((config.mode, config.settings.selector), (Mode::Dense, Selector::Dense));
    }

    #[test]
    fn a_mode_is_trimmed_and_case_does_not_matter() {
        let config = of(&[("COMPACTATTN_MODE", " CompactAttn ")], "").unwrap();
        assert_eq!(config.settings, Settings::of(Selector::SampledExact));
    }

    #[test]
    fn checked_mode_is_0_or_1_and_shown_in_every_mode() {
        let on = of(&[("COMPACTATTN_CHECK", "1")], "").unwrap();
        assert_eq!(on.sources, [("check".to_owned(), "1".to_owned(), "COMPACTATTN_CHECK".to_owned())]);
        assert_eq!(of(&[("COMPACTATTN_CHECK", "0")], "").unwrap().sources, []);
        assert!(of(&[("COMPACTATTN_CHECK", "yes")], "").unwrap_err().to_string().contains("0 or 1"));
        assert!(on.unknown.is_empty());
    }

    #[test]
    fn an_unknown_mode_is_refused_with_the_accepted_ones() {
        let error = of(&[("COMPACTATTN_MODE", "sparse")], "").unwrap_err();
        assert!(error.to_string().contains("dense|compactattn|block_sparse"), "{error}");
    }

    #[test]
    fn a_file_changes_settings_and_single_layers_and_says_so() {
        let file = r#"{"keep_density": 0.2, "layers": {"3": {"selector": "dense"}}}"#;
        let config =
            of(&[("COMPACTATTN_MODE", "compactattn"), ("COMPACTATTN_CONFIG", "c.json")], file).unwrap();
        assert_eq!(config.layer(0).keep, Keep::Density(0.2));
        assert_eq!(config.layer(3).selector, Selector::Dense);
        assert!(
            config.sources.iter().any(|(name, _, source)| name == "layers.3.selector" && source == "c.json")
        );
    }

    #[test]
    fn dense_is_dense_whatever_the_file_says() {
        let config = of(&[("COMPACTATTN_CONFIG", "c.json")], r#"{"selector": "oracle"}"#).unwrap();
        assert_eq!(config.layer(0).selector, Selector::Dense);
    }

    #[test]
    fn unknown_keys_types_and_ranges_are_refused_by_name() {
        for (file, name) in [
            (r#"{"dencity": 0.2}"#, "dencity"),
            (r#"{"block_size": "x"}"#, "block_size"),
            (r#"{"keep_density": 2.0}"#, "keep density"),
            (r#"{"keep_density": 0.2, "keep_mass": 0.9}"#, "keep_density, keep_mass"),
            (r#"{"layers": {"1": {"keep_threshold": 0.2, "keep_mass": 0.9}}}"#, "keep_mass, keep_threshold"),
            ("[1]", "object"),
            ("{", "JSON"),
        ] {
            let error = of(&[("COMPACTATTN_CONFIG", "c.json")], file).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn unknown_variables_are_listed_but_not_those_of_kubernetes() {
        let vars =
            [("COMPACTATTN_MOOD", "x"), ("COMPACTATTN_PORT_80_TCP", "x"), ("COMPACTATTN_SERVICE_HOST", "x")];
        let vars = [&vars[..], &ELSEWHERE.map(|name| (name, "x"))].concat();
        assert_eq!(of(&vars, "").unwrap().unknown, ["COMPACTATTN_MOOD"]);
    }

    #[test]
    fn ranges_are_off_unless_wished_for_and_go_to_the_library_that_a_profiler_names() {
        let of_both = |wish: &str, library: &str| nvtx_of(Some(wish.into()), Some(library.into()));
        assert_eq!(nvtx_of(None, Some("/x.so".into())).unwrap(), Nvtx::Off);
        assert_eq!(of_both("0", "/x.so").unwrap(), Nvtx::Off);
        assert_eq!(of_both("1", "").unwrap(), Nvtx::NoProfiler);
        assert_eq!(of_both("1", "/x.so").unwrap(), Nvtx::Profiler(c"/x.so".to_owned()));
        assert_eq!(of_both("yes", "/x.so").unwrap_err().status(), Status::Config);
        assert!(of(&[("COMPACTATTN_NVTX", "1")], "").unwrap().unknown.is_empty());
        assert!(of(&[("COMPACTATTN_NVTX", "yes")], "").unwrap_err().to_string().contains("0 or 1"));
    }

    #[test]
    fn the_drivers_library_has_a_default_and_is_no_unknown_variable() {
        assert_eq!(libcuda_of(None).unwrap().as_c_str(), c"libcuda.so.1");
        assert_eq!(libcuda_of(Some("".into())).unwrap().as_c_str(), c"libcuda.so.1");
        assert_eq!(libcuda_of(Some("/x.so".into())).unwrap().as_c_str(), c"/x.so");
        assert_eq!(libcuda_of(Some("/x\0y".into())).unwrap_err().status(), Status::Config);
        assert!(of(&[("COMPACTATTN_LIBCUDA", "/x.so")], "").unwrap().unknown.is_empty());
    }
}
