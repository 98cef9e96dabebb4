//! The heat strip: which KV blocks each list reads, one row a list.

use std::path::Path;

use compactattn::Result;
use compactattn::mask;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use crate::plot::{self, Area, INK, MARGIN, failed, text};
use crate::report::fraction;
use crate::sweep::Row;

/// What the strip is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heat<'a> {
    /// Which layer is drawn, in words.
    pub(crate) layer: &'a str,
    /// The density asked for.
    pub(crate) density: f64,
    /// Past blocks: what could be selected.
    pub(crate) past_blocks: usize,
    /// All blocks, the open region included.
    pub(crate) blocks: usize,
    /// KV heads.
    pub(crate) num_kv_heads: usize,
}

/// Draws the first layer's lists of every row that has one list per head or group and chunk.
///
/// # Errors
/// [`Status::Io`](compactattn::Status::Io).
pub(crate) fn draw(path: &Path, heat: &Heat, rows: &[&Row]) -> Result<()> {
    let height = HEAD + rows.iter().map(|row| strip_height(heat, row) + GAP).sum::<i32>() + FOOT;
    let area = plot::bitmap(path, (WIDTH, u32::try_from(height).unwrap_or(u32::MAX)))?;
    let title =
        format!("KV blocks that each list reads ({}, density {})", heat.layer, fraction(heat.density, 2));
    let under = format!(
        "one row a list: {} KV heads (group) or their query heads (head) | columns: blocks of 128 tokens",
        heat.num_kv_heads
    );
    plot::title(&area, &title, &under)?;
    legend(&area)?;
    let mut top = HEAD;
    for row in rows {
        strip(&area, heat, row, top)?;
        top += strip_height(heat, row) + GAP;
    }
    axis(&area, heat, top - GAP + 6)?;
    plot::finish(&area)
}

fn strip(area: &Area, heat: &Heat, row: &Row, top: i32) -> Result<()> {
    let lists = lists(row);
    let step = row_step(heat, lists);
    let colour = plot::colour(row.contender.settings.selector);
    let middle = top + strip_height(heat, row) / 2;
    let name = text(19, HPos::Right, VPos::Bottom);
    area.draw_text(&row.contender.name(), &name, (LEFT - 14, middle + 1)).map_err(failed)?;
    let about = format!("{} | error {}", row.contender.scope(), fraction(row.error, 4));
    let small = text(15, HPos::Right, VPos::Top).color(&GREY);
    area.draw_text(&about, &small, (LEFT - 14, middle + 3)).map_err(failed)?;
    let words = row.layout.mask_words();
    let gap = group_gap(heat, lists);
    for (list, bits) in row.lists[0].chunks_exact(words).take(lists).enumerate() {
        let groups = i32::try_from(list * heat.num_kv_heads / lists).unwrap_or(0);
        let y = top + i32::try_from(list).unwrap_or(0) * step + groups * gap;
        for block in 0..heat.blocks {
            let fill = match (block < heat.past_blocks, mask::get(bits, block)) {
                (false, _) => OPEN,
                (true, true) => colour,
                (true, false) => EMPTY,
            };
            let cell = [(x_of(heat, block), y), (x_of(heat, block + 1) - 1, y + step - 1)];
            area.draw(&Rectangle::new(cell, fill.filled())).map_err(failed)?;
        }
    }
    Ok(())
}

fn axis(area: &Area, heat: &Heat, y: i32) -> Result<()> {
    let label = text(16, HPos::Center, VPos::Top);
    for block in (0..=heat.past_blocks).step_by(tick_step(heat.past_blocks)) {
        let x = x_of(heat, block);
        area.draw(&PathElement::new([(x, y), (x, y + 6)], INK)).map_err(failed)?;
        area.draw_text(&block.to_string(), &label, (x, y + 9)).map_err(failed)?;
    }
    area.draw(&PathElement::new([(LEFT, y), (RIGHT, y)], INK)).map_err(failed)?;
    let title = text(18, HPos::Center, VPos::Top);
    area.draw_text("KV block (128 tokens each)", &title, (i32::midpoint(LEFT, RIGHT), y + 32)).map_err(failed)
}

fn legend(area: &Area) -> Result<()> {
    let entries = [
        ("read (selector's colour)", plot::colour(compactattn::settings::Selector::SampledExact)),
        ("skipped", EMPTY),
        ("open region: always read", OPEN),
    ];
    let mut x = LEFT;
    for (name, colour) in entries {
        let box_ = [(x, HEAD - 32), (x + 16, HEAD - 18)];
        area.draw(&Rectangle::new(box_, colour.filled())).map_err(failed)?;
        area.draw_text(name, &text(16, HPos::Left, VPos::Center), (x + 24, HEAD - 25)).map_err(failed)?;
        x += 230;
    }
    Ok(())
}

/// Lists of the chunk: every span's where there is more than one.
fn lists(row: &Row) -> usize {
    row.layout.lists_per_span()
}

fn strip_height(heat: &Heat, row: &Row) -> i32 {
    let lists = lists(row);
    let groups = i32::try_from(heat.num_kv_heads).unwrap_or(1) - 1;
    i32::try_from(lists).unwrap_or(1) * row_step(heat, lists) + groups * group_gap(heat, lists)
}

/// Pixels a list, so that few lists are still readable and many still fit.
fn row_step(heat: &Heat, lists: usize) -> i32 {
    if lists > heat.num_kv_heads { 9 } else { 16 }
}

/// Pixels between the lists of two KV heads.
fn group_gap(heat: &Heat, lists: usize) -> i32 {
    if lists > heat.num_kv_heads { 3 } else { 1 }
}

#[expect(clippy::cast_possible_truncation, reason = "a pixel within the picture")]
fn x_of(heat: &Heat, block: usize) -> i32 {
    let share = block as f64 / heat.blocks as f64;
    LEFT + (share * f64::from(RIGHT - LEFT)).round() as i32
}

/// A round number of blocks that leaves about ten ticks.
fn tick_step(blocks: usize) -> usize {
    [5, 10, 20, 50, 100, 200, 500].into_iter().find(|step| blocks / step <= 12).unwrap_or(1000)
}

const WIDTH: u32 = 1400;
const LEFT: i32 = 300;
const RIGHT: i32 = 1400 - MARGIN;
const HEAD: i32 = 134;
const FOOT: i32 = 76;
const GAP: i32 = 20;
const EMPTY: RGBColor = RGBColor(234, 236, 239);
const OPEN: RGBColor = RGBColor(190, 194, 200);
const GREY: RGBColor = RGBColor(110, 110, 110);
