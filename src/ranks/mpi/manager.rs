//! The process manager that started this process, the libraries that work with it, and what to do where they do not.

use super::library::Abi;

/// Library of MPICH, Intel MPI, Cray MPICH and MVAPICH; then Debian's name for MPICH.
const MPICH: [&str; 2] = ["libmpi.so.12", "libmpich.so.12"];
/// Library of Open MPI 4 and 5.
const OPEN_MPI: [&str; 1] = ["libmpi.so.40"];
/// Library with the ABI of the MPI-5 standard; its major number was 0 before the standard.
const STANDARD: [&str; 2] = ["libmpi_abi.so.1", "libmpi_abi.so.0"];
/// A name without version, which clusters' modules provide for whichever MPI is loaded.
const ANY: [&str; 1] = ["libmpi.so"];

/// The interface through which the process manager tells a process its rank, as the environment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ranks) enum ProcessManager {
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// PMI-1 or PMI-2: `mpiexec` of MPICH or Intel MPI, `srun --mpi=pmi2`.
    Pmi,
    /// PMIx without Open MPI's variables: `srun --mpi=pmix`.
    Pmix,
    /// Slurm's `srun` without PMI or PMIx variables: `srun --mpi=none`, or Cray's plugin.
    Slurm,
    /// No process manager of MPI.
    Absent,
}

impl ProcessManager {
    /// The process manager that set the variables which `get` reads.
    pub(in crate::ranks) fn from_environment(get: impl Fn(&str) -> Option<String>) -> Self {
        let any = |names: &[&str]| names.iter().any(|name| get(name).is_some());
        if any(&["OMPI_COMM_WORLD_SIZE"]) {
            Self::OpenMpi
        } else if any(&["PMIX_RANK", "PMIX_NAMESPACE"]) {
            Self::Pmix
        } else if any(&["PMI_RANK", "PMI_SIZE", "PMI_FD"]) {
            Self::Pmi
        } else if any(&["SLURM_STEP_ID"]) {
            Self::Slurm
        } else {
            Self::Absent
        }
    }

    /// Names of the libraries that can work with this process manager, the preferred one first.
    pub(super) fn libraries(self) -> Vec<&'static str> {
        let groups: &[&[&str]] = match self {
            Self::OpenMpi => &[&OPEN_MPI, &STANDARD, &ANY],
            Self::Pmi => &[&MPICH, &STANDARD, &ANY],
            Self::Pmix | Self::Slurm | Self::Absent => &[&OPEN_MPI, &MPICH, &STANDARD, &ANY],
        };
        groups.concat()
    }

    /// The remedy where none of [`Self::libraries`] is found.
    pub(super) fn remedy(self) -> &'static str {
        match self {
            Self::OpenMpi => {
                "Open MPI's mpirun started this process: install the package openmpi-bin here too, \
                 or give the library's path in mpi.library"
            }
            Self::Pmi => {
                "a launcher of the MPICH family started this process: install the package mpich, \
                 or give the library's path in mpi.library"
            }
            _ => {
                "install the package openmpi-bin or mpich, or give the library's path in mpi.library"
            }
        }
    }
}

/// The rank that the launcher's variables give this process, to be compared with MPI's.
#[derive(Clone, Debug)]
pub(in crate::ranks) struct ExpectedRank {
    /// The rank, from 0.
    pub(in crate::ranks) rank: usize,
    /// Number of ranks.
    pub(in crate::ranks) world: usize,
    /// Names of the variables, as in "SLURM_PROCID and SLURM_NTASKS".
    pub(in crate::ranks) origin: String,
}

/// Why MPI's `rank` of `world` in the library named `library` is not the one `expected`; `None` if it is.
pub(super) fn mismatch(
    expected: &ExpectedRank,
    (rank, world): (usize, usize),
    library: &str,
    manager: ProcessManager,
) -> Option<String> {
    if (rank, world) == (expected.rank, expected.world) {
        return None;
    }
    let remedy = match manager {
        ProcessManager::OpenMpi | ProcessManager::Pmi => {
            "the launcher and the library belong to different MPIs: use the launcher of this library, \
             or give the library of the launcher in mpi.library"
                .to_owned()
        }
        ProcessManager::Pmix | ProcessManager::Slurm => {
            format!("start the job with `srun --mpi={}`", slurm_plugin(library))
        }
        ProcessManager::Absent if expected.origin.contains("SLURM") => {
            format!("start the job with `srun --mpi={}` or with mpirun", slurm_plugin(library))
        }
        ProcessManager::Absent => "start the job with the mpirun of this library".to_owned(),
    };
    Some(format!(
        "{} say rank {} of {}, but {library} says rank {rank} of {world}: {remedy}",
        expected.origin, expected.rank, expected.world
    ))
}

/// Why a library of `abi` would end the process in `MPI_Init`; `None` if it would not.
///
/// Open MPI 4 calls `exit` there if `srun` started the process without PMIx or PMI.
pub(super) fn refusal(abi: Abi, manager: ProcessManager) -> Option<String> {
    (abi == Abi::OpenMpi && manager == ProcessManager::Slurm).then(|| {
        "srun started this process without PMIx, which Open MPI needs: start the job with `srun --mpi=pmix`"
            .to_owned()
    })
}

/// The value of srun's `--mpi` for the library with this short name.
fn slurm_plugin(library: &str) -> &'static str {
    if library.starts_with("Open MPI") {
        "pmix"
    } else if library.starts_with("Cray") {
        "cray_shasta"
    } else {
        "pmi2"
    }
}

