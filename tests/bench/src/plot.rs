//! Medians as bars, one SVG file per unit; and as lines over the number of pods or images, where that is what changes.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::front::Outcome;
use crate::samples::Samples;
use crate::subject::Name;
use crate::table::digits;
use crate::wire::Series;

const ROW: u32 = 16;
const MARGIN: u32 = 8;
const LABEL: u32 = 220;
const WIDTH: u32 = 760;
/// A panel of lines.
const PANEL: (u32, u32) = (380, 220);

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Draws into `directory`; names of the files, without `.svg`.
pub(crate) fn draw(directory: &Path, Outcome { samples, .. }: &Outcome) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut units: Vec<&str> =
        samples.figures().filter(|one| one.among.is_none()).map(|one| one.unit.as_str()).collect();
    units.sort_unstable();
    units.dedup();
    for unit in units {
        let name = unit.replace('/', "-per-");
        let file = directory.join(format!("{name}.svg"));
        bars(&file, unit, samples).map_err(|error| anyhow!("drawing {}: {error}", file.display()))?;
        names.push(name);
    }
    for what in ["pods", "images"] {
        let name = format!("growth-{what}");
        let file = directory.join(format!("{name}.svg"));
        let mut panels: Vec<&str> = Vec::new();
        for series in samples.series.iter().filter(|one| one.among.as_ref().is_some_and(|(_, of)| of == what))
        {
            if !panels.contains(&series.name.as_str()) {
                panels.push(&series.name);
            }
        }
        if !panels.is_empty() {
            lines(&file, what, &panels, samples)
                .map_err(|error| anyhow!("drawing {}: {error}", file.display()))?;
            names.push(name);
        }
    }
    Ok(names)
}

/// A group per series, a bar per subject, as long as its median beside the longest of the group.
fn bars(file: &Path, unit: &str, samples: &Samples) -> Drawn {
    let groups: Vec<(&Series, Vec<(Name, f64)>)> = samples
        .series
        .iter()
        .filter(|series| series.unit == unit && series.among.is_none())
        .map(|series| (series, of_all(samples, series)))
        .collect();
    let rows: usize = groups.iter().map(|(_, bars)| bars.len() + 2).sum();
    let height = u32::try_from(rows)? * ROW + 2 * MARGIN;
    let area = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let text = ("sans-serif", 12).into_font();
    let bold = ("sans-serif", 13).into_font().style(FontStyle::Bold);
    let mut top = i32::try_from(MARGIN)?;
    let row = i32::try_from(ROW)?;
    let label = i32::try_from(LABEL)?;
    for (series, bars) in groups {
        area.draw(&Text::new(format!("{series}, {unit}"), (4, top), bold.clone()))?;
        top += row;
        let longest = bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        for (subject, value) in bars {
            area.draw(&Text::new(subject.as_str(), (label - 110, top + 2), text.clone()))?;
            // Room is left for the figure.
            #[allow(clippy::cast_possible_truncation)] // at most the picture's width
            let length = (value.max(0.0) / longest * f64::from(WIDTH - LABEL - 80)) as i32;
            let bar = [(label, top + 2), (label + length.max(1), top + row - 2)];
            area.draw(&Rectangle::new(bar, colour(subject).filled()))?;
            area.draw(&Text::new(digits(value), (label + length + 6, top + 2), text.clone()))?;
            top += row;
        }
        top += row;
    }
    area.present()?;
    Ok(())
}

fn of_all(samples: &Samples, series: &Series) -> Vec<(Name, f64)> {
    let subjects = Name::ALL.into_iter();
    subjects.filter_map(|subject| Some((subject, samples.median(series, subject)?))).collect()
}

/// A panel per name of series, a line per subject.
fn lines(file: &Path, what: &str, panels: &[&str], samples: &Samples) -> Drawn {
    let rows = u32::try_from(panels.len().div_ceil(2))?;
    let area = SVGBackend::new(file, (2 * PANEL.0, rows * PANEL.1)).into_drawing_area();
    area.fill(&WHITE)?;
    for (panel, name) in area.split_evenly((rows as usize, 2)).iter().zip(panels) {
        let of_name: Vec<(f64, &Series)> = samples
            .series
            .iter()
            .filter(|series| series.name == **name)
            .filter_map(|series| Some((series.among.as_ref()?, series)))
            .filter(|((_, of), _)| of == what)
            .map(|((count, _), series)| (f64::from(*count), series))
            .collect();
        let of = |subject| {
            let points = of_name.iter();
            points.filter_map(move |(count, series)| Some((*count, samples.median(series, subject)?)))
        };
        let right = of_name.iter().map(|(count, _)| *count).fold(1.0, f64::max);
        let top =
            Name::ALL.into_iter().flat_map(of).map(|(_, value)| value).fold(f64::MIN_POSITIVE, f64::max);
        let unit = of_name.first().map_or("", |(_, series)| series.unit.as_str());
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("{name}, {unit}, by {what}"), ("sans-serif", 13))
            .margin(6)
            .x_label_area_size(20)
            .y_label_area_size(48)
            .build_cartesian_2d(0.0..right, 0.0..top * 1.05)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_labels(5)
            .y_labels(5)
            .x_label_formatter(&|count| format!("{count:.0}"))
            .y_label_formatter(&|value| digits(*value))
            .draw()?;
        for subject in Name::ALL {
            let points: Vec<(f64, f64)> = of(subject).collect();
            let Some(last) = points.last().copied() else { continue };
            let colour = colour(subject);
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 2, colour.filled())))?;
            chart.draw_series(std::iter::once(PathElement::new(points, colour)))?;
            let place = EmptyElement::at(last);
            let name = Text::new(subject.as_str(), (-70, 2), ("sans-serif", 11).into_font().color(&colour));
            chart.draw_series(std::iter::once(place + name))?;
        }
    }
    area.present()?;
    Ok(())
}

fn colour(subject: Name) -> RGBColor {
    match subject {
        Name::Podvisor => RGBColor(24, 95, 165),
        Name::PodvisorCrun => RGBColor(92, 153, 214),
        Name::PodvisorBuiltin => RGBColor(29, 158, 117),
        Name::PodvisorVm => RGBColor(86, 70, 160),
        Name::Containerd => RGBColor(186, 117, 23),
        Name::Crio => RGBColor(153, 60, 29),
        Name::Runc | Name::Crun | Name::Qemu => RGBColor(150, 150, 150),
    }
}
