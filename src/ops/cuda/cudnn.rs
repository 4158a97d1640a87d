//! cuDNN's convolutions: images and kernels as candle lays them out, sums in `f32` for every dtype.
//!
//! Descriptors and the algorithm are found once for each convolution. Only algorithms that give the same bits each time are used.
// Reason: cuDNN takes handles, descriptors and addresses, of which the compiler knows nothing. cudarc's own types over them are
// tied to one dtype each and choose the fastest algorithm, deterministic or not.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cudnn::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use super::conv::{Candidate, Convolution, Pass, ranked};
use super::gpu::{Output, address, output_address};

/// Memory that the fastest algorithm may use. Bytes.
const WORKSPACE: usize = 1 << 30;

/// Computes a pass of a convolution into `out`, on the device's one stream. Returns before it has run.
///
/// The operands are contiguous, of the convolution's dtype and of the shapes that [`Pass`] says; `out` is of the result's.
pub(super) fn convolve(
    device: &CudaDevice,
    pass: Pass,
    conv: &Convolution,
    [a, b]: [&Tensor; 2],
    out: &Output,
) -> Result<()> {
    let addresses = [address(a)?, address(b)?, output_address(out)?];
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let library = match libraries.entry(device.id()) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(Library::open(device.cuda_stream())?),
    };
    library.convolve(pass, conv, addresses)
}

/// cuDNN by device. Kept to the end of the process.
static LIBRARIES: LazyLock<Mutex<HashMap<DeviceId, Library>>> = LazyLock::new(Mutex::default);

/// cuDNN on a device.
struct Library {
    handle: sys::cudnnHandle_t,
    stream: Arc<CudaStream>,
    plans: HashMap<(Pass, Convolution, Precision), Plan>,
    /// The memory that the algorithms work in. One buffer is enough: the calls on a stream run in turn.
    workspace: Option<CudaSlice<u8>>,
}

// SAFETY: a handle and its descriptors are for any thread, but for one at a time: they are behind the mutex of `LIBRARIES`.
unsafe impl Send for Library {}

/// How the products of `f32` are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Precision {
    Full,
    /// As the library likes: in TF32 where the card has it.
    Tf32,
}

/// A pass of a convolution as cuDNN takes it. What it points to is kept to the end of the process.
#[derive(Clone, Copy)]
struct Plan {
    descriptors: Descriptors,
    algorithm: Algorithm,
    /// Bytes.
    workspace: usize,
}

#[derive(Clone, Copy)]
struct Descriptors {
    conv: sys::cudnnConvolutionDescriptor_t,
    x: sys::cudnnTensorDescriptor_t,
    weight: sys::cudnnFilterDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
}

#[derive(Clone, Copy, Debug)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    InputGrad(sys::cudnnConvolutionBwdDataAlgo_t),
    WeightGrad(sys::cudnnConvolutionBwdFilterAlgo_t),
}

impl Library {
    fn open(stream: Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        let handle = result::create_handle()?;
        // SAFETY: both are open, and `Self` keeps the stream so.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }?;
        Ok(Self {
            handle,
            stream,
            plans: HashMap::new(),
            workspace: None,
        })
    }

    /// `addresses`: of the operands and the result.
    fn convolve(&mut self, pass: Pass, conv: &Convolution, addresses: [i64; 3]) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        let precision = if candle_core::cuda::gemm_reduced_precision_f32() {
            Precision::Tf32
        } else {
            Precision::Full
        };
        let plan = match self.plans.entry((pass, *conv, precision)) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => *entry.insert(Plan::new(self.handle, pass, conv, precision)?),
        };
        let workspace = self.workspace(plan.workspace)?;
        match plan.run(self.handle, addresses, workspace) {
            Ok(()) => Ok(()),
            Err(error) => bail!("cuDNN's {:?} of {conv:?}: {error}", plan.algorithm),
        }
    }

    /// The address of at least `bytes` to work in.
    fn workspace(&mut self, bytes: usize) -> Result<*mut c_void> {
        if bytes == 0 {
            return Ok(std::ptr::null_mut());
        }
        if self
            .workspace
            .as_ref()
            .is_none_or(|held| held.len() < bytes)
        {
            // The old one is given back first, after what uses it: both are the stream's.
            self.workspace = None;
            // SAFETY: nothing reads it before it is written.
            self.workspace = Some(unsafe { self.stream.alloc::<u8>(bytes) }.w()?);
        }
        let address = self
            .workspace
            .as_ref()
            .map(|held| held.device_ptr(&self.stream).0);
        Ok(address.unwrap_or(0) as *mut c_void)
    }
}

