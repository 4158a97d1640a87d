//! Stopping on a signal: the first one asks, the second one ends the process at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Hook = Box<dyn Fn() + Send>;

/// Whether a signal asked the process to stop. Clones share it.
#[derive(Clone, Default)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    hooks: Arc<Mutex<Vec<Hook>>>,
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stop")
            .field("asked", &self.asked)
            .finish_non_exhaustive()
    }
}

impl Stop {
    /// Listens for SIGTERM and SIGINT from now on.
    ///
    /// # Errors
    /// When the system refuses the handlers.
    pub fn on_signals() -> std::io::Result<Self> {
        let stop = Self::default();
        for signal in [SIGTERM, SIGINT] {
            // Once a stop has been asked for, the next signal ends the process in the handler itself.
            signal_hook::flag::register_conditional_shutdown(signal, 143, Arc::clone(&stop.asked))?;
        }
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        let listener = stop.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for _ in signals.forever() {
                    listener.ask();
                }
            })?;
        Ok(stop)
    }

    /// Asks for the stop, as a signal does.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        for hook in self
            .hooks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            hook();
        }
    }

    /// Whether a stop was asked for.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Runs `hook` when a stop is asked for, at once if it already was: to wake a thread that waits.
    pub fn on_stop(&self, hook: impl Fn() + Send + 'static) {
        // `ask` sets the flag before it takes this lock: a hook is run there, or here, or (harmlessly) in both.
        let mut hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        if self.asked() {
            hook();
        }
        hooks.push(Box::new(hook));
    }
}
