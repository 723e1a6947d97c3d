//! How results are shown: tables and lines for people, JSON for programs.

use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// A table without lines, as `docker ps` has taught everybody to read.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    table
}

/// Prints a table with no trailing blanks.
pub(crate) fn print_table(table: &Table) {
    for line in table.lines() {
        println!("{}", line.trim_end());
    }
}

/// Prints a value as JSON.
pub(crate) fn print_json<T: Serialize>(value: &T) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("error: cannot print the result as JSON: {error}"),
    }
}

/// A duration from now or until now, in its two largest units.
pub(crate) fn span(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Milliseconds with one digit behind the point below ten, or seconds when there are many.
pub(crate) fn millis(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1e3;
    match ms {
        ..10.0 => format!("{ms:.1} ms"),
        10.0..10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1e3),
    }
}

/// A size in its largest unit of two to the tenth, with three digits.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    // What would be shown as 1024 is shown as 1 of the next.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value {
        _ if unit == 0 => format!("{count} B"),
        ..9.995 => format!("{value:.2} {}", UNITS[unit]),
        ..99.95 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units() {
        let shown: Vec<String> = [-5, 0, 59, 60, 3599, 3600, 90_000].map(span).into();
        assert_eq!(
            shown,
            ["0s", "0s", "59s", "1m00s", "59m59s", "1h00m", "1d01h"]
        );
    }

    #[test]
    fn sizes_have_three_digits() {
        let shown = [
            0,
            1,
            1023,
            1024,
            10_240,
            102_400,
            1_048_063,
            1 << 20,
            512 << 20,
            3 << 30,
            u64::MAX,
        ]
        .map(bytes);
        let expected = [
            "0 B",
            "1 B",
            "1023 B",
            "1.00 KiB",
            "10.0 KiB",
            "100 KiB",
            "1023 KiB",
            "1.00 MiB",
            "512 MiB",
            "3.00 GiB",
            "16384 PiB",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn durations_are_short() {
        let shown = [900, 12_340, 12_345_678].map(|us| millis(Duration::from_micros(us)));
        assert_eq!(shown, ["0.9 ms", "12 ms", "12.3 s"]);
    }
}
