//! Faults of a file of lines that a resumed run finds.

use std::path::Path;

use crate::progress::Progress;

/// Gaps that a warning names.
const NAMED: usize = 3;

/// Lines that were lost or damaged since the run wrote them.
#[derive(Debug, Default)]
pub(super) struct LogFaults {
    /// Number of lines that do not parse, and the first one's.
    unreadable: Option<(usize, usize)>,
    /// The same of lines that are out of order or there twice.
    misplaced: Option<(usize, usize)>,
    /// First and last step of each run of steps without a line.
    gaps: Vec<(u64, u64)>,
}

fn count(fault: &mut Option<(usize, usize)>, line: usize) {
    let (count, _) = fault.get_or_insert((0, line));
    *count += 1;
}

fn lines((count, first): (usize, usize), what: &str) -> String {
    match count {
        1 => format!("line {first} {what}"),
        _ => format!("{count} lines {what}, the first is line {first}"),
    }
}

impl LogFaults {
    /// Records a line that does not parse.
    pub(super) fn unreadable(&mut self, line: usize) {
        count(&mut self.unreadable, line);
    }

    /// Records a line of a step that is not after the step of the line before.
    pub(super) fn misplaced(&mut self, line: usize) {
        count(&mut self.misplaced, line);
    }

    /// Records the steps from 1 to `done` that are not among `steps`, which ascend. A file whose first step is a later one was
    /// begun anew, and the steps before are no gap.
    pub(super) fn find_gaps(&mut self, steps: impl Iterator<Item = u64>, done: u64) {
        let mut last = None;
        for step in steps {
            if let Some(last) = last
                && step > last + 1
            {
                self.gaps.push((last + 1, step - 1));
            }
            last = Some(step);
        }
        let last = last.unwrap_or(0);
        if last < done {
            self.gaps.push((last + 1, done));
        }
    }

    /// Warns of the faults of the file at `path`; `effect` is of the missing steps.
    pub(super) fn say(&self, path: &Path, effect: &str, progress: &Progress) {
        if let Some(message) = self.message(effect) {
            let path = path.display();
            progress.say(format!("warning: {path}: {message}; the run goes on"));
        }
    }

    fn message(&self, effect: &str) -> Option<String> {
        let mut parts = Vec::new();
        parts.extend(self.unreadable.map(|fault| lines(fault, "can't be read")));
        parts.extend(
            self.misplaced
                .map(|fault| lines(fault, "out of order or repeated")),
        );
        if !self.gaps.is_empty() {
            let named = self.gaps.iter().take(NAMED).map(|gap| match gap {
                (first, last) if first == last => format!("step {first}"),
                (first, last) => format!("steps {first} to {last}"),
            });
            let more = match self.gaps.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(" and {more} more gaps"),
            };
            let named = named.collect::<Vec<_>>().join(", ");
            parts.push(format!("{named}{more} missing: {effect}"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(steps: &[u64], done: u64) -> Option<String> {
        let mut faults = LogFaults::default();
        faults.find_gaps(steps.iter().copied(), done);
        faults.message("no curve")
    }

    #[test]
    fn log_faults_name_missing_steps() {
        assert_eq!(gaps(&[1, 2, 3], 3), None);
        assert_eq!(gaps(&[], 0), None);
        assert_eq!(gaps(&[4, 5], 5), None, "begun anew at step 4");
        let said = |steps: &[u64], done| gaps(steps, done).unwrap();
        assert_eq!(said(&[], 4), "steps 1 to 4 missing: no curve");
        assert_eq!(said(&[1, 3], 5), "step 2, steps 4 to 5 missing: no curve");
        assert_eq!(
            said(&[1, 3, 5, 7, 9, 11], 11),
            "step 2, step 4, step 6 and 2 more gaps missing: no curve"
        );
    }

    #[test]
    fn log_faults_name_damaged_lines() {
        let mut faults = LogFaults::default();
        faults.unreadable(7);
        assert_eq!(faults.message("").unwrap(), "line 7 can't be read");
        faults.unreadable(9);
        faults.misplaced(8);
        assert_eq!(
            faults.message("").unwrap(),
            "2 lines can't be read, the first is line 7; line 8 out of order or repeated"
        );
    }
}
