//! An MPI library opened at run time: its ABI, and the functions that the transport calls.
#![allow(
    unsafe_code,
    reason = "dlopen, dlsym and the functions of the MPI library"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::{mem, ptr};

use super::error::MpiError;
use super::manager;

// A library with 32-bit handles writes them into the lower half of a `Handle`.
const _: () = assert!(
    cfg!(target_endian = "little"),
    "MPI handles need a little-endian target"
);

/// A handle of any ABI: an address in Open MPI, a 32-bit number in MPICH, a small pointer-wide number in the standard's ABI.
type Handle = usize;

/// Bytes of every string buffer: more than the longest string of any library.
const TEXT: usize = 8192;

/// Room for the status of any ABI, of which the largest has 32 bytes.
type Status = [u64; 16];

/// How a library represents its handles and constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abi {
    /// Open MPI 1 to 5: handles are addresses of the library's objects.
    OpenMpi,
    /// MPICH 3 and later, Intel MPI, Cray MPICH, MVAPICH: handles are 32-bit numbers.
    Mpich,
    /// The standard's own since MPI 5.0: handles are small numbers, as wide as a pointer.
    Standard,
}

/// The constants of an ABI that the transport needs.
#[derive(Debug)]
struct Constants {
    world: Handle,
    byte: Handle,
    errors_return: Handle,
    funneled: c_int,
}

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The functions of a library; each returns 0 or an error code.
        #[derive(Debug)]
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Functions {
            /// Finds the functions, or returns the name of one that is missing.
            fn find(library: &Opened) -> Result<Self, &'static CStr> {
                Ok(Self {
                    $($field: {
                        let address = library.symbol($symbol).ok_or($symbol)?;
                        // SAFETY: the MPI standard gives the function of this name these arguments, and handles of
                        // every ABI are passed in one register. The library stays loaded.
                        unsafe {
                            mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> c_int>(address)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    init_thread = c"MPI_Init_thread" (*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int);
    initialized = c"MPI_Initialized" (*mut c_int);
    finalize = c"MPI_Finalize" ();
    abort = c"MPI_Abort" (Handle, c_int);
    comm_rank = c"MPI_Comm_rank" (Handle, *mut c_int);
    comm_size = c"MPI_Comm_size" (Handle, *mut c_int);
    comm_set_errhandler = c"MPI_Comm_set_errhandler" (Handle, Handle);
    error_string = c"MPI_Error_string" (c_int, *mut c_char, *mut c_int);
    get_library_version = c"MPI_Get_library_version" (*mut c_char, *mut c_int);
    get_processor_name = c"MPI_Get_processor_name" (*mut c_char, *mut c_int);
    isend = c"MPI_Isend" (*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    irecv = c"MPI_Irecv" (*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    test = c"MPI_Test" (*mut Handle, *mut c_int, *mut Status);
    get_count = c"MPI_Get_count" (*const Status, Handle, *mut c_int);
}

/// A transfer that MPI has started and not ended.
#[derive(Debug)]
pub(super) struct Request(Handle);

/// The other side of a transfer and the kind of message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Envelope {
    /// The other rank.
    pub(super) peer: usize,
    /// The kind of message.
    pub(super) tag: c_int,
}

/// An MPI library. It stays loaded until the process ends, and only the thread that opened it may call it.
#[derive(Debug)]
pub(super) struct MpiLibrary {
    functions: Functions,
    constants: Constants,
    /// How the library represents its handles.
    pub(super) abi: Abi,
    /// Path of the library.
    pub(super) file: PathBuf,
    thread: PhantomData<*const ()>,
}

impl MpiLibrary {
    /// Opens the first of `names` that the system's loader finds.
    ///
    /// # Errors
    /// The loader's message for each of `names`, or what the library found lacks.
    pub(super) fn open(names: &[&str], remedy: &str) -> Result<Self, MpiError> {
        let mut tried = Vec::new();
        for name in names {
            match Opened::new(name) {
                Ok(opened) => return Self::new(&opened, name),
                Err(cause) => tried.push(cause),
            }
        }
        Err(MpiError::NoLibrary {
            tried: tried.join("; "),
            remedy: remedy.to_owned(),
        })
    }

    fn new(opened: &Opened, name: &str) -> Result<Self, MpiError> {
        let missing = |symbol: &CStr| MpiError::Unusable {
            file: name.to_owned(),
            reason: format!("it has no {}", symbol.to_string_lossy()),
        };
        let functions = Functions::find(opened).map_err(missing)?;
        let file = opened
            .file(c"MPI_Init_thread")
            .unwrap_or_else(|| name.into());
        let abi = if is_standard(&file) || is_standard(Path::new(name)) {
            Abi::Standard
        } else if opened.symbol(c"ompi_mpi_comm_world").is_some() {
            Abi::OpenMpi
        } else {
            Abi::Mpich
        };
        let address = |symbol: &'static CStr| {
            let address = opened.symbol(symbol).ok_or_else(|| missing(symbol));
            address.map(|address| address.expose_provenance())
        };
        let constants = match abi {
            Abi::OpenMpi => Constants {
                world: address(c"ompi_mpi_comm_world")?,
                byte: address(c"ompi_mpi_byte")?,
                errors_return: address(c"ompi_mpi_errors_return")?,
                funneled: 1,
            },
            Abi::Mpich => Constants {
                world: 0x4400_0000,
                byte: 0x4c00_010d,
                errors_return: 0x5400_0001,
                funneled: 1,
            },
            Abi::Standard => Constants {
                world: 0x101,
                byte: 0x247,
                errors_return: 0x143,
                funneled: 1024,
            },
        };
        Ok(Self {
            functions,
            constants,
            abi,
            file,
            thread: PhantomData,
        })
    }

    /// Starts MPI. Errors are returned from here on, where the library would otherwise end the process.
    ///
    /// # Errors
    /// When MPI was started before, does not start, or does not allow threads beside the calling one.
    pub(super) fn init(&self) -> Result<(), MpiError> {
        let mut started = 0;
        // SAFETY: this function may be called at any time; the pointer is valid.
        let code = unsafe { (self.functions.initialized)(&raw mut started) };
        self.check("MPI_Initialized", code)?;
        if started != 0 {
            return Err(MpiError::AlreadyOpen);
        }
        let (funneled, mut provided) = (self.constants.funneled, 0);
        // SAFETY: MPI is not started; it allows null for the arguments of `main`.
        let code = unsafe {
            (self.functions.init_thread)(
                ptr::null_mut(),
                ptr::null_mut(),
                funneled,
                &raw mut provided,
            )
        };
        self.check("MPI_Init_thread", code)?;
        if provided < funneled {
            return Err(MpiError::Unusable {
                file: self.file.display().to_string(),
                reason: "it does not support programs with threads (MPI_THREAD_FUNNELED)"
                    .to_owned(),
            });
        }
        let Constants {
            world,
            errors_return,
            ..
        } = self.constants;
        // SAFETY: MPI is started and the handles are this library's.
        let code = unsafe { (self.functions.comm_set_errhandler)(world, errors_return) };
        self.check("MPI_Comm_set_errhandler", code)
    }

    /// This process's rank and the number of ranks. MPI must be started, as for all functions below.
    pub(super) fn rank_and_world(&self) -> Result<(usize, usize), MpiError> {
        let (mut rank, mut world) = (0, 0);
        // SAFETY: the handle is this library's, the pointer valid.
        let code = unsafe { (self.functions.comm_rank)(self.constants.world, &raw mut rank) };
        self.check("MPI_Comm_rank", code)?;
        // SAFETY: as above.
        let code = unsafe { (self.functions.comm_size)(self.constants.world, &raw mut world) };
        self.check("MPI_Comm_size", code)?;
        let number = |value: c_int| usize::try_from(value).unwrap_or_default();
        Ok((number(rank), number(world)))
    }

    /// Name and version of the library, as in "Open MPI 4.1.4".
    pub(super) fn version(&self) -> Result<String, MpiError> {
        let version = text(|buffer, length| {
            // SAFETY: the buffer is larger than any library's longest string.
            unsafe { (self.functions.get_library_version)(buffer, length) }
        });
        let version = version.map_err(|code| self.error("MPI_Get_library_version", code))?;
        Ok(manager::short_version(&version))
    }

    /// Name of this process's node.
    pub(super) fn processor_name(&self) -> Result<String, MpiError> {
        let name = text(|buffer, length| {
            // SAFETY: the buffer is larger than any library's longest string.
            unsafe { (self.functions.get_processor_name)(buffer, length) }
        });
        name.map_err(|code| self.error("MPI_Get_processor_name", code))
    }

    /// Starts to send `length` bytes to the envelope's peer.
    ///
    /// # Safety
    /// `data` is valid for reads of `length` bytes, and nothing writes to them, until [`Self::test`] says that the
    /// request has ended. If it never does, then for ever.
    pub(super) unsafe fn send(
        &self,
        data: *const u8,
        length: c_int,
        to: Envelope,
    ) -> Result<Request, MpiError> {
        let mut request = 0;
        let Constants { world, byte, .. } = self.constants;
        // SAFETY: the caller vouches for the data; the handles are this library's.
        let code = unsafe {
            (self.functions.isend)(
                data.cast(),
                length,
                byte,
                to.peer as c_int,
                to.tag,
                world,
                &raw mut request,
            )
        };
        self.check("MPI_Isend", code)?;
        Ok(Request(request))
    }

    /// Starts to receive at most `length` bytes from the envelope's peer.
    ///
    /// # Safety
    /// `data` is valid for writes of `length` bytes, and nothing reads or writes them, until [`Self::test`] says that
    /// the request has ended. If it never does, then for ever.
    pub(super) unsafe fn receive(
        &self,
        data: *mut u8,
        length: c_int,
        from: Envelope,
    ) -> Result<Request, MpiError> {
        let mut request = 0;
        let Constants { world, byte, .. } = self.constants;
        // SAFETY: the caller vouches for the data; the handles are this library's.
        let code = unsafe {
            (self.functions.irecv)(
                data.cast(),
                length,
                byte,
                from.peer as c_int,
                from.tag,
                world,
                &raw mut request,
            )
        };
        self.check("MPI_Irecv", code)?;
        Ok(Request(request))
    }

    /// Whether a transfer has ended, and for a receive with how many bytes; for a send the number has no meaning.
    /// A request that has ended must not be tested again.
    pub(super) fn test(&self, request: &mut Request) -> Result<Option<usize>, MpiError> {
        let (mut ended, mut status, mut count) = (0, Status::default(), 0);
        // SAFETY: the request is this library's, and the status has room for that of any ABI.
        let code =
            unsafe { (self.functions.test)(&raw mut request.0, &raw mut ended, &raw mut status) };
        self.check("MPI_Test", code)?;
        if ended == 0 {
            return Ok(None);
        }
        // SAFETY: the test has filled the status.
        let code = unsafe {
            (self.functions.get_count)(&raw const status, self.constants.byte, &raw mut count)
        };
        self.check("MPI_Get_count", code)?;
        Ok(Some(usize::try_from(count).unwrap_or_default()))
    }

    /// Ends all ranks with the exit code `code`. Returns only if the library can't.
    pub(super) fn abort(&self, code: c_int) {
        // SAFETY: MPI is started and the handle is this library's.
        unsafe { (self.functions.abort)(self.constants.world, code) };
    }

    /// Ends MPI, which waits for all ranks to do so; nothing of MPI may be called after it.
    pub(super) fn finalize(&self) -> Result<(), MpiError> {
        // SAFETY: MPI is started, and no request is in flight.
        let code = unsafe { (self.functions.finalize)() };
        self.check("MPI_Finalize", code)
    }

    fn check(&self, function: &'static str, code: c_int) -> Result<(), MpiError> {
        if code == 0 {
            Ok(())
        } else {
            Err(self.error(function, code))
        }
    }

    fn error(&self, function: &'static str, code: c_int) -> MpiError {
        let message = text(|buffer, length| {
            // SAFETY: the buffer is larger than any library's longest string.
            unsafe { (self.functions.error_string)(code, buffer, length) }
        });
        MpiError::Call {
            function,
            during: String::new(),
            message: message.unwrap_or_else(|_| format!("error {code}")),
        }
    }
}

/// Ends this process at once, without what libraries do at the end of a process: MPI may hold their locks.
pub(super) fn end_process(code: c_int) -> ! {
    // SAFETY: the function takes any code and has no condition.
    unsafe { libc::_exit(code) }
}

/// Whether a library is one with the standard's ABI, by the name of its file.
fn is_standard(file: &Path) -> bool {
    file.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("libmpi_abi"))
}

/// The string that an MPI function writes into a buffer of [`TEXT`] bytes, or the function's error code.
fn text(write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> Result<String, c_int> {
    let (mut buffer, mut length) = (vec![0_u8; TEXT], 0);
    let code = write(buffer.as_mut_ptr().cast(), &raw mut length);
    if code != 0 {
        return Err(code);
    }
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(TEXT);
    Ok(String::from_utf8_lossy(&buffer[..end]).trim().to_owned())
}

/// A loaded library, which nothing unloads.
struct Opened(*mut c_void);

impl Opened {
    /// Loads the library `name`, or returns the loader's message.
    fn new(name: &str) -> Result<Self, String> {
        let path = CString::new(name).map_err(|_| format!("{name:?} is no file name"))?;
        // Open MPI's plugins look for its symbols among the global ones.
        // SAFETY: the path ends with NUL. MPI libraries may be loaded at any time and on any thread.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if !handle.is_null() {
            return Ok(Self(handle));
        }
        // SAFETY: `dlerror` returns null or a string that is valid until this thread's next call of the loader.
        let message = unsafe {
            let message = libc::dlerror();
            (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
        };
        Err(message.unwrap_or_else(|| format!("{name}: unknown error")))
    }

    fn symbol(&self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is that of a loaded library.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }

    /// The file that holds the symbol `name`, with links resolved.
    fn file(&self, name: &CStr) -> Option<PathBuf> {
        let address = self.symbol(name)?;
        let mut info = mem::MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: the pointer is valid; all-zero is a valid `Dl_info`, and a name in it is a string of the loader.
        let file = unsafe {
            let found = libc::dladdr(address, info.as_mut_ptr());
            let name = info.assume_init().dli_fname;
            (found != 0 && !name.is_null())
                .then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
        }?;
        Some(
            Path::new(&file)
                .canonicalize()
                .unwrap_or_else(|_| file.into()),
        )
    }
}