impl Plan {
    fn new(
        handle: sys::cudnnHandle_t,
        pass: Pass,
        conv: &Convolution,
        precision: Precision,
    ) -> Result<Self> {
        use sys::cudnnMathType_t::{CUDNN_DEFAULT_MATH, CUDNN_FMA_MATH, CUDNN_TENSOR_OP_MATH};

        let asked = match (conv.dtype, precision) {
            (DType::F32, Precision::Full) => CUDNN_FMA_MATH,
            (DType::F32, Precision::Tf32) => CUDNN_DEFAULT_MATH,
            _ => CUDNN_TENSOR_OP_MATH,
        };
        let descriptors = Descriptors::new(conv)?;
        descriptors.set_math(asked)?;
        let offered = descriptors.offered(handle, pass)?;
        for Candidate {
            algorithm: (algorithm, math),
            ..
        } in ranked(&offered, WORKSPACE)
        {
            // Without TF32 no algorithm has a say in it.
            descriptors.set_math(if asked == CUDNN_FMA_MATH { asked } else { math })?;
            if let Ok(workspace) = descriptors.workspace(handle, algorithm) {
                return Ok(Self {
                    descriptors,
                    algorithm,
                    workspace,
                });
            }
        }
        bail!("cuDNN has no deterministic algorithm for {pass:?} of {conv:?}: {offered:?}")
    }

    fn run(
        &self,
        handle: sys::cudnnHandle_t,
        [a, b, out]: [i64; 3],
        workspace: *mut c_void,
    ) -> result::CudnnResult<()> {
        let Descriptors { conv, x, weight, y } = self.descriptors;
        let bytes = self.workspace;
        let (a, b, out) = (a as *const c_void, b as *const c_void, out as *mut c_void);
        let (one, zero) = (1f32, 0f32);
        let one = std::ptr::from_ref(&one).cast::<c_void>();
        let zero = std::ptr::from_ref(&zero).cast::<c_void>();
        // SAFETY: the handle and the descriptors are never closed; the addresses are those of tensors as the descriptors say, by
        // the contract of `convolve`. The device has one stream, so that what follows sees what is written, memory is freed after
        // its last use, and no other call works in the workspace meanwhile.
        unsafe {
            match self.algorithm {
                Algorithm::Forward(algorithm) => result::convolution_forward(
                    handle, one, x, a, weight, b, conv, algorithm, workspace, bytes, zero, y, out,
                ),
                Algorithm::InputGrad(algorithm) => result::convolution_backward_data(
                    handle, one, weight, a, y, b, conv, algorithm, workspace, bytes, zero, x, out,
                ),
                Algorithm::WeightGrad(algorithm) => result::convolution_backward_filter(
                    handle, one, x, a, y, b, conv, algorithm, workspace, bytes, zero, weight, out,
                ),
            }
        }
    }
}

/// The algorithms that a function of cuDNN offers: those that work for the descriptors, the one that should be fastest first.
macro_rules! offered {
    ($ask:path, $offer:ty, $make:path, $($argument:expr),+) => {{
        /// More than there are.
        const MOST: usize = 16;
        let mut offers = [const { MaybeUninit::<$offer>::uninit() }; MOST];
        let mut count: c_int = 0;
        // SAFETY: the handle and the descriptors are open; there is room for as many offers as are asked for.
        unsafe { $ask($($argument),+, MOST as c_int, &mut count, offers.as_mut_ptr().cast()) }?;
        let offers = offers.iter().take(count as usize);
        // SAFETY: as many were written.
        let offers = offers.map(|offer| unsafe { offer.assume_init_ref() });
        let working = offers.filter(|o| o.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS);
        working
            .map(|o| {
                let algorithm = $make(o.algo);
                let same = o.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC;
                Candidate {
                    algorithm: (algorithm, o.mathType),
                    deterministic: same && algorithm.is_deterministic(),
                    workspace: o.memory,
                }
            })
            .collect()
    }};
}

