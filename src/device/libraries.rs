//! Loads CUDA's libraries and fills the table of their functions.
#![allow(unsafe_code, reason = "dlopen and dlsym")]

use std::env;
use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::OnceLock;

use super::DeviceError;
use super::symbols::{self, Library};

/// A library with the names it may have, the preferred one first.
struct Candidates {
    library: Library,
    names: &'static [&'static str],
    /// Whether no device can be opened without it.
    required: bool,
}

/// The libraries in an order in which each one's dependencies come before it.
const LIBRARIES: &[Candidates] = &[
    Candidates {
        library: Library::Driver,
        names: &["libcuda.so.1"],
        required: true,
    },
    // cuBLAS, which depends on it, names it if it is missing.
    Candidates {
        library: Library::CublasLt,
        names: &["libcublasLt.so.13", "libcublasLt.so.12"],
        required: false,
    },
    Candidates {
        library: Library::Cublas,
        names: &["libcublas.so.13", "libcublas.so.12"],
        required: true,
    },
    Candidates {
        library: Library::Curand,
        names: &["libcurand.so.10"],
        required: true,
    },
    Candidates {
        library: Library::Cudnn,
        names: &["libcudnn.so.9"],
        required: cfg!(feature = "cudnn"),
    },
];

/// Loads CUDA's libraries, at the first call.
pub(super) fn load() -> Result<(), DeviceError> {
    static LOADED: OnceLock<Result<(), DeviceError>> = OnceLock::new();
    LOADED
        .get_or_init(|| LIBRARIES.iter().try_for_each(Candidates::load))
        .clone()
}

impl Candidates {
    fn load(&self) -> Result<(), DeviceError> {
        let folders = folders();
        let handle = match open(self.names, &folders) {
            Ok(handle) => handle,
            Err(_) if !self.required => return Ok(()),
            Err(causes) => return Err(self.missing(&causes, &folders)),
        };
        let find = |name: &CStr| {
            // SAFETY: the handle is that of the library, and stays valid, because nothing closes it.
            let address = unsafe { libc::dlsym(handle.0, name.as_ptr()) };
            (!address.is_null()).then_some(address)
        };
        // SAFETY: the address under a function's name in its library is that function.
        unsafe { symbols::fill(self.library, find) };
        Ok(())
    }

    /// The error for a library that can't be loaded for `causes`, the loader's words for each name.
    fn missing(&self, causes: &[String], folders: &[String]) -> DeviceError {
        let names = self.names.join(" or ");
        let (name, driver) = (self.library.name(), self.library == Library::Driver);
        // The loader begins its message with the name that it does not find, which may be that of a dependency.
        let broken = causes.iter().find(|cause| {
            let absent = cause.contains("No such file or directory");
            !absent || !self.names.iter().any(|name| cause.starts_with(name))
        });
        if let Some(cause) = broken {
            return DeviceError::Library(format!("{name} can't be loaded: {cause}"));
        }
        DeviceError::Library(if driver {
            format!(
                "no {name}: {names} not found; install the driver (in a container: pass the GPU to it, as with `--gpus all`), or use \"cpu\""
            )
        } else {
            let path = match env::var("LD_LIBRARY_PATH") {
                Ok(path) if !path.is_empty() => format!("LD_LIBRARY_PATH ({path})"),
                _ => "LD_LIBRARY_PATH (not set)".to_owned(),
            };
            format!(
                "no {name}: {names} not found in {path}, the system's folders, or {}; install it, or add its folder to LD_LIBRARY_PATH",
                folders.join(", ")
            )
        })
    }
}

/// Folders of CUDA toolkits, where the system's loader does not look.
fn folders() -> Vec<String> {
    let home = env::var("CUDA_HOME").ok().filter(|home| !home.is_empty());
    let homes = home.into_iter().chain(["/usr/local/cuda".to_owned()]);
    homes.map(|home| format!("{home}/lib64")).collect()
}

/// A library that is loaded until the process ends.
#[derive(Debug)]
struct Handle(*mut libc::c_void);

/// Opens the first of `names` that is found, where the system's loader looks or in `folders`.
///
/// # Errors
/// The loader's message for each of `names`, and for each file in `folders` that it refuses.
fn open(names: &[&str], folders: &[String]) -> Result<Handle, Vec<String>> {
    let mut causes = Vec::new();
    for name in names {
        match dlopen(name) {
            Ok(handle) => return Ok(handle),
            Err(cause) => causes.push(cause),
        }
        for folder in folders {
            let file = Path::new(folder).join(name);
            if file.exists() {
                match dlopen(&file.to_string_lossy()) {
                    Ok(handle) => return Ok(handle),
                    Err(cause) => causes.push(cause),
                }
            }
        }
    }
    Err(causes)
}

fn dlopen(name: &str) -> Result<Handle, String> {
    let path = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: the path ends with NUL. NVIDIA's libraries may be loaded at any time and on any thread.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(Handle(handle));
    }
    // SAFETY: `dlerror` returns null or a string that is valid until this thread's next call of the loader.
    let message = unsafe {
        let message = libc::dlerror();
        (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
    };
    Err(message.unwrap_or_else(|| format!("{name}: unknown error")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(library: Library, names: &'static [&'static str]) -> String {
        let candidates = Candidates {
            library,
            names,
            required: true,
        };
        candidates.load().unwrap_err().to_string()
    }

    #[test]
    fn missing_libraries_are_named_with_the_remedy() {
        assert_eq!(
            missing(Library::Driver, &["libcoffey-none.so.1"]),
            "no NVIDIA driver: libcoffey-none.so.1 not found; install the driver (in a container: pass the GPU to it, as with \
             `--gpus all`), or use \"cpu\""
        );
        let message = missing(
            Library::Cublas,
            &["libcoffey-none.so.13", "libcoffey-none.so.12"],
        );
        let start = "no cuBLAS: libcoffey-none.so.13 or libcoffey-none.so.12 not found in LD_LIBRARY_PATH (";
        assert!(message.starts_with(start), "{message}");
        let end = "/usr/local/cuda/lib64; install it, or add its folder to LD_LIBRARY_PATH";
        assert!(message.ends_with(end), "{message}");
    }

    #[test]
    fn a_library_that_cannot_be_loaded_is_told_with_the_cause() {
        let message = missing(Library::Curand, &["/proc/self/status"]);
        assert!(
            message.starts_with("cuRAND can't be loaded: /proc/self/status: "),
            "{message}"
        );
    }

    #[test]
    fn functions_are_found_by_name() {
        // The C library stands in for one of CUDA's.
        let handle = open(&["libcoffey-none.so.1", "libc.so.6"], &[]).unwrap();
        // SAFETY: the handle is valid.
        let address = unsafe { libc::dlsym(handle.0, c"strlen".as_ptr()) };
        assert!(!address.is_null());
    }
}
