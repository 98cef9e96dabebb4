//! Exported: presets.

use super::compactattn_status;
use super::guard::guard;
use super::read::{output, room};
use super::settings;
use super::structs::{compactattn_mode, compactattn_settings};
use crate::config::{self, Mode};
use crate::error::{Error, Result, Status};
use crate::settings::Settings;

/// Fills out with the settings a selector is published (or, for ours, measured) with.
///
/// Set out->struct_size before the call.
///
/// # Safety
/// out: NULL, or readable and writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_settings_init(
    selector: i32,
    out: *mut compactattn_settings,
) -> compactattn_status {
    // SAFETY: this function's contract.
    guard(|| unsafe { fill(out, || Ok(Settings::of(settings::selector("selector", selector)?))) })
}

/// Fills out with the settings of a compactattn_mode. Set out->struct_size before the call.
///
/// # Safety
/// out: NULL, or readable and writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_settings_from_mode(
    mode: i32,
    out: *mut compactattn_settings,
) -> compactattn_status {
    // SAFETY: this function's contract.
    guard(|| unsafe { fill(out, || of_mode(mode)) })
}

/// Fills out with what COMPACTATTN_MODE and the file COMPACTATTN_CONFIG names ask for in one layer.
///
/// layer -1 means: any layer the file does not name. Set out->struct_size before the call. What else
/// this library reads of the environment (COMPACTATTN_CHECK, _LIBCUDA, _NVTX) selects nothing.
/// COMPACTATTN_E_CONFIG or COMPACTATTN_E_IO where it cannot be understood.
///
/// # Safety
/// out: NULL, or readable and writable for its struct_size bytes. No other thread changes the environment meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_settings_from_env(
    layer: i32,
    out: *mut compactattn_settings,
) -> compactattn_status {
    // SAFETY: this function's contract.
    guard(|| unsafe { fill(out, || of_env(layer)) })
}

/// # Safety
/// `out`: NULL, or readable and writable for its struct_size bytes.
unsafe fn fill(out: *mut compactattn_settings, make: impl FnOnce() -> Result<Settings>) -> Result<()> {
    // SAFETY: this function's contract.
    let room = unsafe { room("out", out) }?;
    let settings = settings::to_c(&make()?);
    // SAFETY: this function's contract; `room` comes from it.
    unsafe { output(out, room, &settings) };
    Ok(())
}

fn of_mode(mode: i32) -> Result<Settings> {
    if mode == compactattn_mode::COMPACTATTN_MODE_PAPER as i32 {
        return Ok(Settings::paper());
    }
    let found = Mode::ALL.iter().find(|(known, _)| *known as i32 == mode);
    let wanted = "a compactattn_mode (0..4)";
    found.map(|(mode, _)| mode.settings()).ok_or_else(|| Error::new(Status::Value, "mode", wanted, mode))
}

fn of_env(layer: i32) -> Result<Settings> {
    let config = config::from_env()?;
    match usize::try_from(layer) {
        Ok(layer) => Ok(*config.layer(layer)),
        Err(_) if layer == -1 => Ok(config.settings),
        Err(_) => Err(Error::new(Status::Value, "layer", "-1 or a layer", layer)),
    }
}
