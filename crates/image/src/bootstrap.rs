//! How far a bootstrap is, told from what mmdebstrap, apt and dpkg print.

/// Where the phases of a bootstrap begin and end on the way from 0 to 1, by the share of time that
/// they took when measured: the essential packages, then all others inside the new system.
const PHASES: [(f32, f32); 2] = [(0.10, 0.50), (0.50, 0.97)];
/// A package is downloaded, unpacked and configured.
const STEPS_PER_PACKAGE: usize = 3;

/// Reads the output line by line.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Phases that have begun; apt announces each by the number of its packages.
    phases: usize,
    packages: usize,
    steps: usize,
}

impl Meter {
    /// What the line says is being done, and the fraction of the whole that precedes it. None for
    /// a line that says neither.
    pub(crate) fn line(&mut self, line: &str) -> Option<(String, f32)> {
        let mut words = line.split_whitespace();
        let message = match words.next()? {
            "I:" => return self.remark(line.strip_prefix("I: ")?),
            "Get:" => return None,
            get if get.starts_with("Get:") && self.phases > 0 => {
                format!("downloading {}", words.nth(3)?)
            }
            "Unpacking" => format!("unpacking {}", words.next()?),
            "Setting" => format!("configuring {}", words.nth(1)?),
            _ => {
                if let Some(count) = newly_installed(line) {
                    (self.phases, self.packages, self.steps) = (self.phases + 1, count, 0);
                }
                return None;
            }
        };
        self.steps += 1;
        Some((message, self.fraction()))
    }

    fn remark(&self, remark: &str) -> Option<(String, f32)> {
        let message = match remark {
            _ if remark.starts_with("running apt-get update") => "reading the package lists",
            _ if remark.starts_with("extracting archives") => "unpacking the essential packages",
            _ if remark.starts_with("cleaning") => return Some(("cleaning up".into(), 0.97)),
            _ => return None,
        };
        Some((message.into(), self.fraction()))
    }

    fn fraction(&self) -> f32 {
        let Some(phase) = self.phases.checked_sub(1) else {
            return 0.02;
        };
        let (start, end) = PHASES[phase.min(PHASES.len() - 1)];
        let all = (self.packages * STEPS_PER_PACKAGE).max(1);
        start + (end - start) * (self.steps.min(all) as f32 / all as f32)
    }
}

/// `0 upgraded, 69 newly installed, 0 to remove and 0 not upgraded.`
fn newly_installed(line: &str) -> Option<usize> {
    let (before, _) = line.split_once(" newly installed")?;
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
I: chroot architecture amd64 is equal to the host's architecture
I: running apt-get update...
Get:1 http://mirror.example/debian bookworm InRelease [151 kB]
I: downloading packages with apt...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian bookworm/main amd64 libc6 amd64 2.36 [2755 kB]
Get:2 http://mirror.example/debian bookworm/main amd64 dash amd64 0.5 [94 kB]
I: extracting archives...
I: installing essential packages...
Unpacking libc6 (2.36) ...
Setting up libc6 (2.36) ...
I: installing remaining packages inside the chroot...
0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian bookworm/main amd64 git amd64 1:2.39 [7256 kB]
Unpacking git (1:2.39) ...
Setting up git (1:2.39) ...
I: cleaning package lists and apt cache...
I: success in 21.6 seconds
";

    #[test]
    fn progress_rises_from_the_first_line_to_the_last() {
        let mut meter = Meter::default();
        let reports: Vec<_> = OUTPUT.lines().filter_map(|line| meter.line(line)).collect();
        let messages: Vec<_> = reports
            .iter()
            .map(|(message, _)| message.as_str())
            .collect();
        assert_eq!(
            messages,
            [
                "reading the package lists",
                "downloading libc6",
                "downloading dash",
                "unpacking the essential packages",
                "unpacking libc6",
                "configuring libc6",
                "downloading git",
                "unpacking git",
                "configuring git",
                "cleaning up",
            ]
        );
        assert!(
            reports.is_sorted_by_key(|(_, fraction)| *fraction),
            "{reports:?}"
        );
        assert!(
            reports
                .iter()
                .all(|(_, fraction)| (0.0..1.0).contains(fraction))
        );
    }

    #[test]
    fn more_steps_than_announced_do_not_overflow() {
        let mut meter = Meter::default();
        meter.line("0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.");
        for _ in 0..10 {
            meter.line("Setting up libc6 (2.36) ...");
        }
        assert_eq!(meter.line("Setting up libc6 (2.36) ...").unwrap().1, 0.5);
    }
}
