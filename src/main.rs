//! The `coffey` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet_candle();
    keep_backtraces_out_of_messages();
    share_one_heap();
    coffey_pipeline::open_files::raise_limit();
    coffey::cli::run()
}

/// Turns candle's own thread pool off, unless the environment says otherwise. Its workers spin at a barrier for each
/// elementwise operation, which costs more than it gains and stalls where the cores are shared; matrix products and our own
/// operations run on rayon's pool.
#[allow(unsafe_code)]
fn quiet_candle() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: no other thread runs yet that could read the environment.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

/// Keeps backtraces out of errors, whose messages are one line. candle captures one for each error where `RUST_BACKTRACE` is set, and
/// prints it as a part of the message. A panic still prints its backtrace.
#[allow(unsafe_code)]
fn keep_backtraces_out_of_messages() {
    // SAFETY: no other thread runs yet that could read the environment.
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "0") };
}

/// Has glibc keep one heap for all threads. Tensors are large, made on one thread and freed on another: a heap a thread would
/// hold on to up to two thirds more memory, at the same speed.
#[allow(unsafe_code)]
fn share_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: a number for the allocator, set before there are other threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
