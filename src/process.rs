//! What the system says of this process and of its memory.

use std::time::Duration;

/// Processor time this process has used, over all its threads.
pub(super) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The most memory this process has held at once, in bytes; `None` where the system doesn't say.
pub(super) fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Memory of this machine that is free or can be freed, in bytes; `None` where the system doesn't say.
pub(super) fn available_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
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
