//! Stopping on a signal: the first one cancels a token, the second one ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio_util::sync::CancellationToken;

/// Exit code of a process that a signal stopped.
pub const STOPPED_EXIT_CODE: i32 = 143;

/// A token that SIGTERM or SIGINT cancels from now on.
///
/// # Errors
/// When the system refuses the signal handlers.
pub fn cancel_on_signals() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let signalled = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // From the second signal on the handler itself ends the process.
        let again = Arc::clone(&signalled);
        signal_hook::flag::register_conditional_shutdown(signal, STOPPED_EXIT_CODE, again)?;
    }
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
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
