//! NCCL, opened at run time: the functions that the transport calls, and a communicator.
#![allow(
    unsafe_code,
    reason = "dlopen, dlsym and the functions of NCCL, which read and write device memory"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::{mem, ptr};

use candle_core::cuda_backend::cudarc::driver::CudaStream;

use super::NcclError;

/// The library's names, the preferred one first: packages without development files have the first alone.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclUint8`: everything is sent as bytes.
const BYTES: c_int = 1;
/// `ncclInProgress`.
const IN_PROGRESS: c_int = 7;
/// Bytes of an id.
const ID_BYTES: usize = 128;

/// `ncclUniqueId`: what the ranks of a communicator have in common.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId([c_char; ID_BYTES]);

impl UniqueId {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        self.0.map(|byte| byte as u8).to_vec()
    }

    /// The id of these bytes; `None` if they are of another length.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; ID_BYTES] = bytes.try_into().ok()?;
        Some(Self(bytes.map(|byte| byte as c_char)))
    }
}

/// `ncclComm_t`.
type Handle = *mut c_void;

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The functions of the library; each returns 0 or an error code.
        #[derive(Clone, Copy, Debug)]
        pub(super) struct Nccl {
            $($field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            error_string: unsafe extern "C" fn(c_int) -> *const c_char,
        }

        impl Nccl {
            fn find(library: *mut c_void) -> Result<Self, String> {
                let symbol = |name: &CStr| {
                    // SAFETY: the handle is that of a loaded library.
                    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
                    match address.is_null() {
                        true => Err(format!("it has no {}", name.to_string_lossy())),
                        false => Ok(address),
                    }
                };
                Ok(Self {
                    $($field: {
                        let address = symbol($symbol)?;
                        // SAFETY: NCCL 2 gives the function of this name these arguments. The library stays loaded.
                        unsafe {
                            mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> c_int>(address)
                        }
                    },)*
                    error_string: {
                        let address = symbol(c"ncclGetErrorString")?;
                        // SAFETY: as above.
                        unsafe {
                            mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int) -> *const c_char>(address)
                        }
                    },
                })
            }
        }
    };
}

functions! {
    get_version = c"ncclGetVersion" (*mut c_int);
    get_unique_id = c"ncclGetUniqueId" (*mut UniqueId);
    comm_init_rank = c"ncclCommInitRank" (*mut Handle, c_int, UniqueId, c_int);
    comm_get_async_error = c"ncclCommGetAsyncError" (Handle, *mut c_int);
    comm_abort = c"ncclCommAbort" (Handle);
    group_start = c"ncclGroupStart" ();
    group_end = c"ncclGroupEnd" ();
    send = c"ncclSend" (*const c_void, usize, c_int, c_int, Handle, *mut c_void);
    recv = c"ncclRecv" (*mut c_void, usize, c_int, c_int, Handle, *mut c_void);
}

/// Bytes of device memory that go to or come from a rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// The other rank.
    pub(super) peer: usize,
    /// Address on the device.
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl Nccl {
    /// Loads the library, or returns why it can't be.
    pub(super) fn load() -> Result<Self, String> {
        let mut causes = Vec::new();
        for name in NAMES {
            let path = CString::new(name).map_err(|error| error.to_string())?;
            // SAFETY: the path ends with NUL, and the library may be loaded at any time and on any thread.
            let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            if !library.is_null() {
                return Self::find(library).map_err(|cause| format!("{name}: {cause}"));
            }
            // SAFETY: `dlerror` returns null or a string that is valid until this thread's next call of the loader.
            let cause = unsafe {
                let cause = libc::dlerror();
                (!cause.is_null()).then(|| CStr::from_ptr(cause).to_string_lossy().into_owned())
            };
            causes.push(cause.unwrap_or_else(|| format!("{name}: unknown error")));
        }
        Err(causes.join("; "))
    }

    /// Its version, as in "2.28.3".
    pub(super) fn version(&self) -> Result<String, NcclError> {
        let mut number = 0;
        // SAFETY: the pointer is valid.
        self.check("ncclGetVersion", unsafe {
            (self.get_version)(&raw mut number)
        })?;
        // Before 2.9 a minor number had one digit less.
        let major = if number < 10_000 { 1000 } else { 10_000 };
        let (minor, patch) = (number % major / 100, number % 100);
        Ok(format!("{}.{minor}.{patch}", number / major))
    }

    /// A new id.
    pub(super) fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: the pointer is valid.
        self.check("ncclGetUniqueId", unsafe {
            (self.get_unique_id)(&raw mut id)
        })?;
        Ok(id)
    }

    /// Makes this rank's part of a communicator on the current device of the calling thread. Returns when all ranks have called it.
    pub(super) fn communicator(
        self,
        id: UniqueId,
        rank: usize,
        world: usize,
    ) -> Result<Communicator, NcclError> {
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is valid, and the id is passed by value.
        let code =
            unsafe { (self.comm_init_rank)(&raw mut handle, world as c_int, id, rank as c_int) };
        self.check("ncclCommInitRank", code)?;
        Ok(Communicator { nccl: self, handle })
    }

    fn check(&self, function: &'static str, code: c_int) -> Result<(), NcclError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function returns a string of the library, which stays loaded.
        let message = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(NcclError::Call {
            function,
            message: message.to_string_lossy().into_owned(),
        })
    }
}

/// The ranks of a job as NCCL knows them. Never destroyed: that waits for all ranks, and the process ends soon after.
#[derive(Debug)]
pub(super) struct Communicator {
    nccl: Nccl,
    handle: Handle,
}

// SAFETY: a communicator may be used by any thread, one at a time.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Submits transfers to a stream, all as one group: they end together, in any order.
    ///
    /// # Safety
    /// The memory of each span stays allocated until the stream has done the transfers, and other work on what is received comes
    /// after them on the same stream.
    pub(super) unsafe fn submit(
        &self,
        sent: &[Span],
        received: &[Span],
        stream: &CudaStream,
    ) -> Result<(), NcclError> {
        let Self { nccl, handle } = self;
        let stream: *mut c_void = stream.cu_stream().cast();
        // SAFETY: the caller vouches for the memory; the communicator and the stream are those of one device.
        unsafe {
            nccl.check("ncclGroupStart", (nccl.group_start)())?;
            for span in sent {
                let (from, peer) = (span.address as *const c_void, span.peer as c_int);
                let code = (nccl.send)(from, span.bytes, BYTES, peer, *handle, stream);
                nccl.check("ncclSend", code)?;
            }
            for span in received {
                let (to, peer) = (span.address as *mut c_void, span.peer as c_int);
                let code = (nccl.recv)(to, span.bytes, BYTES, peer, *handle, stream);
                nccl.check("ncclRecv", code)?;
            }
            nccl.check("ncclGroupEnd", (nccl.group_end)())
        }
    }

    /// Fails if NCCL has found a fault since the last call.
    pub(super) fn check(&self) -> Result<(), NcclError> {
        let mut found = 0;
        // SAFETY: the communicator is alive and the pointer is valid.
        let code = unsafe { (self.nccl.comm_get_async_error)(self.handle, &raw mut found) };
        self.nccl.check("ncclCommGetAsyncError", code)?;
        match found {
            IN_PROGRESS => Ok(()),
            found => self.nccl.check("a transfer of NCCL", found),
        }
    }

    /// Ends transfers that do not end by themselves. Nothing may be submitted after it.
    pub(super) fn abort(&self) {
        // SAFETY: the communicator is alive, and is not used after this.
        unsafe { (self.nccl.comm_abort)(self.handle) };
    }
}
