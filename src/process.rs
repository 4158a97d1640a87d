//! What the system says of this process and of its memory.

use std::path::Path;
use std::time::Duration;

/// Processor time this process has used, over all its threads.
pub(crate) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The most memory this process has held at once, in bytes; `None` where the system doesn't say.
pub(crate) fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Memory that this process could take, in bytes: what of the machine's is free or can be freed, and of that what its
/// control group may still use; `None` where the system doesn't say.
pub(crate) fn available_memory() -> Option<u64> {
    let free = kilobytes("/proc/meminfo", "MemAvailable:")?;
    Some(free.min(left_to_group(Path::new("/sys/fs/cgroup")).unwrap_or(u64::MAX)))
}

/// What is left of a control group's memory limit, as a container has one; `None` without a limit.
fn left_to_group(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |text: String| text.trim().parse::<u64>().ok();
    let limit = number(read("memory.max")?)?;
    let used = number(read("memory.current")?)?;
    // Files that were read and may be dropped count as used.
    let droppable = read("memory.stat")
        .and_then(|stat| {
            let line = stat
                .lines()
                .find_map(|line| line.strip_prefix("inactive_file "));
            line.and_then(|bytes| bytes.trim().parse().ok())
        })
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(droppable)))
}

fn kilobytes(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_what_its_limit_leaves() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(left_to_group(folder.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        assert_eq!(left_to_group(folder.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left_to_group(folder.path()), Some(300));
        write("memory.stat", "anon 5\ninactive_file 100\n");
        assert_eq!(left_to_group(folder.path()), Some(400));
    }

    #[test]
    fn linux_says_all_of_it() {
        assert!(peak_memory().unwrap() > 1 << 16);
        assert!(available_memory().unwrap() > 1 << 20);
        let before = cpu_time();
        let sum: u64 = std::hint::black_box(0..20_000_000u64)
            .map(std::hint::black_box)
            .sum();
        assert!(sum > 0 && cpu_time() > before);
    }
}