impl Descriptors {
    fn new(conv: &Convolution) -> Result<Self> {
        let dtype = match conv.dtype {
            DType::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
            DType::BF16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            DType::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            other => bail!("no convolution in {other:?}"),
        };
        let format = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
        let descriptors = Self {
            conv: result::create_convolution_descriptor()?,
            x: result::create_tensor_descriptor()?,
            weight: result::create_filter_descriptor()?,
            y: result::create_tensor_descriptor()?,
        };
        let (stride, padding) = (int(conv.stride)?, int(conv.padding)?);
        let (x, weight, y) = (ints(conv.x)?, ints(conv.weight)?, ints(conv.y())?);
        // SAFETY: they were made above.
        unsafe {
            result::set_tensor4d_descriptor(descriptors.x, format, dtype, x)?;
            result::set_tensor4d_descriptor(descriptors.y, format, dtype, y)?;
            result::set_filter4d_descriptor(descriptors.weight, dtype, format, weight)?;
            result::set_convolution2d_descriptor(
                descriptors.conv,
                padding,
                padding,
                stride,
                stride,
                1,
                1,
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                // What is summed in.
                sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            )?;
        }
        Ok(descriptors)
    }

    fn set_math(&self, math: sys::cudnnMathType_t) -> Result<()> {
        // SAFETY: the descriptor is never closed.
        unsafe { result::set_convolution_math_type(self.conv, math) }?;
        Ok(())
    }

    /// The algorithms for a pass, with the arithmetic of each.
    fn offered(
        &self,
        handle: sys::cudnnHandle_t,
        pass: Pass,
    ) -> Result<Vec<Candidate<(Algorithm, sys::cudnnMathType_t)>>> {
        let Self { conv, x, weight, y } = *self;
        Ok(match pass {
            Pass::Forward => offered!(
                result::get_convolution_forward_algorithm,
                sys::cudnnConvolutionFwdAlgoPerf_t,
                Algorithm::Forward,
                handle,
                x,
                weight,
                conv,
                y
            ),
            Pass::InputGrad => offered!(
                result::get_convolution_backward_data_algorithm,
                sys::cudnnConvolutionBwdDataAlgoPerf_t,
                Algorithm::InputGrad,
                handle,
                weight,
                y,
                conv,
                x
            ),
            Pass::WeightGrad => offered!(
                result::get_convolution_backward_filter_algorithm,
                sys::cudnnConvolutionBwdFilterAlgoPerf_t,
                Algorithm::WeightGrad,
                handle,
                x,
                y,
                conv,
                weight
            ),
        })
    }

    /// The bytes that an algorithm works in.
    fn workspace(
        &self,
        handle: sys::cudnnHandle_t,
        algorithm: Algorithm,
    ) -> result::CudnnResult<usize> {
        let Self { conv, x, weight, y } = *self;
        // SAFETY: the handle and the descriptors are open.
        unsafe {
            match algorithm {
                Algorithm::Forward(algorithm) => result::get_convolution_forward_workspace_size(
                    handle, x, weight, conv, y, algorithm,
                ),
                Algorithm::InputGrad(algorithm) => {
                    result::get_convolution_backward_data_workspace_size(
                        handle, weight, y, conv, x, algorithm,
                    )
                }
                Algorithm::WeightGrad(algorithm) => {
                    result::get_convolution_backward_filter_workspace_size(
                        handle, x, y, conv, weight, algorithm,
                    )
                }
            }
        }
    }
}

impl Algorithm {
    /// Whether cuDNN's manual calls it deterministic: the others add up with atomic operations.
    fn is_deterministic(self) -> bool {
        use sys::cudnnConvolutionBwdDataAlgo_t::CUDNN_CONVOLUTION_BWD_DATA_ALGO_0;
        use sys::cudnnConvolutionBwdFilterAlgo_t::{
            CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3,
        };
        !matches!(
            self,
            Self::InputGrad(CUDNN_CONVOLUTION_BWD_DATA_ALGO_0)
                | Self::WeightGrad(
                    CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0 | CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3
                )
        )
    }
}

fn ints(sizes: [usize; 4]) -> Result<[c_int; 4]> {
    let [a, b, c, d] = sizes;
    Ok([int(a)?, int(b)?, int(c)?, int(d)?])
}

fn int(n: usize) -> Result<c_int> {
    match c_int::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("a size of {n} is more than cuDNN takes"),
    }
}
