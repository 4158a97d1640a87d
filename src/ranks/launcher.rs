//! Which process this is, as the launcher's environment says: MPI, torchrun, Slurm, Kubernetes, AWS Batch.

use super::Rank;

/// An environment that names no valid rank; the message says which variable and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LauncherError(String);

/// A rank and the variables or options that it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankOrigin {
    /// The rank.
    pub rank: Rank,
    /// Names of the variables or options; empty without a launcher.
    pub origin: String,
}

impl RankOrigin {
    /// Rank `index` of `world`, as `origin` says.
    ///
    /// # Errors
    /// When `index` is not below `world`.
    pub fn new(index: usize, world: usize, origin: &str) -> Result<Self, LauncherError> {
        match Rank::new(index, world) {
            Some(rank) => Ok(Self {
                rank,
                origin: origin.to_owned(),
            }),
            None => Err(LauncherError(format!(
                "{origin}: rank {index} of {world}: ranks count from 0 to the number of processes less 1"
            ))),
        }
    }
}

/// Variables that name a rank and a world, by launcher, the most specific first.
const PAIRS: [(&str, &str); 4] = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("RANK", "WORLD_SIZE"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
];

/// The same of launchers that connect their processes by MPI.
const MPI_PAIRS: [(&str, &str); 3] = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
];

/// The rank that the launcher gave this process, read from variables through `get`; without a launcher the only rank.
///
/// # Errors
/// When the variables of a launcher contradict each other or are no numbers.
pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<RankOrigin, LauncherError> {
    let env = Environment(&get);
    if let Some(found) = env.first_of(&PAIRS)? {
        return Ok(found);
    }
    // Kubernetes gives a pod its index in the job, not the number of pods.
    if env.number("JOB_COMPLETION_INDEX")?.is_some() {
        return Err(LauncherError(
            "JOB_COMPLETION_INDEX is set and JOB_COMPLETIONS is not: set it to the job's spec.completions, \
             or give --rank and --world"
                .to_owned(),
        ));
    }
    let array = env.slurm_array()?;
    let tasks = env.pair("SLURM_PROCID", "SLURM_NTASKS")?;
    // Every task of every job of an array is a rank of its own.
    match (array, tasks) {
        (Some((job, jobs)), Some((task, tasks))) if tasks > 1 => RankOrigin::new(
            job * tasks + task,
            jobs * tasks,
            "SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT, SLURM_PROCID and SLURM_NTASKS",
        ),
        (Some((job, jobs)), _) => {
            RankOrigin::new(job, jobs, "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT")
        }
        (None, Some((task, tasks))) => {
            RankOrigin::new(task, tasks, "SLURM_PROCID and SLURM_NTASKS")
        }
        // MPICH's mpiexec; Slurm sets them as well, without its arrays.
        (None, None) => match env.pair("PMI_RANK", "PMI_SIZE")? {
            Some((rank, world)) => RankOrigin::new(rank, world, "PMI_RANK and PMI_SIZE"),
            None => RankOrigin::new(0, 1, ""),
        },
    }
}

/// The rank that a launcher of MPI gave this process; without one the only rank. An array of jobs is not one job.
///
/// # Errors
/// As [`from_environment`].
pub(super) fn from_mpi_launcher(
    get: impl Fn(&str) -> Option<String>,
) -> Result<RankOrigin, LauncherError> {
    match Environment(&get).first_of(&MPI_PAIRS)? {
        Some(found) => Ok(found),
        None => RankOrigin::new(0, 1, ""),
    }
}

/// Host and port of rank 0, as `torchrun` gives them to its processes; `None` unless both are set.
///
/// # Errors
/// When the port is none.
pub(super) fn master(
    get: impl Fn(&str) -> Option<String>,
) -> Result<Option<(String, u16)>, LauncherError> {
    let (Some(host), Some(port)) = (get("MASTER_ADDR"), get("MASTER_PORT")) else {
        return Ok(None);
    };
    match port.trim().parse() {
        Ok(port @ 1..) => Ok(Some((host.trim().to_owned(), port))),
        _ => Err(LauncherError(format!(
            "MASTER_PORT = {port:?} is not a port from 1 to 65535"
        ))),
    }
}

struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn number(&self, name: &str) -> Result<Option<usize>, LauncherError> {
        (self.0)(name)
            .map(|value| {
                let number = value.trim().parse::<u32>();
                number.map(|number| number as usize).map_err(|_| {
                    LauncherError(format!(
                        "{name} = {value:?} is not a whole number from 0 to {}; unset it or give --rank and --world",
                        u32::MAX
                    ))
                })
            })
            .transpose()
    }

    /// The rank that the first of `pairs` whose variables are set names.
    fn first_of(&self, pairs: &[(&str, &str)]) -> Result<Option<RankOrigin>, LauncherError> {
        for (rank, world) in pairs {
            if let Some((index, count)) = self.pair(rank, world)? {
                return RankOrigin::new(index, count, &format!("{rank} and {world}")).map(Some);
            }
        }
        Ok(None)
    }

    /// Both variables or none: one alone belongs to another program.
    fn pair(&self, rank: &str, world: &str) -> Result<Option<(usize, usize)>, LauncherError> {
        match ((self.0)(rank), (self.0)(world)) {
            (Some(_), Some(_)) => Ok(self.number(rank)?.zip(self.number(world)?)),
            _ => Ok(None),
        }
    }

    /// Number and count of this job in a Slurm array, whose ids may start anywhere and have even gaps.
    fn slurm_array(&self) -> Result<Option<(usize, usize)>, LauncherError> {
        let Some((id, count)) = self.pair("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")? else {
            return Ok(None);
        };
        let first = self.number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
        let last = self
            .number("SLURM_ARRAY_TASK_MAX")?
            .unwrap_or(first + count.saturating_sub(1));
        let even = match (last.saturating_sub(first), count.saturating_sub(1)) {
            (_, 0) => Some(1),
            (span, gaps) if span % gaps == 0 => Some(span / gaps),
            _ => None,
        };
        match even {
            Some(step) if step > 0 && id >= first && (id - first) % step == 0 => {
                Ok(Some(((id - first) / step, count)))
            }
            _ => Err(LauncherError(format!(
                "the ids of the Slurm array, {first} to {last}, are not evenly spaced for {count} jobs: \
                 give --rank and --world"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(variables: &[(&str, &str)]) -> Result<(usize, usize), String> {
        let get = |name: &str| {
            let variable = variables.iter().find(|(n, _)| *n == name);
            variable.map(|(_, value)| (*value).to_owned())
        };
        let found = from_environment(get).map_err(|error| error.to_string())?;
        Ok((found.rank.index, found.rank.world))
    }

    #[test]
    fn launcher_of_every_kind_is_read() {
        assert_eq!(found(&[]), Ok((0, 1)));
        assert_eq!(found(&[("RANK", "3"), ("WORLD_SIZE", "8")]), Ok((3, 8)));
        assert_eq!(
            found(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]),
            Ok((1, 2))
        );
        assert_eq!(
            found(&[("JOB_COMPLETION_INDEX", "4"), ("JOB_COMPLETIONS", "5")]),
            Ok((4, 5))
        );
        assert_eq!(
            found(&[
                ("AWS_BATCH_JOB_ARRAY_INDEX", "0"),
                ("AWS_BATCH_JOB_ARRAY_SIZE", "9")
            ]),
            Ok((0, 9))
        );
        assert_eq!(
            found(&[("SLURM_PROCID", "2"), ("SLURM_NTASKS", "4")]),
            Ok((2, 4))
        );
    }

    #[test]
    fn slurm_array_starts_anywhere_and_holds_several_tasks() {
        let array = [
            ("SLURM_ARRAY_TASK_ID", "14"),
            ("SLURM_ARRAY_TASK_COUNT", "3"),
            ("SLURM_ARRAY_TASK_MIN", "10"),
            ("SLURM_ARRAY_TASK_MAX", "14"),
        ];
        assert_eq!(found(&array), Ok((2, 3)));
        let one_task = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")];
        assert_eq!(found(&[&array[..], &one_task].concat()), Ok((2, 3)));
        let two_tasks = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")];
        assert_eq!(found(&[&array[..], &two_tasks].concat()), Ok((5, 6)));
        let uneven = [
            ("SLURM_ARRAY_TASK_ID", "3"),
            ("SLURM_ARRAY_TASK_COUNT", "3"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_MAX", "8"),
        ];
        assert!(found(&uneven).unwrap_err().contains("1 to 8"));
    }

    #[test]
    fn launcher_variables_without_sense_are_refused() {
        let refused = |variables: &[(&str, &str)]| found(variables).unwrap_err();
        assert!(
            refused(&[("RANK", "8"), ("WORLD_SIZE", "8")])
                .contains("RANK and WORLD_SIZE: rank 8 of 8")
        );
        assert!(refused(&[("RANK", "x"), ("WORLD_SIZE", "8")]).contains("RANK = \"x\""));
        let large = (1u64 << 33).to_string();
        assert!(refused(&[("RANK", "0"), ("WORLD_SIZE", &large)]).contains("from 0 to 4294967295"));
        assert!(refused(&[("JOB_COMPLETION_INDEX", "1")]).contains("JOB_COMPLETIONS"));
        assert_eq!(
            found(&[("RANK", "x")]),
            Ok((0, 1)),
            "a variable alone is another program's"
        );
    }
}
