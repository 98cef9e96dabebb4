//! What the plots share: the font, colours, text.

use std::path::Path;

use compactattn::settings::Selector;
use compactattn::{Error, Result, Status};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

/// A bitmap, or a part of one.
pub(crate) type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// A white bitmap of `size` pixels that [`finish`] writes to `path`.
///
/// # Errors
/// [`Status::Io`].
pub(crate) fn bitmap(path: &Path, size: (u32, u32)) -> Result<Area<'_>> {
    let font = epaint_default_fonts::UBUNTU_LIGHT;
    for style in [FontStyle::Normal, FontStyle::Bold] {
        register_font("sans-serif", style, font)
            .map_err(|_| Error::plain(Status::Internal, "the built-in font cannot be read"))?;
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::plain(Status::Io, format!("cannot make {}: {e}", folder.display())))?;
    }
    let area = BitMapBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    Ok(area)
}

/// Writes the bitmap.
///
/// # Errors
/// [`Status::Io`].
pub(crate) fn finish(area: &Area) -> Result<()> {
    area.present().map_err(failed)
}

/// Text of a size in pixels, dark, anchored as said.
pub(crate) fn text(size: u32, h: HPos, v: VPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&INK).pos(Pos::new(h, v))
}

/// A title and, under it, a smaller line.
///
/// # Errors
/// [`Status::Io`].
pub(crate) fn title(area: &Area, title: &str, under: &str) -> Result<()> {
    area.draw_text(title, &text(30, HPos::Left, VPos::Top), (MARGIN, 18)).map_err(failed)?;
    area.draw_text(under, &text(19, HPos::Left, VPos::Top), (MARGIN, 56)).map_err(failed)
}

/// Turns a plotting error into ours.
pub(crate) fn failed(error: impl std::fmt::Display) -> Error {
    Error::plain(Status::Io, format!("cannot draw: {error}"))
}

/// A selector's colour, the same in every plot (Okabe and Ito's palette, told apart by colour-blind readers too).
pub(crate) fn colour(selector: Selector) -> RGBColor {
    match selector {
        Selector::SampledExact => RGBColor(0, 114, 178),
        Selector::FlashPrefill => RGBColor(213, 94, 0),
        Selector::Oracle | Selector::Dense => RGBColor(0, 0, 0),
        Selector::PooledMass => RGBColor(0, 158, 115),
        Selector::TwoLevel => RGBColor(86, 180, 233),
        Selector::XAttention => RGBColor(204, 121, 167),
        Selector::Quoka => RGBColor(230, 159, 0),
        Selector::Streaming => RGBColor(140, 140, 140),
        Selector::AttnGate => RGBColor(148, 103, 72),
        Selector::External => RGBColor(120, 94, 240),
    }
}

/// Left edge of titles.
pub(crate) const MARGIN: i32 = 28;

/// Text and axes.
pub(crate) const INK: RGBColor = RGBColor(40, 40, 40);