/// Name and version from `MPI_Get_library_version`'s text, as in "Open MPI 4.1.4".
pub(super) fn short_version(text: &str) -> String {
    const NAMES: [(&str, &str); 6] = [
        ("open mpi", "Open MPI"),
        ("intel", "Intel MPI"),
        ("cray", "Cray MPICH"),
        ("mvapich2", "MVAPICH2"),
        ("mvapich", "MVAPICH"),
        ("mpich", "MPICH"),
    ];
    let line = text.lines().next().unwrap_or_default().trim();
    let lower = line.to_lowercase();
    let name = NAMES.iter().find(|(part, _)| lower.contains(part));
    let version = line
        .split([' ', '\t', ',', ':'])
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    match (name, version) {
        (Some((_, name)), Some(version)) => format!("{name} {version}"),
        (Some((_, name)), None) => (*name).to_owned(),
        (None, _) if line.is_empty() => "unknown MPI".to_owned(),
        (None, _) => line.chars().take(60).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(variables: &[&str]) -> ProcessManager {
        ProcessManager::from_environment(|name| variables.contains(&name).then(|| "1".to_owned()))
    }

    #[test]
    fn process_manager_is_known_by_its_variables() {
        assert_eq!(
            manager(&["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "SLURM_STEP_ID"]),
            ProcessManager::OpenMpi
        );
        assert_eq!(manager(&["PMI_RANK", "PMI_SIZE"]), ProcessManager::Pmi);
        let pmi2 = ["PMI_FD", "SLURM_STEP_ID", "SLURM_PROCID"];
        assert_eq!(manager(&pmi2), ProcessManager::Pmi);
        let pmix = ["PMIX_RANK", "SLURM_STEP_ID", "SLURM_PROCID"];
        assert_eq!(manager(&pmix), ProcessManager::Pmix);
        let none = ["SLURM_STEP_ID", "SLURM_PROCID"];
        assert_eq!(manager(&none), ProcessManager::Slurm);
        let batch_script = ["SLURM_PROCID", "SLURM_NTASKS"];
        assert_eq!(manager(&batch_script), ProcessManager::Absent);
        assert_eq!(manager(&[]), ProcessManager::Absent);
    }

    #[test]
    fn library_of_the_launcher_comes_first_and_the_other_family_not_at_all() {
        let names = ProcessManager::OpenMpi.libraries();
        assert_eq!(names[0], "libmpi.so.40");
        assert!(!names.contains(&"libmpich.so.12"));
        let names = ProcessManager::Pmi.libraries();
        assert_eq!(names[..2], ["libmpi.so.12", "libmpich.so.12"]);
        assert!(!names.contains(&"libmpi.so.40"));
        assert_eq!(ProcessManager::Absent.libraries().len(), 6);
    }

    #[test]
    fn library_version_is_shortened() {
        let short = [
            (
                "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022",
                "Open MPI 4.1.4",
            ),
            (
                "MPICH Version:      4.0.2\nMPICH Release date: Thu Apr  7 2022\n",
                "MPICH 4.0.2",
            ),
            (
                "Intel(R) MPI Library 2021.9 for Linux* OS\n",
                "Intel MPI 2021.9",
            ),
            (
                "MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)\nMPI BUILD INFO : x\n",
                "Cray MPICH 8.1.25.17",
            ),
            ("MVAPICH2 Version      :\t2.3.7\n", "MVAPICH2 2.3.7"),
            ("MVAPICH Version:\t3.0\n", "MVAPICH 3.0"),
            ("Another MPI, edition 7\nmore", "Another MPI, edition 7"),
            ("", "unknown MPI"),
        ];
        for (text, expected) in short {
            assert_eq!(short_version(text), expected);
        }
    }

    #[test]
    fn another_world_than_the_launchers_is_refused_with_the_remedy() {
        let expected = ExpectedRank {
            rank: 2,
            world: 4,
            origin: "SLURM_PROCID and SLURM_NTASKS".to_owned(),
        };
        let say = |found, library, manager| mismatch(&expected, found, library, manager);
        assert_eq!(say((2, 4), "MPICH 4.0.2", ProcessManager::Pmi), None);
        assert_eq!(
            say((0, 1), "MPICH 4.0.2", ProcessManager::Pmix).as_deref(),
            Some(
                "SLURM_PROCID and SLURM_NTASKS say rank 2 of 4, but MPICH 4.0.2 says rank 0 of 1: \
                 start the job with `srun --mpi=pmi2`"
            )
        );
        let remedy = |library, manager| say((0, 1), library, manager).unwrap_or_default();
        assert!(remedy("Open MPI 5.0.11", ProcessManager::Slurm).ends_with("`srun --mpi=pmix`"));
        assert!(remedy("Cray MPICH 8.1", ProcessManager::Slurm).contains("cray_shasta"));
        assert!(remedy("MPICH 5.0.2", ProcessManager::OpenMpi).contains("mpi.library"));
        assert!(remedy("MPICH 5.0.2", ProcessManager::Absent).ends_with("pmi2` or with mpirun"));
    }

    #[test]
    fn open_mpi_is_refused_where_it_would_end_the_process() {
        let refused = |abi, manager| refusal(abi, manager).is_some();
        assert!(refused(Abi::OpenMpi, ProcessManager::Slurm));
        assert!(!refused(Abi::OpenMpi, ProcessManager::Pmix));
        assert!(!refused(Abi::OpenMpi, ProcessManager::Absent));
        assert!(!refused(Abi::Mpich, ProcessManager::Slurm));
    }
}
