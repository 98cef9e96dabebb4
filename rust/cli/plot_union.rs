//! Density before and after union, one pair of bars per layer and KV head.

use std::path::Path;

use compactattn::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use crate::inspect::Inflation;
use crate::plot::{self, Area, INK, MARGIN, failed, text};
use crate::report::fraction;

/// Draws the bars.
///
/// # Errors
/// [`Status::Io`](compactattn::Status::Io).
pub(crate) fn draw(path: &Path, about: &str, heads: &[Inflation]) -> Result<()> {
    let rows = i32::try_from(heads.len()).unwrap_or(i32::MAX / STEP / 2);
    let bottom = HEAD + rows * STEP;
    let area = plot::bitmap(path, (WIDTH, u32::try_from(bottom + FOOT).unwrap_or(u32::MAX)))?;
    plot::title(&area, "What the union costs", about)?;
    legend(&area)?;
    grid(&area, bottom)?;
    for (i, head) in heads.iter().enumerate() {
        bars(&area, head, HEAD + i32::try_from(i).unwrap_or(0) * STEP)?;
    }
    plot::finish(&area)
}

fn bars(area: &Area, head: &Inflation, top: i32) -> Result<()> {
    let name = format!("layer {}, KV head {}", head.layer, head.kv_head);
    area.draw_text(&name, &text(17, HPos::Right, VPos::Center), (LEFT - 12, top + STEP / 2))
        .map_err(failed)?;
    for (density, colour, y) in [(head.before, BEFORE, top + 5), (head.after, AFTER, top + STEP / 2)] {
        let bar = [(LEFT, y), (x_of(density), y + STEP / 2 - 6)];
        area.draw(&Rectangle::new(bar, colour.filled())).map_err(failed)?;
    }
    let figures = format!("x {:.2}, mass {}", head.factor(), fraction(head.mass, 3));
    area.draw_text(&figures, &text(16, HPos::Left, VPos::Center), (RIGHT + 14, top + STEP / 2))
        .map_err(failed)
}

fn grid(area: &Area, bottom: i32) -> Result<()> {
    for tenth in 0..=10 {
        let density = f64::from(tenth) / 10.0;
        let x = x_of(density);
        area.draw(&PathElement::new([(x, HEAD), (x, bottom)], LINE)).map_err(failed)?;
        let label = text(15, HPos::Center, VPos::Top);
        area.draw_text(&format!("{density:.1}"), &label, (x, bottom + 6)).map_err(failed)?;
    }
    area.draw(&PathElement::new([(LEFT, bottom), (RIGHT, bottom)], INK)).map_err(failed)?;
    let title = text(17, HPos::Center, VPos::Top);
    let middle = i32::midpoint(LEFT, RIGHT);
    area.draw_text("density: share of past KV blocks", &title, (middle, bottom + 28)).map_err(failed)
}

fn legend(area: &Area) -> Result<()> {
    let entries = [
        (BEFORE, "before union: a query head's own blocks", LEFT),
        (AFTER, "after union: a list's blocks", LEFT + 340),
    ];
    for (colour, name, x) in entries {
        area.draw(&Rectangle::new([(x, HEAD - 32), (x + 16, HEAD - 18)], colour.filled())).map_err(failed)?;
        area.draw_text(name, &text(16, HPos::Left, VPos::Center), (x + 24, HEAD - 25)).map_err(failed)?;
    }
    let note = text(16, HPos::Left, VPos::Center);
    area.draw_text("inflation, captured mass", &note, (RIGHT + 14, HEAD - 25)).map_err(failed)
}

#[expect(clippy::cast_possible_truncation, reason = "a pixel within the picture")]
fn x_of(density: f64) -> i32 {
    LEFT + (density * f64::from(RIGHT - LEFT)).round() as i32
}

const WIDTH: u32 = 1200;
const LEFT: i32 = 190;
const RIGHT: i32 = 1200 - 190 - MARGIN;
const HEAD: i32 = 134;
const FOOT: i32 = 64;
const STEP: i32 = 40;
const BEFORE: RGBColor = RGBColor(158, 202, 225);
const AFTER: RGBColor = RGBColor(0, 90, 160);
const LINE: RGBColor = RGBColor(225, 225, 225);
