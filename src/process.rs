//! Facts from the operating system about this process: environment variables, the cache folder, CPU time, memory.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Value of an environment variable; an empty value counts as unset.
pub(crate) fn env_var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// `$XDG_CACHE_HOME`, else `~/.cache`; `None` if neither variable is set.
pub(crate) fn cache_dir(env_var: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env_var("HOME")?).join(".cache"));
    env_var("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)
}

/// An environment of the given variables alone, for functions that take `env_var`.
#[cfg(test)]
pub(crate) fn env_of(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
    let variables: std::collections::HashMap<String, String> = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    move |name| variables.get(name).cloned()
}

/// Whether this process ignores a signal; `false` where `/proc` does not have it.
pub(crate) fn ignores_signal(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Name of this machine; `?` where `/proc` does not have it.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "?".to_owned(),
        name => name.to_owned(),
    }
}

/// A process of any machine; no other process ever has the same.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ProcessId {
    /// Id of the machine's start, and the namespace that `pid` counts in.
    system: String,
    pid: u32,
    /// Time of the process's start, as Linux counts it; empty where `/proc` does not have it.
    started: String,
}

impl ProcessId {
    /// This process.
    pub(crate) fn this() -> Self {
        let pid = std::process::id();
        Self {
            system: system(),
            pid,
            started: start_of(pid).unwrap_or_default(),
        }
    }

    /// Whether the process has ended; `None` if it is none of this machine, or of another container.
    pub(crate) fn has_ended(&self) -> Option<bool> {
        let known = !self.started.is_empty() && self.system == system();
        known.then(|| start_of(self.pid).as_deref() != Some(&self.started))
    }
}

/// Id of this machine's start, and this process's namespace of process ids.
fn system() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// Time at which a process of this machine started; `None` if there is no such process, or it is a zombie.
fn start_of(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold spaces. Then: state, and 18 more fields before the time.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?;
    (state != "Z").then(|| started.to_owned())
}

/// CPU time of this process, summed over its threads.
pub(crate) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Peak resident memory of this process in bytes; `None` where `/proc` does not have it.
pub(crate) fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Memory in bytes that this process can still allocate: the machine's available memory, limited by what its control group
/// has left. `None` where `/proc` does not have it.
pub(crate) fn available_memory() -> Option<u64> {
    let free = kilobytes("/proc/meminfo", "MemAvailable:")?;
    Some(free.min(left_to_group(Path::new("/sys/fs/cgroup")).unwrap_or(u64::MAX)))
}

/// Memory in bytes that this process can have at most, and whose limit it is: of the machine with its swap space, of the control
/// group, or of the process. `None` where `/proc` does not have it.
pub(crate) fn total_memory() -> Option<(u64, &'static str)> {
    let memory = kilobytes("/proc/meminfo", "MemTotal:")?;
    let swap = kilobytes("/proc/meminfo", "SwapTotal:").unwrap_or(0);
    let group = limit_of_group(Path::new("/sys/fs/cgroup"));
    let process = std::fs::read_to_string("/proc/self/limits");
    let process = process.ok().and_then(|limits| address_space(&limits));
    let limits = [
        Some((memory + swap, "this machine has")),
        group.map(|bytes| (bytes, "this control group (container) has")),
        process.map(|bytes| {
            (
                bytes,
                "the limit of this process's address space (ulimit -v) is",
            )
        }),
    ];
    limits.into_iter().flatten().min_by_key(|(bytes, _)| *bytes)
}

/// The soft limit in the line of `/proc/self/limits` about the address space; `None` without a limit.
fn address_space(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Memory limit of a control group with its swap space; `None` without a limit.
fn limit_of_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse().ok()
    };
    let limit = number("memory.max")?;
    match number("memory.swap.max") {
        Some(swap) => Some(limit.saturating_add(swap)),
        // "max": all swap space of the machine.
        None => Some(limit.saturating_add(kilobytes("/proc/meminfo", "SwapTotal:").unwrap_or(0))),
    }
}

/// Bytes left of a control group's (a container's) memory limit; `None` without a limit.
fn left_to_group(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |text: String| text.trim().parse::<u64>().ok();
    let limit = number(read("memory.max")?)?;
    let used = number(read("memory.current")?)?;
    // `memory.current` includes cached file pages, which the kernel can drop.
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
    fn control_group_memory_is_limit_minus_use() {
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
    fn process_of_another_machine_may_live() {
        let this = ProcessId::this();
        assert_eq!(this.has_ended(), Some(false));
        let earlier = ProcessId {
            started: "1".to_owned(),
            ..this.clone()
        };
        assert_eq!(earlier.has_ended(), Some(true));
        let elsewhere = ProcessId {
            system: "another".to_owned(),
            ..this
        };
        assert_eq!(elsewhere.has_ended(), None);
    }

    #[test]
    fn process_figures_are_known_on_linux() {
        assert!(peak_memory().unwrap() > 1 << 16);
        assert!(available_memory().unwrap() > 1 << 20);
        let before = cpu_time();
        let sum: u64 = std::hint::black_box(0..20_000_000u64)
            .map(std::hint::black_box)
            .sum();
        assert!(sum > 0 && cpu_time() > before);
    }
}
