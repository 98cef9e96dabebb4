//! Error against density: one panel for lists shared by a KV group, one for lists of single query heads.

use std::path::Path;

use compactattn::Result;
use compactattn::settings::Settings;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use crate::contender::BLOCK;
use crate::plot::{self, Area, INK, failed, text};
use crate::sweep::Row;

/// A selector at one scope, over densities.
struct Curve<'a> {
    name: String,
    colour: RGBColor,
    mark: Mark,
    points: Vec<(f64, f64)>,
    first: &'a Row,
}

/// How a curve of the selector's colour is told from its others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// Solid, dots: one list for the whole chunk, blocks of 128.
    Chunk,
    /// Dashed, rings: lists of fewer queries.
    Span,
    /// Dashed, triangles: other block sizes.
    Blocks,
    /// Dashed, crosses: mean correction.
    Corrected,
}

/// Draws both panels.
///
/// # Errors
/// [`Status::Io`](compactattn::Status::Io).
pub(crate) fn draw(path: &Path, about: &str, rows: &[Row]) -> Result<()> {
    let area = plot::bitmap(path, (1500, 860))?;
    plot::title(&area, "Error against density, by selector and list scope", about)?;
    let curves = curves(rows);
    let (low, high) = range(rows);
    let body = area.margin(96, 16, 16, 16);
    let (left, right) = body.split_horizontally(734);
    for (panel, heads, title) in
        [(left, 0, "one list per KV group (heads united)"), (right, 1, "one list per query head")]
    {
        let shown = curves.iter().filter(|c| c.first.contender.settings.scope.heads_per_list == heads);
        panel_of(&area, &panel, title, (low, high), &shown.collect::<Vec<_>>())?;
    }
    plot::finish(&area)
}

fn panel_of(root: &Area, area: &Area, title: &str, (low, high): (f64, f64), curves: &[&Curve]) -> Result<()> {
    let (upper, lower) = area.split_vertically(560);
    let densities = || curves.iter().flat_map(|c| &c.points).map(|p| p.0);
    let (first, last) = (densities().fold(1.0, f64::min), densities().fold(0.0, f64::max));
    let around = 0.08 * (last - first).max(0.1);
    let mut chart = ChartBuilder::on(&upper)
        .margin(8)
        .caption(title, text(20, HPos::Left, VPos::Top))
        .x_label_area_size(52)
        .y_label_area_size(78)
        .build_cartesian_2d((first - around)..(last + around), (low..high).log_scale())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("density: share of past KV blocks read")
        .y_desc("relative error of the output, ||o' - o|| / ||o||")
        .axis_desc_style(text(17, HPos::Left, VPos::Top))
        .label_style(text(15, HPos::Left, VPos::Top))
        .x_labels(8)
        .x_label_formatter(&|x| format!("{x:.2}"))
        .y_label_formatter(&|y| format!("{y}"))
        .bold_line_style(RGBColor(215, 215, 215))
        .light_line_style(RGBColor(242, 242, 242))
        .axis_style(INK)
        .draw()
        .map_err(failed)?;
    for curve in curves {
        let line = curve.colour.stroke_width(2);
        let points = curve.points.iter().copied();
        if curve.mark == Mark::Chunk {
            chart.draw_series(LineSeries::new(points.clone(), line)).map_err(failed)?;
        } else {
            chart.draw_series(DashedLineSeries::new(points.clone(), 7, 5, line)).map_err(failed)?;
        }
        for point in points {
            symbol(root, curve, chart.plotting_area().map_coordinate(&point))?;
        }
    }
    legend(&lower, curves)
}

/// Names in two columns under the panel, best first at the lowest density all have.
fn legend(area: &Area, curves: &[&Curve]) -> Result<()> {
    let rows = i32::try_from(curves.len().div_ceil(2)).unwrap_or(1);
    for (i, curve) in curves.iter().enumerate() {
        let i = i32::try_from(i).unwrap_or(0);
        let (x, y) = (86 + i / rows * 325, 14 + i % rows * 25);
        let style = curve.colour.stroke_width(2);
        let solid = curve.mark == Mark::Chunk;
        let pieces: &[(i32, i32)] = if solid { &[(0, 34)] } else { &[(0, 8), (26, 34)] };
        for &(a, b) in pieces {
            area.draw(&PathElement::new([(x + a, y), (x + b, y)], style)).map_err(failed)?;
        }
        symbol(area, curve, (x + 17, y))?;
        let name = text(16, HPos::Left, VPos::Center);
        area.draw_text(&curve.name, &name, (x + 44, y)).map_err(failed)?;
    }
    Ok(())
}

/// Draws the curve's mark at a pixel.
fn symbol(area: &Area, curve: &Curve, at: (i32, i32)) -> Result<()> {
    let (full, line) = (curve.colour.filled(), curve.colour.stroke_width(2));
    match curve.mark {
        Mark::Chunk => area.draw(&Circle::new(at, 4, full)),
        Mark::Span => area.draw(&Circle::new(at, 5, line)),
        Mark::Blocks => area.draw(&TriangleMarker::new(at, 6, full)),
        Mark::Corrected => area.draw(&Cross::new(at, 5, line)),
    }
    .map_err(failed)
}

fn mark(settings: &Settings) -> Mark {
    match (settings.mean_correction, settings.block_size == BLOCK, settings.scope.query_span) {
        (true, _, _) => Mark::Corrected,
        (_, false, _) => Mark::Blocks,
        (_, _, 0) => Mark::Chunk,
        _ => Mark::Span,
    }
}

/// Rows by contender, those with least error at the last density first.
fn curves(rows: &[Row]) -> Vec<Curve<'_>> {
    let mut curves: Vec<Curve> = Vec::new();
    for row in rows {
        let settings = &row.contender.settings;
        let span = row.contender.scope();
        let span = span.rsplit(' ').next().unwrap_or_default();
        let blocks = match settings.block_size {
            BLOCK => String::new(),
            1 => ", single tokens".to_owned(),
            size => format!(", blocks of {size}"),
        };
        let name = format!("{}, {span}{blocks}", row.contender.name());
        let point = (row.density, row.error);
        match curves
            .iter_mut()
            .find(|curve| curve.first.contender.settings.scope == settings.scope && curve.name == name)
        {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve {
                name,
                colour: plot::colour(settings.selector),
                mark: mark(settings),
                points: vec![point],
                first: row,
            }),
        }
    }
    let last = |curve: &Curve| curve.points.last().map_or(0.0, |p| p.1);
    curves.sort_by(|a, b| last(a).total_cmp(&last(b)));
    curves
}

/// The errors' range, a little wider.
fn range(rows: &[Row]) -> (f64, f64) {
    let errors = || rows.iter().map(|row| row.error).filter(|e| *e > 0.0);
    let (low, high) = (errors().fold(f64::INFINITY, f64::min), errors().fold(0.0, f64::max));
    if low < high { (low / 1.15, high * 1.15) } else { (1e-4, 1.0) }
}
