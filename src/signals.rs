//! Stopping on a signal: the first one cancels a token, the second one ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio_util::sync::CancellationToken;

use crate::process::ignores_signal;

/// Exit code of a process that a signal stopped.
pub const STOPPED_EXIT_CODE: i32 = 143;

/// A token that SIGTERM, SIGINT or SIGHUP cancels from now on. A SIGHUP that is ignored, as under `nohup`, stays so.
///
/// # Errors
/// When the system refuses the signal handlers.
pub fn cancel_on_signals() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let signalled = Arc::new(AtomicBool::new(false));
    let mut handled = vec![SIGTERM, SIGINT];
    if !ignores_signal(SIGHUP) {
        handled.push(SIGHUP);
    }
    for signal in handled.iter().copied() {
        // From the second signal on the handler itself ends the process.
        let again = Arc::clone(&signalled);
        signal_hook::flag::register_conditional_shutdown(signal, STOPPED_EXIT_CODE, again)?;
    }
    let mut signals = Signals::new(&handled)?;
    let cancelled = token.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for _ in signals.forever() {
                signalled.store(true, Ordering::SeqCst);
                cancelled.cancel();
            }
        })?;
    Ok(token)
}
