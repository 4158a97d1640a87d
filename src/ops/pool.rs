//! Where the kernels run.

/// Runs `work`, a chain of operations, on a thread of rayon's pool.
///
/// From outside the pool each operation would wake a thread of it and sleep until that is done, which for small tensors costs
/// as much as the work. The result is the same.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}
