//! Medians as bars, one SVG file per unit and topic.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::front::Samples;
use crate::statistics::summary;
use crate::subject::Name;

const ROW: u32 = 16;
const MARGIN: u32 = 8;
const LABEL: u32 = 220;
const WIDTH: u32 = 760;

/// Draws `UNIT.svg` for every unit into `directory`: a group of bars per series, a bar per subject, as long as its median beside the longest
/// of the group.
pub(crate) fn draw(directory: &Path, subjects: &[Name], samples: &Samples) -> Result<()> {
    let mut units: Vec<&str> = samples.series.iter().map(|(_, unit)| unit.as_str()).collect();
    units.sort_unstable();
    units.dedup();
    for unit in units {
        let file = directory.join(format!("{}.svg", unit.replace('/', "-per-")));
        chart(&file, unit, subjects, samples)
            .map_err(|error| anyhow!("drawing {}: {error}", file.display()))?;
    }
    Ok(())
}

fn chart(
    file: &Path,
    unit: &str,
    subjects: &[Name],
    samples: &Samples,
) -> Result<(), Box<dyn std::error::Error>> {
    let groups: Vec<(&str, Vec<(Name, f64)>)> = samples
        .series
        .iter()
        .filter(|(_, of)| of == unit)
        .map(|(series, _)| {
            let medians = subjects
                .iter()
                .filter_map(|subject| Some((*subject, summary(samples.of(series, *subject))?.median)));
            (series.as_str(), medians.collect())
        })
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
            let length = (value / longest * f64::from(WIDTH - LABEL - 80)) as i32;
            let bar = [(label, top + 2), (label + length.max(1), top + row - 2)];
            area.draw(&Rectangle::new(bar, colour(subject).filled()))?;
            let figure = if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") };
            area.draw(&Text::new(figure, (label + length + 6, top + 2), text.clone()))?;
            top += row;
        }
        top += row;
    }
    area.present()?;
    Ok(())
}

fn colour(subject: Name) -> RGBColor {
    match subject {
        Name::Podvisor => RGBColor(24, 95, 165),
        Name::PodvisorCrun => RGBColor(92, 153, 214),
        Name::Containerd => RGBColor(186, 117, 23),
        Name::Crio => RGBColor(153, 60, 29),
        Name::Runc | Name::Crun => RGBColor(150, 150, 150),
    }
}
